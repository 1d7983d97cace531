"""No test reaches for a model hub, for more cores than its worker has, or for times; `gpu` tests need CUDA."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DQ_CHOICE"] = "static"  # kernels by rank, the same ones however loaded the machine is

import pytest
import torch

import dq
from tests import models

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small FLUX transformer, full precision, fp32, on disk."""
    return models.saved(tmp_path_factory.mktemp("base"), models.FLUX)


@pytest.fixture(scope="session")
def quantized(base, tmp_path_factory):
    """The same, int8, saved."""
    folder = str(tmp_path_factory.mktemp("quantized") / "model")
    models.load(base, quantization_config=dq.DQConfig("int8")).save_pretrained(folder)
    return folder
