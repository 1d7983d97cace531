"""Tables of rows: each row has values of its own, in rounding, learning, packed layers, kernels and files."""

import pytest
import torch
from torch import nn

import dq
from dq import formats, kernels, layers
from dq.fit import drafts, rounding
from dq.fit.adaround import Rounding
from dq.formats.base import FormatError, Scales
from dq.formats.lookup import normal
from dq.kernels import Conv, Tensors, torchops
from dq.plan import LayerPlan, Plan, TensorPlan

ROWS, COLUMNS = 12, 90


def make(seed):
    return torch.Generator().manual_seed(seed)


def tables(rows, bits, seed=3):
    """A rising table a row, every one another; the last two values of row 0 are the same."""
    drawn = torch.stack([torch.randperm(255, generator=make(seed + row))[: 2**bits] - 127 for row in range(rows)])
    drawn = drawn.sort(1).values
    drawn[0, -1] = drawn[0, -2]
    return drawn.to(torch.int8)


def scales(rows=ROWS, bits=4, seed=3):
    steps = torch.rand(rows, 1, generator=make(seed)) * 1e-3 + 1e-3
    return Scales(steps, table=tables(rows, bits, seed))


def weights(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=make(seed)) * 0.08


def nearest(weight, scale):
    """Found by looking at every value of every row."""
    values = scale.table.float() * scale.scale
    picks = (weight[:, :, None] - values[:, None]).abs().argmin(-1)
    return values.gather(1, picks)


def plan_of(weight="lut4/channel", act=None, shape=(ROWS, COLUMNS), **more):
    kind = "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"
    return LayerPlan(kind, shape, TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, **more)


def test_golden_lut3():
    form, x = formats.get("lut3"), torch.tensor([[-1.0, 0.05, 1.27, 0.3], [2.0, -0.9, 0.0, 0.4]])
    table = torch.tensor([[-100, -50, -10, 0, 8, 40, 90, 127], [-90, -60, -20, -2, 1, 40, 60, 100]], dtype=torch.int8)
    e = form.encode(x, scale=torch.tensor([[0.01], [0.02]]), table=table)
    assert e.codes.tolist() == [[0, 4, 7, 5], [7, 1, 4, 4]]  # 0 is nearer to 0.02 than to -0.04, 0.4 than to 0.8
    assert form.pack(e.codes).view(torch.uint8).tolist() == [[0xE0, 0x0B], [0x0F, 0x09]]
    assert torch.allclose(form.decode(e), torch.tensor([[-1.0, 0.08, 1.27, 0.4], [2.0, -1.2, 0.02, 0.02]]))


def test_the_default_table_is_normal_floats():
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    assert torch.tensor(normal(4)).div(127).sub(torch.tensor(published)).abs().max() < 0.5 / 127 + 1e-4
    assert normal(3)[0] == -127 and normal(3)[-1] == 127 and 0 in normal(3) and len(set(normal(3))) == 8


@pytest.mark.parametrize("bits", [3, 4])
def test_every_row_is_rounded_to_the_nearest_of_its_own_values(bits):
    form, weight, scale = formats.get(f"lut{bits}"), weights(), scales(bits=bits)
    assert torch.equal(form.fake(weight, "channel", *scale), nearest(weight, scale))
    e = form.encode(weight, "channel", *scale)
    assert torch.equal(form.decode(e), nearest(weight, scale)) and torch.equal(e.table, scale.table)
    real = form.pack(e.codes).numel() + 4 * e.scale.numel() + e.table.numel()
    assert form.packed_bytes(ROWS, COLUMNS) == real == ROWS * (-(-COLUMNS * bits // 8) + 4 + 2**bits)


def test_a_row_with_its_sign_turned_decodes_to_the_opposite():
    form, weight, scale = formats.get("lut4"), weights(), scales()
    turned = Scales(scale.scale, table=-scale.table.flip(1))
    assert torch.equal(form.fake(-weight, "channel", *turned), -form.fake(weight, "channel", *scale))


def test_gptq_takes_each_rows_own_values():
    weight, scale, plan = weights(), scales(), plan_of()
    mixed = torch.randn(500, 20, generator=make(1)) @ torch.randn(20, COLUMNS, generator=make(2))
    gram = mixed.t() @ mixed / 500
    rounded, kept = rounding.gptq(weight, plan, gram, scales=[scale])
    values = scale.table.float() * scale.scale
    assert torch.equal(rounded, nearest(rounded, scale)) and torch.equal(kept[0].table, scale.table)
    assert (rounded[:, :, None] == values[:, None]).any(-1).all()
    assert rounding.error(rounded, weight, gram) < 0.5 * rounding.error(nearest(weight, scale), weight, gram)


def test_learned_rounding_stands_between_neighbours_of_its_own_row():
    weight, scale, plan = weights(), scales(), plan_of()
    found = Rounding(weight, plan, [scale])
    values = scale.table.float() * scale.scale
    inside = (weight > values[:, :1]) & (weight < values[:, -1:])
    for row, column in inside.nonzero().tolist():
        below, above = found.low[row, column], found.high[row, column]
        assert below <= weight[row, column] <= above and below in values[row] and above in values[row]
        assert not ((values[row] > below) & (values[row] < above)).any()
    assert found.soft().isfinite().all()
    torch.testing.assert_close(found.soft()[inside], weight[inside], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(ROWS, 96), (ROWS, 8, 3, 3)], ids=["linear", "conv2d"])
@torch.no_grad()
def test_a_packed_layer_keeps_the_tables_of_its_rows_and_parts(shape):
    module = nn.Linear(96, ROWS) if len(shape) == 2 else nn.Conv2d(8, ROWS, 3)
    plan = plan_of(shape=shape, splits=(3,))
    draft = drafts.draft(module, plan)
    draft.scales = [scales(seed=5), scales(seed=50)]
    rows, parts = draft.weight.reshape(ROWS, -1), plan.parts
    expected = torch.cat([nearest(rows[:, a:b], s) for (a, b), s in zip(parts, draft.scales, strict=True)], 1)
    packed = draft.pack(torch.float32)
    assert packed.table.shape == (ROWS, 32) and packed.table.dtype == torch.int8
    assert torch.equal(packed.dense_weight().reshape(ROWS, -1), expected)
    x = torch.randn(2, *shape[1:2], *[7] * (len(shape) - 2), generator=make(9))
    torch.testing.assert_close(packed(x), packed.dense()(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_expert_decodes_by_its_own_tables():
    experts = torch.randn(3, 20, 4, generator=make(4)) * 0.08
    plan = LayerPlan("stack", (3, 20, 4), TensorPlan.parse("lut4/channel"))
    stack = layers.pack_stack("experts.up", experts, plan, torch.float32)
    stack.put("table", tables(12, 4))
    assert torch.equal(torch.stack([stack[i] for i in range(3)]), stack.dense_weight())


@pytest.mark.skipif(not kernels.vnni(), reason="torch._int_mm is refused without VNNI")
@pytest.mark.parametrize("act", ["int8/token", "int8a/token", "int4/token"])
def test_tables_run_as_an_exact_8_bit_product(act):
    plan, scale = plan_of("lut4/channel", act), scales()
    packed = layers.encode(weights(), plan, [scale])
    t = Tensors(packed["weight"], packed["scale"], table=packed["table"])
    x = torch.rand(17, COLUMNS, generator=make(6)) * 9 - 2
    assert torchops.why_not("linear", plan, "cpu") is None
    q, steps, zero = torchops.quantize_rows(x, plan.act.spec)
    codes = scale.table.double().gather(1, plan.weight.spec.unpack(packed["weight"], COLUMNS).long())
    product = (q.double() - (0 if zero is None else zero.double())) @ codes.t()
    assert torch.equal(torchops.build("linear", plan, None)(x, t), product.float() * steps * scale.scale.t())
    assert "integers, not lut4" in kernels.backends()["cpu"].why_not("linear", plan, "cpu", None)
    assert "one weight scale per" in torchops.why_not("linear", plan_of("lut4/group:16", act), "cpu")
    conv = plan_of("lut4", "int8/tensor", (8, 8, 3, 3))
    assert torchops.why_not("conv", conv, "cpu", Conv((1, 1), (1, 1), (1, 1), 1)) is None


def test_a_saved_model_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 5))
    plan = Plan({"0": plan_of("lut3/channel")}, compute_dtype="float32")
    dq.quantize(model, plan, progress=False)
    model[0].put("table", tables(ROWS, 3))
    dq.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 5))
    dq.load(tmp_path, fresh)
    assert torch.equal(fresh[0].table, model[0].table)
    x = torch.randn(3, COLUMNS)
    assert torch.equal(fresh(x), model(x)) and torch.equal(fresh[0].dense_weight(), model[0].dense_weight())


def test_a_decode_traces_into_one_graph():
    plan, scale = plan_of(), scales()
    packed = layers.encode(weights(), plan, [scale])
    t = Tensors(packed["weight"], packed["scale"], table=packed["table"])
    run, x = kernels.dense.build("linear", plan, None), torch.randn(4, COLUMNS)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x, t), run(x, t))


X = torch.ones(4, 32)
WRONG = {
    "a table of integers": (lambda: formats.get("int4").encode(X, table=tables(4, 4)), "got a table, expected none"),
    "a table alone": (lambda: formats.get("lut4").encode(X, table=tables(4, 4)), "expected its scale with it"),
    "a wide table": (
        lambda: formats.get("lut3").encode(X, scale=torch.ones(4, 1), table=tables(4, 4)),
        r"table \(4, 16\), expected int8 \(4, 8\)",
    ),
    "a table of floats": (
        lambda: formats.get("lut4").encode(X, scale=torch.ones(4, 1), table=tables(4, 4).float()),
        "got a torch.float32 table",
    ),
    "two levels": (lambda: formats.get("lut4").encode(X, "group:8+channel"), "expected two-level scales with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_was_expected(case):
    call, message = WRONG[case]
    with pytest.raises(FormatError, match=message):
        call()
