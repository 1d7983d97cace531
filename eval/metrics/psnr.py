"""Peak signal-to-noise ratio of pictures against full-precision pictures of the same seeds.

    psnr = 1/N sum_n -10 log10(max(mse_n, 1e-10)),    mse_n = mean((x_n - y_n)^2),  pictures x, y in [0, 1]

The mean is over pictures (in dB), not over pixels of all pictures. Equal pictures count as 100 dB, so that one exact
match does not make the mean infinite.
"""

import numpy as np
import torch

NEEDS = ("images", "reference")
UNITS = {"psnr_db": "dB", "psnr_db_worst": "dB"}
BETTER = "higher"
FLOOR = 1e-10  # mean squared error at which pictures count as equal


def as_batch(images) -> torch.Tensor:
    """PIL pictures or a float tensor (N, 3, H, W) in [0, 1] -> float64 tensor; ValueError for another shape."""
    if not torch.is_tensor(images):
        arrays = [np.asarray(image.convert("RGB"), np.float64) / 255 for image in images]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if images.ndim != 4:
        raise ValueError(f"psnr needs pictures (N, channels, height, width), got {tuple(images.shape)}")
    return images.double()


def per_picture(images, reference) -> torch.Tensor:
    """PSNR of each picture, (N,) in dB; ValueError when the two sets differ in shape."""
    x, y = as_batch(images), as_batch(reference)
    if x.shape != y.shape:
        raise ValueError(f"psnr needs two sets of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return -10 * torch.log10((x - y).square().flatten(1).mean(1).clamp_min(FLOOR))


def per_item(images, reference) -> list[float]:
    """PSNR of each picture in dB."""
    return per_picture(images, reference).tolist()


def score(images, reference) -> dict[str, float]:
    """Mean and worst PSNR of N pictures against their N references."""
    decibels = per_picture(images, reference)
    return {"psnr_db": float(decibels.mean()), "psnr_db_worst": float(decibels.min())}
