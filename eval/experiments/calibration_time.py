"""Seconds and memory to calibrate at full width: `python -m eval.experiments.calibration_time [--layers 28]`.

A PixArt-Sigma transformer (0.6 billion parameters) of random weights, with a few loud input channels at every linear
of its blocks, is quantized from a forward loop: 16 samples in 4 steps at 512 pixels (1024 tokens), random text states
of 300 x 4096. With `--frames N` a Wan 2.1 transformer of 1.3B's width in its place: N frames at 480 x 832, text states
of 512 x 4096. A row for eval/results/calibration_time.json says how long it took, with how much memory, and where the
time went: every 20 ms the running stack is looked at, and charged to the innermost function of dq in it.
"""

import argparse
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel

import dq
from dq.bench import widths
from dq.layers import packed_layers
from dq.layers.memory import peak_bytes
from eval.experiments import rows
from eval.experiments.methods import branch_share

FILE = rows.FOLDER / "calibration_time.json"
KEYS = (
    "model",
    "frames",
    "recipe",
    "budget_bits",
    "layers",
    "samples",
    "steps",
    "dtype",
    "device",
    "threads",
    "machine",
)
CONFIG = widths.PIXART
TEXT = (300, 4096)
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}
WAN_TEXT, WAN_LATENT = (512, 4096), (60, 104)  # of 480 x 832 pixels
OUTLIERS = 0.005  # share of input channels that are loud
LOUDNESS = (10.0, 20.0)  # times the others
SHOWN = 16  # rows of the profile
DQ = str(Path(dq.__file__).parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="svdquant-int4")
    parser.add_argument("--layers", type=int, default=28, help="blocks, of 28")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=None, help="of a video, 4 n + 1: Wan in place of PixArt")
    parser.add_argument("--budget-bits", type=float, default=None, help="choose formats under so many bits a weight")
    options = parser.parse_args()
    if options.frames is not None and options.frames % 4 != 1:
        parser.error(f"--frames is {options.frames}, expected 1, 5, 9, ...")
    began = time.perf_counter()
    make, name = (build, "PixArt-Sigma 512 px") if options.frames is None else (build_wan, "Wan 2.1 1.3B 480p")
    model = make(options.layers, getattr(torch, options.dtype), options.device)
    built = time.perf_counter() - began
    row = {"model": name, "build_seconds": round(built, 1), **vars(options)}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}
    row["call_seconds"] = round(call_seconds(model, loop_of(options, 1, 1)), 2)
    row |= measure(model, options) | rows.stamp(options.device)
    rows.add(FILE, row, KEYS)
    show(row)


def build(layers: int, dtype: torch.dtype, device: str, seed: int = 0) -> PixArtTransformer2DModel:
    """The transformer, matrices N(0, 1 / inputs), loud channels put in; the same for the same seed."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(num_layers=layers, **CONFIG)
    position = PixArtTransformer2DModel(num_layers=0, **CONFIG).pos_embed.pos_embed  # the only buffer
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    model.pos_embed.pos_embed = position.to(device, dtype)
    dice = torch.Generator(device).manual_seed(seed)
    for value in model.parameters():
        if value.dim() > 1:
            value.normal_(generator=dice).mul_(value[0].numel() ** -0.5)
        else:
            value.zero_()
    inject(model, dice)
    return model


def build_wan(layers: int, dtype: torch.dtype, device: str, seed: int = 0) -> WanTransformer3DModel:
    """Wan's transformer as it is initialised; the same for the same seed."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(num_layers=layers, **WAN).to(device, dtype).requires_grad_(False).eval()


def inject(model: PixArtTransformer2DModel, dice: torch.Generator) -> None:
    """Make OUTLIERS of the input channels of each linear in the blocks LOUDNESS times as loud as the others.

    Inputs after adaLN through the modulation's scale, the others through the rows of the layer before.
    """
    stem = model.pos_embed.proj
    _louden(stem.weight, dice)  # the residual stream, which cross-attention's queries read
    _louden(model.caption_projection.linear_2.weight, dice)
    for block in model.transformer_blocks:
        for row in (1, 4):  # scale of the attention, scale of the feed-forward
            factors, channels = _draw(block.scale_shift_table.shape[1], dice)
            block.scale_shift_table[row, channels] = (factors - 1).to(block.scale_shift_table.dtype)
        for layer in (block.attn1.to_v, block.attn2.to_v, block.ff.net[0].proj):
            _louden(layer.weight, dice)


def _louden(weight: torch.Tensor, dice: torch.Generator) -> None:
    factors, channels = _draw(weight.shape[0], dice)
    weight[channels] *= factors.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


def _draw(width: int, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """-> factors and the channels they are for."""
    count = max(1, round(OUTLIERS * width))
    low, high = LOUDNESS
    factors = low + (high - low) * torch.rand(count, generator=dice, device=dice.device)
    return factors, torch.randperm(width, generator=dice, device=dice.device)[:count]


@dataclass(frozen=True)
class Loop:
    """The forward loop: `samples` texts, `steps` noise levels each, one latent of 64 x 64 a call."""

    samples: int
    steps: int
    seed: int = 1

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text and of a latent."""
        return TEXT, (CONFIG["in_channels"], 64, 64)

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> None:
        value = next(model.parameters())
        for sample in range(self.samples):
            dice = torch.Generator().manual_seed(1000 * self.seed + sample)
            text, latents = (torch.randn(1, *shape, generator=dice).to(value) for shape in self.shapes)
            for step in range(self.steps):
                self.call(model, latents, text, 999 - 1000 * step // self.steps)
                latents = 0.9 * latents + 0.3 * torch.randn(latents.shape, generator=dice).to(value)

    @staticmethod
    def call(model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor, timestep: int) -> torch.Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        when = torch.tensor([timestep], device=latents.device)
        return model(latents, encoder_hidden_states=text, timestep=when, added_cond_kwargs=sizes).sample


@dataclass(frozen=True)
class Video(Loop):
    """The same of Wan: one latent of so many frames a call."""

    frames: int = 17

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return WAN_TEXT, (16, (self.frames - 1) // 4 + 1, *WAN_LATENT)

    @staticmethod
    def call(model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor, timestep: int) -> torch.Tensor:
        when = torch.tensor([timestep], device=latents.device)
        return model(latents, timestep=when, encoder_hidden_states=text).sample


def loop_of(options, samples: int, steps: int) -> Loop:
    return Loop(samples, steps) if options.frames is None else Video(samples, steps, frames=options.frames)


def call_seconds(model: torch.nn.Module, loop: Loop) -> float:
    """One call of the full-precision model, after a first that warms up."""
    loop(model)
    began = time.perf_counter()
    loop(model)
    return time.perf_counter() - began


def measure(model: torch.nn.Module, options) -> dict:
    """Quantize, watched; the figures of the row."""
    loop = loop_of(options, options.samples, options.steps)
    with Watch() as watch:
        began, used = time.perf_counter(), time.process_time()
        budget = None if options.budget_bits is None else dq.Budget(bits=options.budget_bits)
        report = dq.quantize(model, options.recipe, calibration=loop, budget=budget)
        seconds, used = time.perf_counter() - began, time.process_time() - used
    figures = {"seconds": round(seconds, 1), "cpu_seconds": round(used, 1), "load": round(os.getloadavg()[0], 2)}
    figures |= {"seconds_a_block": round(seconds / options.layers, 2)}
    figures |= {"peak_gib": round(peak_gib(options.device), 2), "candidates": report.candidates}
    figures |= {"bytes": report.bytes_after, "bytes_before": report.bytes_before, "notes": report.notes}
    figures["branch_share"] = round(branch_share(packed_layers(model)), 4)
    return figures | {"profile_seconds": watch.seconds(seconds), "passes_seconds": watch.passes(seconds)}


def peak_gib(device: str) -> float:
    """Most memory this process ever held: on the device, or resident for the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_bytes() or 0) / 2**30


class Watch:
    """Looks at the stack of the thread that made it, every `pause` seconds, while the block runs."""

    def __init__(self, pause: float = 0.02):
        self.pause, self.watched, self.done = pause, threading.get_ident(), threading.Event()
        self.inner: Counter[str] = Counter()
        self.outer: Counter[str] = Counter()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(self.pause):
            frame, stack = sys._current_frames().get(self.watched), []
            while frame is not None:
                if frame.f_code.co_filename.startswith(DQ):
                    stack.append(_place(frame))
                frame = frame.f_back
            self.inner[stack[0] if stack else "outside of dq"] += 1
            steps = [place for place in stack if not place.startswith(("api.", "stages.", "fit.walk."))]
            self.outer[steps[-1] if steps else (stack or ["outside of dq"])[0]] += 1

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds by innermost function of dq, torch's own below it included, longest first."""
        return self._shares(self.inner, total)

    def passes(self, total: float) -> dict[str, float]:
        """Seconds by what `quantize` and the walk over the units called, all below it included."""
        return self._shares(self.outer, total)

    def _shares(self, counts: Counter[str], total: float) -> dict[str, float]:
        looks = max(counts.total(), 1)
        return {place: round(total * count / looks, 1) for place, count in counts.most_common(SHOWN)}


def _place(frame) -> str:
    """`fit.lowrank.factors` for a frame of dq/fit/lowrank.py."""
    path = Path(frame.f_code.co_filename).relative_to(DQ).with_suffix("")
    return ".".join([*path.parts, frame.f_code.co_qualname.replace(".<locals>", "")])


def show(row: dict) -> None:
    minutes = row["seconds"] / 60
    frames = f", {row['frames']} frames" if row["frames"] else ""
    print(f"{row['model']}{frames}, {row['layers']} blocks, {row['recipe']}: {minutes:.1f} min, {row['peak_gib']} GiB")
    print(f"{row['seconds_a_block']} s a block, a full-precision call {row['call_seconds']} s, load {row['load']}")
    print("\n".join(row["notes"]))
    for title in ("passes_seconds", "profile_seconds"):
        print(title, *(f"{seconds:9.1f}  {place}" for place, seconds in row[title].items()), sep="\n")


if __name__ == "__main__":
    main()
