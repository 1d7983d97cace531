"""VBench's own dimensions of video quality, through its package: Huang et al., 2311.17982.

Those that need no prompts of VBench's list, as its `custom_input` mode computes them from files of the videos. Each
has a row of its own (`vbench_<dimension>`), in VBench's units and through VBench's networks (DINO, CLIP, RAFT, AMT,
MUSIQ): the project's figures of similar names, through its own, do not compare with them.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from eval import features
from eval.metrics import why_no_library

NEEDS = ("clips",)
DIMENSIONS = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness")
DIMENSIONS += ("dynamic_degree", "aesthetic_quality", "imaging_quality")
UNITS = {f"vbench_{name}": "1" for name in DIMENSIONS}
BETTER = "higher"
FPS = 8


def why_not() -> str | None:
    """Why VBench cannot be asked here; its weights are not fetched, they are gigabytes from many places."""
    absent = why_no_library("vbench")
    if absent:
        return absent
    from vbench.utils import CACHE_DIR

    if not Path(CACHE_DIR).is_dir():
        return f"needs VBench's weights in {CACHE_DIR!r}, which is not there; run `vbench evaluate` once to fetch them"
    return None


def score(clips: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean of every dimension over videos (T, 3, height, width) in [0, 1]."""
    import vbench
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory() as place:
        videos, info = Path(place) / "videos", Path(vbench.__file__).parent / "VBench_full_info.json"
        videos.mkdir()
        for number, clip in enumerate(clips):
            export_to_video([*clip.permute(0, 2, 3, 1).float().cpu().numpy()], str(videos / f"{number:05d}.mp4"), FPS)
        judge = vbench.VBench(features.device(), str(info), place)
        judge.evaluate(str(videos), name="run", dimension_list=list(DIMENSIONS), mode="custom_input")
        found = json.loads((Path(place) / "run_eval_results.json").read_text())
    return {f"vbench_{name}": float(found[name][0]) for name in DIMENSIONS}
