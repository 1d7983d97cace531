"""Whether a tuning fits into memory: asked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dq import families
from dq.errors import DQError
from dq.fit.student import Student, latents
from dq.fit.tune import Tune
from dq.layers import naming
from dq.layers.memory import free_bytes
from dq.trace import units
from dq.trace.pairs import Pair


def needed_bytes(student: Student, pair: Pair) -> tuple[int, int]:
    """Estimate of what training holds beside the model: (with all activations kept, with those of one block at once).

    Parameters count five times (value, gradient, two moments, best state) and rounded weights three times in fp32; of
    activations, every layer keeps its input twice (rounded and not) and its output twice (what follows keeps it).
    """
    fixed = 20 * sum(value.numel() for _, _, value, _ in student.groups)
    fixed += 12 * sum(layer.plan.rows * layer.plan.columns for layer in student.layers.values())
    sizes: dict[str, int] = {}

    def counting(name: str) -> Callable:
        def hook(module, args, output):
            sizes[name] = sizes.get(name, 0) + 8 * (args[0].numel() + output.numel())

        return hook

    hooks = [naming.at(student.model, n).register_forward_hook(counting(n)) for n in student.layers]
    try:
        with torch.no_grad(), student.evaluating():
            student.model(*pair.args, **pair.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    blocks: dict[str, int] = {}
    names = list(units.candidates(student.model, families.of(student.model)))
    for name, size in sizes.items():
        owner = next((block for block in names if name == block or name.startswith(f"{block}.")), "")
        blocks[owner] = blocks.get(owner, 0) + size
    given = latents(pair)
    borders = len(names) * 4 * (0 if given is None else given.numel() * 16)
    return fixed + sum(sizes.values()), fixed + blocks.pop("", 0) + max(blocks.values(), default=0) + borders


def check(student: Student, wish: Tune, pair: Pair, device: torch.device) -> str:
    """Choose whether blocks run again on the way back; DQError where that will not do either. -> what is needed."""
    whole, least = needed_bytes(student, pair)
    free = free_bytes(device)
    student.again = wish.checkpoint if wish.checkpoint is not None else free is not None and whole > free
    need = least if student.again else whole
    if free is not None and need > free:
        what = f"tune: training needs about {need / 2**30:.1f} GiB beside the model, {free / 2**30:.1f} GiB are free"
        raise DQError(f"{what}; tune fewer layers (layers=...) or parts (parts=...), or on a larger machine")
    return f"training needs about {need / 2**30:.2f} GiB beside the model" + (", blocks run twice" * student.again)
