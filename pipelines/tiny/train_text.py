"""Tokenizers and text encoders: built on the caption grammar, and taught before the denoiser to read captions.

The lesson: for each of the 48 (colour, shape) pairs a query attends to the token states and says whether the caption
names that object, how large it is and where it lies. The readout is thrown away; the token states keep what they know.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from . import scenes
from .training import RUNS, Run, adamw

WIDTH = 128
LENGTH = 40  # tokens; the longest caption has fewer
TEXT_OFFSET = 20_000_000
PAIRS = len(scenes.COLOUR_NAMES) * len(scenes.SHAPES)


def _captions(count: int = 20_000) -> list[str]:
    return [scenes.sample(TEXT_OFFSET - 1 - i)[1] for i in range(count)]


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer: Unigram pieces are the grammar's words, scored by log frequency, and single characters."""
    counts = Counter(word for text in _captions() for word in text.replace(",", " ,").split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}" if word != "," else word, math.log(n / total)) for word, n in counts.most_common()]
    pieces += [(letter, -16.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.-'"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from captions."""
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trainee.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trainee.train_from_iterator(_captions(), trainer)
    model = json.loads(trainee.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=LENGTH)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=64 * ((len(tokenizer) + 63) // 64),
        d_model=WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        relative_attention_max_distance=64,
    )
    model = T5EncoderModel(config)
    model.shared.weight.data.mul_(0.3)
    for block in model.encoder.block[
        :1
    ]:  # the table of relative positions, shared by all layers, learns slowly from 0
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return model


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=64 * ((len(tokenizer) + 63) // 64),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class Readout(nn.Module):
    """Token states (N, L, d) and mask (N, L) -> per pair: presence, size, x, y logits (N, 48, 4)."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.query = nn.Parameter(torch.randn(PAIRS, width))
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.out = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 4))

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(states), -1, -1)
        seen = self.attend(query, states, states, key_padding_mask=mask == 0, need_weights=False)[0]
        return self.out(torch.cat([seen, query], -1))


def pair_targets(drawn: Sequence[scenes.Scene]) -> torch.Tensor:
    """Per scene and (colour, shape) pair: presence, is large, x, y in [-1, 1]; zeros where absent. (N, 48, 4)."""
    wanted = torch.zeros(len(drawn), PAIRS, 4)
    for n, scene in enumerate(drawn):
        for item in scene.items:
            pair = scenes.COLOUR_NAMES.index(item.colour) * len(scenes.SHAPES) + scenes.SHAPES.index(item.shape)
            place = (item.x / 32 - 1, item.y / 32 - 1)
            wanted[n, pair] = torch.tensor((1.0, float(item.size == "large"), *place))
    return wanted


def readout_loss(said: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(presence loss, detail loss), the latter over pairs that are present."""
    there = wanted[..., 0]
    presence = F.binary_cross_entropy_with_logits(said[..., 0], there, reduction="sum") / there.sum()
    size = F.binary_cross_entropy_with_logits(said[..., 1], wanted[..., 1], reduction="none")
    place = (said[..., 2:] - wanted[..., 2:]).square().sum(-1)
    return presence, ((size + place) * there).sum() / there.sum()


def encode(encoder: nn.Module, tokenizer, captions: Sequence[str], pad: str = "longest"):
    """Token states (N, L, d) and attention mask (N, L) of captions, as the pipelines compute them."""
    tokens = tokenizer(list(captions), padding=pad, max_length=LENGTH, truncation=True, return_tensors="pt")
    if isinstance(encoder, CLIPTextModel):
        return encoder(tokens.input_ids)[0], tokens.attention_mask
    return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0], tokens.attention_mask


def train_text(name: str, minutes: float) -> Path:
    """Teach the T5 (`name` "t5") or CLIP ("clip") text encoder to read captions; returns the folder."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer() if name == "t5" else clip_tokenizer()
    encoder = t5_encoder(tokenizer) if name == "t5" else clip_encoder(tokenizer)
    readout = Readout()
    optimiser = adamw([*encoder.parameters(), *readout.parameters()], 1e-3)
    parts = {"encoder": encoder, "readout": readout, "optimiser": optimiser}
    run = Run(f"text-{name}", minutes, parts, optimiser)
    while run.going():
        first = TEXT_OFFSET + run.step * 128
        drawn, captions = zip(*[scenes.sample(i) for i in range(first, first + 128)], strict=True)
        states, mask = encode(encoder, tokenizer, captions)
        presence, detail = readout_loss(readout(states, mask), pair_targets(drawn))
        optimiser.zero_grad()
        (presence + detail).backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *readout.parameters()], 1.0)
        optimiser.step()
        run.count(presence=presence.detach(), detail=detail.detach())
    run.save()
    encoder.save_pretrained(RUNS / f"text-{name}" / "text_encoder")
    tokenizer.save_pretrained(RUNS / f"text-{name}" / "tokenizer")
    return RUNS / f"text-{name}"
