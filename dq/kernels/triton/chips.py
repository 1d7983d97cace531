"""What GPUs multiply in hardware, and from which release on Triton's compiler gets there; plain data, no triton.

Found by compiling every kernel for every chip with every release (`python -m tests.kernels.cross_compile`), which also
holds that each refusal is still needed. A product without its unit falls to an older instruction: right, and slower
than bf16, so it is refused here and torch's own ops run the layer.
"""

from __future__ import annotations

import re

OLDEST = (3, 6)  # release of Triton
# gfx942 has an fp8 of its own, gfx950 block scales that are powers of two, sm_103 no integers in its fifth-generation
# tensor cores
WITHOUT = {
    "int8": ("sm_103",),
    "fp8": ("sm_80", "sm_86", "sm_87", "gfx942"),
    "nvfp4": ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "gfx942", "gfx950"),
}
SINCE = {("sm_100", "int8"): (3, 8)}  # earlier ones multiply int8 there with the instruction of sm_80

Release = tuple[int, int]


def release(version: str) -> Release:
    """Of a version as builds write it: "3.9.0", "3.7.1+gitd1f7", "3.6.0.post25"; (0, 0) of one without numbers."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def dotted(numbers: Release) -> str:
    return ".".join(map(str, numbers))


def too_old(version: str) -> str | None:
    """Why a version of Triton is not used at all, None when it is."""
    numbers = release(version)
    return None if numbers >= OLDEST else f"triton {version} is older than {dotted(OLDEST)}"


def missing(unit: str, arch: str, numbers: Release | None = None) -> str | None:
    """Why products of a kind ("int8", "fp8", "nvfp4") do not run on a chip, None when they do.

    numbers  of the Triton at hand, None for the newest
    """
    if arch in WITHOUT.get(unit, ()):
        return f"{arch} has no {unit} matrix unit"
    since = SINCE.get((arch, unit))
    if since is None or numbers is None or numbers >= since:
        return None
    return f"triton {dotted(numbers)} does not reach the {unit} matrix unit of {arch}, {dotted(since)} does"
