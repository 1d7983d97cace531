"""The clips of docs/results/video.md: the same prompts and seeds in full precision, int8 and 4 bits, below each other.

    python -m eval.experiments.clips        draws docs/clips.webp, which plays; minutes, most of them calibration

The entries are those of eval/suites/video.yaml, quantized as it says, on its first prompts, drawn into out/clips.
Decibels and motion accuracy beside each row are those of eval/results/video.json.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from dq.disk import write
from eval.experiments import pictures, rows, video
from eval.static import kernels_by_rank
from eval.suite import FULL, Suite

FILE, SUITE = pictures.ROOT / "docs" / "clips.webp", pictures.ROOT / "eval" / "suites" / "video.yaml"
ENTRIES = {FULL: "original, fp32", "int8": "int8", "svdquant-int4": "svdquant-int4"}
LABEL, GAP = pictures.LABEL, pictures.GAP
FRAME_MS, QUALITY = 160, 90


def main() -> None:
    kernels_by_rank()
    sheets = grid(pictures.drawn(Suite.read(SUITE), video.MODEL, list(ENTRIES), "clips"), shown())
    more = {"save_all": True, "append_images": sheets[1:], "duration": FRAME_MS, "loop": 0, "quality": QUALITY}
    write(FILE, lambda fresh: sheets[0].save(fresh, format="WEBP", **more))
    print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} KiB")


def shown() -> dict[str, tuple[str, ...]]:
    """Lines beside the rows that were measured, by entry."""
    found = {row["row"]: row for row in rows.read(video.FILE)}
    told = {name: row for name, row in found.items() if name in ENTRIES}
    lines = {name: (f"{row['psnr_db']:.1f} dB", _moves(row["motion_accuracy"])) for name, row in told.items()}
    first = next(iter(told.values()), None)
    return lines | ({FULL: (_moves(first["motion_accuracy_fp32"]),)} if first else {})


def _moves(share: float) -> str:
    return f"{100 * share:.0f} % move as named"


def grid(run, told: dict[str, tuple[str, ...]]) -> list[Image.Image]:
    """A sheet for each frame: entries as rows, prompts as columns."""
    clips = {name: [run.frames(video.MODEL, name, j) for j in range(len(run.items))] for name in ENTRIES}
    side, count = pictures.ENLARGED * clips[FULL][0][0].width, len(clips[FULL][0])
    across = side + GAP
    size = (LABEL + len(run.items) * across + GAP, len(ENTRIES) * across + GAP)
    sheets = [Image.new("RGB", size, pictures.GROUND) for _ in range(count)]
    for n, sheet in enumerate(sheets):
        pen = ImageDraw.Draw(sheet)
        for i, (name, label) in enumerate(ENTRIES.items()):
            top = GAP + i * across
            pictures.say(pen, (2 * GAP, top + side // 2), (label, *told.get(name, ())), "lm")
            for j, clip in enumerate(clips[name]):
                pictures.paste(sheet, clip[n], (LABEL + j * across, top))
    return sheets


if __name__ == "__main__":
    main()
