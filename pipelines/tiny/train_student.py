"""Distillation of the few-step students: a LoRA on an embedded model that goes its teacher's way in four strides.

The way of the teacher (guidance 3, DPM-Solver++ 2M, 8 steps from noise to picture) is cut into four phases. From any
point of a phase the student leads to the phase's end, so that four calls of it take the place of 16 of the teacher:
the boundary condition of phased consistency models (https://arxiv.org/abs/2405.18407, section 3.1), with the end taken
from the teacher's own way in place of a slowly moving copy of the student. In the angle phi of a noise level,
cos phi = sqrt(alpha), one deterministic step of TCDScheduler is

    x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v,

so that the v which leads to x_s is known, and the loss is the Huber distance to it.
Three quarters of the ways begin where the student itself arrives after one to three strides: it learns to go on from
its own errors. No pictures are needed, only captions.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, TCDScheduler
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from . import CALL, PARTS, folder, load, scenes
from .train_denoiser import NOISE
from .train_text import encode
from .training import RUNS, Average, Run, adamw

OFFSET = 30_000_000  # each training reads its own part of the training stream
PHASES, POINTS, BATCH = 4, 8, 16
RANKS = {"tiny-pixart": 32, "tiny-sd": 16}  # of LoRAs of about the same size
FRESH, EVERY, KEPT = 32, 24, 1600  # ways drawn at once, steps between, ways kept
HUBER = 0.2  # errors of v beyond it count linearly
SCHEDULER = NOISE | {
    "original_inference_steps": 40,  # a multiple of 1, 2, 4 and 8, so that their steps end where phases do
}


@dataclass
class Teacher:
    """An embedded pipeline, and how to call denoisers of its kind."""

    name: str
    pipe: DiffusionPipeline

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipe, PARTS[self.name])

    def read(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states (N, L, d) and mask (N, L)."""
        padding = "longest" if PARTS[self.name] == "transformer" else "max_length"
        return encode(self.pipe.text_encoder, self.pipe.tokenizer, texts, padding)

    def denoise(self, model: nn.Module, latents: torch.Tensor, t: torch.Tensor, states: torch.Tensor, mask):
        """v (N, 4, 16, 16) of latents at times t (N), in bf16 arithmetic."""
        with torch.autocast("cpu", torch.bfloat16):
            if PARTS[self.name] == "transformer":
                sizes = {"resolution": None, "aspect_ratio": None}
                return model(latents, states, t, sizes, encoder_attention_mask=mask, return_dict=False)[0].float()
            latents = latents.contiguous(memory_format=torch.channels_last)
            return model(latents, t, states, return_dict=False)[0].float()


def teacher(name: str) -> Teacher:
    """The embedded model of that name, with the attention that trains faster here than the fused kernel."""
    found = Teacher(name, load(name))
    found.model.requires_grad_(False).set_attn_processor(AttnProcessor())
    if PARTS[name] == "unet":
        found.model.to(memory_format=torch.channels_last)
    return found


def with_lora(model: nn.Module, rank: int) -> PeftModel:
    """The model with a LoRA in every layer that has more numbers than it."""
    targets = [name for name, layer in model.named_modules() if _worth_it(layer, rank)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def _worth_it(layer: nn.Module, rank: int) -> bool:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return False
    outs, ins = layer.weight.flatten(1).shape
    return rank * (outs + ins) < outs * ins


def solver() -> DPMSolverMultistepScheduler:
    """The teacher's solver with its POINTS steps, whose ends of phases are the steps of TCDScheduler."""
    made = DPMSolverMultistepScheduler.from_config(_base_scheduler(), timestep_spacing="trailing")
    made.set_timesteps(POINTS)
    return made


def _base_scheduler() -> dict:
    return DPMSolverMultistepScheduler.load_config(folder("tiny-pixart") / "scheduler")


class Angles:
    """Noise levels as angles: of the POINTS steps, and of the ends of their phases."""

    def __init__(self):
        self.times = solver().timesteps
        alphas = DPMSolverMultistepScheduler.from_config(_base_scheduler()).alphas_cumprod
        every = torch.acos(alphas.sqrt())
        ends = [min(POINTS, (i // PHASE + 1) * PHASE) for i in range(POINTS)]
        self.ends = torch.tensor(ends)
        self.at = every[self.times]
        self.end = torch.stack([every[self.times[end] if end < POINTS else 0] for end in ends])

    def leads(self, x: torch.Tensor, v: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Where v leads to from latents x (N, ...) at these points (N): the end of the phase."""
        turn = (self.at - self.end)[points][:, None, None, None]
        return turn.cos() * x - turn.sin() * v

    def wanted(self, x: torch.Tensor, end: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """The v that leads from x to `end`."""
        turn = (self.at - self.end)[points][:, None, None, None]
        return (turn.cos() * x - end) / turn.sin()


PHASE = POINTS // PHASES  # points of a phase


class Ways:
    """What the teacher did: latents (N, POINTS + 1, 4, 16, 16) in fp16, the first point of each, its caption."""

    def __init__(self, teacher: Teacher, angles: Angles):
        self.teacher, self.angles = teacher, angles
        self.count = 0  # ways drawn so far
        self.latents = torch.zeros(0, POINTS + 1, 4, 16, 16, dtype=torch.float16)
        self.first = torch.zeros(0, dtype=torch.long)
        self.index = torch.zeros(0, dtype=torch.long)

    def state_dict(self) -> dict:
        return {"count": self.count, "latents": self.latents, "first": self.first, "index": self.index}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    @torch.no_grad()
    def draw(self, student: nn.Module, phase: int) -> None:
        """FRESH more, where the student takes the first `phase` strides and the teacher the rest."""
        index = torch.arange(self.count, self.count + FRESH)
        states, mask = self.teacher.read([""] * FRESH + self.captions(index))
        x = torch.randn(FRESH, 4, 16, 16, generator=torch.Generator().manual_seed(OFFSET + self.count))
        for stride in range(phase):
            points = torch.full((FRESH,), stride * PHASE)
            times = self.angles.times[points]
            v = self.teacher.denoise(student, x, times, states[FRESH:], mask[FRESH:])
            x = self.angles.leads(x, v, points)
        latents = torch.zeros(FRESH, *self.latents.shape[1:])
        latents[:, phase * PHASE] = x
        scale, steps = CALL[self.teacher.name]["guidance_scale"], solver()
        for point in range(phase * PHASE, POINTS):
            t = steps.timesteps[point]
            v = self.teacher.denoise(self.teacher.model, torch.cat([x, x]), t.expand(2 * FRESH), states, mask)
            x = steps.step(v[:FRESH] + scale * (v[FRESH:] - v[:FRESH]), t, x).prev_sample
            latents[:, point + 1] = x
        self.latents = torch.cat([self.latents, latents.half()])[-KEPT:]
        self.first = torch.cat([self.first, torch.full((FRESH,), phase * PHASE)])[-KEPT:]
        self.index = torch.cat([self.index, index])[-KEPT:]
        self.count += FRESH

    def captions(self, index: torch.Tensor) -> list[str]:
        return [scenes.sample(OFFSET + int(i))[1] for i in index]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """(latents, points (size), latents at the ends of their phases, captions); half begin their phase."""
        rows = torch.randint(0, len(self.first), (size,))
        first = self.first[rows]
        points = first + (torch.rand(size) * (POINTS - first)).long()
        points = torch.where(torch.rand(size) < 0.5, points // PHASE * PHASE, points)
        ends = self.latents[rows, self.angles.ends[points]]
        return self.latents[rows, points].float(), points, ends.float(), self.captions(self.index[rows])


def train_student(part: str, minutes: float, rate: float = 2e-3) -> Path:
    """Distil tiny-pixart (`part` "pixart") or tiny-sd ("sd"); writes the LoRA folder at the end."""
    torch.manual_seed(0)
    name = f"tiny-{part}"
    source, angles = teacher(name), Angles()
    student = with_lora(teacher(name).model, RANKS[name])
    ways, average = Ways(source, angles), Average(student, 0.99)
    optimiser = adamw([p for p in student.parameters() if p.requires_grad], rate, 0.0)
    parts = {"student": student, "ways": ways, "average": average, "optimiser": optimiser}
    run = Run(f"{part}-4step", minutes, parts, optimiser)
    while run.going():
        if not ways.count:
            for _ in range(2):
                ways.draw(student, 0)
        elif run.step % EVERY == 0:
            ways.draw(student, run.step // EVERY % PHASES)
        x, points, ends, captions = ways.batch(BATCH)
        with torch.no_grad():
            states, mask = source.read(captions)
        v = source.denoise(student, x, angles.times[points], states, mask)
        wanted = angles.wanted(x, ends, points)
        loss = F.huber_loss(v, wanted, delta=HUBER)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        average.update(student)
        mse = F.mse_loss(v.detach(), wanted)
        if run.count(25, loss=loss.detach(), mse=mse) and run.due(120):
            run.save()
    run.save()
    return write_student(name, student, average)


def write_student(name: str, student: PeftModel, average: Average) -> Path:
    """Write the averaged LoRA, in bf16, and its scheduler into the folder that ships."""
    work, final = RUNS / f"{name}.new", folder(f"{name}-4step")
    student.peft_config["default"].base_model_name_or_path = f"pipelines/tiny/{name}/{PARTS[name]}"
    student.save_pretrained(work, state_dict={key: value.to(torch.bfloat16) for key, value in average.values.items()})
    final.mkdir(exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(work / file, final / file)
    TCDScheduler(**SCHEDULER).save_pretrained(final / "scheduler")
    print("wrote", final.name, flush=True)
    return final
