"""The tables of README.md and of docs/, made from the committed rows: `python -m eval.experiments.tables [--write]`.

Each stands between the lines <!-- name --> and <!-- /name --> of its page. A dagger marks a row whose version is not
that of the code behind it any more.
"""

import argparse
import operator
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from eval.experiments import rows, speed_layers, speed_pipelines
from eval.markdown import table

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
OLD = " †"
FEWER = " ‡"
NOT_YET = "No rows are committed yet."
OLD_SAYS = (
    "† The code behind this row (formats, planning, kernels, its method) has changed since it was measured: today's "
    "code may give other figures."
)


def quality(found: list[dict], version: str) -> list[str]:
    """Markdown lines of the quality table; version: of today's code."""
    head = ["model", "recipe", "computes in", "size", "PSNR to fp32, dB", "worst", "caption accuracy", "kernel"]
    return table(head, [_quality_cells(row, row.get("version") != version) for row in found])


def _quality_cells(row: dict, old: bool) -> list[str]:
    name = "not quantized" if row["recipe"] == "none" else f"`{row['recipe']}`"
    share = "" if row["bytes_share"] is None else f"{row['bytes_share']:.2f}x"
    accuracy = f"{100 * row['caption_accuracy']:.0f} % (fp32: {100 * row['caption_accuracy_fp32']:.0f} %)"
    cells = [row["model"], name + (OLD if old else ""), SHORT[row["dtype"]], share, decibels(row)]
    return [*cells, f"{row['psnr_db_worst']:.1f}", accuracy, _kernel(row["kernels"])]


def _kernel(kernels: Mapping[str, int]) -> str:
    """The kernel of most layers."""
    name, count = max(kernels.items(), key=lambda item: item[1], default=("torch", 0))
    return f"{name} ({count} of {sum(kernels.values())})" if count else name


def decibels(row: Mapping) -> str:
    """Mean PSNR of a row, with its interval where it has one."""
    ends = f" ({row['psnr_db_low']:.1f} to {row['psnr_db_high']:.1f})" if "psnr_db_low" in row else ""
    return f"{row['psnr_db']:.1f}{ends}"


def speed(found: list[dict]) -> list[str]:
    """Markdown lines of the speed table. Rows whose activations are emulated do not belong into it."""
    cells, hidden = [], any(map(rows.limited, found))
    for row in found:
        if not row.get("emulated"):
            full = f"{row['full_ms']:.2f} ms {SHORT[row['dtype']]}"
            quantized = f"{row['quantized_ms']:.2f} ms `{row['recipe']}`"
            ratio = f"{row['full_ms'] / row['quantized_ms']:.2f}"
            cells.append(
                [row["what"], full, quantized, ratio, row["kernel"], *([row.get("level", "")] if hidden else [])]
            )
    head = ["one call", "full precision", "quantized", "times as fast", "kernels", *(["on"] if hidden else [])]
    return table(head, cells)


def methods(found: list[dict]) -> list[str]:
    """Markdown lines of the table of methods, and why a row does not beat what it is set against."""
    # imported here: only this table needs the recipes
    from eval.experiments.methods import ENTRIES, REASONS

    return _against(found, ENTRIES, REASONS)


def few_steps(found: list[dict]) -> list[str]:
    """The same of the students of few steps."""
    from eval.experiments.few_steps import ENTRIES, REASONS

    return _against(found, ENTRIES, REASONS)


def _against(found: list[dict], rivals, reasons: Mapping[tuple[str, str], str]) -> list[str]:
    from eval.experiments.methods import version

    entries = {entry.name: entry for entry in rivals}
    order = list(entries)
    known = [row for row in found if row["row"] in entries]
    values = {(row["model"], row["row"], row["prompts"]): row["psnr_db"] for row in known}
    most = max((row["prompts"] for row in known), default=0)
    cells, below = [], []
    for row in sorted(known, key=lambda row: (row["model"], order.index(row["row"]))):
        entry = entries[row["row"]]
        rival = values.get((row["model"], entry.against, row["prompts"]))
        gain = None if rival is None else row["psnr_db"] - rival
        marks = FEWER * (row["prompts"] < most) + OLD * (row["version"] != version(entry))
        cells.append(_method_cells(row, gain, marks))
        if gain is not None and gain <= 0:
            reason = reasons.get((row["model"], row["row"]), "no reason known")
            below.append(f"- `{row['row']}` on {row['model']} does not beat {entry.against}: {reason}")
    head = ["model", "row", "bits", "PSNR to fp32, dB (gain)", "feature distance", "caption accuracy"]
    head += ["noise SQNR early / middle / late, dB", "size", "branch", "seconds", "kernel"]
    return [*table(head, cells), "", *below] if below else table(head, cells)


def _method_cells(row: dict, gain: float | None, marks: str) -> list[str]:
    noise = " / ".join(f"{row[f'noise_sqnr_{third}_db']:.1f}" for third in ("early", "middle", "late"))
    accuracy = f"{100 * row['caption_accuracy']:.0f} % (fp32: {100 * row['caption_accuracy_fp32']:.0f} %)"
    cells = [row["model"], row["row"] + marks, row["bits"]]
    cells += [decibels(row) + ("" if gain is None else f" ({gain:+.1f})"), f"{row['feature_distance']:.3f}", accuracy]
    branch = f"{100 * row['branch_share']:.0f} %" if row["branch_share"] else ""
    cells += [noise, f"{row['bytes'] / row['fp32_bytes']:.2f}x", branch]
    return [*cells, f"{row['seconds']:.0f}", _kernel(row["kernels"])]


def insights(found: list[dict]) -> list[str]:
    """Markdown lines: decibels that ways of rounding gain over uniform steps, by model, operation and bits."""
    ways = {"lut/channel": "k-means a row", "lut/tensor": "k-means a tensor"}
    cells = []
    for row in sorted(found, key=lambda row: (row["model"], -row["bits"], -row["weights"])):
        gains = [f"{row['ways'][way]:+.1f}" for way in ways]
        cells.append(
            [row["model"], f"`{row['operation']}`", str(row["bits"]), f"{row['weights'] / 1e3:.0f} k", *gains]
        )
    return table(["model", "operation", "bits", "weights", *ways.values()], cells)


def video(found: list[dict]) -> list[str]:
    """Markdown lines of the table of the video model, and why a row does not beat what it is set against."""
    # imported here: only this table needs the recipes
    from eval.experiments.methods import version
    from eval.experiments.video import ENTRIES, REASONS

    entries = {entry.name: entry for entry in ENTRIES}
    known = {row["row"]: row for row in found if row["row"] in entries}
    cells, below = [], []
    for name, entry in entries.items():
        if name not in known:
            continue
        rival = known.get(entry.against)
        gain = None if rival is None else known[name]["psnr_db"] - rival["psnr_db"]
        cells.append(_video_cells(known[name], gain, known[name]["version"] != version(entry)))
        if gain is not None and gain <= 0:
            below.append(f"- `{name}` does not beat {entry.against}: {REASONS.get(name, 'no reason known')}")
    head = ["row", "bits", "PSNR to fp32, dB (gain)", "added flicker", "moves as named", "objects right"]
    head += ["dynamic degree, pixels", "smoothness", "noise SQNR early / middle / late, dB", "size"]
    lines = table([*head, "ms a step (fp32)", "seconds", "kernel"], cells)
    return [*lines, "", *below] if below else lines


def _video_cells(row: dict, gain: float | None, old: bool) -> list[str]:
    noise = " / ".join(f"{row[f'noise_sqnr_{third}_db']:.1f}" for third in ("early", "middle", "late"))
    moves, objects = (
        f"{100 * row[key]:.0f} % (fp32: {100 * row[f'{key}_fp32']:.0f} %)"
        for key in ("motion_accuracy", "objects_right")
    )
    degree = f"{row['dynamic_degree']:.2f} (fp32: {row['dynamic_degree_fp32']:.2f})"
    smooth = f"{row['motion_smoothness']:.4f} (fp32: {row['motion_smoothness_fp32']:.4f})"
    ms = "emulated" if row["ms_per_step"] is None else f"{row['ms_per_step']:.0f}"
    cells = [row["row"] + (OLD if old else ""), row["bits"]]
    cells += [decibels(row) + ("" if gain is None else f" ({gain:+.1f})"), f"{row['flicker']:.4f}", moves, objects]
    cells += [degree, smooth, noise, f"{row['bytes'] / row['fp32_bytes']:.2f}x"]
    return [*cells, f"{ms} ({row['fp32_ms_per_step']:.0f})", f"{row['seconds']:.0f}", _kernel(row["kernels"])]


def peers(found: list[dict]) -> list[str]:
    """Markdown lines of dq next to its peers: a table for each machine, level and base, by model, the base first.

    Emulated execution is left out.
    """
    chosen = [row for row in found if row["kind"] == "speed" and not row.get("emulated")]
    models = list(dict.fromkeys(row["model"] for row in chosen))
    chosen.sort(key=lambda row: (models.index(row["model"]), row["contender"] != row["base"]))
    lines = []
    which, several = operator.itemgetter("level", "base", "machine"), len({row["machine"] for row in chosen}) > 1
    for level, base, machine in dict.fromkeys(map(which, chosen)):
        mine = [row for row in chosen if which(row) == (level, base, machine)]
        head = ["model", "contender", "ms", f"times {base}", f"dB to {base}", "kernel"]
        on = f", on {machine}" if several else ""
        lines += [f"{level}, beside {base}{on}:", "", *table(head, map(_peer_cells, mine)), ""]
    return lines[:-1]


def _peer_cells(row: dict) -> list[str]:
    error = "" if row.get("error_db") is None else f"{row['error_db']:.1f}"
    return [
        row["shown"],
        f"`{row['contender']}`",
        f"{row['ms']:.2f}",
        f"{row['times_base']:.2f}",
        error,
        row["kernel"],
    ]


def memory(found: list[dict]) -> list[str]:
    """Markdown lines of what a process holds that loads a model and runs one step."""
    cells = []
    for row in (row for row in found if row["kind"] == "memory"):
        share = f"{100 * row['saved_share']:.0f} % of the weights' {row['weight_bytes'] / 2**30:.2f} GiB"
        saved = "" if row["contender"] == "bf16" else share
        cells.append([row["shown"], f"`{row['contender']}`", f"{row['peak_bytes'] / 2**30:.2f} GiB", saved])
    return table(["model", "loaded as", "peak of the process", "below bf16's by"], cells)


def calibration(found: list[dict]) -> list[str]:
    """Markdown lines of what it takes to calibrate a model of full width."""
    head = ["model", "recipe", "blocks", "model in bf16", "threads", "one call", "all", "peak of the process"]
    cells = []
    for row in found:
        limit = f", {row['budget_bits']:g} bits a weight" if row.get("budget_bits") else ""
        size, took = f"{row['bytes_before'] / 2**30:.2f} GiB", f"{row['seconds'] / 60:.1f} min"
        frames = f", {row['frames']} frames" if row.get("frames") else ""
        names = [row["model"] + frames, f"`{row['recipe']}`{limit}", str(row["layers"]), size, str(row["threads"])]
        cells.append([*names, f"{row['call_seconds']:.1f} s", took, f"{row['peak_gib']:.1f} GiB"])
    return table(head, cells)


def budgets(found: list[dict]) -> list[str]:
    """Markdown lines of the table of budgets: a line per model and budget, a column per way to choose."""
    ways = ("one format", "mixed", "greedy", "random", "one format, GPTQ", "mixed, GPTQ")
    pairs = {(row["model"], row["budget"]): row["limit"] for row in found}
    lines = []
    for model, budget in sorted(pairs, key=lambda pair: (pair[0], -pairs[pair])):
        mine = [row for row in found if (row["model"], row["budget"]) == (model, budget)]
        values = {way: [row["psnr_db"] for row in mine if row["way"] == way] for way in ways}
        plain = {way: statistics.mean(values[way]) for way in ways if way.startswith("one format") and values[way]}
        share = max(row["bytes"] / row["limit"] for row in mine)
        cells = [_spread(values[way], None if way in plain else plain.get(_plain(way))) for way in ways]
        lines.append([model, budget, *cells, f"{100 * share:.1f} %"])
    return table(["model", "bytes of", *ways, "share"], lines)


def _plain(way: str) -> str:
    """What a way of choosing is set against."""
    return "one format, GPTQ" if way.endswith("GPTQ") else "one format"


def _spread(values: list[float], plain: float | None) -> str:
    """Mean and range in dB, and the gain over `plain`."""
    if not values:
        return ""
    mean = statistics.mean(values)
    ends = f", {min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""
    return f"{mean:.1f} dB{ends}" + ("" if plain is None else f" ({mean - plain:+.1f})")


def _read(name: str) -> list[dict]:
    return rows.read(rows.FOLDER / f"{name}.json")


def _where(found: list[dict]) -> str:
    """Commits and machines of rows."""
    commits, machines = (", ".join(sorted({row[key] for row in found})) for key in ("commit", "machine"))
    return f"Commit {commits}; {machines}."


def _with(lines: list[str], *below: str) -> str:
    old = [OLD_SAYS] if any(OLD in line for line in lines) else []
    return "\n".join([*lines, "", " ".join([*below, *old])])


def _quality() -> str:
    from eval.experiments.quality import version

    found = _read("quality")
    return _with(quality(found, version()), f"{found[0]['prompts']} held-out prompts a row, 20 steps.", _where(found))


def _fitted(name: str, make: Callable[[list[dict]], list[str]], steps: int) -> str:
    """A table of rows of `eval.experiments.methods` in so many steps."""
    found = _read(name)
    if not found:
        return NOT_YET
    most, *fewer = sorted({row["prompts"] for row in found}, reverse=True)
    few = "".join(f", of rows with{FEWER} {count}" for count in fewer)
    asked = f"{most} held-out prompts{few}, seed {found[0]['seed']}, {steps} steps, 32 other prompts to calibrate on."
    return _with(make(found), asked, _where(found))


def _budgets() -> str:
    found = [row for row in _read("mixed") if "psnr_db" in row]
    return _with(budgets(found), f"{found[0]['prompts']} held-out prompts, 20 steps.", _where(found))


def _speed() -> str:
    found = _read("speed")
    return _with(speed(found), _where(found))


def _peers() -> str:
    found = [row for row in _read("kernels") if row["kind"] == "speed"]
    versions = {name: number for row in found for name, number in row["versions"].items()}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    threads = ", ".join(sorted({f"{row['threads']} threads" for row in found}))
    return _with(peers(found), f"{threads}; {packages}.", _where(found))


def _layers() -> str:
    found = _read("layers")
    return _with(speed_layers.tables(found), _where(found)) if found else NOT_YET


def _pipelines() -> str:
    found = _read("pipelines")
    return _with(speed_pipelines.tables(found), _where(found)) if found else NOT_YET


def _memory() -> str:
    found = [row for row in _read("kernels") if row["kind"] == "memory"]
    return _with(memory(found), _where(found))


def _calibration() -> str:
    found = _read("calibration_time")
    return _with(calibration(found), _where(found))


def _insights() -> str:
    found = _read("insights")
    if not found:
        return NOT_YET
    trusts = ", ".join(f"{row['model']} {row['trust']:.2f}" for row in {r["model"]: r for r in found}.values())
    says = f"Rank correlation of predicted and measured errors of unseen plans: {trusts}."
    return _with(insights(found), says, _where(found))


def _video() -> str:
    found = _read("video")
    return _with(video(found), f"{found[0]['prompts']} prompts.", _where(found)) if found else NOT_YET


def _eval() -> str:
    # imported here: only this table needs what runs are made of
    from eval import report, summary

    found, parts = rows.read(report.FILE), []
    for suite in dict.fromkeys(row["suite"] for row in found):
        mine = [row for row in found if row["suite"] == suite]
        text = f"Suite `{suite}`: {mine[0]['items']} pictures an entry, {mine[0]['steps']} steps. {summary.SPREADS}"
        parts.append(_with(report.table(mine), text, _where(mine)))
    return "\n\n".join(parts)


def _made(make: Callable[[], list[str]], file: str) -> Callable[[], str]:
    """A table of one file's rows, with how they were measured below."""

    def made() -> str:
        found = _read(file)
        return _with(make(), _asked(found), _where(found)) if found else NOT_YET

    return made


def _asked(found: list[dict]) -> str:
    """What is the same in rows: prompts, seeds, steps."""
    said = []
    for key, text in (
        ("prompts", "{} held-out prompts."),
        ("seeds", "{} seeds of the noise."),
        ("threads", "{} threads."),
    ):
        values = sorted({row[key] for row in found if key in row})
        said += [text.format(", ".join(map(str, values)))] if values else []
    return " ".join(said)


def tables() -> dict[str, tuple[Path, Callable[[], str]]]:
    """Page and maker of every table, by the name of its markers."""
    from eval.experiments import headline, matrix, recipe_tables, time_tables

    readme, docs = ROOT / "README.md", ROOT / "docs"
    results = {
        name: (docs / "results" / f"{page}.md", make)
        for page, made in {
            "quality": {"quality": _quality},
            "methods": {"methods": lambda: _fitted("methods", methods, 20), "insights": _insights},
            "video": {"video": _video},
            "few_steps": {"few_steps": lambda: _fitted("few_steps", few_steps, 4)},
            "time": {
                "along": _made(time_tables.along, "thirds"),
                "attention_pictures": _made(time_tables.attention_pictures, "attention"),
                "attention_calls": _made(time_tables.attention_calls, "attention"),
                "caching": _made(time_tables.caching, "caches"),
                "corrected": _made(time_tables.corrected, "around"),
                "saved": _made(time_tables.saved, "curve"),
            },
            "budgets": {"budgets": _budgets},
            "speed": {"speed": _speed, "pipelines": _pipelines, "layers": _layers, "peers": _peers},
            "memory": {"memory": _memory, "calibration": _calibration},
            "gpu": {"gpu": lambda: "\n".join(recipe_tables.gpus())},
            "eval": {"eval": _eval},
        }.items()
        for name, make in made.items()
    }
    return results | {
        "headline": (readme, lambda: "\n".join(headline.headline())),
        "needs": (readme, lambda: _with(headline.needs(), headline.needs_say())),
        "matrix": (readme, lambda: "\n".join(matrix.matrix(["linear"], ["stable"]))),
        "recipes": (docs / "recipes.md", lambda: "\n".join(recipe_tables.recipes())),
        "backends": (docs / "recipes.md", lambda: "\n".join(recipe_tables.backends())),
        "formats": (docs / "recipes.md", lambda: "\n".join(matrix.matrix())),
    }


def current(text: str, name: str) -> str:
    """What stands between the markers of a table in a page's text. ValueError without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    _, found, rest = text.partition(start)
    inside, closed, _ = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page lacks the lines {start} and {end}")
    return inside.strip("\n")


def written(text: str, name: str, made: str) -> str:
    """A page's text with one table made anew. ValueError for a page without its markers."""
    current(text, name)
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    return f"{head}{start}\n\n{made}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    write = parser.parse_args().write
    for name, (page, make) in tables().items():
        if write:
            page.write_text(written(page.read_text(), name, make()))
        else:
            print(make(), end="\n\n")


if __name__ == "__main__":
    main()
