"""Structural similarity of pictures to full-precision pictures of the same seeds, by torchmetrics.

    ssim = mean over windows of (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2))

m, s^2, s_xy: means, variances and covariance under a Gaussian window of 1.5 pixels; c1 = 0.01^2, c2 = 0.03^2 for
pictures in [0, 1]. Wang et al., 2004, doi:10.1109/TIP.2003.819861. 1 for equal pictures.
"""

from eval.metrics import psnr, why_no_library

NEEDS = ("images", "reference")
UNITS = {"ssim": "1"}
BETTER = "higher"
WINDOW = 11  # pixels
CHUNK = 16  # pictures at once: the library keeps five maps of each


def why_not() -> str | None:
    return why_no_library("torchmetrics")


def per_item(images, reference) -> list[float]:
    """SSIM of each picture; ValueError when the sets differ in shape or are smaller than the window."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = psnr.as_batch(images), psnr.as_batch(reference)
    if x.shape != y.shape or min(x.shape[2:]) < WINDOW:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"ssim needs two sets of equal shape, {WINDOW} pixels or more a side, got {shapes}")
    found = []
    for mine, theirs in zip(x.float().split(CHUNK), y.float().split(CHUNK), strict=True):
        part = structural_similarity_index_measure(mine, theirs, data_range=1.0, reduction="none")
        found += part.flatten().tolist()
    return found


def score(images, reference) -> dict[str, float]:
    """Mean SSIM of N pictures against their N references."""
    found = per_item(images, reference)
    return {"ssim": sum(found) / len(found)}
