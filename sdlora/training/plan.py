"""The plan of a run: all numbers that follow from the settings, before weights are loaded."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdlora.config import RunConfig
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import BucketPlan
from sdlora.data.cache import TensorCache, cache_folder, latent_key
from sdlora.data.records import DatasetIndex, Finding, raise_errors
from sdlora.diffusion.objective import Objective
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.errors import ConfigError, RunError
from sdlora.evaluation.heldout import NUM_BANDS
from sdlora.lora.adapter import KINDS
from sdlora.lora.attach import count_parameters, match_modules
from sdlora.lora.layers import DENOISER
from sdlora.lora.layout import Layout, plan_layout
from sdlora.memory.cards import find_card
from sdlora.memory.estimate import ANY_DEVICE, DeviceInfo, Memory, MemoryInputs, plan_memory
from sdlora.memory.work import ImageFlop, Speed, Work, flop_of, read_speed, speed_of_card
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.safety import missing_checker
from sdlora.models.tokenizer import describe_bracketed_prompts, describe_cut_prompts
from sdlora.models.weights import empty_components
from sdlora.notebook import show_html
from sdlora.training.adapter import check_init_from, check_parents, find_parents, with_parents
from sdlora.training.optimizer import check_optimizer, find_optimizer, num_warmup_steps
from sdlora.training.plan_summary import describe_plan
from sdlora.training.preflight import (
    TRAINING_PASSES,
    check_for_base,
    check_objective,
    global_batch,
    num_validated,
    resolve_config,
    sampling_share,
)
from sdlora.tree.lineage import PathEntry


@dataclass(frozen=True)
class RunPlan:
    """A run before it starts."""

    config: RunConfig  # with every default resolved
    info: BaseInfo
    index: DatasetIndex
    buckets: BucketPlan
    order: BatchOrder
    layout: Layout
    num_processes: int
    memory: Memory
    memory_inputs: MemoryInputs
    device_info: DeviceInfo
    findings: list[Finding]  # warnings and notices of preflight; errors have stopped the run already
    data_lines: list[str]  # summary of the images
    flop: ImageFlop
    num_missing: int  # crops whose latents are not in the cache
    parents: tuple[PathEntry, ...] = ()  # ancestors of the new adapter, the root first

    def lines(self) -> list[str]:
        """The plan in words."""
        return describe_plan(self)

    def _repr_html_(self) -> str:
        return show_html("plan", self.lines())

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        assert self.config.train.steps
        return self.config.train.steps

    @property
    def objective(self) -> Objective:
        asked = self.config.objective
        return Objective(schedule_from_config(self.info.scheduler_config, asked.prediction_type), asked)

    @property
    def targets(self) -> list[str]:
        """Names of the adapted modules."""
        return list(self.layout.ranks)

    @property
    def global_batch(self) -> int:
        """Samples of a full step."""
        return global_batch(self.config, self.num_processes)

    def due_steps(self, every: int | None) -> list[int]:
        """Every n-th step and the last; none for 0."""
        return sorted({*range(every, self.steps + 1, every), self.steps}) if every else []

    @property
    def save_steps(self) -> list[int]:
        """Steps that save an adapter and a checkpoint; the last always does."""
        return self.due_steps(self.config.train.save_every) or [self.steps]

    @property
    def sample_steps(self) -> list[int]:
        """Steps that make a grid."""
        return self.due_steps(self.config.train.sample_every)

    @property
    def sampling_share(self) -> float:
        """The share of the time that grids take, as estimated."""
        return sampling_share(self.config, self.steps * self.global_batch)

    @property
    def evaluate_steps(self) -> list[int]:
        """Steps that measure the held-out loss, from 0."""
        due = self.due_steps(self.config.train.evaluate_every)
        return [0, *due] if due else []

    def proof_step(self, start: int = 0) -> int:
        """The first step from `start` on whose update must change every module (R-09).

        With zeros as the states of an empty caption, cross-attention gets no gradient: then it is the first
        step with a caption.
        """
        if not self.info.zeroes_empty_prompt:
            return start
        steps = range(start, self.steps)
        captioned = (n for n in steps if any(sample.caption for sample in self.order.step(n)))
        return next(captioned, self.steps)

    @cached_property
    def num_trainable(self) -> int:
        """Parameters of the adapter."""
        return count_parameters(self.memory_inputs.parts, self.layout.ranks, self.layout.kind)

    @cached_property
    def num_padded(self) -> int:
        """Parameters with every module at the largest rank, as in kohya's format."""
        ranks = dict.fromkeys(self.layout.ranks, max(self.layout.ranks.values()))
        return count_parameters(self.memory_inputs.parts, ranks, self.layout.kind)

    @cached_property
    def num_base(self) -> int:
        """Parameters of the denoiser."""
        return sum(parameter.numel() for parameter in self.memory_inputs.parts[DENOISER].parameters())

    @cached_property
    def images_seen(self) -> int:
        """Samples of the whole run, with its short steps."""
        epochs = self.steps // self.order.steps_per_epoch
        # The positions of short steps in an epoch are random.
        begun = range(epochs * self.order.steps_per_epoch, self.steps)
        return epochs * self.order.samples_per_epoch + sum(len(self.order.step(step)) for step in begun)

    @property
    def adapter_bytes(self) -> int:
        """Size of one saved file, without its header."""
        return self.num_trainable * self._value_bytes

    @property
    def _value_bytes(self) -> int:
        return 4 if self.config.export.precision == "fp32" else 2

    def bytes_after(self, step: int) -> int:
        """Bytes written after a step: adapters, and checkpoints with weights, two moments and the EMA."""
        final = {"diffusers": self.num_trainable, "kohya": self.num_padded}
        exports = self._value_bytes * sum(final[name] for name in self.config.export.formats)
        adapters = sum(due > step for due in {*self.save_steps, *self.sample_steps})
        # One more than are kept, until the newest is complete; a resumed run has that one already.
        states = min(self.config.train.keep_checkpoints, sum(due > step for due in self.save_steps))
        states += step == 0
        state_bytes = (16 if self.config.train.ema_decay else 12) * self.num_trainable
        return adapters * self.adapter_bytes + exports + states * state_bytes

    @property
    def speed_key(self) -> str:
        """Names device and base, for the speed that is measured; empty if the device is not known."""
        train, device = self.config.train, self.device_info
        how = f"{device.precision.compute} on {device.precision.base}, {self.info.quantize}"
        again = ", checkpointing" if train.gradient_checkpointing is True else ""
        where = f"{device.name}, {self.num_processes} processes"
        return f"{where}, {how}{again}, {self.info.digest[:16]}" if device.name else ""

    @cached_property
    def speed(self) -> Speed | None:
        """Measured on this device with this base, else estimated from what is published of the GPU."""
        device = self.device_info
        if device.card:
            return speed_of_card(device.card)
        if known := read_speed(self.speed_key):
            return known
        try:
            return speed_of_card(find_card(device.name)) if device.device.type == "cuda" else None
        except ConfigError:
            return None

    def work_left(self, step: int = 0, due: int | None = None) -> dict[str, Work]:
        """What a process has still to compute, by stage, once a step is done.

        Evaluations and grids of steps from `due` on are to come, by default that of this step too.
        """
        train, sample, share = self.config.train, self.config.sample, self.num_processes
        due, flop, left = step if due is None else due, self.flop, max(0, self.steps - step)
        images = self.images_seen * left / self.steps / share
        predicted = num_validated(self.index) * NUM_BANDS / share
        predicted *= sum(one >= due for one in self.evaluate_steps)
        grids = sum(one >= due for one in self.sample_steps)
        columns = grids * len({*sample.strengths} - {0.0})
        if grids == len(self.sample_steps) > 0:
            columns += 2 if self.parents else 1  # the base, and the parents, are drawn once
        drawn = len(sample.prompts) * len(sample.seeds) * columns / share
        guided = sample.steps * (2 if (sample.guidance or 0) > 1 else 1)
        missing = 0 if step else self.num_missing / share
        batch = train.micro_batch
        return {
            "encoding": Work(missing * flop.encode, missing),
            "training": Work(images * flop.learn, (TRAINING_PASSES + 1) * images / batch),
            "validation": Work(predicted * flop.denoise, predicted / max(4, batch)),
            "sampling": Work(
                drawn * (guided * flop.denoise + flop.decode), drawn * sample.steps / sample.batch_size
            ),
        }

    @property
    def seconds(self) -> dict[str, float] | None:
        """Time by stage, `rest` for all else; None if the speed is not known."""
        return {**self.speed.seconds(self.work_left()), "rest": self.speed.rest} if self.speed else None

    @property
    def exchange_bytes(self) -> int:
        """Bytes that a process reduces in a step: the gradients in fp32, and the loss."""
        return 4 * (self.num_trainable + 1) if self.num_processes > 1 else 0

    def as_json(self) -> dict[str, Any]:
        """The event, with the resolved settings and the findings of preflight."""
        settings = self.config.model_dump(mode="json")
        return {**self.as_event(), "settings": settings, "findings": [asdict(one) for one in self.findings]}

    def as_event(self) -> dict[str, Any]:
        """The numbers, for `events.jsonl`."""
        return {
            "steps": self.steps,
            "steps_per_epoch": self.order.steps_per_epoch,
            "global_batch": self.global_batch,
            "images": len(self.index.records),
            "images_per_epoch": self.order.samples_per_epoch,
            "images_seen": self.images_seen,
            "heldout_images": len(self.index.heldout),
            "captions": self.index.num_captions,
            "buckets": {str(size): images for size, images, _ in self.buckets.table()},
            "warmup_steps": num_warmup_steps(self.config.train.warmup, self.steps),
            "save_steps": self.save_steps,
            "sample_steps": self.sample_steps,
            "sampling_share": round(self.sampling_share, 3),
            "evaluate_steps": self.evaluate_steps,
            "modules": len(self.layout.ranks),
            "trainable_parameters": self.num_trainable,
            "base_parameters": self.num_base,
            "adapter_bytes": self.adapter_bytes,
            "disk_bytes": self.bytes_after(0),
            "memory": self.memory.as_event(),
            "seconds": {name: round(size, 1) for name, size in (self.seconds or {}).items()},
            "seconds_from": self.speed.source if self.speed else None,
            "num_processes": self.num_processes,
            "exchange_bytes": self.exchange_bytes,
            "dataset_digest": self.index.digest,
            "base_digest": self.info.digest,
            "parents": [parent.ancestor.digest for parent in self.parents],
        }


def make_plan(config: RunConfig, num_processes: int = 1, device_info: DeviceInfo = ANY_DEVICE) -> RunPlan:
    """Reads all images and captions and the base's configuration; loads no weights.

    Raises an SdloraError if the images, the base or the settings cannot be used.
    """
    find_optimizer(config.train)
    info = inspect_base(config.base, config.objective, config.data)
    config = with_base_defaults(config, info)
    check_objective(config, info)
    checkup = check_for_base(config, info)
    index, buckets, findings = checkup.index, checkup.buckets, checkup.findings
    forced: list[str] = []
    parents = find_parents(config.lora, forced.append)
    config, about_rank = with_parents(config, parents)
    config = epochs_to_steps(config, index, buckets, num_processes)
    config = resolve_config(config, info, index, num_processes)
    raise_errors(findings)
    unknown = info.describe_unknown_words(config.sample.prompts, config.data.trigger)
    # What captions lose is a finding already.
    captions = {record.caption for record in (*index.records, *index.heldout)}
    sample = config.sample
    prompts = [text for text in (*sample.prompts, sample.negative_prompt) if text not in captions]
    cut, bracketed = describe_cut_prompts(info, prompts), describe_bracketed_prompts(info, prompts)
    unchecked = missing_checker(info) if config.sample.safety_checker and config.train.sample_every else None
    findings += [Finding("notice", line) for line in (unknown, cut, bracketed, unchecked, about_rank) if line]
    parts = empty_components(info, text=config.lora.text_encoder)
    findings += [Finding("warning", line) for line in (*forced, *check_parents(parents, info, parts))]
    layout = plan_layout(config.lora, match_modules(parts, config.lora.targets))
    check_optimizer(config.train, list(layout.ranks), KINDS[layout.kind].parts())
    sizes = (crop.size for crops in buckets.crops.values() for crop in crops)
    largest = max(sizes, key=lambda size: size.area)
    num_frozen = sum(step.adapter.num_parameters for step in parents)
    memory_inputs = MemoryInputs(config, info, parts, layout.ranks, num_frozen, largest)
    memory = plan_memory(memory_inputs, device_info)
    problem = None if memory.fits or device_info.card else f"the run {memory.verdict}"
    config = config.replace(train={"gradient_checkpointing": memory.checkpointing})
    memory_inputs = replace(memory_inputs, config=config)
    other_base = check_init_from(config, info, parts, layout)
    findings += [Finding("warning", line) for line in (problem, other_base) if line]
    batch, seed = global_batch(config, num_processes), config.train.seed
    return RunPlan(
        config=config,
        info=info,
        index=index,
        buckets=buckets,
        order=BatchOrder(index.records, buckets, config.data, global_batch=batch, seed=seed),
        layout=layout,
        num_processes=num_processes,
        memory=memory,
        memory_inputs=memory_inputs,
        device_info=device_info,
        findings=findings,
        data_lines=checkup.summary,
        flop=flop_of(memory_inputs, device_info.precision),
        num_missing=_count_missing(index, buckets, info, config, device_info),
        parents=parents,
    )


def _count_missing(
    index: DatasetIndex, buckets: BucketPlan, info: BaseInfo, config: RunConfig, device_info: DeviceInfo
) -> int:
    """Crops whose latents are not in the cache; a damaged entry counts as known."""
    if config.data.cache is False:
        return 0
    cache, dtype = TensorCache(cache_folder()), str(device_info.precision.vae_dtype)
    crops = [(record, crop) for record in index.records for crop in buckets.crops[record.name]]
    crops += [(record, buckets.crops[record.name][0]) for record in index.heldout]
    keys = (
        latent_key(*view, vae_digest=info.vae_digest, background=config.data.background, dtype=dtype)
        for view in crops
    )
    return sum(not cache.has_file(key) for key in keys)


def epochs_to_steps(
    config: RunConfig, index: DatasetIndex, buckets: BucketPlan, num_processes: int
) -> RunConfig:
    """`train.epochs` as `train.steps`; whole steps, at least one."""
    if config.train.epochs is None:
        return config
    batch = global_batch(config, num_processes)
    order = BatchOrder(index.records, buckets, config.data, global_batch=batch, seed=0)
    steps = max(1, round(config.train.epochs * order.steps_per_epoch))
    return config.replace(train={"steps": steps, "epochs": None})


def check_disk(plan: RunPlan, folder: Path, step: int = 0) -> None:
    """Raises a RunError if the free space of a folder is less than a run will write after a step."""
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(parent).free
    needed = plan.bytes_after(step)
    if needed > free:
        size = f"{needed / 1e6:.1f} MB{' more' if step else ''}"
        problem = f"the run will write up to {size} but {parent} has {free / 1e6:.1f} MB free"
        remedy = "free some" if step else "choose another --out"
        raise RunError(f"{problem}; {remedy}, or set a larger train.save_every", key="disk-space")
