"""Makes the plan of a run from its settings, images and base, before weights are loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from sdlora.config import RunConfig
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import BucketPlan
from sdlora.data.cache import TensorCache, cache_folder, latent_key
from sdlora.data.records import DatasetIndex, Finding, raise_errors
from sdlora.errors import RunError
from sdlora.lora.attach import match_modules, plan_layout, tensor_shapes
from sdlora.memory.estimate import ANY_DEVICE, DeviceInfo, MemoryInputs, plan_memory
from sdlora.memory.work import flop_of
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.safety import missing_checker
from sdlora.models.tokenizer import describe_bracketed_prompts, describe_cut_prompts
from sdlora.models.weights import empty_components
from sdlora.report.terminal import Terminal
from sdlora.training.adapter import check_init_from, check_parents, find_parents, with_parents
from sdlora.training.optimizer import check_optimizer, find_optimizer
from sdlora.training.plan import RunPlan, describe_plan
from sdlora.training.preflight import (
    check_for_base,
    check_objective,
    check_sampling,
    global_batch,
    resolve_config,
)


def print_plan(plan: RunPlan, terminal: Terminal, *, is_default_base: bool) -> None:
    """Prints the plan of a new run, and the findings of preflight; `is_default_base`: no base was given."""
    if is_default_base:
        terminal.print("no --base given: using the built-in base (128 px); pass --base for a real one")
    terminal.print(*describe_plan(plan))
    for finding in plan.findings:
        if finding.severity == "warning":
            terminal.warn(finding.message)
        else:
            terminal.print(f"note: {finding.message}")


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
    check_sampling(config, info)
    raise_errors(findings)
    # What captions lose is a finding already.
    captions = {record.caption for record in (*index.records, *index.heldout)}
    unknown = info.describe_unknown_words((*config.sample.prompts, *captions), config.data.trigger)
    sample = config.sample
    prompts = [text for text in (*sample.prompts, sample.negative_prompt) if text not in captions]
    cut, bracketed = describe_cut_prompts(info, prompts), describe_bracketed_prompts(info, prompts)
    unchecked = missing_checker(info) if config.sample.safety_checker and config.train.sample_every else None
    findings += [Finding("notice", line) for line in (unknown, cut, bracketed, unchecked, about_rank) if line]
    parts = empty_components(info, text=config.lora.text_encoder)
    findings += [Finding("warning", line) for line in (*forced, *check_parents(parents, info, parts))]
    findings += _short_steps(buckets, config, num_processes)
    layout = plan_layout(config.lora, match_modules(parts, config.lora.targets))
    shapes = tensor_shapes(parts, layout.ranks, layout.kind)
    check_optimizer(config.train, {name: len(shape) for name, shape in shapes.items()})
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


def _short_steps(buckets: BucketPlan, config: RunConfig, num_processes: int) -> list[Finding]:
    """A notice if images of small buckets weigh more than others, and `data.merge_buckets` is not used."""
    batch, rows = global_batch(config, num_processes), buckets.table()
    small = sum(samples for _, _, samples in rows if samples < batch)
    if config.data.merge_buckets or not small or len(rows) == 1:
        return []
    text = (
        f"{small} of {sum(samples for *_, samples in rows)} samples an epoch are in buckets of fewer than "
        f"the global batch of {batch}: their steps are smaller, so that each counts for more; "
        f"data.merge_buckets={batch} moves those images to other buckets that are near"
    )
    return [Finding("notice", text, key="data.buckets-lonely")]


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
