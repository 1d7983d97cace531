"""Training of tiny-clip, a `transformers.CLIPModel` on captioned scenes, and its held-out retrieval accuracy."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from . import scenes
from .recogniser import as_tensor
from .train_text import LENGTH, WIDTH
from .training import RUNS, Run, adamw

FOLDER = Path(__file__).parent / "tiny-clip"
OFFSET = 30_000_000
MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VISION = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": scenes.SIDE,
    "patch_size": 8,
    "projection_dim": WIDTH,
}


def build() -> tuple[CLIPModel, CLIPTokenizer]:
    """The model, its text half started from the text encoder that already reads captions."""
    tokenizer = CLIPTokenizer.from_pretrained(RUNS / "text-clip" / "tokenizer")
    from transformers import CLIPTextModel

    reader = CLIPTextModel.from_pretrained(RUNS / "text-clip" / "text_encoder")
    config = CLIPConfig(
        text_config=reader.config.to_dict(), vision_config=VISION, projection_dim=WIDTH, logit_scale_init_value=2.6592
    )
    model = CLIPModel(config)
    state = {name.removeprefix("text_model."): value for name, value in reader.state_dict().items()}
    model.text_model.load_state_dict(state)
    return model, tokenizer


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] as the image processor gives them to the model."""
    return (images - MEAN[0]) / DEVIATION[0]


def _logits(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], images: torch.Tensor) -> torch.Tensor:
    tokens = tokenizer(captions, padding=True, max_length=LENGTH, truncation=True, return_tensors="pt")
    return model(**tokens, pixel_values=pixels(images)).logits_per_image.float()


def _batch(first: int, size: int, stream: int = scenes.TRAIN) -> tuple[list[str], torch.Tensor]:
    drawn, captions = zip(*[scenes.sample(i, stream) for i in range(first, first + size)], strict=True)
    return list(captions), as_tensor(scenes.render(drawn))


def train_clip(minutes: float, batch: int = 128) -> Path:
    """Contrastive training: each picture must pick its caption out of the batch, and the other way round."""
    torch.manual_seed(0)
    model, tokenizer = build()
    optimiser = adamw(model.parameters(), 1e-3, 0.05)
    run = Run("clip", minutes, {"model": model, "optimiser": optimiser}, optimiser)
    target = torch.arange(batch)
    while run.going():
        captions, images = _batch(OFFSET + run.step * batch, batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = _logits(model, tokenizer, captions, images)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if run.count(loss=loss.detach()) and run.due(60):
            run.save()
    run.save()
    size = {"height": scenes.SIDE, "width": scenes.SIDE}
    images = CLIPImageProcessorPil(
        do_resize=True, size=size, do_center_crop=False, image_mean=MEAN, image_std=DEVIATION
    )
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(FOLDER)
    return FOLDER


@torch.no_grad()
def retrieval(count: int = 1000, group: int = 100) -> dict[str, float]:
    """Share of held-out captions whose own picture scores highest of `group`, and of pictures likewise."""
    model = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    target, hits = torch.arange(group), np.zeros(2)
    for start in range(0, count, group):
        logits = _logits(model, tokenizer, *_batch(2_000_000_000 + start, group, scenes.HELD_OUT))
        hits += [(logits.argmax(1) == target).sum().item(), (logits.argmax(0) == target).sum().item()]
    image_to_text, text_to_image = (hits / count).round(4).tolist()
    return {"group": group, "image_to_text": image_to_text, "text_to_image": text_to_image}
