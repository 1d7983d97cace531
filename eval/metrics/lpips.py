"""LPIPS of pictures against full-precision pictures of the same seeds, by torchmetrics: AlexNet, version 0.1.

    d(x, y) = sum_l 1 / (H_l W_l) sum_hw |w_l * (u_l(x)_hw - u_l(y)_hw)|^2,    u_l = f_l / |f_l| over channels

Zhang et al., 1801.03924, equation 1. f_l (channels, H_l, W_l) are AlexNet's features, w_l is fitted to human
judgements. Needs torchvision, which fetches AlexNet's weights once. Where they are not to be had, `feature_distance`
has the same form over the project's own net; its figures are not LPIPS.
"""

from functools import cache

from eval.metrics import psnr, why_no_library

NEEDS = ("images", "reference")
UNITS = {"lpips": "1"}
BETTER = "lower"
INSTEAD = "feature_distance"


@cache
def _measure():
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)


@cache
def why_not() -> str | None:
    absent = why_no_library("torchmetrics", "torchvision")
    if absent:
        return absent
    try:
        _measure()
    except OSError as error:  # no connection, no space
        return f"needs the weights of AlexNet, which cannot be fetched: {error}"
    return None


def per_item(images, reference) -> list[float]:
    """LPIPS of each picture; ValueError when the sets differ in shape."""
    x, y = psnr.as_batch(images).float(), psnr.as_batch(reference).float()
    if x.shape != y.shape:
        raise ValueError(f"lpips needs two sets of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    measure = _measure()
    measure.reset()
    measure.update(x, y)
    return measure.compute().flatten().tolist()


def score(images, reference) -> dict[str, float]:
    """Mean LPIPS of N pictures against their N references."""
    found = per_item(images, reference)
    return {"lpips": sum(found) / len(found)}
