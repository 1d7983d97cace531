"""Kernels and measurements that need a card. The kernels here are not used by dq yet.

    visit     all of it in pieces, `python -m eval.gpu.visit`           bench   what the pieces measure
    checks    every kernel next to the reference                        faults  put into kernels, that checks see
    block     a block of FLUX in bf16 and on fused 8-bit kernels        flux    diffusers' FLUX beside other libraries
    kernels   norms, rotations, GELU, gates                             launches  what only that block runs, on tensors
The kernels run in Triton's interpreter and are compiled for every architecture in the tests, like those of dq.
"""
