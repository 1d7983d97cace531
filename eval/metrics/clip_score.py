"""CLIP score: how well pictures show their prompts, by any `transformers.CLIPModel`.

    score = 100 cos(image embedding, text embedding)

Hessel et al., 2104.08718, without its cut at 0, so that the figure is the mean over pictures. Prompts are cut to the
model's number of tokens. Usual: openai/clip-vit-large-patch14 where it is on this machine; a model that a suite names
is fetched. The stand-in `tiny-clip` is the project's own and reads the scene grammar only: other words mean nothing to
it.
"""

from collections.abc import Sequence
from functools import cache

import torch

from eval import features as networks
from eval.metrics import psnr

NEEDS = ("images", "prompts")
UNITS = {"clip_score": "100 cos"}
BETTER = "higher"
JUDGES = {networks.CLIP: (), networks.TINY_CLIP: ("scenes",)}
JUDGE_FROM = ("clip", "model")


@cache
def _model(judge: str, fetch: bool = True):
    from transformers import CLIPModel, CLIPProcessor

    return networks.pretrained(CLIPModel, judge, fetch), networks.pretrained(CLIPProcessor, judge, fetch)


@cache
def why_not(judge: str, fetch: bool = True) -> str | None:
    try:
        _model(judge, fetch)
    except networks.DQError as error:
        return str(error)
    return None


@torch.no_grad()
def per_item(images, prompts: Sequence[str], judge: str = networks.CLIP) -> list[float]:
    """Score of each picture; ValueError when there are not as many prompts."""
    batch = psnr.as_batch(images)
    if len(batch) != len(prompts):
        raise ValueError(f"clip score needs as many prompts as pictures, got {len(prompts)} and {len(batch)}")
    model, processor = _model(judge)
    most = model.config.text_config.max_position_embeddings
    text = processor.tokenizer(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt")
    pixels = processor.image_processor(networks.as_bytes(batch), return_tensors="pt")["pixel_values"]
    found = model(**text.to(model.device), pixel_values=pixels.to(model.device))
    return (100 * torch.cosine_similarity(found.image_embeds, found.text_embeds)).tolist()


def score(images, prompts: Sequence[str], judge: str = networks.CLIP) -> dict[str, float]:
    """Mean score of N pictures against their N prompts."""
    found = per_item(images, prompts, judge)
    return {"clip_score": sum(found) / len(found)}
