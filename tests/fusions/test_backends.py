"""diffusers' attention backends by card: chosen, given way where the user chose, refused per call, undone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from torch._subclasses.fake_tensor import FakeTensorMode

import dq
from dq import fusions, kernels
from dq.fusions import backends
from dq.kernels import Machine
from tests import models, zoo
from tests.models import FLUX, PIXART

NAMES = dispatch.AttentionBackendName
REGISTRY = dispatch._AttentionBackendRegistry


def installed(monkeypatch, *packages: str, hub: bool = False):
    """Let diffusers find these packages and no others; `hub`: code from the Hub is allowed."""
    monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", "sage" in packages)
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN_3", "flash3" in packages)
    monkeypatch.setattr(dispatch, "is_kernels_available", lambda: "kernels" in packages)
    monkeypatch.setattr(dispatch, "is_kernels_version", lambda *wanted: True)
    monkeypatch.setattr(dispatch, "DIFFUSERS_TRUST_REMOTE_KERNELS", hub)


def chosen(arch: str):
    with kernels.imagined(Machine(gpu=arch)):
        return backends.choose("cuda")


def recorded(monkeypatch) -> list[str]:
    """Names of the backends that are called, in place of any attention."""
    calls = []
    for member in (NAMES.NATIVE, NAMES.SAGE, NAMES._FLASH_3, NAMES._NATIVE_CUDNN, NAMES.FLASH):
        run = lambda q, k, v, member=member, **given: calls.append(member.value) or torch.zeros_like(q)  # noqa: E731
        monkeypatch.setitem(REGISTRY._backends, member, run)
    return calls


def quantized(name: str = FLUX) -> torch.nn.Module:
    model = zoo.build(name, dtype=torch.bfloat16)
    dq.quantize(model, "sageattention-int8", progress=False)
    return model


def named(model) -> set:
    return {backends._name(processor) for processor in backends._processors(model)}


def on_a_card(model):
    """The model, its parameters on a card without memory."""
    with FakeTensorMode():
        for module in model.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    module._parameters[key] = torch.nn.Parameter(made, False)
    return model


@pytest.mark.parametrize(
    ("arch", "packages", "hub", "name"),
    [
        ("sm_80", ("sage",), False, "sage"),
        ("sm_89", ("sage", "flash3", "kernels"), True, "sage"),
        ("sm_120", ("kernels",), True, "sage_hub"),
        ("sm_120", ("kernels",), False, "native"),
        ("sm_86", (), True, "native"),
        ("sm_90", ("sage", "flash3"), False, "_flash_3"),
        ("sm_90", ("sage",), False, "_native_cudnn"),
        ("sm_100", ("sage", "flash3", "kernels"), True, "_native_cudnn"),
        ("sm_75", ("sage", "flash3", "kernels"), True, "native"),
        ("gfx942", ("sage", "flash3", "kernels"), True, "native"),
    ],
)
def test_the_card_and_what_is_installed_choose(arch, packages, hub, name, monkeypatch):
    installed(monkeypatch, *packages, hub=hub)
    assert chosen(arch)[0] == name


def test_every_faster_backend_that_is_not_there_has_a_reason(monkeypatch):
    installed(monkeypatch, "kernels")
    sage, hub = chosen("sm_89")[1]
    assert "'sage'" in sage and "install `sageattention>=" in sage
    assert "'sage_hub'" in hub and "DIFFUSERS_TRUST_REMOTE_KERNELS=true" in hub
    assert "sm_75" in chosen("sm_75")[1][0]
    installed(monkeypatch, "flash3")
    assert chosen("sm_90")[1] == ()


def test_a_kernel_of_the_hub_is_loaded_only_where_it_is_allowed_and_may_fail(monkeypatch):
    asked = []

    def load(member):
        asked.append(member.value)
        raise OSError("no network\nhere")

    monkeypatch.setattr(dispatch, "_maybe_download_kernel_for_backend", load)
    installed(monkeypatch, "kernels")
    assert "set DIFFUSERS" in backends.why_not("sage_hub") and not asked
    installed(monkeypatch, "kernels", hub=True)
    assert backends.why_not("sage_hub") == "no network here" and asked == ["sage_hub"]


def call(monkeypatch, arch="sm_89", dtype=torch.bfloat16, rows=(8, 8), size=64, device="cuda", grad=False, **given):
    """Which backend a call on a card reaches through dq's entry."""
    calls = recorded(monkeypatch)
    with FakeTensorMode(), kernels.imagined(Machine(gpu=arch)):
        make = lambda count: torch.empty(1, count, 2, size, dtype=dtype, device=device, requires_grad=grad)  # noqa: E731
        dispatch.dispatch_attention_fn(
            make(rows[0]), make(rows[1]), make(rows[1]), backend=backends.entry(given.pop("backend", None)), **given
        )
    (name,) = calls
    return name


def test_calls_that_a_library_would_refuse_are_torchs(monkeypatch):
    installed(monkeypatch, "sage", "flash3")
    assert call(monkeypatch) == "sage" and call(monkeypatch, rows=(8, 5)) == "sage"
    assert call(monkeypatch, attn_mask=torch.ones(1, 8, dtype=torch.bool)) == "native"
    assert call(monkeypatch, dtype=torch.float32) == "native" and call(monkeypatch, dropout_p=0.1) == "native"
    assert call(monkeypatch, size=160) == "native" and call(monkeypatch, size=160, arch="sm_90") == "_flash_3"
    assert call(monkeypatch, size=60) == "native" and call(monkeypatch, rows=(8, 1)) == "native"
    assert call(monkeypatch, grad=True) == "native" and call(monkeypatch, device="cpu") == "native"


def test_reference_for_all_or_for_one_model_is_torchs_attention(monkeypatch):
    installed(monkeypatch, "sage")
    dq.set_backend("reference")
    try:
        assert call(monkeypatch) == "native" and call(monkeypatch, backend="auto") == "sage"
    finally:
        dq.set_backend("auto")
    assert call(monkeypatch, backend="reference") == "native"


def test_the_backend_that_the_user_made_active_serves(monkeypatch):
    installed(monkeypatch, "sage")
    monkeypatch.setattr(REGISTRY, "_active_backend", NAMES.FLASH)
    assert call(monkeypatch) == "flash"


def test_only_int8_plans_are_attached_and_what_the_user_set_stays():
    model = zoo.build(FLUX, dtype=torch.bfloat16)
    dq.quantize(model, "int8", progress=False)
    assert named(model) == {None}
    model = zoo.build(FLUX, dtype=torch.bfloat16)
    first = next(backends._processors(model))
    first._attention_backend = NAMES._NATIVE_MATH
    dq.quantize(model, "sageattention-int8", progress=False)
    assert named(model) == {"_native_math", "dq"}
    for processor in list(backends._processors(model))[1:]:
        processor._attention_backend = NAMES.FLEX
    dq.set_backend("reference", model)
    dq.dequantize(model)
    assert named(model) == {"_native_math", "flex"}


def test_backends_of_a_model_alone_and_dequantizing_are_followed():
    model = quantized()
    dq.set_backend("reference", model)
    assert named(model) == {"dq_reference"}
    dq.set_backend("auto", model)
    assert named(model) == {"dq_auto"}
    dq.dequantize(model)
    assert named(model) == {None}


def test_setting_it_leaves_other_models_and_the_checkpoint_alone(tmp_path):
    active = REGISTRY._active_backend
    model = quantized()
    other = zoo.build(FLUX, dtype=torch.bfloat16)
    assert REGISTRY._active_backend is active and named(other) == {None}
    model.save_pretrained(tmp_path)
    assert not any("dq_auto" in text.read_text() or "_attention_backend" in text.read_text()
                   for text in tmp_path.glob("*.json"))  # fmt: skip
    assert named(models.load(tmp_path, torch_dtype=torch.bfloat16)) == {"dq"}


def test_copies_keep_the_entry_and_pickles_bring_it_to_a_process_without_dq():
    made = backends.entry("auto")
    assert copy.deepcopy(made) is made and pickle.loads(pickle.dumps(made)) is made
    read = f"import pickle; print(pickle.loads({pickle.dumps(made)!r}).value)"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "dq_auto", found.stderr


@torch.no_grad()
def test_on_the_cpu_nothing_changes_eager_or_compiled():
    model = quantized()
    expected, graphs = models.output(model), []
    backends.detach(model)
    assert torch.equal(models.output(model), expected)
    backends.attach(model)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert (models.output(compiled) - expected).norm() <= 0.01 * expected.norm() and len(graphs) == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_calls_settle_on_a_card_once_and_in_one_graph(monkeypatch):
    installed(monkeypatch, "sage")
    seen, asked, choose = [], [], backends.choose
    sage = lambda query, key, value, **given: query * 2  # noqa: E731
    monkeypatch.setitem(REGISTRY._backends, NAMES.SAGE, sage)
    monkeypatch.setattr(backends, "choose", lambda device: asked.append(device) or choose(device))
    entry = backends.entry(None)

    def backend(graph, inputs):
        seen.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(
        lambda q: dispatch.dispatch_attention_fn(q, q, q, backend=entry), fullgraph=True, backend=backend
    )
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.imagined(Machine(gpu="sm_89")):
        q = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
        run(q), run(q)
    torch._dynamo.reset()
    assert len(seen) == 1 and "* 2" in seen[0] and len(asked) == 1


def test_explain_says_what_serves_and_why_nothing_faster(monkeypatch):
    installed(monkeypatch, "sage")
    model = on_a_card(quantized())
    count = len(list(backends._processors(model)))
    with kernels.imagined(Machine(gpu="sm_89")):
        (line,) = [line for line in fusions.notes(model) if "attention" in line]
    assert line.startswith(f"attention runs on diffusers' 'sage' in {count} modules, not measured here")
    installed(monkeypatch)
    with kernels.imagined(Machine(gpu="sm_89")):
        told = [line for line in fusions.notes(model) if "attention" in line]
    assert told[0] == f"attention is torch's in {count} modules" and "does not run on diffusers' 'sage': " in told[1]
    backends.set_backend(model, "reference")
    assert "attention is torch's: backend 'reference' was selected with dq.set_backend" in fusions.notes(model)
    for processor in backends._processors(model):
        processor._attention_backend = NAMES.FLASH
    assert f"attention runs on diffusers' 'flash' in {count} modules, as was set for them" in fusions.notes(model)


def test_models_whose_processors_name_no_backend_stay_torchs():
    model = on_a_card(quantized(PIXART))
    assert named(model) == set() and any("attention is torch's in 4 modules" in line for line in fusions.notes(model))


@pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
def test_a_library_that_is_not_right_on_the_card_is_refused(fault, monkeypatch):
    right, cpu = REGISTRY._backends[NAMES.NATIVE], torch.device("cpu")
    monkeypatch.setitem(REGISTRY._backends, NAMES.SAGE, lambda q, k, v: right(q, k, v))
    assert backends._wrong("sage", cpu) is None

    def run(q, k, v):
        if fault == "raises":
            raise RuntimeError("no kernel image\nfor this device")
        return right(q, k, v) * (1.2 if fault == "wrong" else float("nan"))

    monkeypatch.setitem(REGISTRY._backends, NAMES.SAGE, run)
    expected = "no kernel image for this device" if fault == "raises" else "away from torch's"
    assert expected in backends._wrong("sage", cpu)


def test_nothing_is_tried_or_kept_while_a_graph_is_captured(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "_served", {})
    monkeypatch.setattr(backends, "_choose", lambda device: asked.append(device) or ("sage", ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.choose("cuda:0")[0] == "native" and not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert backends.choose("cuda:0")[0] == backends.choose("cuda:0")[0] == "sage" and len(asked) == 1
