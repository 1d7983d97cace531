"""Names of denoisers' tensors in the files that people share, and in diffusers: data, read both ways.

A row is (name in the file, names in diffusers, how): `same`; rows of several `joined`, one below the other; `halves`
of the rows exchanged (shift and scale of a final norm). {} is a number, the same on both sides; what follows a name
(.weight, .bias) is carried over unless the row names it. Sources: diffusers' own conversions of single files, which
read the other way (tests hold one against the other), and the loaders named with each layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dq.bridges.stored import Piece
from dq.errors import DQError

SAME, JOINED, HALVES = "same", "joined", "halves"


class Row(NamedTuple):
    """One row of a table; `last` where the file's name holds for a last block alone (see `Layout.names`)."""

    file: str
    model: tuple[str, ...]
    how: str = SAME
    last: str = ""


class Home(NamedTuple):
    """Where a tensor of the model lies in a file: its name there, how, and which of those joined it is."""

    file: str
    how: str = SAME
    place: int = 0


@dataclass(frozen=True)
class Layout:
    """A family's file. arch: `general.architecture` of a GGUF file; classes: diffusers classes.

    prefix   before every name, where loaders expect one
    readers  who loads a GGUF file of this layout beside diffusers and dq, for people
    """

    arch: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    readers: str = ""
    prefix: str = ""
    made: Callable[[Mapping[str, Any]], tuple[Row, ...]] | None = field(default=None, compare=False)

    def table(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Its rows for a model of this config; none where files have the model's own names."""
        return self.rows + (self.made(config) if self.made is not None else ())

    def homes(self, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Home]:
        """Where each tensor of a model lies. DQError for a name that the table has not."""
        rows = self.table(config)
        found, names = {}, list(names)
        for name in names:
            home = self._home(rows, name, set(names), config) if rows else Home(name)
            if home is None:
                raise DQError(f"tensor {name!r} has no name in files of {self.arch}; is the model a variant of it?")
            found[name] = Home(self.prefix + home.file, home.how, home.place)
        return found

    def joined(
        self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
    ) -> dict[str, tuple[list[str], bool]]:
        """By name in the file the model's tensors that it joins, in order, and whether halves are exchanged."""
        found: dict[str, tuple[list[str], bool]] = {}
        for name, home in sorted(self.homes(shapes, config).items(), key=lambda row: row[1].place):
            found.setdefault(home.file, ([], home.how == HALVES))[0].append(name)
        return found

    def _home(self, rows: tuple[Row, ...], name: str, names: set[str], config: Mapping[str, Any]) -> Home | None:
        for row in rows:
            for place, pattern in enumerate(row.model):
                match = _match(pattern, name)
                if match is None:
                    continue
                numbers, rest = match
                if row.last and str(numbers[0]) != str(int(config.get(row.last, 0)) - 1):
                    continue
                return Home(_filled(row.file, numbers) + rest, row.how, place)
        return None


PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
KEYS = (".weight", ".bias")


def _match(pattern: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """-> (numbers, what follows) where a name begins with a pattern and nothing but a key follows."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else (found.groups()[:-1], found.groups()[-1] or "")


_cache: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _cache:
        keys = "" if pattern.endswith(KEYS) else "|".join(re.escape(key) for key in KEYS)
        _cache[pattern] = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)") + f"({keys})?")
    return _cache[pattern]


def _filled(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("{}", number, 1)
    return pattern


def _rows(text: str) -> tuple[Row, ...]:
    """A table from lines `file = model`, `file = stem(a + b)` (joined), `file % model` (halves)."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        file, sign, models = re.split(r" ([=%]) ", line)
        stem, _, ends = models.partition("(")
        names = tuple(stem + end for end in ends.rstrip(")").split(" + "))
        found.append(Row(file.strip(), names, HALVES if sign == "%" else JOINED if len(names) > 1 else SAME))
    return tuple(found)


FLUX = _rows("""
    img_in = x_embedder
    txt_in = context_embedder
    time_in.in_layer = time_text_embed.timestep_embedder.linear_1
    time_in.out_layer = time_text_embed.timestep_embedder.linear_2
    vector_in.in_layer = time_text_embed.text_embedder.linear_1
    vector_in.out_layer = time_text_embed.text_embedder.linear_2
    guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
    double_blocks.{}.img_mod.lin = transformer_blocks.{}.norm1.linear
    double_blocks.{}.txt_mod.lin = transformer_blocks.{}.norm1_context.linear
    double_blocks.{}.img_attn.qkv = transformer_blocks.{}.attn.(to_q + to_k + to_v)
    double_blocks.{}.txt_attn.qkv = transformer_blocks.{}.attn.(add_q_proj + add_k_proj + add_v_proj)
    double_blocks.{}.img_attn.norm.query_norm.scale = transformer_blocks.{}.attn.norm_q.weight
    double_blocks.{}.img_attn.norm.key_norm.scale = transformer_blocks.{}.attn.norm_k.weight
    double_blocks.{}.txt_attn.norm.query_norm.scale = transformer_blocks.{}.attn.norm_added_q.weight
    double_blocks.{}.txt_attn.norm.key_norm.scale = transformer_blocks.{}.attn.norm_added_k.weight
    double_blocks.{}.img_mlp.0 = transformer_blocks.{}.ff.net.0.proj
    double_blocks.{}.img_mlp.2 = transformer_blocks.{}.ff.net.2
    double_blocks.{}.txt_mlp.0 = transformer_blocks.{}.ff_context.net.0.proj
    double_blocks.{}.txt_mlp.2 = transformer_blocks.{}.ff_context.net.2
    double_blocks.{}.img_attn.proj = transformer_blocks.{}.attn.to_out.0
    double_blocks.{}.txt_attn.proj = transformer_blocks.{}.attn.to_add_out
    single_blocks.{}.modulation.lin = single_transformer_blocks.{}.norm.linear
    single_blocks.{}.linear1 = single_transformer_blocks.{}.(attn.to_q + attn.to_k + attn.to_v + proj_mlp)
    single_blocks.{}.norm.query_norm.scale = single_transformer_blocks.{}.attn.norm_q.weight
    single_blocks.{}.norm.key_norm.scale = single_transformer_blocks.{}.attn.norm_k.weight
    single_blocks.{}.linear2 = single_transformer_blocks.{}.proj_out
    final_layer.linear = proj_out
    final_layer.adaLN_modulation.1 % norm_out.linear
""")

SD3 = (
    Row(
        "joint_blocks.{}.context_block.adaLN_modulation.1",
        ("transformer_blocks.{}.norm1_context.linear",),
        HALVES,
        "num_layers",
    ),
    *_rows("""
    pos_embed = pos_embed.pos_embed
    x_embedder.proj = pos_embed.proj
    t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
    y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
    context_embedder = context_embedder
    joint_blocks.{}.x_block.attn.qkv = transformer_blocks.{}.attn.(to_q + to_k + to_v)
    joint_blocks.{}.context_block.attn.qkv = transformer_blocks.{}.attn.(add_q_proj + add_k_proj + add_v_proj)
    joint_blocks.{}.x_block.attn2.qkv = transformer_blocks.{}.attn2.(to_q + to_k + to_v)
    joint_blocks.{}.x_block.attn.ln_q = transformer_blocks.{}.attn.norm_q
    joint_blocks.{}.x_block.attn.ln_k = transformer_blocks.{}.attn.norm_k
    joint_blocks.{}.context_block.attn.ln_q = transformer_blocks.{}.attn.norm_added_q
    joint_blocks.{}.context_block.attn.ln_k = transformer_blocks.{}.attn.norm_added_k
    joint_blocks.{}.x_block.attn2.ln_q = transformer_blocks.{}.attn2.norm_q
    joint_blocks.{}.x_block.attn2.ln_k = transformer_blocks.{}.attn2.norm_k
    joint_blocks.{}.x_block.attn.proj = transformer_blocks.{}.attn.to_out.0
    joint_blocks.{}.context_block.attn.proj = transformer_blocks.{}.attn.to_add_out
    joint_blocks.{}.x_block.attn2.proj = transformer_blocks.{}.attn2.to_out.0
    joint_blocks.{}.x_block.adaLN_modulation.1 = transformer_blocks.{}.norm1.linear
    joint_blocks.{}.context_block.adaLN_modulation.1 = transformer_blocks.{}.norm1_context.linear
    joint_blocks.{}.x_block.mlp.fc1 = transformer_blocks.{}.ff.net.0.proj
    joint_blocks.{}.x_block.mlp.fc2 = transformer_blocks.{}.ff.net.2
    joint_blocks.{}.context_block.mlp.fc1 = transformer_blocks.{}.ff_context.net.0.proj
    joint_blocks.{}.context_block.mlp.fc2 = transformer_blocks.{}.ff_context.net.2
    final_layer.linear = proj_out
    final_layer.adaLN_modulation.1 % norm_out.linear
    """),
)

WAN = _rows("""
    patch_embedding = patch_embedding
    time_embedding.0 = condition_embedder.time_embedder.linear_1
    time_embedding.2 = condition_embedder.time_embedder.linear_2
    text_embedding.0 = condition_embedder.text_embedder.linear_1
    text_embedding.2 = condition_embedder.text_embedder.linear_2
    time_projection.1 = condition_embedder.time_proj
    img_emb.proj.0 = condition_embedder.image_embedder.norm1
    img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
    img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
    img_emb.proj.4 = condition_embedder.image_embedder.norm2
    blocks.{}.self_attn.q = blocks.{}.attn1.to_q
    blocks.{}.self_attn.k = blocks.{}.attn1.to_k
    blocks.{}.self_attn.v = blocks.{}.attn1.to_v
    blocks.{}.self_attn.o = blocks.{}.attn1.to_out.0
    blocks.{}.self_attn.norm_q = blocks.{}.attn1.norm_q
    blocks.{}.self_attn.norm_k = blocks.{}.attn1.norm_k
    blocks.{}.cross_attn.q = blocks.{}.attn2.to_q
    blocks.{}.cross_attn.k = blocks.{}.attn2.to_k
    blocks.{}.cross_attn.v = blocks.{}.attn2.to_v
    blocks.{}.cross_attn.o = blocks.{}.attn2.to_out.0
    blocks.{}.cross_attn.norm_q = blocks.{}.attn2.norm_q
    blocks.{}.cross_attn.norm_k = blocks.{}.attn2.norm_k
    blocks.{}.cross_attn.k_img = blocks.{}.attn2.add_k_proj
    blocks.{}.cross_attn.v_img = blocks.{}.attn2.add_v_proj
    blocks.{}.cross_attn.norm_k_img = blocks.{}.attn2.norm_added_k
    blocks.{}.norm3 = blocks.{}.norm2
    blocks.{}.ffn.0 = blocks.{}.ffn.net.0.proj
    blocks.{}.ffn.2 = blocks.{}.ffn.net.2
    blocks.{}.modulation = blocks.{}.scale_shift_table
    head.modulation = scale_shift_table
    head.head = proj_out
""")

INSIDE = _rows("""
    in_layers.0 = norm1
    in_layers.2 = conv1
    out_layers.0 = norm2
    out_layers.3 = conv2
    emb_layers.1 = time_emb_proj
    skip_connection = conv_shortcut
""")  # of a residual block of Stable Diffusion's UNet
AROUND = _rows("""
    time_embed.0 = time_embedding.linear_1
    time_embed.2 = time_embedding.linear_2
    label_emb.0.0 = add_embedding.linear_1
    label_emb.0.2 = add_embedding.linear_2
    input_blocks.0.0 = conv_in
    out.0 = conv_norm_out
    out.2 = conv_out
""")
TRANSFORMER = (
    "norm proj_in proj_out transformer_blocks.{}.norm1 transformer_blocks.{}.norm2 transformer_blocks.{}.norm3 "
    "transformer_blocks.{}.attn1.to_q transformer_blocks.{}.attn1.to_k transformer_blocks.{}.attn1.to_v "
    "transformer_blocks.{}.attn1.to_out.0 transformer_blocks.{}.attn2.to_q transformer_blocks.{}.attn2.to_k "
    "transformer_blocks.{}.attn2.to_v transformer_blocks.{}.attn2.to_out.0 transformer_blocks.{}.ff.net.0.proj "
    "transformer_blocks.{}.ff.net.2"
).split()  # of a block with attention, the same on both sides


def _unet(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """Rows of Stable Diffusion's UNet: its blocks are counted through, down, middle, up.

    DQError for a config with other numbers of layers a block.
    """
    depth, downs, ups = (config.get(key) for key in ("layers_per_block", "down_block_types", "up_block_types"))
    if type(depth) is not int or not isinstance(downs, list | tuple) or not isinstance(ups, list | tuple):
        raise DQError(f"layers_per_block is {depth!r}, files of sd1 and sdxl have one number of layers for all blocks")
    rows = list(AROUND)
    for block in range(len(downs)):
        first = block * (depth + 1) + 1
        for layer in range(depth):
            rows += _both(f"input_blocks.{first + layer}", f"down_blocks.{block}", layer)
        down = f"down_blocks.{block}.downsamplers.0.conv"
        rows.append(Row(f"input_blocks.{first + depth}.0.op", (down,)))
    for place, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        rows += _inside(f"middle_block.{place}", f"mid_block.{part}", part.startswith("resnets"))
    for block, kind in enumerate(ups):
        for layer in range(depth + 1):
            rows += _both(f"output_blocks.{block * (depth + 1) + layer}", f"up_blocks.{block}", layer)
        last, place = block * (depth + 1) + depth, 2 if "Attn" in kind else 1
        rows.append(Row(f"output_blocks.{last}.{place}.conv", (f"up_blocks.{block}.upsamplers.0.conv",)))
    return tuple(rows)


def _both(file: str, model: str, layer: int) -> list[Row]:
    """A residual block and the attention after it."""
    return [
        *_inside(f"{file}.0", f"{model}.resnets.{layer}", True),
        *_inside(f"{file}.1", f"{model}.attentions.{layer}", False),
    ]


def _inside(file: str, model: str, residual: bool) -> list[Row]:
    if residual:
        return [Row(f"{file}.{row.file}", tuple(f"{model}.{name}" for name in row.model)) for row in INSIDE]
    return [Row(f"{file}.{name}", (f"{model}.{name}",)) for name in TRANSFORMER]


BOTH = "ComfyUI-GGUF, stable-diffusion.cpp"
LAYOUTS = (
    Layout("flux", ("FluxTransformer2DModel",), FLUX, BOTH),
    Layout("sd3", ("SD3Transformer2DModel",), SD3, BOTH),
    Layout("wan", ("WanTransformer3DModel",), WAN, BOTH),
    Layout("qwen_image", ("QwenImageTransformer2DModel",), readers=BOTH),
    Layout("sdxl", ("UNet2DConditionModel",), readers=BOTH, prefix="model.diffusion_model.", made=_unet),
    Layout("sd1", ("UNet2DConditionModel",), readers=BOTH, prefix="model.diffusion_model.", made=_unet),
    Layout("pixart", ("PixArtTransformer2DModel",)),  # no other program reads PixArt from GGUF: diffusers' own names
)


def of(kind: str, config: Mapping[str, Any]) -> Layout | None:
    """The layout of a diffusers class, None for one that has no table."""
    found = [layout for layout in LAYOUTS if kind in layout.classes]
    if len(found) < 2:
        return found[0] if found else None
    return found[0] if config.get("addition_embed_type") == "text_time" else found[1]


def required(config: Mapping[str, Any], part: str, target: str) -> Layout:
    """The layout of a model's config. DQError, for a target, where there is no table."""
    kind = str(config.get("_class_name", ""))
    found = of(kind, config)
    if found is None:
        known = ", ".join(dict.fromkeys(name for row in LAYOUTS for name in row.classes))
        raise DQError(f"{part} is a {kind}, {target} files are known of {known}")
    return found


def pieces(homes: Mapping[str, Home], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """Which rows of which tensor of the file each tensor of the model is made of. shapes: of the model's tensors."""
    beside: dict[str, list[str]] = {}
    for name, home in sorted(homes.items(), key=lambda row: row[1].place):
        beside.setdefault(home.file, []).append(name)
    found = {}
    for file, names in beside.items():
        start = 0
        for name in names:
            count = shapes[name][0] if shapes[name] else 1
            rows = [Piece(file, start, start + count)]
            if homes[name].how == HALVES:
                rows = [Piece(file, count // 2, count), Piece(file, 0, count // 2)]
            found[name], start = rows, start + count
    return found
