"""Faults put into the products of a card, to see that the checks of `eval.gpu.tiles` find them there, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from dq.kernels.triton import configs, ops
from dq.kernels.triton.ops import Blocks
from eval.gpu import tiles
from eval.gpu.tiles import Problem

Launch = Callable[..., torch.Tensor]
LAUNCHES = ("launch_gemm", "launch_w4a8", "launch_nvfp4")


def without_bias(launch: Launch) -> Launch:
    return lambda x, w, end, *rest: launch(x, w, end._replace(bias=None), *rest)


def scales_off(launch: Launch) -> Launch:
    """By 2 %."""

    def run(x, w, *rest):
        w = w._replace(whole=w.whole * 1.02) if isinstance(w, Blocks) else w._replace(scale=w.scale * 1.02)
        return launch(x, w, *rest)

    return run


def columns_moved(launch: Launch) -> Launch:
    return lambda *args: launch(*args).roll(1, -1)


def row_unwritten(launch: Launch) -> Launch:
    """As memory of an output that a kernel leaves is: NaN."""

    def run(*args):
        y = launch(*args)
        y[-1] = torch.nan
        return y

    return run


FAULTS = {
    "bias dropped": without_bias, "scales 2 % off": scales_off, "columns moved": columns_moved,
    "row not written": row_unwritten,
}  # fmt: skip


def checks(device: str) -> Iterator[tuple[str, str, Callable[..., str], Problem, str]]:
    """(what, matrix unit, check, problem, fault): each fault in the smallest tile of every kernel and type."""
    last: dict[tuple[str, str], Problem] = {}
    for problem in tiles.problems(configs.architecture(), device):
        last.setdefault((problem.kernel, problem.operands), problem)
        if problem.size < last[problem.kernel, problem.operands].size:
            last[problem.kernel, problem.operands] = problem
    for problem in last.values():
        for fault in FAULTS:
            yield f"{fault} in {problem}", problem.operands, unseen, problem, fault


def unseen(problem: Problem, fault: str) -> str:
    """ "" when the check of a tile finds the fault. DQError, or whatever it is, where the kernel does not run."""
    wrong = tiles.check(problem)
    if wrong:
        return f"wrong without the fault: {wrong}"
    spoiled = {name: FAULTS[fault](getattr(ops, name)) for name in LAUNCHES}
    with mock.patch.multiple(ops, **spoiled), _in_flight(problem, fault):
        found = tiles.check(problem)
    return "" if found else "the check does not see it"


def _in_flight(problem: Problem, fault: str) -> AbstractContextManager:
    """The fault in Gluon's product, which has a launch of its own."""
    if problem.kernel != tiles.FLIGHT:
        return nullcontext()
    from dq.kernels.triton import flight  # here: Gluon does not load everywhere

    return mock.patch.object(flight, "launch", FAULTS[fault](flight.launch))
