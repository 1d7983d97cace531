"""How far two denoising runs of the same seeds drift apart, step by step, before the decoder hides or adds anything.

    mse_s = mean((z_s - r_s)^2),    sqnr = 10 log10(sum_s |r_s|^2 / sum_s |z_s - r_s|^2)

z_s, r_s (N, channels, ...) are the latents after scheduler step s of the quantized and the full-precision run.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

NEEDS = ("trajectory", "reference_trajectory")
UNITS = {"trajectory_mse": "latent^2", "trajectory_mse_last": "latent^2", "trajectory_sqnr_db": "dB"}
BETTER = {"trajectory_mse": "lower", "trajectory_mse_last": "lower", "trajectory_sqnr_db": "higher"}


@contextlib.contextmanager
def record(pipe) -> Iterator[list[torch.Tensor]]:
    """A list that fills with the latents after each scheduler step, fp32 on the CPU, while the block runs `pipe` once.

    Reads the scheduler, which every pipeline calls the same way; callbacks differ from pipeline to pipeline.
    """
    latents: list[torch.Tensor] = []
    scheduler, step = pipe.scheduler, pipe.scheduler.step

    @functools.wraps(step)  # pipelines read the signature of `step` to learn which arguments it takes
    def recorded(*args, **kwargs):
        output = step(*args, **kwargs)
        after = output[0] if isinstance(output, tuple) else output.prev_sample
        latents.append(after.detach().float().cpu())
        return output

    scheduler.step = recorded
    try:
        yield latents
    finally:
        del scheduler.step


def per_step(trajectory: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """Mean squared error of the latents at each step; ValueError when the runs differ in steps or shape."""
    if len(trajectory) != len(reference) or not trajectory:
        raise ValueError(f"trajectory error: runs of {len(trajectory)} and {len(reference)} steps, expected equal")
    for mine, theirs in zip(trajectory, reference, strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(f"trajectory error: latents {tuple(mine.shape)}, reference {tuple(theirs.shape)}")
    return [float((mine - theirs).square().mean()) for mine, theirs in zip(trajectory, reference, strict=True)]


def per_item(trajectory: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """Mean squared error over all steps of each picture, latents (N, ...) a step."""
    per_step(trajectory, reference)
    errors = [(mine - theirs).square().flatten(1).mean(1) for mine, theirs in zip(trajectory, reference, strict=True)]
    return torch.stack(errors).mean(0).tolist()


def score(trajectory: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, float]:
    """Figures of one run (or of several, latents concatenated over pictures) against its full-precision twin."""
    errors = per_step(trajectory, reference)
    power = sum(float(theirs.square().mean()) for theirs in reference)
    noise = max(sum(errors), 1e-20 * power, 1e-30)
    return {
        "trajectory_mse": sum(errors) / len(errors),
        "trajectory_mse_last": errors[-1],
        "trajectory_sqnr_db": float(10 * torch.log10(torch.tensor(power / noise))),
    }
