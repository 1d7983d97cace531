"""What README says in figures: three to begin with, and which recipe for which need. All are from committed rows."""

from __future__ import annotations

from dq import cookbook
from dq.plan import Recipe, TensorPlan
from eval.experiments import methods, quality, rows
from eval.experiments.tables import OLD
from eval.markdown import table
from pipelines import tiny

MODELS = tiny.NAMES
# need, recipe, where its rows are, and the entry of the suite for what has a budget
NEEDS = (
    ("smaller and faster, at once", "int8", "quality", ""),
    ("smaller, nearly the same pictures", "int8-weight", "quality", ""),
    ("4-bit weights, no integer products", "gptq-int4-weight", "methods", ""),
    ("4-bit weights, integer products", "svdquant-w4a8", "methods", ""),
    ("4 bits on both sides", "svdquant-int4", "methods", ""),
    ("a size you state: `budget=dq.Budget(bits=5)`", "int8-weight", "eval", "mixed-5-bits"),
)
QUALITY, SPEED, METHODS = (f"docs/results/{page}.md" for page in ("quality", "speed", "methods"))
RIVALS = {"torchao": "torchao-int8-compiled", "SDNQ": "sdnq-int8-compiled"}


def headline() -> list[str]:
    """Three lines of markdown, each with a link to the page of its rows."""
    one, two = (_row("quality", "int8", model) for model in MODELS)
    other = f"{MODELS[1]}: {_size(two)}, {two['psnr_db']:.1f} dB"
    first = f"to the fp32 pictures of the same seeds (`int8`, {MODELS[0]}; {other}){_mark(one, two)}."
    fast = {row["contender"]: row["times_base"] for row in _kernels("flux")}
    rivals = ", ".join(f"{name} {fast[key]:.2f}" for name, key in RIVALS.items())
    second = f"at the widths of FLUX, random weights, 2 CPU cores with AVX512 (`int8`; beside it, compiled: {rivals})."
    return [
        f"- [**8 bits: {_size(one)} the bytes, {one['psnr_db']:.1f} dB**]({QUALITY}) {first}",
        f"- [**{fast['dq-int8']:.2f} times as fast as bf16**]({SPEED}) {second}",
        _four_bits(),
    ]


def _four_bits() -> str:
    one, two = (_row("methods", "svdquant-int4", model) for model in MODELS)
    plain = [_row("methods", "plain of svdquant-int4", model) for model in MODELS]
    told = f"where plain rounding of the same layers has {plain[0]['psnr_db']:.1f} (`svdquant-int4`, {MODELS[0]}; "
    told += (
        f"{MODELS[1]}: {_size(two)}, {two['psnr_db']:.1f} and {plain[1]['psnr_db']:.1f} dB){_mark(one, two, *plain)}."
    )
    return f"- [**4 bits: {_size(one)} the bytes, {one['psnr_db']:.1f} dB**]({METHODS}) {told}"


def needs() -> list[str]:
    """Markdown lines: need, recipe, bits, size, decibels and minutes of calibration on both embedded models."""
    head = ["you want", "recipe", "bits", "size, of fp32", "PSNR, dB", "calibration, min", "rows"]
    return table(head, [_needed(*given) for given in NEEDS])


def needs_say() -> str:
    """What the figures of the table are."""
    prompts = {_row(page, name, model)["prompts"] for _, name, page, entry in NEEDS if not entry for model in MODELS}
    items = _row("eval", NEEDS[-1][-1], MODELS[0])["items"]
    return (
        f"First {MODELS[0]}, then {MODELS[1]}. Size: the denoiser beside fp32. PSNR: mean over {_either(prompts)} "
        f"held-out prompts, to the fp32 pictures of the same seeds; last row: {items}. Calibration: on the CPU."
    )


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _needed(need: str, recipe: str, page: str, entry: str) -> list[str]:
    found = [_row(page, entry or recipe, model) for model in MODELS]
    sizes, decibels = (
        ", ".join(_size(row).rstrip("x") for row in found),
        ", ".join(f"{row['psnr_db']:.1f}" for row in found),
    )
    fitted = bool(entry) or cookbook.get(recipe).needs_calibration
    minutes = ", ".join(f"{row['seconds'] / 60:.1f}" for row in found) if fitted else "none"
    link = f"[{page}](docs/results/{page}.md)" + _mark(*found)
    return [need, f"`{recipe}`", _bits(cookbook.get(recipe), bool(entry)), sizes, decibels, minutes, link]


def _bits(recipe: Recipe, mixed: bool) -> str:
    """`W4A8`: bits of most weights and of activations; of weights under a budget their mean."""
    weight, act = (None if text is None else TensorPlan.parse(text).spec.bits for text in recipe.linear)
    return ("W5, mean" if mixed else f"W{weight}") + ("" if act is None else f"A{act}")


def _row(page: str, name: str, model: str) -> dict:
    """The row of a recipe, method or entry of the suite on a model, all with the keys of methods' rows."""
    if page == "eval":
        found = next(
            row for row in rows.read(rows.FOLDER / "eval.json") if (row["pipeline"], row["entry"]) == (model, name)
        )
        figures = found["figures"]
        sizes = {"bytes": figures["bytes"], "fp32_bytes": figures["full_bytes"], "seconds": figures["seconds"]}
        return sizes | {"psnr_db": found["scores"]["psnr"]["value"], "items": found["items"]}
    key = {"quality": "recipe", "methods": "row"}[page]
    fitting = [row for row in rows.read(rows.FOLDER / f"{page}.json") if (row["model"], row[key]) == (model, name)]
    return next(row for row in fitting if row.get("dtype", "float32") == "float32")


def _size(row: dict) -> str:
    share = row["bytes_share"] if "bytes_share" in row else row["bytes"] / row["fp32_bytes"]
    return f"{share:.2f}x"


def _mark(*found: dict) -> str:
    """A dagger when one of the rows is of older code."""
    versions = {entry.name: methods.version(entry) for entry in methods.ENTRIES}
    old = [
        row.get("version") != (versions[row["row"]] if "row" in row else quality.version())
        for row in found
        if "items" not in row
    ]
    return OLD if any(old) else ""


def _kernels(model: str) -> list[dict]:
    found = rows.read(rows.FOLDER / "kernels.json")
    mine = [row for row in found if not rows.limited(row)]
    return [row for row in mine if (row["kind"], row["model"], row["base"]) == ("speed", model, "bf16")]


if __name__ == "__main__":
    print("\n".join([*headline(), "", *needs()]))
