"""Read a denoiser class that nobody described: blocks by structure, the timestep by argument, modulation by name."""

from __future__ import annotations

import inspect

from torch import nn

from dq.families import Family
from dq.layers import kind_of, naming

TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "timestep_ratio", "r", "decoder_noise_time")
TIMESTEPS += ("timestep_img", "vision_timesteps", "local_latents_time")

# layers that see one token per sample wherever they stand: adaLN projections, time embeddings inside blocks
MODULATION = (
    r"(.*\.)?(norm\w*|adaln\w*|ada_?ln\w*)\.(linear|lin|proj)(_\w+|\.\d+)?$",
    r"(.*\.)?(\w*(adaLN|adaln|ada_ln|modulation|modulate)\w*|(\w+_)?mod)(\.(linear|lin|proj|net|mlp|out_layer|\d+))*$",
    r"(.*\.)?(\w*time_emb\w*|\w*time_proj\w*|emb_layers|(\w+_)?t_embedder|time_mlp|\w*timestep\w*)(\.\w+)*$",
    r"(.*\.)?norm\w*\.emb\..*",
    r"(.*\.)?(\w*film|FiLM|scale_bias|context_mlp|\w*mapper(_\w+)?|\w*time_mod\w*|to_gamma|to_beta)(\.\w+)*$",
)
# the first layer of a timestep embedder outside blocks: some classes cast the timestep to the dtype of its weight
TIME_EMBEDDER = (r"(.*\.)?(time\w*|t_embed\w*)\.(\w+\.)*(linear_1|in_layer|fc1|proj_in|0)$",)
# choices between experts: a wrong turn costs more than the bytes
ROUTING = (r"(.*\.)?(router|gating)(\.\w+)*$",)
KEEP = ROUTING


def discover(model: nn.Module) -> Family:
    """A Family for any model: what the described families say in data, found out by looking."""
    return Family(
        name="generic",
        classes=(type(model).__name__,),
        blocks=tuple(find_blocks(model)) or tuple(name for name, _ in model.named_children()),
        timestep=find_timestep(model),
        modulation=MODULATION,
        keep=KEEP,
    )


def find_timestep(model: nn.Module) -> str | None:
    """The name of the forward argument that carries the timestep, or None."""
    names = list(inspect.signature(type(model).forward).parameters)
    return next((name for name in TIMESTEPS if name in names), None)


def find_blocks(model: nn.Module) -> list[str]:
    """Dotted names of the outermost lists of blocks, and of U-Net middle blocks.

    A block list is an nn.ModuleList or nn.ModuleDict whose entries hold two or more quantizable layers on average; a
    list of single layers (per-block caption projections) is not one, nor is one of final layers (one a patch size).
    """
    found: list[str] = []
    for name, module in naming.named(model):
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and "final" not in name and _is_block_list(module):
            found.append(name)
        elif name.rpartition(".")[2] in ("mid_block", "middle_block", "mid_blocks", "bottleneck"):
            found.append(name)
    return found


def _is_block_list(module: nn.Module) -> bool:
    layers = sum(kind_of(layer) is not None for _, layer in naming.named(module))
    return len(module) > 0 and layers >= 2 * len(module)
