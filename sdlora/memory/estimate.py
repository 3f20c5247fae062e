"""A run's memory on its device, stage by stage, and what to change if it does not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from operator import or_
from typing import Any

import psutil
import torch
from torch import nn

from sdlora.config import Quantize, RunConfig, TrainSection
from sdlora.data.records import Size
from sdlora.dtypes import Precision
from sdlora.lora.attach import count_parameters
from sdlora.lora.layers import DENOISER
from sdlora.memory.activations import DenoiserPass, denoiser_cost, text_peak, vae_costs
from sdlora.memory.cards import Card
from sdlora.models.info import BaseInfo
from sdlora.models.quantize import LayerBytes, bytes_by_kind

# Moments of an optimizer, in bytes per trained number, by a part of its name; else AdamW's two in fp32.
MOMENTS = {"8bit": 2, "sgd": 4, "lion": 4}
# Usable share of the free memory: allocators leave gaps.
FITS = 0.9
# Beside what a run computes with: the CUDA context and its libraries' buffers on a GPU; elsewhere kernels and
# modules that are loaded when they are first used.
CONTEXT_BYTES, KERNEL_BYTES = 600_000_000, 80_000_000


@dataclass(frozen=True)
class DeviceInfo:
    """Where a run is computed, or is planned to be.

    Args:
        precision: Dtypes of the denoiser.
        free_bytes: Free memory, if torch can measure it.
        baseline_bytes: What Python and its libraries take of it beside a run; not part of `free_bytes`.
        name: Of the processor and what else its speed depends on; empty if nothing is known.
        card: The GPU that is planned for, where it is not this machine's.
    """

    precision: Precision
    device: torch.device
    free_bytes: int | None = None
    baseline_bytes: int = 0
    name: str = ""
    card: Card | None = None


ANY_DEVICE = DeviceInfo(Precision("fp32", "fp32"), torch.device("cpu"))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if torch cannot measure it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def baseline_bytes(device: torch.device) -> int:
    """What a process takes of a device's memory before it loads a base."""
    return CONTEXT_BYTES if device.type == "cuda" else psutil.Process().memory_info().rss + KERNEL_BYTES


def device_of_card(card: Card, precision: Precision) -> DeviceInfo:
    """A GPU with nothing on it."""
    free = max(0, card.num_bytes - CONTEXT_BYTES)
    return DeviceInfo(precision, torch.device("cuda"), free, CONTEXT_BYTES, card=card)


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
        read: The largest text encoder as its file stores it, where it is read on the device itself.
        staying: Encoders that stay in memory during training: `vae`, `text_encoders`.
        baseline: Python and its libraries, in every stage; the other numbers are without it.
        free: Free memory of the device, beside the baseline; None if unknown.
        changes: Settings that make the run fit if it does not, `section.key=value`.
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
    read: int = 0
    baseline: int = 0
    free: int | None = None
    changes: tuple[str, ...] = ()

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
        encoding = max(self.text_encoders + self.read, self.vae + self.encode)
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

    @property
    def needs(self) -> int:
        """The peak with the baseline."""
        return self.peak + self.baseline

    @property
    def fits(self) -> bool:
        """Whether the run fits; what is unknown counts as enough."""
        return self.free is None or self.peak <= FITS * self.free

    @property
    def verdict(self) -> str:
        """What the run needs, against what there is."""
        if self.free is None:
            return f"needs {as_size(self.needs)}"
        needs = f"needs {as_size(self.needs)} of {as_size(self.free + self.baseline)}"
        if self.fits:
            return f"{needs}: fits"
        advice = f"set {' '.join(self.changes)}" if self.changes else "lower data.resolution"
        return f"{needs}: does not fit; {advice}"

    def lines(self, quantize: Quantize) -> list[str]:
        """Lines of the printed plan, for a `base.quantize`."""
        stages = ", ".join(f"{stage} {as_size(size + self.baseline)}" for stage, size in self.stages.items())
        training = {"denoiser": self.denoiser_bytes, "adapter": self.adapter, "activations": self.learn}
        if beside := self.stages["training"] - sum(training.values()):
            training["encoders"] = beside
        parts = ", ".join(f"{name} {as_size(size)}" for name, size in training.items())
        how = "with" if self.checkpointing else "without"
        lines = [
            f"memory    {self.verdict}",
            f"          {stages}",
            f"          training: {parts}, {how} gradient checkpointing",
        ]
        if self.baseline:
            lines.append(f"          of each, {as_size(self.baseline)} for torch and other libraries")
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
        found = {"stages": self.stages, "peak": self.peak, "needs": self.needs, "fits": self.fits}
        found["verdict"] = self.verdict
        return {DENOISER: values.pop("denoiser"), **values, **found}


def as_size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 0.95e9 else f"{num_bytes / 1e6:.0f} MB"


def plan_memory(inputs: MemoryInputs, device_info: DeviceInfo) -> Memory:
    """The estimate of a run, with what to change if it does not fit.

    With `train.gradient_checkpointing = auto`, activations are recomputed if the run would not fit otherwise.
    """
    asked, free = inputs.config.train.gradient_checkpointing, device_info.free_bytes
    memory = estimate_memory(inputs, device_info, checkpointing=asked is True)
    if asked == "auto" and free is not None and memory.stages["training"] > FITS * free:
        memory = estimate_memory(inputs, device_info, checkpointing=True)
    if memory.fits:
        return memory
    inputs = replace(
        inputs, config=inputs.config.replace(train={"gradient_checkpointing": memory.checkpointing})
    )
    return replace(memory, changes=tuple(_find_changes(inputs, device_info)))


def _find_changes(inputs: MemoryInputs, device_info: DeviceInfo) -> Iterator[str]:
    """The first single change that makes a run fit, else as many as it takes; none if nothing helps."""
    config, info = inputs.config, inputs.info
    together = config.train.micro_batch * config.train.accumulate
    # Those that cost least first.
    changes: list[dict[str, Any]] = [
        {"train.batch_size": 1, "train.accumulate": together} if config.train.micro_batch > 1 else {},
        {"sample.batch_size": 1} if config.sample.batch_size > 1 and config.train.sample_every else {},
        {} if config.train.gradient_checkpointing is True else {"train.gradient_checkpointing": True},
    ]
    if config.lora.kind != "dora":  # whose norms are of whole weights
        changes += [{"base.quantize": "int8"}] if info.quantize == "none" else []
        has_nf4 = info.quantize != "nf4" and device_info.device.type != "mps"
        changes += [{"base.quantize": "nf4"}] if has_nf4 else []
    changes = [change for change in changes if change]
    for change in (*changes, *accumulate(changes, or_)):
        sections: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in change.items():
            section, _, key = name.partition(".")
            sections[section][key] = value
        changed, quantize = config.replace(**sections), change.get("base.quantize", info.quantize)
        asked = replace(inputs, config=changed, info=replace(info, quantize=quantize))
        checkpointing = changed.train.gradient_checkpointing is True
        if estimate_memory(asked, device_info, checkpointing=checkpointing).fits:
            yield from (f"{name}={str(value).lower()}" for name, value in change.items())
            return


def passes_of(
    inputs: MemoryInputs, precision: Precision, *, checkpointing: bool
) -> tuple[DenoiserPass, DenoiserPass]:
    """The denoiser's pass over a micro-batch, and over a batch of samples."""
    config, info = inputs.config, inputs.info
    ranks = {name: rank for name, rank in inputs.ranks.items() if not name.startswith("text_encoder")}
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
    guided = 2 if (config.sample.guidance or 0) > 1 else 1
    together = guided * config.sample.batch_size
    return learning, replace(learning, learns=False, checkpointing=False, batch_size=together)


def estimate_memory(inputs: MemoryInputs, device_info: DeviceInfo, *, checkpointing: bool) -> Memory:
    """The estimate of a run."""
    config, info, precision = inputs.config, inputs.info, device_info.precision
    learning, sampling = passes_of(inputs, precision, checkpointing=checkpointing)
    learn = denoiser_cost(learning).num_bytes
    if precision.compute != precision.base:
        # Autocast keeps a copy of every weight until the backward pass.
        learn += info.num_parameters * precision.compute_dtype.itemsize
    encoders = {name: part for name, part in inputs.parts.items() if name != DENOISER}
    texts = {name: rank for name, rank in inputs.ranks.items() if name.startswith("text_encoder")}
    num_texts = learning.batch_size * info.prompt_chunks
    learn += text_peak(encoders, texts, info.text_length, num_texts, kind=config.lora.kind)
    trained = count_parameters(inputs.parts, inputs.ranks, config.lora.kind)
    encode, decode = vae_costs(info, inputs.size, precision.vae_dtype)
    has_samples = bool(config.train.sample_every)
    no_cache = config.data.cache is False
    text_sizes = [info.components[name].num_parameters for name in info.traits.text_encoders]
    return Memory(
        denoiser=bytes_by_kind(inputs.parts[DENOISER], precision.base_dtype, info.quantize),
        vae=info.components["vae"].num_parameters * precision.vae_dtype.itemsize,
        text_encoders=4 * sum(text_sizes),
        adapter=trained * (4 + _moment_bytes(config.train)) + 4 * inputs.num_frozen,
        encode=encode.num_bytes,
        learn=learn,
        sample=denoiser_cost(sampling).num_bytes + 4 * trained if has_samples else 0,
        decode=decode.num_bytes if has_samples else 0,
        prove=denoiser_cost(replace(sampling, batch_size=1)).num_bytes,
        checkpointing=checkpointing,
        staying=("vae",) * no_cache + ("text_encoders",) * (no_cache or bool(texts)),
        # Files of text encoders are mostly in 16 bits.
        read=2 * max(text_sizes) if device_info.device.type == "cpu" else 0,
        baseline=device_info.baseline_bytes,
        free=device_info.free_bytes,
    )


def _moment_bytes(train: TrainSection) -> int:
    name = train.optimizer.lower()
    moments = next((size for part, size in MOMENTS.items() if part in name), 8)
    return moments + (4 if train.ema_decay else 0)
