"""The plan of a run: all numbers that follow from the settings, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sdlora.config import RunConfig
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import BucketPlan
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, count_of
from sdlora.diffusion.objective import Objective, describe_objective
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.errors import ConfigError
from sdlora.evaluation.heldout import NUM_BANDS
from sdlora.lora.attach import Layout, count_parameters
from sdlora.lora.layers import DENOISER, component_of
from sdlora.memory.cards import find_card
from sdlora.memory.estimate import DeviceInfo, Memory, MemoryInputs
from sdlora.memory.work import ImageFlop, Speed, Work, as_time, describe_times, read_speed, speed_of_card
from sdlora.models.info import BaseInfo
from sdlora.notebook import show_html
from sdlora.training.optimizer import describe_rates, num_warmup_steps
from sdlora.training.preflight import (
    TRAINING_PASSES,
    choose_validated,
    global_batch,
    sampling_share,
)
from sdlora.tree.lineage import PathEntry

LABEL_WIDTH = 10
# Of a module in the header of a file, and of a checkpoint's other values.
HEADER_BYTES, STATE_BYTES = 500, 200_000


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

    def _repr_html_(self) -> str:
        return show_html("plan", describe_plan(self))

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

    @cached_property
    def validated(self) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Images of training, and held-out ones, that the held-out loss is measured on."""
        return choose_validated(self.index)

    def first_update_step(self, start: int = 0) -> int:
        """The first step from `start` on whose update must change every module.

        It must have a caption where an empty one teaches nothing: with zeros as its text states,
        cross-attention gets no gradient, and prior prediction keeps images without their caption as they are.
        """
        if not (self.info.zeroes_empty_prompt or self.config.objective.prior_weight):
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
        # fp16 that would lose too much becomes fp32.
        largest = 2 if self.config.export.precision == "bf16" else 4
        header = HEADER_BYTES * len(self.layout.ranks)
        final = {"diffusers": self.num_trainable, "kohya": self.num_padded}
        exports = sum(largest * final[name] + header for name in self.config.export.formats)
        adapters = sum(due > step for due in {*self.save_steps, *self.sample_steps})
        # One more than are kept, until the newest is complete; a resumed run has that one already.
        states = min(self.config.train.keep_checkpoints, sum(due > step for due in self.save_steps))
        states += step == 0
        state_bytes = (16 if self.config.train.ema_decay else 12) * self.num_trainable
        saved = largest * self.num_trainable + header
        return adapters * saved + exports + states * (state_bytes + 3 * header + STATE_BYTES)

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
        predicted = sum(map(len, self.validated)) * NUM_BANDS / share
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
            "family": self.info.family,
            "parents": [parent.ancestor.digest for parent in self.parents],
        }


def describe_plan(plan: RunPlan) -> list[str]:
    """The plan, one line for each subject."""
    train, info = plan.config.train, plan.info
    warmup = num_warmup_steps(train.warmup, plan.steps)
    rates = describe_rates(plan.targets, train)
    size = count_of(len(plan.config.sample.prompts) * len(plan.config.sample.seeds), "row")
    cost = f" ({size}, about {plan.sampling_share:.0%} of the time)" if plan.sample_steps else ""
    rows = {
        "base": f"{info.name} ({info.family}, {info.prediction_type}, {info.resolution} px, "
        f"{plan.num_base / 1e6:.1f} M parameters)",
        "adapter": f"{plan.layout.describe()}; {len(plan.targets)} modules{_text_modules(plan)}, "
        f"{plan.num_trainable / 1e6:.2f} M trainable parameters ({plan.num_trainable / plan.num_base:.2%}), "
        f"{plan.adapter_bytes / 1e6:.1f} MB a file",
        "steps": _describe_steps(plan),
        "EMA": f"of the weights, over about {1 / (1 - train.ema_decay):.0f} steps (train.ema_decay = "
        f"{train.ema_decay:g}); it is evaluated, sampled, saved and exported",
        "network": f"{plan.exchange_bytes / 1e6:.2f} MB of gradients a step between "
        f"{plan.num_processes} processes",
        "optimizer": f"{train.optimizer}, learning rate {train.learning_rate:g}, {train.schedule} schedule, "
        f"{warmup} warm-up steps{f'; {rates}' if rates else ''}",
        "objective": describe_objective(plan.objective),
        "cadence": f"save at {_points(plan.save_steps)}; sample at {_points(plan.sample_steps)}{cost}; "
        f"validation loss at {_points(plan.evaluate_steps)}",
        "disk": f"up to {plan.bytes_after(0) / 1e6:.0f} MB, without samples{_cache_size(plan)}",
    }
    if not train.ema_decay:
        del rows["EMA"]
    if plan.num_processes == 1:
        del rows["network"]
    lines = [f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows.items()]
    memory = [*plan.memory.lines(plan.info.quantize), f"{'time':<{LABEL_WIDTH}}{_describe_time(plan)}"]
    path = " > ".join(f"{step.ancestor} rank {step.adapter.rank}" for step in plan.parents)
    parents = [f"{'parent':<{LABEL_WIDTH}}{path}; frozen below the new adapter"] if path else []
    at = list(rows).index("optimizer")
    return [lines[0], *plan.data_lines, *parents, *lines[1:at], *memory, *lines[at:]]


def _describe_steps(plan: RunPlan) -> str:
    train = plan.config.train
    factors = [f"batch size {train.batch_size}"]
    if train.batch_size == "auto":
        factors = [f"batch size 1 to {train.accumulate} (auto)"]
    elif train.accumulate > 1:
        factors.append(f"{train.accumulate} accumulated")
    if plan.num_processes > 1:
        factors.append(f"{plan.num_processes} processes")
    return (
        f"{plan.steps}; {' x '.join(factors)} = global batch {plan.global_batch}; "
        f"{plan.order.steps_per_epoch} steps an epoch, {plan.steps / plan.order.steps_per_epoch:.1f} epochs, "
        f"{plan.images_seen} images seen"
    )


def _describe_time(plan: RunPlan) -> str:
    """The time of the run, and where it is known from."""
    card = plan.device_info.card
    if plan.speed and plan.seconds:
        whole, stages = as_time(sum(plan.seconds.values())), describe_times(plan.seconds)
        return f"about {whole}: {stages}; {plan.speed.source}"
    if card:
        return 'not known without the name of the card, such as --device "RTX 3060 12GB"'
    return "not known yet: no run with this base was timed on this machine; the third step will tell"


def _cache_size(plan: RunPlan) -> str:
    """What the variants of captions and images take in the cache, if there are any."""
    info, parts = plan.info, []
    if any(record.variants for record in plan.index.records):
        size = 4 * plan.index.num_captions * info.num_text_states * info.text_width
        parts.append(f"{size / 1e6:.0f} MB for {plan.index.num_captions} captions")
    crops = [crop for record in plan.index.records for crop in plan.buckets.crops[record.name]]
    if len(crops) > len(plan.index.records):
        values = 2 * info.latent_channels * sum(crop.size.area for crop in crops) // info.vae_factor**2
        size = values * plan.device_info.precision.vae_dtype.itemsize
        parts.append(f"{size / 1e6:.1f} MB for {len(crops)} views of images")
    return f"; in the cache up to {', '.join(parts)}" if parts else ""


def _text_modules(plan: RunPlan) -> str:
    count = sum(component_of(name) != DENOISER for name in plan.targets)
    return f" ({count} in text encoders)" if count else ""


def _points(steps: Sequence[int]) -> str:
    if len(steps) <= 3:
        return ", ".join(map(str, steps)) or "no step"
    return f"{steps[0]}, {steps[1]} … {steps[-1]}"
