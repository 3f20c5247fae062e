"""Keeps what a training run needs to continue at any step: tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlora.errors import ModelError
from sdlora.reading import read_header
from sdlora.writing import write_file, write_text

MOMENTS = ("exp_avg", "exp_avg_sq")
SEED_STRIDE = 1_000_003  # a prime: the streams of two seeds do not meet within a run


def step_seed(seed: int, step: int) -> int:
    """The seed of one step: a run that continues draws what it would have drawn."""
    return seed * SEED_STRIDE + step


def step_generators(seed: int, step: int) -> tuple[random.Random, torch.Generator]:
    """Python's and torch's generator for one step."""
    number = step_seed(seed, step)
    return random.Random(number), torch.Generator().manual_seed(number)


def learning_rate(step: int, total: int, peak: float, warmup: int, decay_share: float) -> float:
    """Linear warm-up, a plateau, then a linear decay to zero over the last `decay_share` of `total` steps."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (total - step) / max(1.0, decay_share * total))
    return peak * rising * max(0.0, falling)


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of several modules, `module.parameter` -> parameter."""
    return {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()
    }


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages gradients over all processes, each of which has computed those of its part of the batch."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(total)
    parts = (total / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class TrainingState:
    """The parameters in training, their AdamW moments and running average, and the number of steps done."""

    def __init__(
        self, modules: Mapping[str, nn.Module], betas: tuple[float, float], average_decay: float
    ) -> None:
        self.parameters = named_parameters(modules)
        self.trainable = list(self.parameters.values())
        self.average = [parameter.detach().clone() for parameter in self.trainable]
        self.average_decay = average_decay
        self.step = 0
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, betas=betas, weight_decay=0.01, fused=True)

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of AdamW at learning rate `rate`, gradients clipped to norm 1; counts it and averages."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.trainable)
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        decay = min(self.average_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.trainable], 1 - decay)
        self.step += 1

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges the parameters with their running average; a second call undoes the first."""
        for parameter, average in zip(self.trainable, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def save(self, file: Path) -> None:
        """Writes everything to `file` (safetensors), all or nothing; the step is in the file's metadata."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.parameters.items(), self.average, strict=True):
            tensors[f"parameter/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = average
            for moment in MOMENTS:
                if parameter in self.optimizer.state:
                    tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        write_tensors(file, tensors, {"step": str(self.step)})

    def load(self, file: Path) -> None:
        """Continues from what `save` wrote; raises a ModelError if that is of other modules."""
        tensors = load_file(file)
        if not {f"parameter/{name}" for name in self.parameters} <= set(tensors):
            raise ModelError(f"{file} holds the state of other modules; choose another --out")
        self.step = int(read_header(file).metadata["step"])
        for (name, parameter), average in zip(self.parameters.items(), self.average, strict=True):
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter/{name}"])
                average.copy_(tensors[f"average/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                # the fused optimizer wants its moments laid out in memory as their parameter is
                moments = {m: torch.empty_like(parameter).copy_(tensors[f"{m}/{name}"]) for m in MOMENTS}
                count = torch.tensor(float(self.step), device=parameter.device)
                self.optimizer.state[parameter] = {"step": count, **moments}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes a safetensors file with `facts` as its metadata, all or nothing."""
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(file, lambda temporary: save_file(rows, temporary, dict(facts)))
    file.chmod(0o644)


def save_folder(folder: Path, save: Callable[[Path], object], *networks: str) -> None:
    """Writes a diffusers folder, all or nothing; `networks` are subfolders whose weights become fp16."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    for name in networks:
        file = partial / name / "diffusion_pytorch_model.safetensors"
        half = {key: tensor.half() for key, tensor in load_file(file).items()}
        write_tensors(file, half, {"format": "pt"})
    for config in partial.rglob("*.json"):
        contents = json.loads(config.read_text(encoding="utf-8"))
        if "_name_or_path" in contents:
            del contents["_name_or_path"]
            write_text(config, json.dumps(contents, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
