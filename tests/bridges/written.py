"""Files as other programs write them: GGUF by the package gguf, in the names of diffusers or of the authors."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from dq.bridges import layouts
from tests import zoo

TYPES = gguf.GGMLQuantizationType
FAMILIES = {
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "sdxl": "UNet2DConditionModel",
    "pixart": "PixArtTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "qwen_image": "QwenImageTransformer2DModel",
}
ENCODED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # the library encodes these
HALVES = {  # bytes at which blocks of a type have 16-bit numbers: scales, then minima
    "Q8_0": ((0,), ()), "Q4_0": ((0,), ()), "Q5_0": ((0,), ()), "Q4_1": ((0,), (2,)), "Q5_1": ((0,), (2,)),
    "Q2_K": ((80,), (82,)), "Q3_K": ((108,), ()), "Q4_K": ((0,), (2,)), "Q5_K": ((0,), (2,)), "Q6_K": ((208,), ()),
    "MXFP4": ((), ()), "IQ4_NL": ((0,), ()), "IQ4_XS": ((0,), ()),
}  # fmt: skip


def blocks(kind: str, count: int, seed: int = 0, negative: bool = False) -> np.ndarray:
    """Random blocks of a type, uint8 (count, bytes): every code and sub-scale, scales of 16 bits up to 0.02."""
    dice = np.random.default_rng(seed)
    raw = dice.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[TYPES[kind]][1]), dtype=np.uint8)
    scales, minima = HALVES[kind]
    for at in (*scales, *minima):
        low = -0.02 if at in minima or negative else 0.0
        raw[:, at : at + 2] = dice.uniform(low, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = dice.integers(115, 121, count)
    return raw


def quantized(x: np.ndarray, kind: str) -> np.ndarray:
    """Rows of blocks: rounded by the library where it can, else random ones of the same shape."""
    if kind in ENCODED:
        return gguf.quants.quantize(x, TYPES[kind])
    width, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    made = blocks(kind, x.size // width, negative=HALVES[kind][1] == ())
    return made.reshape(len(x), x.shape[1] // width * size)


def file(path: Path, tensors: dict[str, np.ndarray], kind: str | None = None, arch: str = "flux", **texts) -> Path:
    """A GGUF file; matrices whose rows are whole blocks of `kind` are in it, all else is fp32."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in texts.items():
        writer.add_string(key.replace("__", "."), value)
    for name, value in tensors.items():
        width = gguf.GGML_QUANT_SIZES[TYPES[kind]][0] if kind else 1
        if kind and value.ndim == 2 and name.endswith("weight") and value.shape[1] % width == 0:
            writer.add_tensor(name, quantized(value, kind), raw_dtype=TYPES[kind])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(model, original: bool) -> dict[str, np.ndarray]:
    """A model's tensors in fp32, in diffusers' names or those of the authors."""
    state = {name: value.float() for name, value in model.state_dict().items()}
    layout = layouts.of(type(model).__name__, model.config)
    if not original or layout is None:
        return {name: value.numpy() for name, value in state.items()}
    homes = layout.homes(state, model.config)
    groups: dict[str, list[str]] = {}
    for name, home in sorted(homes.items(), key=lambda row: row[1].place):
        groups.setdefault(home.file, []).append(name)
    made = {}
    for name, parts in groups.items():
        value = torch.cat([state[part] for part in parts])
        made[name] = (torch.cat(value.chunk(2)[::-1]) if homes[parts[0]].how == layouts.HALVES else value).numpy()
    return made


def model(family: str):
    """A tiny model of random weights, and its config."""
    made = zoo.build(FAMILIES[family])
    return made, {**made.config, "_class_name": FAMILIES[family]}
