"""README's results table, made from the committed rows: `python -m eval.table [--write]`."""

import argparse
from pathlib import Path

from eval import rows

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results -->", "<!-- /results -->"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def quality(found: list[dict]) -> list[str]:
    """Markdown lines of the quality table."""
    head = ["model", "recipe (compute dtype)", "denoiser file", "PSNR to fp32", "caption accuracy", "kernels"]
    lines = [_line(head), "|---|---|---|---|---|---|"]
    for row in found:
        name = "not quantized" if row["recipe"] == "none" else f"`{row['recipe']}`"
        share = "" if row["bytes_share"] is None else f"{row['bytes_share']:.2f}x of fp32"
        decibels = f"{row['psnr_db']:.1f} dB (worst {row['psnr_db_worst']:.1f})"
        accuracy = f"{100 * row['caption_accuracy']:.0f} % (fp32: {100 * row['caption_accuracy_fp32']:.0f} %)"
        kernels = ", ".join(f"{name} ({count})" for name, count in row["kernels"].items()) or "torch"
        cells = [row["model"], f"{name} ({SHORT[row['dtype']]})", share, decibels, accuracy, kernels]
        lines.append(_line(cells))
    return lines


def speed(found: list[dict]) -> list[str]:
    """Markdown lines of the speed table. Rows whose activations are emulated do not belong into it."""
    head = ["one call", "machine", "full precision", "quantized", "times as fast", "kernels"]
    lines = [_line(head), "|---|---|---|---|---|---|"]
    for row in found:
        if "emulated" not in row["kernel"]:
            full = f"{row['full_ms']:.2f} ms {SHORT[row['dtype']]}"
            quantized = f"{row['quantized_ms']:.2f} ms `{row['recipe']}`"
            ratio = f"{row['full_ms'] / row['quantized_ms']:.2f}"
            lines.append(_line([row["what"], row["machine"], full, quantized, ratio, row["kernel"]]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render() -> str:
    """What stands between the markers, from eval/results."""
    parts = []
    if found := rows.read(rows.FOLDER / "quality.json"):
        text = f"{found[0]['prompts']} held-out prompts a row, the same seeds; more figures are in eval/results."
        parts.append("\n".join([*quality(found), "", text]))
    if found := rows.read(rows.FOLDER / "speed.json"):
        parts.append("\n".join([*speed(found), "", "Medians, both models in turn in one process."]))
    return "\n\n".join(parts)


def current(text: str) -> str:
    """What stands between the markers in a README's text; ValueError without them."""
    _, start, rest = text.partition(START)
    inside, end, _ = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the lines {START} and {END}")
    return inside.strip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args().write:
        text = README.read_text()
        README.write_text(text.replace(f"{START}{_between(text)}{END}", f"{START}\n{render()}\n{END}"))
    else:
        print(render())


def _between(text: str) -> str:
    current(text)
    return text.partition(START)[2].partition(END)[0]


if __name__ == "__main__":
    main()
