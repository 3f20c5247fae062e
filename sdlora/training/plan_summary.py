"""What is printed before a run starts: its plan, number by number."""

from __future__ import annotations

from collections.abc import Sequence

from sdlora.diffusion.objective import describe_objective
from sdlora.lora.modules import component_of
from sdlora.report.terminal import Terminal
from sdlora.training.adapter import describe_parents
from sdlora.training.optimizer import describe_rates, num_warmup_steps
from sdlora.training.plan import RunPlan


def print_plan(plan: RunPlan, terminal: Terminal, *, is_default_base: bool) -> None:
    """Prints the plan of a new run, and what preflight noticed.

    Args:
        plan: The run.
        terminal: Of the main process.
        is_default_base: Whether no base was given.
    """
    if is_default_base:
        terminal.print("no --base given: using the built-in base (128 px); pass --base for a real one")
    terminal.print(*describe_plan(plan))
    if plan.info.is_builtin and "learning_rate" not in plan.config.train.model_fields_set:
        terminal.print("note: the built-in base is small and learns best at train.learning_rate=3e-3 or so")
    for finding in plan.findings:
        if finding.severity == "warning":
            terminal.warn(finding.message)
        else:
            terminal.print(f"note: {finding.message}")


def describe_plan(plan: RunPlan) -> list[str]:
    """The plan in lines, from the base to the disk."""
    train, info = plan.config.train, plan.info
    share = plan.num_trainable / plan.num_base
    warmup = num_warmup_steps(train.warmup, plan.steps)
    epochs = plan.steps / plan.order.steps_per_epoch
    rates = describe_rates(plan.targets, train)
    accumulation = f" x {train.accumulate} accumulated" if train.accumulate > 1 else ""
    if train.batch_size == "auto":
        accumulation = f", 1 to {train.accumulate} as the memory allows, {train.accumulate} in all"
    processes = f" x {plan.num_processes} processes" if plan.num_processes > 1 else ""
    return [
        f"base      {info.name} ({info.family}, {info.prediction_type}, {info.resolution} px, "
        f"{plan.num_base / 1e6:.1f} M in the UNet)",
        *plan.data_lines,
        *describe_parents(plan.parents),
        f"adapter   {plan.layout.describe()}; {len(plan.layout.ranks)} modules{_text_modules(plan)}, "
        f"{plan.num_trainable / 1e6:.2f} M trainable ({share:.2%} of the UNet), "
        f"file {plan.adapter_bytes / 1e6:.1f} MB",
        f"steps     {plan.steps} of batch {train.batch_size}{accumulation}{processes} = global batch "
        f"{plan.global_batch}; {plan.order.steps_per_epoch} an epoch, {epochs:.1f} epochs, "
        f"{plan.images_seen} images seen",
        *_average_lines(plan),
        *_exchange_lines(plan),
        *plan.memory.lines(plan.info.quantize),
        f"rate      {train.learning_rate:g}, {train.schedule} after {warmup} warm-up steps, "
        f"{train.optimizer}{f'; {rates}' if rates else ''}",
        f"loss      {describe_objective(plan.objective)}",
        f"every     save {_points(plan.save_steps)}; samples {_points(plan.sample_steps)}; "
        f"held-out loss {_points(plan.evaluate_steps)}",
        f"disk      up to {plan.disk_bytes / 1e6:.0f} MB and the samples",
    ]


def _text_modules(plan: RunPlan) -> str:
    count = sum(component_of(name) != "unet" for name in plan.targets)
    return f" ({count} in text encoders)" if count else ""


def _average_lines(plan: RunPlan) -> list[str]:
    decay = plan.config.train.ema_decay
    if not decay:
        return []
    return [
        f"average   of about the last {1 / (1 - decay):.0f} steps (train.ema_decay = {decay:g}); "
        "it is what is measured, sampled, saved and exported"
    ]


def _exchange_lines(plan: RunPlan) -> list[str]:
    if plan.num_processes == 1:
        return []
    return [
        f"exchange  {plan.exchange_bytes / 1e6:.2f} MB of gradients a step between "
        f"{plan.num_processes} processes"
    ]


def _points(steps: Sequence[int]) -> str:
    if not steps:
        return "off"
    if len(steps) <= 3:
        return "at " + ", ".join(map(str, steps))
    return f"at {steps[0]}, {steps[1]} … {steps[-1]}"
