"""What recipes keep of the four-step students: `python -m eval.experiments.few_steps [--prompts 64]`.

A row per student and entry of ENTRIES, as in `eval.experiments.methods`: pictures of four steps against those of the
fp32 student from the same seeds, caption accuracy, noise prediction by thirds (one, one and two steps), bytes.
Calibrated on the student's own four steps. Controls round to nearest what the recipe's own plan quantizes; step-aware
recipes stand beside one range for all steps, late steps of 8 bits beside as many early ones. Rows go to
eval/results/few_steps.json and are kept while weights, code, prompts and seed are the same.
"""

from dataclasses import replace

from eval.experiments import methods, rows
from eval.experiments.methods import EARLY8, Entry, with_plain
from pipelines import tiny

FILE = rows.FOLDER / "few_steps.json"
BUDGET, ONE_FORMAT = "budget of 5 bits", "one format of 5 bits"
LATE, EARLY, RANGE = "svdquant-int4-late8", "svdquant-int4-late8, early instead", "ptq4dm-w8a8 baseline"


# why a row does not beat the one it is set `against`, by (model, row); docs/results/few_steps.md shows it
REASONS: dict[tuple[str, str], str] = {
    (model, LATE): "of four steps the first is the one that rounding hurts most: 8 bits belong there"
    for model in tiny.STUDENTS
} | {
    ("tiny-pixart-4step", BUDGET): "scales count, so that it has 8 % fewer bytes than 5 bits in groups of 64",
}
ENTRIES = tuple(
    replace(entry, models=tuple(tiny.STUDENTS), calibration={"steps": 4, **entry.calibration})
    for entry in (
        Entry("int8", "int8"),
        Entry("int4-weight", "int4-weight"),
        *with_plain("svdquant-int4"),
        Entry(LATE, LATE, against=EARLY),
        Entry(EARLY, LATE, fields=EARLY8),
        *with_plain("svdquant-w4a8"),
        Entry("viditq-w8a8", "viditq-w8a8", against="int8"),
        *with_plain("viditq-w4a8"),
        *with_plain("gptq-w4a8"),
        Entry("tfmq-w8a8", "tfmq-w8a8", against=RANGE),
        Entry("tdq-w8a8", "tdq-w8a8", against=RANGE),
        Entry("ptq4dm-w8a8", "ptq4dm-w8a8", against=RANGE, calibration={"policy": "normal"}),
        Entry(RANGE, "ptq4dm-w8a8", baseline=True),
        Entry(BUDGET, "int8-weight", against=ONE_FORMAT, bits=5),
        Entry(ONE_FORMAT, "int8-weight", weights=("int5/group:64",)),
    )
)


def main() -> None:
    methods.command(__doc__, tuple(tiny.STUDENTS), ENTRIES, FILE, methods.measure, prompts=64)


if __name__ == "__main__":
    main()
