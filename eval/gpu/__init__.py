"""Kernels and measurements that need a card. The kernels here are not used by dq yet.

    bench     right first, then how fast: `python -m eval.gpu.bench`    checks  every kernel next to the reference
    block     a block of FLUX in bf16 and on fused 8-bit kernels        launches  what only that block runs, on tensors
    kernels   norms, rotations, GELU, gates                             attention  8-bit queries and keys
The kernels run in Triton's interpreter and are compiled for every architecture in the tests, like those of dq.
"""
