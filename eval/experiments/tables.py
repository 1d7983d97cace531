"""README's result tables, made from the committed rows: `python -m eval.experiments.tables [--write]`."""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from eval.experiments import rows

README = Path(__file__).resolve().parents[2] / "README.md"
TABLES = (
    "results",
    "eval",
    "mixed",
    "methods",
    "kernels",
)  # each between lines <!-- name --> and <!-- /name --> of README.md
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def quality(found: list[dict]) -> list[str]:
    """Markdown lines of the quality table."""
    head = ["model", "recipe (compute dtype)", "denoiser file", "PSNR to fp32", "caption accuracy", "kernels"]
    lines = [line(head), "|---|---|---|---|---|---|"]
    for row in found:
        name = "not quantized" if row["recipe"] == "none" else f"`{row['recipe']}`"
        share = "" if row["bytes_share"] is None else f"{row['bytes_share']:.2f}x of fp32"
        decibels = f"{row['psnr_db']:.1f} dB (worst {row['psnr_db_worst']:.1f})"
        accuracy = f"{100 * row['caption_accuracy']:.0f} % (fp32: {100 * row['caption_accuracy_fp32']:.0f} %)"
        kernels = ", ".join(f"{name} ({count})" for name, count in row["kernels"].items()) or "torch"
        cells = [row["model"], f"{name} ({SHORT[row['dtype']]})", share, decibels, accuracy, kernels]
        lines.append(line(cells))
    return lines


def speed(found: list[dict]) -> list[str]:
    """Markdown lines of the speed table. Rows whose activations are emulated do not belong into it."""
    head = ["one call", "machine", "full precision", "quantized", "times as fast", "kernels"]
    lines = [line(head), "|---|---|---|---|---|---|"]
    for row in found:
        if not row.get("emulated"):
            full = f"{row['full_ms']:.2f} ms {SHORT[row['dtype']]}"
            quantized = f"{row['quantized_ms']:.2f} ms `{row['recipe']}`"
            ratio = f"{row['full_ms'] / row['quantized_ms']:.2f}"
            lines.append(line([row["what"], row["machine"], full, quantized, ratio, row["kernel"]]))
    return lines


def methods(found: list[dict]) -> list[str]:
    """Markdown lines of the table of methods, and why a row does not beat what it is set against."""
    # imported here: only this table needs the recipes
    from eval.experiments.methods import ENTRIES, REASONS

    order = [entry.name for entry in ENTRIES]
    against = {entry.name: entry.against for entry in ENTRIES}
    decibels = {(row["model"], row["row"], row["prompts"]): row["psnr_db"] for row in found}
    head = ["model", "row", "prompts", "bits", "PSNR to fp32 (gain)", "feature distance", "caption accuracy"]
    head += ["noise SQNR early / middle / late", "bytes", "branch", "seconds", "kernel"]
    lines, below = [line(head), "|---" * len(head) + "|"], []
    known = [row for row in found if row["row"] in order]
    for row in sorted(known, key=lambda row: (row["model"], order.index(row["row"]))):
        rival = decibels.get((row["model"], against[row["row"]], row["prompts"]))
        gain = None if rival is None else row["psnr_db"] - rival
        lines.append(line(_method_cells(row, gain)))
        if gain is not None and gain <= 0:
            reason = REASONS.get((row["model"], row["row"]), "no reason known")
            below.append(f"- `{row['row']}` on {row['model']} does not beat {against[row['row']]}: {reason}")
    return [*lines, "", *below] if below else lines


def _method_cells(row: dict, gain: float | None) -> list[str]:
    noise = " / ".join(f"{row[f'noise_sqnr_{third}_db']:.1f}" for third in ("early", "middle", "late"))
    accuracy = f"{100 * row['caption_accuracy']:.0f} % (fp32: {100 * row['caption_accuracy_fp32']:.0f} %)"
    kernel, count = max(row["kernels"].items(), key=lambda item: item[1])
    cells = [row["model"], row["row"], str(row["prompts"]), row["bits"]]
    cells += [f"{row['psnr_db']:.1f} dB" + ("" if gain is None else f" ({gain:+.1f})")]
    cells += [f"{row['feature_distance']:.3f}", accuracy, f"{noise} dB"]
    cells += [
        f"{row['bytes'] / row['fp32_bytes']:.2f}x",
        f"{100 * row['branch_share']:.0f} %" if row["branch_share"] else "",
    ]
    return [*cells, f"{row['seconds']:.0f}", f"{kernel} ({count} of {sum(row['kernels'].values())})"]


def kernels(found: list[dict]) -> list[str]:
    """Markdown lines of dq next to its peers, a model at a time, bf16 first. Emulated execution is left out."""
    head = ["model", "contender", "ms", "times bf16", "kernel"]
    lines, chosen = [line(head), "|---" * len(head) + "|"], [row for row in found if row["kind"] == "speed"]
    models = list(dict.fromkeys(row["model"] for row in chosen))
    for row in sorted(chosen, key=lambda row: (models.index(row["model"]), row["contender"] != "bf16")):
        if not row.get("emulated"):
            figures = [f"{row['ms']:.2f}", f"{row['times_bf16']:.2f}"]
            lines.append(line([row["shown"], f"`{row['contender']}`", *figures, row["kernel"]]))
    return lines


def memory(found: list[dict]) -> list[str]:
    """Markdown lines of what a process holds that loads a model and runs one step."""
    head = ["model", "loaded as", "peak of the process", "below bf16's by"]
    lines = [line(head), "|---" * len(head) + "|"]
    for row in found:
        if row["kind"] == "memory":
            share = f"{100 * row['saved_share']:.0f} % of the weights' {row['weight_bytes'] / 2**30:.2f} GiB"
            saved = "" if row["contender"] == "bf16" else share
            lines.append(line([row["shown"], f"`{row['contender']}`", f"{row['peak_bytes'] / 2**30:.2f} GiB", saved]))
    return lines


def line(cells: Iterable[str]) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(text.replace('|', '/') for text in cells)} |"


def render(name: str = "results") -> str:
    """What stands between the markers of a table, from eval/results; "" without rows."""
    return {"results": _results, "eval": _eval, "mixed": _mixed, "methods": _methods, "kernels": _kernels}[name]()


def _results() -> str:
    parts = []
    if found := rows.read(rows.FOLDER / "quality.json"):
        text = f"{found[0]['prompts']} held-out prompts a row, the same seeds; more figures are in eval/results."
        parts.append("\n".join([*quality(found), "", text]))
    if found := rows.read(rows.FOLDER / "speed.json"):
        parts.append("\n".join([*speed(found), "", "Medians, both models in turn in one process."]))
    return "\n\n".join(parts)


def _eval() -> str:
    # imported here: only this table needs what runs are made of
    from eval import report, summary

    found, parts = rows.read(report.FILE), []
    for suite in dict.fromkeys(row["suite"] for row in found):
        mine = [row for row in found if row["suite"] == suite]
        commits, machines = (", ".join(sorted({row[key] for row in mine})) for key in ("commit", "machine"))
        text = (
            f"Suite `{suite}`: {mine[0]['items']} pictures an entry, {mine[0]['steps']} steps, commit {commits}, "
            f"{machines}. {summary.SPREADS} More figures are in eval/results/eval.json."
        )
        parts.append("\n".join([*report.table(mine), "", text]))
    return "\n\n".join(parts)


def _mixed() -> str:
    found = [row for row in rows.read(rows.FOLDER / "mixed.json") if "psnr_db" in row]
    if not found:
        return ""
    commits, machines = (", ".join(sorted({row[key] for row in found})) for key in ("commit", "machine"))
    text = (
        f"PSNR to fp32, {found[0]['prompts']} held-out prompts, 20 steps, 8-bit activations; mean, and least to most "
        "where there are several calibration seeds. In brackets: gain over one format. Share: most bytes used of what "
        f"is allowed. Commit {commits}, {machines}."
    )
    return "\n".join([*mixed(found), "", text])


def mixed(found: list[dict]) -> list[str]:
    """Markdown lines of the table of budgets: a line per model and budget, a column per way to choose."""
    ways = ("one format", "mixed", "greedy", "random", "one format, GPTQ", "mixed, GPTQ")
    lines = [line(["model", "bytes of", *ways, "share"]), "|---" * (len(ways) + 3) + "|"]
    pairs = {(row["model"], row["budget"]): row["limit"] for row in found}
    for model, budget in sorted(pairs, key=lambda pair: (pair[0], -pairs[pair])):
        mine = [row for row in found if (row["model"], row["budget"]) == (model, budget)]
        values = {way: [row["psnr_db"] for row in mine if row["way"] == way] for way in ways}
        plain = {way: statistics.mean(values[way]) for way in ways if way.startswith("one format") and values[way]}
        share = max(row["bytes"] / row["limit"] for row in mine)
        cells = [_spread(values[way], None if way in plain else plain.get(_plain(way))) for way in ways]
        lines.append(line([model, budget, *cells, f"{100 * share:.1f} %"]))
    return lines


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


def _methods() -> str:
    found = rows.read(rows.FOLDER / "methods.json")
    if not found:
        return ""
    commits, machines = (", ".join(sorted({row[key] for row in found})) for key in ("commit", "machine"))
    text = (
        f"Held-out prompts, seed {found[0]['seed']}, 20 steps, 32 other prompts for calibration, commit {commits}, "
        f"{machines}. "
        "Gain: over plain rounding of the same layers, groups and activations (8-bit: over `int8` or one range for "
        "all steps). Feature distance: eval/metrics/feature_distance.py. Noise SQNR: the denoiser alone, on the "
        "inputs of the fp32 run. Branch: low-rank factors, of the packed bytes. Kernel: of most layers."
    )
    return "\n".join([*methods(found), "", text])


def _kernels() -> str:
    found = rows.read(rows.FOLDER / "kernels.json")
    if not found:
        return ""
    machines = ", ".join(dict.fromkeys(f"{row['machine']}, {row['threads']} threads" for row in found))
    versions = {name: number for row in found for name, number in row["versions"].items()}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts = []
    if len(table := kernels(found)) > 2:
        text = (
            "Random weights, the same layers quantized by everyone, medians in turn in one run, over the bf16 model "
            f"of the same process. {machines}. {packages}."
        )
        parts.append("\n".join([*table, "", text]))
    if len(table := memory(found)) > 2:
        text = "Most memory a process held that loaded the model and ran one step; `dq-w4a8` is int4 in groups of 64."
        parts.append("\n".join([*table, "", text]))
    return "\n\n".join(parts)


def current(text: str, name: str = "results") -> str | None:
    """What stands between the markers of a table in a README's text; None without them.

    ValueError for the table of results, which README.md must have, and for half a pair.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text and end not in text and name != "results":
        return None
    _, found, rest = text.partition(start)
    inside, closed, _ = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md lacks the lines {start} and {end}")
    return inside.strip("\n")


def written(text: str) -> str:
    """A README's text with its tables made anew; tables without markers or rows stay as they are."""
    for name in TABLES:
        if current(text, name) is not None and (made := render(name)):
            start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            head, _, rest = text.partition(start)
            text = f"{head}{start}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    if parser.parse_args().write:
        README.write_text(written(README.read_text()))
    else:
        print("\n\n".join(filter(None, map(render, TABLES))))


if __name__ == "__main__":
    main()
