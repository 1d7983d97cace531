"""Attention rounded in tiles: what smoothing leaves alone and what it saves, masks, heads, formats of the softmax."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from dq.attentionplan import INT8, WISHES, AttentionPlan
from dq.errors import DQError
from dq.fusions import attention, tiles
from dq.kernels.cpu import attention as cpu
from dq.kernels.cpu import library
from dq.layers import attending, takeover
from pipelines import tiny

OFF = AttentionPlan()
INT4 = WISHES["sage2"].choices[0]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(rows=150, keys=700, width=32, batch=2, count=3):
    query, key, value = (drawn(batch, count, n, width, seed=seed) for seed, n in enumerate((rows, keys, keys)))
    return query, key, value


def error(plan, given, **more):
    """Relative error of the output."""
    full = F.scaled_dot_product_attention(*given, **more)
    return ((tiles.attention(plan, *given, **more) - full).norm() / full.norm()).item()


def median_error(plan, given, **more):
    """Relative error of the output's rows, their median."""
    full = F.scaled_dot_product_attention(*given, **more)
    return ((tiles.attention(plan, *given, **more) - full).norm(dim=-1) / full.norm(dim=-1)).median().item()


@cache
def calls(name):
    """By module (query, key, value) of attention in one call of an embedded model, in the middle of a run."""
    pipe, found = tiny.load(name), {}
    model = getattr(pipe, tiny.PARTS[name])

    def keep(place, query, key, value, *args, **kwargs):
        found[place] = tuple(each.detach() for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def role(place, module, inner, *args, **kwargs):
        with attention.Instead(partial(keep, place)):
            return inner(*args, **kwargs)

    for place, module in attending.modules(model):
        takeover.take(module, "kept", partial(role, place))
    pipe("a red circle", **tiny.CALL[name] | {"num_inference_steps": 2})
    return found


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("smooth", ["", "k", "q", "qk"])
def test_without_formats_smoothing_and_tiles_leave_the_output(name, smooth, start):
    for given in calls(name).values():
        assert error(AttentionPlan(smooth=smooth, start=start), given) < 2e-5


@pytest.mark.parametrize("name", tiny.NAMES)
def test_smoothing_saves_4_bit_scores_from_a_bias_of_the_keys(name):
    for place, (query, key, value) in calls(name).items():
        biased = query, key + 8 * key.abs().mean() * drawn(key.shape[-1]), value
        errors = {smooth: error(replace(INT4, smooth=smooth), biased) for smooth in ("", "k", "qk")}
        assert errors["k"] < 0.7 * errors[""] and errors["qk"] < 0.7 * errors[""], place
        assert abs(errors["k"] - error(replace(INT4, smooth="k"), (query, key, value))) < 0.1 * errors["k"] + 0.01, (
            place
        )


def test_smoothing_queries_saves_them_from_a_bias():
    query, key, value = heads()
    biased = query + 8 * drawn(32, seed=9), key, value
    errors = [error(replace(INT4, smooth=smooth), biased) for smooth in ("k", "qk")]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("plan", [OFF, AttentionPlan(smooth="qk", start=True)])
@pytest.mark.parametrize("kind", ["bool", "float", "row", "causal", "gqa", "scale"])
def test_masks_heads_and_scales_are_torchs(plan, kind):
    query, key, value = heads()
    mask = drawn(2, 1, 150, 700) > 0
    more = {
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": 3 * drawn(2, 3, 1, 700)},
        "row": {"attn_mask": mask[0, 0, :1]},
    }
    more |= {"causal": {"is_causal": True}, "gqa": {"enable_gqa": True}, "scale": {"scale": 0.3}}
    if kind == "gqa":
        key, value = key[:, :1], value[:, :1]
    assert error(plan, (query, key, value), **more[kind]) < 1e-5


def test_rows_without_keys_give_zeros_and_half_precision_stays():
    mask = torch.ones(150, 700, dtype=torch.bool)
    mask[3] = False
    query, key, value = (each.bfloat16() for each in heads())
    found = tiles.attention(INT4, query, key, value, mask)
    assert found.dtype is torch.bfloat16 and not found[:, :, 3].any() and found.isfinite().all()


def test_samples_and_heads_do_not_see_each_other():
    given = heads()
    query, key, value = (torch.cat([each[:1], 100 * each[1:]]) for each in given)
    assert torch.equal(tiles.attention(INT4, *given)[0], tiles.attention(INT4, query, key, value)[0])


def test_a_scale_for_each_thread_is_nearly_one_for_each_token_and_better_than_one_for_all():
    query, key, value = heads()
    loud = torch.ones(150, 1)
    loud[::32] = 20
    grains = ("token", "thread", "block", "tensor")
    given = query * loud, key, value
    errors = [error(AttentionPlan(q=f"int4/{grain}"), given) for grain in grains]
    assert errors == sorted(errors) and errors[1] < 0.9 * errors[2]


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_the_kernel_of_bytes_rounds_as_the_tiles_do():
    given = heads(width=64)
    full, ours = F.scaled_dot_product_attention(*given), cpu.sdpa(*given, int8=True)
    between = (ours - tiles.attention(INT8, *given)).norm()
    assert between < 0.2 * (ours - full).norm() and error(INT8, given) < 0.03


def test_logarithmic_shares_are_powers_and_end_in_zero():
    weights = torch.tensor([1.0, 0.71, 0.5, 0.34, 2**-7.0, 2**-7.3, 0.0])
    assert tiles._share(weights, "log4/0.5").tolist() == pytest.approx([1, 2**-0.5, 0.5, 2**-1.5, 2**-7.0, 0, 0])
    linear = tiles._share(weights, "uint4")
    assert linear.tolist() == pytest.approx([round(15 * w) / 15 for w in weights.tolist()])
    assert (tiles._share(torch.rand(1000), "uint8") >= 0).all() and tiles._share(weights, "fp8")[0] == 1


@pytest.mark.parametrize("name", tiny.NAMES)
def test_logarithmic_shares_keep_the_text_beside_a_loud_start_token_where_linear_ones_lose_it(name):
    """DGQ's P3, on the text's part of the output: the start token's value is 0, its share 0.9 and more."""
    for place, (query, key, value) in calls(name).items():
        if place.endswith("attn2"):
            loud = torch.zeros(1, key.shape[2])
            loud[0, 0] = 8
            given, shares = (query, key, value * (loud[0] == 0)[:, None]), ("log4/1", "uint4")
            together = [median_error(AttentionPlan(p=p), given, attn_mask=loud) for p in shares]
            apart = [median_error(AttentionPlan(p=p, start=True), given, attn_mask=loud) for p in shares]
            assert together[0] < 0.3 < 0.9 < together[1] and max(apart) < 0.3, place


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q": "int4"}, "q is 'int4', expected a format and one of token, block"),
        ({"k": "int4/channel"}, "k is 'int4/channel', expected a format and one of"),
        ({"v": "int9/channel"}, "v is 'int9/channel'"),
        ({"q": "nvfp4/token"}, "expected a format of one symmetric scale"),
        ({"p": "int8"}, "p is 'int8', expected uint2 to uint8, fp8, or a logarithm"),
        ({"p": "log4/0"}, "p is 'log4/0'"),
        ({"smooth": "v"}, "smooth is 'v', expected one of"),
    ],
)
def test_formats_that_do_not_exist_are_refused_in_one_line(fields, message):
    with pytest.raises(DQError, match=f"^attention of 'a.b': .*{message}") as told:
        AttentionPlan(**fields).check("a.b")
    assert "\n" not in str(told.value)
