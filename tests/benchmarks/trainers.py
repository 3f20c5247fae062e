"""The two sides of the comparison on the same base: our own trainer, and a plain PEFT loop."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from sdlora.config import RunConfig, load_config
from sdlora.models.base import quiet
from sdlora.models.load import DTYPE
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.device import describe_environment, make_accelerator
from sdlora.training.loop import Trainer
from sdlora.training.planning import make_plan
from sdlora.training.prepare import prepare

RANK = 16
# Nothing but steps, on any base: all three trainers do the same work.
PLAIN: dict[str, Any] = {
    "data.heldout": 0,
    "data.caption_dropout": 0.0,
    "lora.rank": RANK,
    "train.precision": "bf16",
    "train.batch_size": 1,
    "train.sample_every": 0,
    "train.evaluate_every": 0,
    "train.save_every": 0,
}


def write_images(folder: Path, count: int, side_px: int) -> Path:
    """Writes smooth random images with captions, as `metadata.jsonl` and as text files beside them."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True)
    noise, lines = np.random.default_rng(0), []
    for number in range(count):
        small = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side_px, side_px), Image.Resampling.BICUBIC).save(
            folder / f"{number:04d}.jpg", quality=92
        )
        lines.append(f'{{"file_name": "{number:04d}.jpg", "text": "a painting, number {number}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def plain_config(base: Path, images: Path, **settings: Any) -> RunConfig:
    return load_config(None, {"base.source": str(base), **PLAIN, **settings}, images=images)


def make_trainer(base: Path, images: Path, folder: Path, **settings: Any) -> Trainer:
    """Our trainer, as `sdlora train` makes it, with the cache in `SDLORA_CACHE`."""
    config = plain_config(base, images, **settings)
    accelerator, precision = make_accelerator(config)
    plan = make_plan(config)
    run = RunFolder(folder)
    RunFolder.create(folder, plan.config, describe_environment(accelerator, precision))
    terminal = Terminal(quiet=True)
    prepared = prepare(plan, accelerator, precision, terminal)
    return Trainer(run, plan, prepared, accelerator, precision, terminal)


@torch.no_grad()
def fill_up(trainer: Trainer) -> None:
    """Gives the adapter an effect, as if it had learned something: `up` starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in trainer.runner.adapter.named_tensors().items():
        if name.endswith(".up"):
            tensor.normal_(0, 0.02, generator=generator)


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the denoiser saw it, and the gradient of the loss in its prediction."""

    noisy: Tensor
    timesteps: Tensor
    hidden: Tensor
    output_gradient: Tensor


def record_gradients(trainer: Trainer) -> tuple[Inputs, dict[str, Tensor]]:
    """Our gradients of a step by module and part, and the inputs that led to them."""
    base, seen = trainer.prepared.base, {}
    original = base.denoise

    def recording(noisy: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        answer = original(noisy, timesteps, condition)
        seen.update(noisy=noisy.detach(), timesteps=timesteps, hidden=condition.hidden.detach())
        answer.register_hook(lambda gradient: seen.update(output_gradient=gradient.detach()))
        return answer

    base.denoise = recording  # type: ignore[method-assign]
    try:
        trainer.runner.compute_gradients(0, trainer.plan.order.step(0))
    finally:
        del base.denoise  # the class's own is there again
    tensors = trainer.runner.adapter.named_tensors()
    return Inputs(**seen), {name: tensor.grad.clone() for name, tensor in tensors.items()}


class PeftLoop:
    """A loop as the diffusers script has it, on cached latents and text states: UNet in bf16, LoRA in fp32.

    The script itself leaves the LoRA in bf16 under `--mixed_precision bf16`; fp32 under autocast is what its
    fp16 mode, and everyone who wants AdamW's small steps to count, does.
    """

    def __init__(self, base: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        with quiet():
            self.unet = UNet2DConditionModel.from_pretrained(
                base / "unet", local_files_only=True, **{DTYPE: dtype}
            )
            self.scheduler = DDPMScheduler.from_pretrained(base / "scheduler", local_files_only=True)
        self.unet.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        cast_training_params(self.unet, dtype=torch.float32)
        self.unet.train()
        self.parameters = [one for one in self.unet.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)

    @property
    def num_modules(self) -> int:
        return len(self.parameters) // 2

    def named_parameters(self) -> dict[str, Tensor]:
        """The adapter by our names of modules and parts."""
        names = {".lora_A.default.weight": ".down", ".lora_B.default.weight": ".up"}
        return {
            name.replace(ending, part): parameter
            for name, parameter in self.unet.named_parameters()
            for ending, part in names.items()
            if name.endswith(ending)
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            answer: Tensor = self.unet(
                noisy.to(self.dtype), timesteps, hidden.to(self.dtype), return_dict=False
            )[0]
        return answer.float()

    def train_step(self, latents: Tensor, hidden: Tensor) -> float:
        """One update on latents (B, C, H, W) and text states (B, L, D)."""
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        loss = (self.predict(noisy, timesteps, hidden) - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def gradients(self, inputs: Inputs) -> dict[str, Tensor]:
        """Gradients by module and part for recorded inputs."""
        answer = self.predict(inputs.noisy, inputs.timesteps, inputs.hidden)
        answer.backward(inputs.output_gradient)
        found = {name: parameter.grad.clone() for name, parameter in self.named_parameters().items()}
        self.optimizer.zero_grad()
        return found


def cached_example(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Latents (1, C, H, W) and text states (1, L, D) of the run's first image."""
    sample = trainer.plan.order.step(0)[0]
    encodings = trainer.prepared.encodings
    mean, _ = encodings.posterior(sample.record, sample.crop)
    return mean[None], encodings.condition(sample.caption).hidden[None]


def keep_cache_in(folder: Path) -> None:
    os.environ["SDLORA_CACHE"] = str(folder)
