"""Gradients of the end of a denoising run with respect to every layer, through all steps of the user's own pipeline.

    L = x(W),   dL_v/dW = sum over steps t of (dx/dP_t)^T v  dP_t/dW,   L_v = <v, x>

x are the pictures (of videos the final latents), P_t the denoiser's predictions, v random signs. The pipeline's own
call runs without its `no_grad`, so that scheduler, guidance and decoder are differentiated as they are; every denoiser
call is run again when its turn comes on the way back, so that memory holds one call, the latents of the steps, and the
decoder. The sum over steps is taken before the square: errors of one weight add up along the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

from dq.budget import sensitivity
from dq.budget.choices import Choice, Start
from dq.budget.limits import Budget
from dq.budget.margins import Listener
from dq.budget.predictions import BUCKETS
from dq.budget.sensitivity import Errors
from dq.errors import DQError
from dq.fit.student import frozen
from dq.trace.records import Store
from dq.trace.running import Runner, Steps, timestep_reader
from dq.trace.units import replaced

FEWEST_RUNS = 4
RUNS_A_PROMPT = 8  # each from other noise
SECONDS = 480.0  # after which no run begins, but for the fewest


def possible(runner: Runner) -> str | None:
    """None when the pipeline can be differentiated; else why not."""
    if runner.undecorated is None:
        return f"{type(runner.pipe).__name__}'s call has no version without no_grad"
    return None if runner.end else f"{type(runner.pipe).__name__} returns neither pictures nor latents as tensors"


def gradients(
    runner: Runner,
    models: Mapping[str, nn.Module],
    menus: Mapping[str, Mapping[str, Sequence[Choice]]],
    store: Store,
    progress: bool = True,
    start: Start = None,
    most: int = Budget.runs,
) -> tuple[dict[str, Errors], int]:
    """-> by part: errors of the pictures or final latents, to first order; and from how many runs, as time allows.

    Weights are rounded with `start`'s scales.

    store  keeps what was gathered after every run; a killed measurement goes on there
    most   runs
    Raises DQError where the pipeline's loop cannot be differentiated.
    """
    steps, seed = runner.calibration.steps, runner.calibration.seed
    runs = min(RUNS_A_PROMPT * len(runner.texts), most)
    listeners = {part: Listener(model, menus[part], start) for part, model in models.items()}
    made = sensitivity.Progress.resume(listeners, store, "trajectory", [steps, seed, runs, *runner.texts])
    with tqdm(total=runs, initial=made.done, desc="trajectories", disable=not progress, delay=2) as bar:
        while made.done < runs and (made.done < FEWEST_RUNS or made.seconds < SECONDS):
            begun = time.perf_counter()
            try:
                _walk(runner, made.done, models, listeners, sensitivity.generator(seed, made.done))
            except RuntimeError as error:
                first = (str(error).strip().splitlines() or ["no message"])[0]
                what = f"budget: the run of {type(runner.pipe).__name__} cannot be differentiated: {first}"
                raise DQError(f"{what}; give the budget metric='prediction'") from error
            made.step(listeners, time.perf_counter() - begun)
            bar.update()
    found = {part: sensitivity.table(own, menus[part], made.done, progress) for part, own in listeners.items()}
    return found, made.done


def _walk(runner: Runner, run: int, models: Mapping, listeners: Mapping, signs: torch.Generator) -> None:
    """One run forward and back."""
    parts = [part for part in runner.pipe.components.values() if isinstance(part, nn.Module)]
    with ExitStack() as stack:
        stack.enter_context(frozen(parts))
        steps = Steps()  # of all denoisers: two may take turns in a run
        calls = {part: _Again(part, model, listeners[part], steps) for part, model in models.items()}
        stack.enter_context(replaced({models[part]: call for part, call in calls.items()}))
        for listener in listeners.values():
            stack.enter_context(listener.listening())
        stack.enter_context(torch.enable_grad())
        sensitivity.backward(runner.differentiable(run), signs)
    energy = sum(listener.end() for listener in listeners.values())
    for listener in listeners.values():
        listener.close(energy)


class _Again:
    """A model's forward that keeps only its inputs, and runs again, with gradients, when its turn comes back."""

    def __init__(self, part: str, model: nn.Module, listener: Listener, steps: Steps):
        self.part = part
        self.forward = model.forward
        self.timestep = timestep_reader(model)
        self.listener = listener
        self.steps = steps

    def __call__(self, *args, **kwargs):
        leaves, self.tree = tree_flatten((args, kwargs))
        tensors = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
        step = self.steps.number(self.part, self.timestep(args, kwargs))
        made: list = []
        ask = torch.zeros((), requires_grad=True)  # so that the first step's output has a gradient too
        outputs = _Step.apply(self, leaves, self.tree, step, made, ask, *tensors)
        return tree_unflatten(list(outputs), made[0])


class _Step(torch.autograd.Function):
    """One denoiser call: forward without a graph, backward by running it again."""

    @staticmethod
    def forward(ctx, again: _Again, leaves: list, tree, step: int, made: list, ask, *tensors):
        ctx.again = again
        ctx.leaves = leaves
        ctx.tree = tree
        ctx.step = step
        args, kwargs = tree_unflatten(leaves, tree)
        with torch.no_grad():
            outputs, shape = tree_flatten(again.forward(*args, **kwargs))
        made.append(shape)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        # nothing but what earlier steps made: masks, texts and timesteps are the same whatever the weights are, and a
        # model may count or compare them, where no gradient goes
        wanted = ctx.needs_input_grad[-len(ctx.leaves) :]
        roots = [x.detach().requires_grad_(True) if want else x for x, want in zip(ctx.leaves, wanted, strict=True)]
        ctx.again.listener.bucket = ctx.step * BUCKETS // len(ctx.again.steps)  # of the whole run, which has ended
        with torch.enable_grad():
            leaves = [x.clone() if want else x for x, want in zip(roots, wanted, strict=True)]  # models write in place
            args, kwargs = tree_unflatten(leaves, ctx.tree)
            outputs, _ = tree_flatten(ctx.again.forward(*args, **kwargs))
            pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
            torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        back = [root.grad if want else None for root, want in zip(roots, wanted, strict=True)]
        return (None, None, None, None, None, None, *back)


class Ends:
    """Judges a model by where whole runs of the pipeline end."""

    def __init__(self, runner: Runner, runs: int):
        self.runner, self.runs = runner, range(runs)
        self.keys = [f"{runner.end} {runner.calibration.steps} {runner.calibration.seed} {run}" for run in self.runs]
        self._truth = [self._end(run) for run in self.runs]

    def error(self) -> np.ndarray:
        """(buckets + 1,) the same share everywhere, as a run has one end; over the runs the geometric mean."""
        shares = []
        for run, truth in zip(self.runs, self._truth, strict=True):
            noise = (self._end(run) - truth).square().sum(dtype=torch.float64)
            shares.append(float(noise / truth.square().sum(dtype=torch.float64)))
        return np.full(BUCKETS + 1, np.exp(np.mean(np.log(np.maximum(shares, 1e-12)))))

    @torch.no_grad()
    def _end(self, run: int) -> torch.Tensor:
        return self.runner.differentiable(run).float()
