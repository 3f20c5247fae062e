"""A run's memory on its device, stage by stage, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from sdlora.config import Quantize, RunConfig, TrainSection
from sdlora.data.records import Size
from sdlora.dtypes import Precision
from sdlora.lora.attach import count_parameters
from sdlora.lora.layers import DENOISER
from sdlora.memory.activations import DenoiserPass, denoiser_peak, text_peak, vae_peaks
from sdlora.models.info import BaseInfo
from sdlora.models.quantize import LayerBytes, bytes_by_kind

# Moments of an optimizer, in bytes per trained number, by a part of its name; else AdamW's two in fp32.
MOMENTS = {"8bit": 2, "sgd": 4, "lion": 4}
# Usable share of the free memory: allocators leave gaps.
FITS = 0.9


@dataclass(frozen=True)
class DeviceInfo:
    """Dtypes of the denoiser, the device of a process, and its free memory if torch can measure it."""

    precision: Precision
    device: torch.device
    free_bytes: int | None = None


ANY_DEVICE = DeviceInfo(Precision("fp32", "fp32"), torch.device("cpu"))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if torch cannot measure it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


@dataclass(frozen=True)
class MemoryInputs:
    """Everything that a run's memory depends on, beside its device.

    Args:
        config: The settings, with every default resolved but `train.gradient_checkpointing`.
        parts: The base's denoiser, and trained text encoders, on the meta device.
        ranks: Of the trained modules.
        num_frozen: Number of parameters of the adapters below the trained one.
        size: The largest image, in pixels.
    """

    config: RunConfig
    info: BaseInfo
    parts: Mapping[str, nn.Module]
    ranks: Mapping[str, int]
    num_frozen: int
    size: Size


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes.

    Args:
        denoiser, vae, text_encoders: Their weights; the denoiser's by kind of layer.
        adapter: Trained parameters, moments of the optimizer, adapters below; gradients are in `learn`.
        encode: Peak of encoding an image, beside weights.
        learn: Peak of forward and backward pass of a micro-batch, beside weights.
        sample: Peak of the denoiser while sampling a batch, with its own copy of the adapter; 0 without
            samples.
        decode: Peak of decoding an image; 0 without samples.
        prove: Peak of the denoiser's pass that verifies an export.
        staying: Encoders that stay in memory during training: `vae`, `text_encoders`.
    """

    denoiser: Mapping[str, LayerBytes]
    vae: int
    text_encoders: int
    adapter: int
    encode: int
    learn: int
    sample: int
    decode: int
    prove: int
    checkpointing: bool
    staying: tuple[str, ...]

    @property
    def denoiser_bytes(self) -> int:
        """Weights of the denoiser as stored."""
        return sum(part.stored for part in self.denoiser.values())

    @property
    def stages(self) -> dict[str, int]:
        """The peak of each stage of a run."""
        encoders = {"vae": self.vae, "text_encoders": self.text_encoders}
        beside = sum(encoders[name] for name in self.staying)
        trained = self.denoiser_bytes + self.adapter + beside
        encoding = max(self.text_encoders, self.vae + self.encode)
        at_once = max(self.learn, self.encode if "vae" in self.staying else 0)
        stages = {"encoding": encoding, "training": trained + at_once}
        if self.sample:
            vae = 0 if "vae" in self.staying else self.vae
            stages["sampling"] = trained + max(self.sample, vae + self.decode)
        stages["postflight"] = trained + self.prove
        return stages

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def lines(self, quantize: Quantize) -> list[str]:
        """Lines of the printed plan, for a `base.quantize`."""
        stages = ", ".join(f"{stage} {as_size(size)}" for stage, size in self.stages.items())
        training = {"denoiser": self.denoiser_bytes, "adapter": self.adapter, "activations": self.learn}
        if beside := self.stages["training"] - sum(training.values()):
            training["encoders"] = beside
        parts = ", ".join(f"{name} {as_size(size)}" for name, size in training.items())
        how = "with" if self.checkpointing else "without"
        lines = [
            f"memory    about {as_size(self.peak)}: {stages}",
            f"          training: {parts}, {how} gradient checkpointing",
        ]
        if quantize != "none":
            kinds = ", ".join(
                f"{kind} {as_size(size.plain)} to {as_size(size.stored)}"
                for kind, size in self.denoiser.items()
            )
            saved = 1 - self.denoiser_bytes / sum(size.plain for size in self.denoiser.values())
            lines.append(f"{quantize:<9} {kinds}: denoiser weights {saved:.0%} smaller")
        return lines

    def as_event(self) -> dict[str, Any]:
        """The numbers, for `events.jsonl`."""
        values = asdict(self)
        return {DENOISER: values.pop("denoiser"), **values, "stages": self.stages, "peak": self.peak}


def as_size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 0.5e9 else f"{num_bytes / 1e6:.0f} MB"


def plan_memory(inputs: MemoryInputs, device_info: DeviceInfo) -> tuple[Memory, str | None]:
    """The estimate of a run, and a warning if the run does not fit.

    With `train.gradient_checkpointing = auto`, activations are recomputed if the run would not fit otherwise.
    """
    train, free = inputs.config.train, device_info.free_bytes
    memory = estimate_memory(inputs, device_info, checkpointing=train.gradient_checkpointing is True)
    if free is None:
        return memory, None
    if train.gradient_checkpointing == "auto" and memory.stages["training"] > FITS * free:
        memory = estimate_memory(inputs, device_info, checkpointing=True)
    if memory.peak <= FITS * free:
        return memory, None
    remedies = {
        "train.gradient_checkpointing=true": not memory.checkpointing,
        "base.quantize=int8": inputs.info.quantize == "none",
        "base.quantize=nf4": inputs.info.quantize == "int8" and device_info.device.type != "mps",
        "train.batch_size=1 with train.accumulate": train.micro_batch > 1,
        "a smaller sample.batch_size": memory.peak == memory.stages.get("sampling"),
        "a smaller data.resolution": True,
    }
    advice = ", ".join(remedy for remedy, helps in remedies.items() if helps)
    return memory, (
        f"the run needs about {as_size(memory.peak)} of memory, and {as_size(free)} are free on the "
        f"{device_info.device.type}; try {advice}"
    )


def estimate_memory(inputs: MemoryInputs, device_info: DeviceInfo, *, checkpointing: bool) -> Memory:
    """The estimate of a run, without the memory of driver, allocator and Python itself."""
    config, info, precision = inputs.config, inputs.info, device_info.precision
    ranks = {name: rank for name, rank in inputs.ranks.items() if not name.startswith("text_encoder")}
    texts = {name: rank for name, rank in inputs.ranks.items() if name not in ranks}
    learning = DenoiserPass(
        info=info,
        kind=config.lora.kind,
        ranks=tuple(ranks.items()),
        latents=Size(inputs.size.width // info.vae_factor, inputs.size.height // info.vae_factor),
        dtype=precision.base_dtype,
        batch_size=config.train.micro_batch,
        learns=True,
        checkpointing=checkpointing,
    )
    learn = denoiser_peak(learning)
    if precision.compute != precision.base:
        # Autocast keeps a copy of every weight until the backward pass.
        learn += info.num_parameters * precision.compute_dtype.itemsize
    encoders = {name: part for name, part in inputs.parts.items() if name != DENOISER}
    learn += text_peak(encoders, texts, info.text_length, learning.batch_size, kind=config.lora.kind)
    trained = count_parameters(inputs.parts, inputs.ranks, config.lora.kind)
    encode, decode = vae_peaks(info, inputs.size, precision.vae_dtype)
    guided = 2 if (config.sample.guidance or 0) > 1 else 1
    sampling = replace(
        learning, learns=False, checkpointing=False, batch_size=guided * config.sample.batch_size
    )
    has_samples = bool(config.train.sample_every)
    no_cache = config.data.cache is False
    return Memory(
        denoiser=bytes_by_kind(inputs.parts[DENOISER], precision.base_dtype, info.quantize),
        vae=info.components["vae"].num_parameters * precision.vae_dtype.itemsize,
        text_encoders=4 * sum(info.components[name].num_parameters for name in info.traits.text_encoders),
        adapter=trained * (4 + _moment_bytes(config.train)) + 4 * inputs.num_frozen,
        encode=encode,
        learn=learn,
        sample=denoiser_peak(sampling) + 4 * trained if has_samples else 0,
        decode=decode if has_samples else 0,
        prove=denoiser_peak(replace(sampling, batch_size=1)),
        checkpointing=checkpointing,
        staying=("vae",) * no_cache + ("text_encoders",) * (no_cache or bool(texts)),
    )


def _moment_bytes(train: TrainSection) -> int:
    name = train.optimizer.lower()
    moments = next((size for part, size in MOMENTS.items() if part in name), 8)
    return moments + (4 if train.ema_decay else 0)
