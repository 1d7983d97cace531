"""Quantizing before and after what people turn on around a pipeline: it works, or one line says what to do first."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import PixArtSigmaPipeline
from torch import nn

import dq
from dq.errors import DQError
from dq.layers import packed_layers
from tests.models import same_state

CPU = torch.device("cpu")
TINY = "pipelines/tiny/tiny-pixart"
CLOSE = 0.1  # relative error of a prediction of int8


def call(pipe, step: int = 500) -> torch.Tensor:
    """A prediction of the pipeline's denoiser on seeded inputs."""
    dice = torch.Generator().manual_seed(0)
    model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    size = model.config.sample_size
    given = {
        "hidden_states": torch.randn(1, model.config.in_channels, size, size, generator=dice),
        "encoder_hidden_states": torch.randn(1, 8, model.config.caption_channels, generator=dice),
        "timestep": torch.tensor([step]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        return pipe.transformer(**given, return_dict=False)[0]


def sequential_offload(pipe) -> None:
    cpu_offload(pipe.transformer, execution_device=CPU)


def model_offload(pipe) -> None:
    cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


def group_offload(pipe) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def compiled(pipe) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    call(pipe)


def compiled_in_place(pipe) -> None:
    pipe.transformer.compile(backend="eager")
    call(pipe)


def casting(pipe) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def pickled(pipe) -> None:
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))


def threads(pipe) -> None:
    steps = (900, 100) * 4
    alone = [call(pipe, step) for step in steps]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda step: call(pipe, step), steps))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


WAYS = (sequential_offload, model_offload, group_offload, compiled, compiled_in_place, casting, pickled, threads)
FIRST = {sequential_offload: "offloaded", group_offload: "group offloading on", casting: "layerwise casting on"}


@pytest.fixture(autouse=True)
def fresh():
    """No compiled code of another test."""
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    return call(PixArtSigmaPipeline.from_pretrained(TINY))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    pipe = PixArtSigmaPipeline.from_pretrained(TINY)
    dq.quantize(pipe, "int8", progress=False)
    return pipe.transformer


def right(pipe, truth: torch.Tensor) -> bool:
    return bool((call(pipe) - truth).norm() < CLOSE * truth.norm())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_quantize_before(way, truth, plain):
    pipe = PixArtSigmaPipeline.from_pretrained(TINY)
    dq.quantize(pipe, "int8", progress=False)
    way(pipe)
    assert right(pipe, truth) and right(pipe, truth)
    assert packed_layers(pipe.transformer) and dq.explain(pipe).layers


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_quantize_after(way, truth, plain, tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(TINY)
    way(pipe)
    if way in FIRST:
        with pytest.raises(DQError, match=FIRST[way]) as error:
            dq.quantize(pipe, "int8", progress=False)
        assert "\n" not in str(error.value) and "first" in str(error.value)
        assert not packed_layers(pipe.transformer) and right(pipe, truth)
        return
    dq.quantize(pipe, "int8", progress=False)
    assert right(pipe, truth) and right(pipe, truth)
    assert same_state(getattr(pipe.transformer, "_orig_mod", pipe.transformer), plain)
    dq.save(pipe, tmp_path / "saved")
    assert same_state(PixArtSigmaPipeline.from_pretrained(tmp_path / "saved").transformer, plain)
