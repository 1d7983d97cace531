"""WanPipeline with two experts: each is calibrated on the steps it runs, with its own scales, buckets and budget."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image

import dq
from dq.errors import DQError
from dq.host import mark
from dq.layers import packed_layers
from dq.trace.capture import capture
from dq.trace.records import Store
from tests import zoo
from tests.pipelines import parts

EDGE = 0.5
CALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16, "guidance_scale": 1.0}
PARTS = ("transformer", "transformer_2")


def wan(kind=diffusers.WanPipeline, **changes):
    """A pipeline of random weights whose experts have one block each, and take turns at EDGE of the noise."""
    encoder, tokenizer = parts.t5("UMT5")
    own = {"image_dim": None, "added_kv_proj_dim": None, "num_layers": 1} | changes
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=parts.seeded(lambda: diffusers.AutoencoderKLWan(**parts.WAN_VAE)),
        scheduler=parts.flow(),
        transformer=zoo.build("WanTransformer3DModel", init="own", **own),
        transformer_2=zoo.build("WanTransformer3DModel", seed=1, init="own", **own),
        boundary_ratio=EDGE,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calibration(**changes):
    return dq.Calibration(**({"prompts": ["a cat"], "steps": 6, "samples": 6, "call_kwargs": CALL} | changes))


@pytest.fixture(scope="module")
def fitted():
    pipe = wan()
    return pipe, dq.quantize(pipe, "tfmq-w8a8", calibration=calibration(), progress=False)


def test_each_expert_has_the_step_buckets_and_scales_of_the_steps_it_runs(fitted):
    pipe, _ = fitted
    early, late = (mark.plan_of(getattr(pipe, name)).edges for name in PARTS)
    assert early and late and min(early) > 1000 * EDGE > max(late)
    tables = []
    for name in PARTS:
        layers = packed_layers(getattr(pipe, name))
        tables.append([layer.act_scale for layer in layers.values() if getattr(layer, "act_scale", None) is not None])
    assert tables[0] and len(tables[0]) == len(tables[1])
    assert not all(torch.equal(one, other) for one, other in zip(*tables, strict=True))


def test_the_report_says_which_expert_was_fitted_on_which_steps(fitted):
    pipe, report = fitted
    found = {}
    for name in PARTS:
        (line,) = [note for note in report.notes if note.startswith(f"{name}: fitted on")]
        found[name] = [float(part) for part in re.search(r"timesteps (\S+) to (\S+)$", line).groups()]
        assert any(row.name.startswith(f"{name}.") for row in report.layers)
    assert found["transformer"][0] == 1000 and found["transformer"][1] >= 1000 * EDGE > found["transformer_2"][0]
    frames = pipe("a cat", num_inference_steps=4, output_type="np", **CALL).frames
    assert torch.from_numpy(frames).isfinite().all()


def test_each_expert_keeps_its_own_budget():
    pipe = wan()
    limits = {
        "transformer": dq.Budget(bits=7, metric="prediction"),
        "transformer_2": dq.Budget(bits=5, metric="prediction"),
    }
    report = dq.quantize(pipe, "int8-weight", budget=limits, calibration=calibration(), progress=False)
    bits = {}
    for name in PARTS:
        layers = mark.plan_of(getattr(pipe, name)).layers.values()
        bits[name] = sum(x.rows * x.columns * x.weight.spec.bits for x in layers) / sum(
            x.rows * x.columns for x in layers
        )
    assert 5 < bits["transformer"] <= 7 and bits["transformer_2"] <= 5
    said = [note for note in report.notes if "bits per weight: predicted" in note]
    assert [note.partition(" bits per weight")[0] for note in said] == [
        "transformer: budget 7",
        "transformer_2: budget 5",
    ]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"transformer": dq.Budget(bits=5)}, "got limits of transformer, expected one for each of transformer, tr"),
        ({name: dq.Budget(bits=5, scope="pipeline") for name in PARTS}, "expected scope='denoiser'"),
        ({"transformer": dq.Budget(bits=5), "transformer_2": dq.Budget(bits=5, metric="output")}, "the same in each"),
        ({"transformer": 5, "transformer_2": 5}, "budget is 5, expected dq.Budget"),
        ({"transformer": dq.Budget(bits=5), "transformer_2": dq.Budget(bits=0.5)}, "budget"),
    ],
)
def test_wrong_budgets_by_expert_are_refused_in_one_line_before_any_work(limits, message):
    pipe = wan()
    with pytest.raises(DQError, match=message) as error:
        dq.quantize(pipe, "int8-weight", budget=limits, calibration=calibration(), progress=False)
    assert "\n" not in str(error.value) and not packed_layers(pipe.transformer)


def test_limits_by_denoiser_are_not_for_a_model():
    with pytest.raises(DQError, match=r"expected one dq\.Budget"):
        dq.quantize(wan().transformer, "int8-weight", budget={"transformer": dq.Budget(bits=5)}, progress=False)


def test_first_and_last_frames_reach_both_experts_through_call_kwargs(tmp_path, monkeypatch):
    """WanImageToVideoPipeline: 16 channels of noise, 4 of the mask, 16 of the frames that are given."""
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", str.strip)  # its own needs ftfy
    pipe = wan(diffusers.WanImageToVideoPipeline, in_channels=36)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    given = {"first": {"image": red}, "both": {"image": red, "last_image": blue}}
    seen = {}
    for name, pictures in given.items():
        models = {part: getattr(pipe, part) for part in PARTS}
        kept = calibration(steps=4, samples=4, policy="all", call_kwargs=CALL | pictures)
        assert capture(pipe, models, kept, tmp_path / name, progress=False) == {}
        for part in PARTS:
            store = Store(tmp_path / name / part)
            calls = [store.read(key, kind="call") for key in store.keys("calls/")]
            assert calls and all(call["kwargs"]["hidden_states"].shape[1] == 36 for call in calls)
            seen[name, part] = calls[0]["kwargs"]["hidden_states"][:, 16:].float()
    for part in PARTS:
        first, both = seen["first", part], seen["both", part]
        assert torch.equal(first[:, :4, :1], both[:, :4, :1]) and not torch.equal(first, both)
        assert both[:, :4, -1].amax() == 1 and first[:, :4, -1].amax() == 0, "the mask says which frames are given"
