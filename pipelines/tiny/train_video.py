"""Training of tiny-video, a `LattePipeline`: `python -m pipelines.tiny.train video-text|video [--threads N]`.

Why Latte and not Wan: on two shared cores a 3-D autoencoder, a UMT5 and two transformers from nothing are out of
reach, while spatial blocks, autoencoder and most of the words of tiny-pixart can be taken over; temporal blocks start
as the identity (their last matrices at zero), so that the first step knows the objects of every frame already.

    loss = |d|^2 + F / 2 |mean over frames of d|^2 + 0.1 cells,   d = v - v_hat,   v = a_t e - s_t x

with x (N, 4, F, 16, 16) each frame's latents and t one per clip. The second part moves no optimum (it weighs one
direction of the error more): it is where frames that do not agree lose most.

Up to UNTIL of the time a step sees FEW of a clip's frames, drawn anew each step, with their places in time: half the
cost, and motion over larger steps of time is easier to see. Steps of time are drawn towards noise, where it is decided
what moves where; what a single frame looks like is known from the start.

The text encoder learns the words of motion first, with a readout that is thrown away, and is frozen then: trained
jointly, tiny-pixart's forgot which colour belongs to which shape (`train_refine`). Where tiny-video is shipped, a run
without a checkpoint goes on from its weights, with a learning rate that rises and falls anew. The pipeline pads every
prompt to 120 tokens and gives no mask to the transformer (`mask_feature=False`): so does the training.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from . import folder, motion, scenes
from .train_denoiser import CELL_WEIGHT, DROPOUT, SCHEDULER, cell_labels, cell_loss
from .train_text import WIDTH, Readout, encode, pair_targets, readout_loss, t5_encoder
from .training import RUNS, Average, Run, adamw, optimiser_of, put

BASE, NAME = "tiny-pixart", "tiny-video"
LENGTH = 120  # tokens LattePipeline pads prompts to
BATCH, PATCH, CHANNELS = 16, 2, 4
SHARED = 0.5  # weight of what a clip's frames get wrong together: where its objects are; 2.0 was mostly noise
FEW, UNTIL = 4, 0.6  # frames of each clip that are learned from, up to this share of the budget; all of them then
LATTE = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,  # the pipeline drops the second half, a variance in Latte's first releases
    "num_layers": 6,
    "cross_attention_dim": 256,
    "attention_bias": True,
    "sample_size": 16,
    "patch_size": PATCH,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": WIDTH,
    "video_length": motion.FRAMES,
}


def tokenizer() -> T5Tokenizer:
    """The tokenizer of tiny-pixart, its pieces at their places, with the words of motion behind them."""
    known = T5Tokenizer.from_pretrained(folder(BASE) / "tokenizer")
    pieces = sorted(known.get_vocab().items(), key=lambda item: item[1])
    words = sorted({word for texts in motion.WORDS.values() for text in texts for word in text.split()} - {"to"})
    fresh = [f"▁{word}" for word in words if f"▁{word}" not in dict(pieces)]
    scores = _scores(known)
    return T5Tokenizer(
        vocab=[*((piece, scores[piece]) for piece, _ in pieces), *((piece, -5.0) for piece in fresh)],
        extra_ids=0,
        model_max_length=LENGTH,
    )


def _scores(known: T5Tokenizer) -> dict[str, float]:
    return dict(json.loads(known.backend_tokenizer.to_str())["model"]["vocab"])


def text_encoder(words: T5Tokenizer) -> T5EncoderModel:
    """The encoder of tiny-pixart with rows for the new words."""
    before, encoder = T5EncoderModel.from_pretrained(folder(BASE) / "text_encoder"), t5_encoder(words)
    state = before.float().state_dict()
    for name in [name for name, value in state.items() if value.shape != encoder.state_dict()[name].shape]:
        grown = encoder.state_dict()[name].clone()
        grown[: len(state[name])] = state[name]
        state[name] = grown
    encoder.load_state_dict(state)
    return encoder


def motion_targets(clips: Sequence[motion.Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per clip and (colour, shape) pair: its motion's index + 1, 0 where absent (N, 48); 1 for fast (N, 48)."""
    kinds = torch.zeros(len(clips), len(scenes.COLOUR_NAMES) * len(scenes.SHAPES), dtype=torch.long)
    fast = torch.zeros(kinds.shape)
    for n, clip in enumerate(clips):
        for item, moves in zip(clip.scene.items, clip.motions, strict=True):
            pair = scenes.COLOUR_NAMES.index(item.colour) * len(scenes.SHAPES) + scenes.SHAPES.index(item.shape)
            kinds[n, pair] = 1 + motion.KINDS.index(moves.kind)
            fast[n, pair] = moves.speed == "fast"
    return kinds, fast


def train_text(minutes: float) -> Path:
    """Teach tiny-pixart's text encoder the words of motion; returns the folder of tokenizer and encoder."""
    torch.manual_seed(0)
    words = tokenizer()
    encoder, readout, moves = text_encoder(words), Readout(), Readout()
    moves.out = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2 + len(motion.KINDS)))
    every = nn.ModuleDict({"encoder": encoder, "readout": readout, "moves": moves})
    optimiser = adamw(every.parameters(), 6e-4)
    run = Run("text-video", minutes, {"every": every, "optimiser": optimiser}, optimiser)
    while run.going():
        first = 20_000_000 + run.step * 128
        clips, captions = zip(*[motion.sample(i) for i in range(first, first + 128)], strict=True)
        states, mask = encode(encoder, words, captions)
        presence, detail = readout_loss(readout(states, mask), pair_targets([clip.scene for clip in clips]))
        kinds, fast = motion_targets(clips)
        said, there = moves(states, mask), kinds > 0
        named = F.cross_entropy(said[..., : 1 + len(motion.KINDS)][there], kinds[there])
        speed = F.binary_cross_entropy_with_logits(said[..., -1][there], fast[there])
        optimiser.zero_grad()
        (presence + 0.3 * detail + named + 0.3 * speed).backward()
        nn.utils.clip_grad_norm_(every.parameters(), 1.0)
        optimiser.step()
        losses = {"presence": presence, "detail": detail, "named": named}
        if run.count(**{name: value.detach() for name, value in losses.items()}) and run.due(60):
            run.save()
    run.save()
    encoder.save_pretrained(RUNS / "text-video" / "text_encoder")
    words.save_pretrained(RUNS / "text-video" / "tokenizer")
    return RUNS / "text-video"


def latte() -> LatteTransformer3DModel:
    """The transformer: spatial blocks, patches, time and text of tiny-pixart, temporal blocks that do nothing yet."""
    model = LatteTransformer3DModel(**LATTE)
    before = PixArtTransformer2DModel.from_pretrained(folder(BASE) / "transformer", torch_dtype=torch.float32)
    state = {name: value.float() for name, value in before.state_dict().items() if not name.startswith("proj_out")}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith(("temporal_transformer_blocks", "proj_out")) for name in missing):
        raise RuntimeError(f"tiny-pixart does not fit: missing {missing}, unknown {unknown}")
    with torch.no_grad():
        for name in ("weight", "bias"):
            old, new = getattr(before.proj_out, name), getattr(model.proj_out, name).zero_()
            new.view(PATCH**2, 2 * CHANNELS, -1)[:, :CHANNELS] = old.float().view(PATCH**2, CHANNELS, -1)
        for block in model.temporal_transformer_blocks:
            block.scale_shift_table.copy_(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].expand(6, 256))
            for layer in (block.attn1.to_out[0], block.ff.net[2]):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


class Data:
    """Endless batches for a step number: (latents (N, 4, 8, 16, 16), captions, cell labels (N * 8, 2, 64))."""

    def __init__(self, size: int):
        self.size = size
        self.vae = AutoencoderKL.from_pretrained(folder(BASE) / "vae", torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def draw(self, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        rng = np.random.default_rng([13, step])
        clips, texts = zip(*[motion.sample(step * self.size + i) for i in range(self.size)], strict=True)
        frames = torch.from_numpy(motion.render(clips)).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.vae.encode(frames.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        latents = latents.float().reshape(self.size, motion.FRAMES, *latents.shape[1:]).transpose(1, 2)
        labels = cell_labels([clip.frame(n) for clip in clips for n in range(motion.FRAMES)])
        return latents, ["" if rng.random() < DROPOUT else text for text in texts], labels

    def batches(self, step: int) -> Iterator[tuple[torch.Tensor, list[str], torch.Tensor]]:
        """From a step on, each drawn one ahead."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(self.draw, step)
            while True:
                step += 1
                batch, waiting = waiting.result(), ahead.submit(self.draw, step)
                yield batch


def states_of(encoder: T5EncoderModel, words: T5Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """(N, 120, d) token states as LattePipeline computes them with `mask_feature=False`."""
    kept = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    tokens = words(list(texts), **kept)
    with torch.no_grad():
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


class SharedText(AttnProcessor):
    """Cross attention to text with keys and values computed once a clip, as all its frames see the same text."""

    def __init__(self, frames: int):
        super().__init__()
        self.frames = frames

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kw):
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, attention_mask, temb, *args, **kw)
        text = encoder_hidden_states[:: self.frames]
        query, clips = attn.head_to_batch_dim(attn.to_q(hidden_states)), len(text)
        key, value = (attn.head_to_batch_dim(layer(text)) for layer in (attn.to_k, attn.to_v))
        query = query.reshape(clips, self.frames, attn.heads, *query.shape[1:]).transpose(1, 2).flatten(2, 3)
        shares = attn.get_attention_scores(query.flatten(0, 1), key)
        mixed = torch.bmm(shares, value).reshape(clips, attn.heads, self.frames, -1, value.shape[-1])
        mixed = mixed.permute(0, 2, 3, 1, 4).reshape(hidden_states.shape)
        return attn.to_out[1](attn.to_out[0](mixed))


def seeing(model: LatteTransformer3DModel, places: torch.Tensor, frames: torch.Tensor) -> None:
    """Make the model take clips of these frames only; `places` (1, 8, d) are those in time of all of them."""
    model.temp_pos_embed = places[:, frames]
    for module in model.modules():
        if isinstance(module, Attention):
            module.processor.frames = len(frames)


def v_loss(model, clean: torch.Tensor, states: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Loss of v at one step a clip, in bf16 arithmetic (see the top); steps t / T are distributed as u^0.4."""
    t = (torch.rand(len(clean)) ** 0.4 * len(alphas)).long()
    a, s = alphas[t].sqrt()[:, None, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None, None]
    noise = torch.randn_like(clean)
    with torch.autocast("cpu", torch.bfloat16):
        v = model(a * clean + s * noise, t, encoder_hidden_states=states, return_dict=False)[0][:, :CHANNELS]
    error = v.float() - (a * noise - s * clean)
    return error.square().mean() + SHARED * error.shape[2] * error.mean(2).square().mean()


def train_video(minutes: float, rate: float = 4e-4, snapshot_s: float = 900) -> Path:
    """Train the transformer beside the frozen encoder of `train_text`; writes the pipeline now and then."""
    torch.manual_seed(0)
    model, readout, average, optimiser, parts = _trained(rate)
    encoder, words = T5EncoderModel.from_pretrained(_text() / "text_encoder").eval(), _tokenizer()
    run, seen = Run("video", minutes, parts, optimiser), []
    model.temporal_transformer_blocks[3].register_forward_hook(lambda module, args, out: seen.append(out))
    places = model.temp_pos_embed
    alphas, written_s = DPMSolverMultistepScheduler(**SCHEDULER).alphas_cumprod, run.spent_s
    data = Data(BATCH).batches(run.step)
    while run.going():
        clean, texts, labels = next(data)
        frames = torch.arange(motion.FRAMES)
        if run.spent_s < UNTIL * run.budget_s:
            frames = torch.randperm(motion.FRAMES)[:FEW].sort().values
        seeing(model, places, frames)
        clean, labels = clean[:, :, frames], labels.unflatten(0, (len(clean), -1))[:, frames].flatten(0, 1)
        seen.clear()
        loss = v_loss(model, clean, states_of(encoder, words, texts), alphas)
        hidden = seen[0].reshape(len(clean), 64, len(frames), -1).transpose(1, 2).flatten(0, 1)
        cells = cell_loss(hidden, readout, labels)
        optimiser.zero_grad()
        (loss + CELL_WEIGHT * cells).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(model)
        if run.count(25, loss=loss.detach(), cells=cells.detach()) and run.due(120):
            run.save()
            if run.spent_s - written_s > snapshot_s:
                written_s = run.spent_s
                write_pipeline(average, RUNS / NAME)
    run.save()
    return write_pipeline(average, RUNS / NAME)


def _text() -> Path:
    """Folder of the text encoder and tokenizer: of `train_text`, or the shipped ones."""
    return RUNS / "text-video" if (RUNS / "text-video" / "text_encoder").is_dir() else folder(NAME)


def _tokenizer() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(_text() / "tokenizer")


def _trained(rate: float):
    """Model, readout, average, optimiser (Muon for the matrices of blocks, AdamW for the rest), and all by name."""
    model, readout = latte(), nn.Linear(256, 16)
    if folder(NAME).is_dir():
        shipped = LatteTransformer3DModel.from_pretrained(folder(NAME) / "transformer", torch_dtype=torch.float32)
        model.load_state_dict(shipped.state_dict())
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(SharedText(motion.FRAMES))  # trains faster here than the fused kernel
    blocks = [*model.transformer_blocks, *model.temporal_transformer_blocks]
    optimiser = optimiser_of(blocks, [*model.parameters(), *readout.parameters()], rate)
    average = Average(model, 0.998)
    parts = {"model": model, "readout": readout, "average": average, "optimiser": optimiser}
    return model, readout, average, optimiser, parts


def write_pipeline(average: Average, final: Path) -> Path:
    """Write the pipeline with averaged weights, replacing the folder in one rename; types as in `train_denoiser`."""
    model = latte()
    model.load_state_dict(average.values, strict=False)
    vae = AutoencoderKL.from_pretrained(folder(BASE) / "vae", torch_dtype=torch.bfloat16)
    vae.register_to_config(_name_or_path=f"pipelines/tiny/{BASE}/vae")  # no path of the machine it was trained on
    pipe = LattePipeline(
        tokenizer=_tokenizer(),
        text_encoder=T5EncoderModel.from_pretrained(_text() / "text_encoder"),
        vae=vae,
        transformer=model.to(torch.bfloat16),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
    )
    return put(pipe, final, final.parent)


__all__ = ["train_text", "train_video", "write_pipeline"]
