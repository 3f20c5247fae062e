"""`train.batch_size = auto`: the largest micro-batch that the memory holds, tried before the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from sdlora.data.batches import Sample
from sdlora.data.records import Size
from sdlora.errors import first_line
from sdlora.memory.estimate import Machine, Workload, as_size, estimate_memory
from sdlora.models.dtypes import Precision
from sdlora.training.distributed import all_reduce_count
from sdlora.training.plan import RunPlan
from sdlora.training.resume import RESUMABLE
from sdlora.training.step import StepRunner

NUM_REMEDIES = 3


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Turns what the allocators of a CPU and of MPS, and cuDNN, raise into torch's OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        raise


def describe_remedies(work: Workload, machine: Machine) -> str:
    """The settings that free the most memory in a step, by the estimate that the plan printed too."""
    found = find_remedies(work, machine)[:NUM_REMEDIES]
    if not found:
        return "no setting of the run would free memory"
    texts = [f"{setting} ({as_size(freed)} less{_when(setting)})" for setting, freed in found]
    return f"what helps most: {', '.join(texts)}"


def find_remedies(work: Workload, machine: Machine) -> list[tuple[str, int]]:
    """Settings with the bytes that each would free in a step, the most first."""
    checkpointing = work.config.train.gradient_checkpointing is True
    now = estimate_memory(work, machine, checkpointing=checkpointing).stages["training"]
    found = []
    for setting, other, where, recomputes in _candidates(work, machine):
        memory = estimate_memory(other, where, checkpointing=checkpointing or recomputes)
        found.append((setting, now - memory.stages["training"]))
    return sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])


def _candidates(work: Workload, machine: Machine) -> Iterator[tuple[str, Workload, Machine, bool]]:
    """Changes that may help: setting, workload, machine, whether activations are recomputed."""
    train = work.config.train
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true", work, machine, True
    if train.micro_batch > 1:
        size = train.micro_batch // 2
        while train.micro_batch % size:
            size -= 1
        count = train.accumulate * train.micro_batch // size
        setting = f"train.batch_size={size} train.accumulate={count}"
        yield setting, _with(work, train={"batch_size": size, "accumulate": count}), machine, False
    # Four bits free a little more than eight, and answer much further from the full base: they come second.
    if work.info.quantize == "none":
        yield "base.quantize=int8", replace(work, info=replace(work.info, quantize="int8")), machine, False
    if work.info.quantize == "int8" and machine.device.type != "mps":
        yield "base.quantize=nf4", replace(work, info=replace(work.info, quantize="nf4")), machine, False
    if machine.precision.base == "fp32" and machine.device.type != "cpu":
        yield "train.precision=bf16", work, replace(machine, precision=Precision("bf16", "bf16")), False
    step, resolution = work.info.min_step, work.config.data.resolution or work.info.resolution
    if smaller := _shrink(resolution, step):
        fewer = Size(_shrink(work.size.width, step) or step, _shrink(work.size.height, step) or step)
        yield f"data.resolution={smaller}", replace(work, size=fewer), machine, False
    rank = max(work.ranks.values(), default=1)
    if rank > 1:
        ranks = {name: max(1, own // 2) for name, own in work.ranks.items()}
        yield f"lora.rank={rank // 2}", replace(work, ranks=ranks), machine, False


def _shrink(side: int, step: int) -> int:
    """Three quarters of a side, in whole steps."""
    return side * 3 // 4 // step * step


def _with(work: Workload, **sections: Any) -> Workload:
    return replace(work, config=work.config.replace(**sections))


def _when(setting: str) -> str:
    keys = [part.partition("=")[0] for part in setting.split(" ")]
    return "" if all(key in RESUMABLE for key in keys) else ", in a new run"


# Beside the parameters and gradients that a trial has: the two moments of AdamW.
MOMENTS = 2


def fit_batch(plan: RunPlan, runner: StepRunner, accelerator: Accelerator) -> RunPlan:
    """Divides what a process has to do in a step into the fewest micro-batches; the global batch is kept.

    The trial is a forward and backward pass over copies of the largest image. It draws nothing from any
    random state and leaves no gradient.

    Args:
        plan: With `train.batch_size = auto`.
        runner: Goes through the trials.
        accelerator: All its processes take the same size.

    Returns:
        The plan with numbers for `train.batch_size` and `train.accumulate`.

    Raises:
        OutOfMemoryError: If not even one sample fits.
    """
    share = plan.config.train.accumulate
    for size in halving_divisors(share):
        fits = _try(runner, largest_samples(plan, size))
        if all_reduce_count(accelerator, fits) == accelerator.num_processes:
            train = {"batch_size": size, "accumulate": share // size}
            return replace(plan, config=plan.config.replace(train=train))
    raise torch.OutOfMemoryError("not even one image fits")


def halving_divisors(share: int) -> Iterator[int]:
    """Divisors of a number, from itself down, each at most half of the one before."""
    size = share
    while size:
        if share % size == 0:
            yield size
            size //= 2
        else:
            size -= 1


def largest_samples(plan: RunPlan, count: int) -> list[Sample]:
    """Copies of an image of the largest bucket."""
    crops = plan.buckets.crops
    record = max(plan.index.records, key=lambda record: crops[record.name][0].size.area)
    return [Sample(index, record, crops[record.name][0], record.caption) for index in range(count)]


def _try(runner: StepRunner, samples: Sequence[Sample]) -> bool:
    """Whether a micro-batch goes through, with what the optimizer will take lying beside it."""
    fits = False
    with suppress(torch.OutOfMemoryError), as_out_of_memory():
        moments: list[Tensor] = [torch.empty_like(p) for p in runner.parameters for _ in range(MOMENTS)]
        runner.forward_backward(0, list(samples), len(samples))
        fits = bool(moments)
    moments = []
    runner.optimizer.zero_grad(set_to_none=True)
    clear_device_cache()
    return fits
