"""How far the end of a run follows each step's prediction: what a tuning's errors are counted by.

    w_i = E_v |J_i^T v|^2 / n_i,    J_i = dx_0/dP_i,    E |J_i e_i|^2 = w_i |e_i|^2 for errors without a pattern

x_0: the final latents of the pipeline's own run; P_i (any shape, n_i entries): what the denoiser answered at step i; v
random signs of x_0's shape. Scheduler, guidance and every later call of the denoiser are differentiated as they are,
so that an error counts for what the later steps leave of it. Calls run again on the way back: memory holds one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dq.fit.student import frozen
from dq.fit.tune import MOST_RUNS
from dq.trace import pairs
from dq.trace.calibration import Calibration
from dq.trace.records import Store
from dq.trace.running import Runner, Steps, drawing, kept_modes, run_seed, spare_schedulers, timestep_reader
from dq.trace.units import map_tree, replaced, tensors_in
from dq.trace.world import processes

KEY = "tune/steps"
FIRST = pairs.FIRST + MOST_RUNS  # run that these begin with: none to learn from is so late
RUNS = 2  # averaged over: on tiny-pixart the early steps differ by a third from run to run, the late ones do not


def follows(runner: Runner, models: Mapping[str, nn.Module], first: int) -> list[float]:
    """w_i by step, 1 on average; of several runs, numbered from `first`, the geometric mean.

    Empty where the pipeline cannot be differentiated.
    """
    logs = []
    if runner.undecorated is None:
        return []
    for run in range(first, first + RUNS):
        found: dict[int, list[torch.Tensor]] = {}
        try:
            _walk(runner, models, run, lambda step, grad, found=found: found.setdefault(step, []).append(grad))
        except (RuntimeError, StopIteration):  # integers or in-place writes on the way: no gradient goes there
            return []
        logs.append(torch.stack([torch.stack(found[step]).mean().log() for step in sorted(found)]))
    if not logs[0].numel() or any(len(each) != len(logs[0]) for each in logs):
        return []
    mean = torch.stack(logs).mean(0).exp()
    weights = mean / mean.mean()
    return weights.tolist() if bool(weights.isfinite().all()) else []


def _walk(runner: Runner, models: Mapping[str, nn.Module], run: int, heard: Callable) -> None:
    """One run forward and back; `heard` is told the mean squared gradient of every call's answer."""
    parts = [part for part in runner.pipe.components.values() if isinstance(part, nn.Module)]
    seed, steps = runner.calibration.seed, Steps()
    with ExitStack() as stack:
        for each in (frozen(parts), kept_modes(models), drawing(seed, run), spare_schedulers(runner.pipe)):
            stack.enter_context(each)
        calls = {model: _listening(part, model, steps, heard) for part, model in models.items()}
        stack.enter_context(replaced(calls))
        stack.enter_context(torch.enable_grad())
        plain = {"return_dict": False} if "return_dict" in runner.accepted else {}
        assert runner.undecorated is not None, "asked by who calls"
        output = runner.undecorated(runner.pipe, **runner.arguments(run) | plain)
        end = next(value for value in tensors_in(output) if value.is_floating_point())
        signs = torch.Generator().manual_seed(run_seed(seed, run))
        drawn = torch.randint(0, 2, end.shape, generator=signs).to(end) * 2 - 1
        (end * drawn).sum().backward()


def _listening(part: str, model: nn.Module, steps: Steps, heard: Callable) -> Callable:
    """The model's forward, run again on the way back, whose answers tell their gradients."""
    forward, timestep = model.forward, timestep_reader(model)

    def call(*args, **kwargs):
        step = steps.number(part, timestep(args, kwargs))

        def asked(value: torch.Tensor) -> torch.Tensor:
            if not value.is_floating_point():
                return value
            made = value + value.new_zeros(()).requires_grad_()  # the first step's answer asks for a gradient, too
            made.register_hook(lambda grad: heard(step, grad.float().square().mean().cpu()))
            return made

        return map_tree(checkpoint(forward, *args, use_reentrant=False, **kwargs), asked)

    return call


def kept(store: Store, target, models: Mapping[str, nn.Module], calibration: Calibration) -> list[float]:
    """`follows` of a pipeline's runs, worked out once and kept in a store; empty for a bare model."""
    world = processes()
    if world.is_main_process and not store.has(KEY):
        bare = isinstance(target, nn.Module)
        store.write(KEY, {"by_step": [] if bare else follows(Runner(target, calibration), models, FIRST)})
    world.wait_for_everyone()
    return store.read(KEY)["by_step"]
