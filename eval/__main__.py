"""Evaluation runs: `python -m eval run SUITE.yaml --out DIR`, `report DIR`, `compare A B`.

`accelerate launch -m eval run ...` shares a run between GPUs, `torchrun --nproc-per-node 2 -m eval run ...` between
processes on a CPU; the pictures are the same. Exit codes: 0 done, 2 wrong use (one line on stderr), 1 a fault of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dq.cli import leaving
from dq.errors import DQError, nearest

app = typer.Typer(
    name="eval",
    help="Draw with quantized pipelines, measure, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Folder = Annotated[Path, typer.Argument(help="The folder of a run.")]


def main() -> None:
    """Run the command line and leave with its exit code."""
    leaving.run(app, "python -m eval", "eval")


@app.command()
def run(
    suite: Annotated[Path, typer.Argument(help="A suite, for example eval/suites/tiny.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that was stopped goes on there.")],
    only: Annotated[list[str], typer.Option(help="A pipeline, an entry or pipeline/entry; may repeat.")] = [],  # noqa: B006
) -> None:
    """Draw every picture of a suite, compute the scores, write the report."""
    from eval.suite import Suite

    asked = Suite.read(suite)  # before what takes seconds to import
    chosen = _chosen(asked, only)
    quiet_loading()
    from dq.trace.world import processes
    from eval import generate
    from eval import score as scoring
    from eval.static import kernels_by_rank

    kernels_by_rank()
    state = processes()
    scoring.check(asked)
    found = generate.generate(asked, out, chosen)
    _score(found, chosen, state)
    if state.is_main_process:
        from eval import report as reporting

        print(f"wrote {reporting.write(found)}")


@app.command()
def report(
    folder: Folder,
    commit: Annotated[bool, typer.Option(help="Also put its figures into eval/results/eval.json.")] = False,
) -> None:
    """Write a run's report anew: report.html, report.md and report.json in its folder."""
    from eval.runs import Run

    found = Run(folder)
    from eval import report as reporting

    print(f"wrote {reporting.write(found)}")
    if commit:
        reporting.commit(found)
        print(f"wrote {reporting.FILE}; `make table` puts it into docs/results/eval.md")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run's folder, or FOLDER/PIPELINE or FOLDER/PIPELINE/ENTRY in one.")],
    second: Annotated[str, typer.Argument(help="What is compared with it.")],
    metric: Annotated[Optional[str], typer.Option(help="Only this one.")] = None,  # noqa: UP045
) -> None:
    """What got better or worse from the first to the second, tested on paired pictures."""
    from eval import compare as comparing

    print(comparing.text(comparing.compare(first, second, metric), comparing.differences(first, second)))


def quiet_loading() -> None:
    """No bars of diffusers and transformers for every pipeline that is loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _chosen(suite, only: list[str]) -> list[tuple[str, str]]:
    """(pipeline, entry) pairs that were asked for, and `full` of their pipelines, which all else is compared with."""
    from eval.suite import FULL

    pairs = [(pipeline.name, entry.name) for pipeline in suite.pipelines for entry in suite.entries]
    known = {name for pair in pairs for name in (*pair, "/".join(pair))}
    for name in only:
        if name not in known:
            raise DQError(
                f"--only {name!r} is not in the suite, {nearest(name, {part for pair in pairs for part in pair})}"
            )
    named = [pair for pair in pairs if not only or {*pair, "/".join(pair)} & set(only)]
    return [pair for pair in pairs if pair in named or (pair[1] == FULL and pair[0] in {part for part, _ in named})]


def _score(found, chosen: list[tuple[str, str]], state) -> None:
    """The scores that are not there yet, dealt out to the processes."""
    from eval.score import score

    todo = [pair for pair in chosen if found.drawn(*pair) and not found.scores(*pair)]
    state.wait_for_everyone()
    for pair in todo[state.process_index :: state.num_processes]:
        found.write_scores(*pair, score(found, *pair))
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
