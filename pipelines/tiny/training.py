"""What all trainings share: a wall-clock budget that sets the learning rate, checkpoints, averages, the curve."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

RUNS = Path(os.environ.get("TINY_RUNS", "runs/tiny"))
WARMUP = 0.02  # share of the budget


def learning_rate(fraction: float, floor: float = 0.01) -> float:
    """Factor on the base rate after this fraction of the time budget: linear warm-up, then cosine down to `floor`."""
    if fraction < WARMUP:
        return max(fraction, 1e-3) / WARMUP
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARMUP) / (1 - WARMUP))))


class Average:
    """Exponential moving average of parameters (fp32), with a short memory at the start."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.count = decay, 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        live = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(self.values.values()), live, weight)

    def state_dict(self) -> dict:
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: Mapping) -> None:
        self.count = state["count"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


class Run:
    """One training of `minutes` of wall clock; restarting it goes on where the last checkpoint was written.

    `parts` maps names to anything with state_dict / load_state_dict (modules, optimiser, Average).
    """

    def __init__(self, name: str, minutes: float, parts: Mapping[str, object], optimiser):
        self.name, self.budget_s, self.parts, self.optimiser = name, minutes * 60, parts, optimiser
        self.folder = RUNS / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.spent_s, self.curve = 0, 0.0, []
        self.base = [group["lr"] for group in optimiser.param_groups]
        self._sum: dict[str, float] = {}
        self._count = 0
        if (self.folder / "last.pt").exists():
            self._restore()
        self.clock = time.time()
        self.saved_s = self.spent_s

    def going(self) -> bool:
        """Set the learning rate for the next step; False once the budget is used up."""
        now = time.time()
        self.spent_s, self.clock = self.spent_s + now - self.clock, now
        fraction = self.spent_s / self.budget_s
        for group, base in zip(self.optimiser.param_groups, self.base, strict=True):
            group["lr"] = base * learning_rate(fraction)
        return fraction < 1

    def count(self, every: int = 50, **losses: torch.Tensor) -> bool:
        """Note the losses of one step; True each time a line of the curve was written."""
        self.step += 1
        self._count += 1
        for name, value in losses.items():
            self._sum[name] = self._sum.get(name, 0.0) + float(value)
        if self._count < every:
            return False
        row = {"step": self.step, "seconds": round(self.spent_s, 1)}
        row |= {name: round(value / self._count, 5) for name, value in self._sum.items()}
        self.curve.append(row)
        print(self.name, json.dumps(row), flush=True)
        self._sum, self._count = {}, 0
        return True

    def due(self, seconds: float) -> bool:
        """True once in every so many seconds of training: time to write a checkpoint."""
        if self.spent_s - self.saved_s < seconds:
            return False
        self.saved_s = self.spent_s
        return True

    def save(self) -> None:
        """Write the checkpoint and the curve, each whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["run"] = {"step": self.step, "spent_s": self.spent_s, "curve": self.curve}
        path = self.folder / "last.pt"
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        write_json(self.folder / "curve.json", self.curve)

    def _restore(self) -> None:
        state = torch.load(self.folder / "last.pt", weights_only=True, map_location="cpu")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.spent_s = state["run"]["step"], state["run"]["spent_s"]
        self.curve = state["run"]["curve"]


def write_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.rename(path)


def adamw(parameters: Iterable[nn.Parameter], lr: float, decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def optimiser_of(blocks: Iterable[nn.Module], every: Iterable[nn.Parameter], rate: float):
    """Muon for the matrices inside blocks, AdamW for everything else; AdamW alone where no block has a matrix."""
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2 and min(p.shape) > 8]
    chosen = {id(p) for p in matrices}
    rest = adamw([p for p in every if id(p) not in chosen], rate)
    if not matrices:
        return rest
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return Together(muon, rest)


def put(pipe, final: Path, work: Path, kept: Iterable[str] = ()) -> Path:
    """Write a pipeline in place of the folder `final` in one rename, `kept` files of what stood there with it.

    work  folder on the same disk, for the new one and the old one meanwhile
    """
    fresh, old = work / f"{final.name}.new", work / f"{final.name}.old"
    pipe.save_pretrained(fresh)
    for name in kept:
        if (final / name).exists():
            shutil.copy(final / name, fresh / name)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    print("wrote", final.name, flush=True)
    return final


class Together:
    """Several optimisers stepped as one."""

    def __init__(self, *optimisers: torch.optim.Optimizer):
        self.optimisers = optimisers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def zero_grad(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad()

    def step(self) -> None:
        for optimiser in self.optimisers:
            optimiser.step()

    def state_dict(self) -> dict:
        return {str(i): optimiser.state_dict() for i, optimiser in enumerate(self.optimisers)}

    def load_state_dict(self, state: Mapping) -> None:
        for i, optimiser in enumerate(self.optimisers):
            optimiser.load_state_dict(state[str(i)])


def draw_curve(curve: list[dict], path: Path, names: Iterable[str]) -> None:
    """Small PNG of the losses over steps (log scale)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 2.6), dpi=80)
    for name in names:
        rows = [row for row in curve if name in row]
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, linewidth=1)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
