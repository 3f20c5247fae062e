"""A run's plan in words, for the terminal, and in plain values, for the files of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.config import RunConfig
from sdlora.data.records import count_of
from sdlora.diffusion.objective import describe_objective
from sdlora.export.metadata import TrainingMetadata
from sdlora.lora.layers import DENOISER, component_of
from sdlora.memory.work import as_time, describe_times
from sdlora.models.components import kohya_hashes
from sdlora.report.summary import losses_of
from sdlora.report.terminal import Terminal
from sdlora.runs import RunFolder
from sdlora.training.optimizer import describe_rates, num_warmup_steps

if TYPE_CHECKING:
    from sdlora.training.health import Counters
    from sdlora.training.plan import RunPlan

LABEL_WIDTH = 10


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
        f"held-out loss at {_points(plan.evaluate_steps)}",
        "disk": f"up to {plan.bytes_after(0) / 1e6:.0f} MB, without samples{_caption_cache(plan)}",
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


def _caption_cache(plan: RunPlan) -> str:
    if not any(record.variants for record in plan.index.records):
        return ""
    size = 4 * plan.index.num_captions * plan.info.num_text_states * plan.info.text_width
    return f"; in the cache up to {size / 1e6:.0f} MB for {plan.index.num_captions} captions"


def _text_modules(plan: RunPlan) -> str:
    count = sum(component_of(name) != DENOISER for name in plan.targets)
    return f" ({count} in text encoders)" if count else ""


def _points(steps: Sequence[int]) -> str:
    if len(steps) <= 3:
        return ", ".join(map(str, steps)) or "no step"
    return f"{steps[0]}, {steps[1]} … {steps[-1]}"


def training_metadata(run: RunFolder, plan: RunPlan, counters: Counters) -> TrainingMetadata:
    """The metadata of a file saved at a step; nothing private unless `export.include_captions` allows it."""
    config, info = plan.config, plan.info
    environment = run.read_environment()
    started = next((event["time"] for event in run.events("plan")), 0.0)
    captions = [record.caption for record in plan.index.records] if config.export.include_captions else None
    return TrainingMetadata(
        title=plan.config.export.name or run.name,
        base_name=info.name,
        base_digest=info.digest,
        family=info.family,
        kohya_version=info.traits.kohya_version,
        kohya_v2=info.traits.kohya_v2,
        architecture=info.traits.architecture,
        prediction_type=config.objective.prediction_type or info.prediction_type,
        trigger=config.data.trigger,
        rank=config.lora.rank,
        alpha=config.lora.trained_alpha,
        targets=config.lora.targets,
        steps=counters.step,
        images_seen=counters.images_seen,
        repeats=Counter(record.repeats for record in plan.index.records),
        dataset_digest=plan.index.digest,
        resolution=config.data.resolution or info.resolution,
        batch_size=plan.global_batch,
        learning_rate=config.train.learning_rate,
        optimizer=config.train.optimizer,
        schedule=config.train.schedule,
        precision=str(environment.get("compute_dtype")),
        seed=config.train.seed,
        date=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        base_hashes=_base_hashes(info.path),
        text_learning_rate=config.train.text_encoder_rate if config.lora.text_encoder else None,
        ancestors=[parent.ancestor for parent in plan.parents],
        heldout_loss=losses_of(run, "heldout").get(counters.step),
        captions=captions,
        options=_options(config),
        versions=dict(environment.get("versions") or {}),
    )


def _base_hashes(path: Path) -> tuple[str, str] | None:
    """Of a base in one file; None if it is out of reach by now, since a save must not fail for it."""
    try:
        return kohya_hashes(path) if path.is_file() else None
    except OSError:
        return None


def _options(config: RunConfig) -> dict[str, Any]:
    """Settings of adapter, text and objective that differ from the defaults and have no own field."""
    elsewhere = {"rank", "alpha", "targets", "init_from", "parent", "force_parent"}
    lora = config.lora.model_dump(exclude_defaults=True, exclude=elsewhere)
    text = config.data.model_dump(
        exclude_defaults=True, include={"clip_skip", "prompt_chunks", "prompt_weights"}
    )
    return lora | text | config.objective.model_dump(exclude_defaults=True, exclude={"prediction_type"})
