"""Summary of a run: its state, its validation losses, and what they suggest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sdlora.errors import one_line
from sdlora.runs import RunFolder

SPLITS = {"train": "training images", "heldout": "held-out images"}
# Relative changes of a loss: a smaller rise does not matter, a smaller fall does not count.
RISE, FALL = 0.01, 0.002
# From fewer held-out images, nothing is concluded.
MIN_IMAGES = 8


def losses_of(run: RunFolder, split: str) -> dict[int, float]:
    """The validation losses of a split, by step."""
    return {
        event["step"]: event["loss"]
        for event in run.events("heldout")
        if event.get("split") == split and isinstance(event.get("loss"), float)
    }


def trained_losses(run: RunFolder, split: str) -> dict[int, float]:
    """The losses that training lowers: with `objective.layout_range`, of the bands it trains."""
    objective = run.read_config().objective
    if objective.layout_range is None:
        return losses_of(run, split)
    losses = {}
    for event in run.events("heldout"):
        bands = event.get("by_band", {}) if event.get("split") == split else {}
        own = [bands[name] for name in bands if int(name.partition("-")[2]) < objective.timestep_range[1]]
        if own:
            losses[event["step"]] = sum(own) / len(own)
    return losses or losses_of(run, split)


def describe_step(run: RunFolder, step: int, losses: Mapping[str, float]) -> str:
    """The losses of a step, in one line, with their change since the start of the run."""
    changes = {split: _change({**losses_of(run, split), step: loss}, step) for split, loss in losses.items()}
    texts = [f"{SPLITS[split]} {loss:.4f}{changes[split]}" for split, loss in losses.items()]
    return f"step {step:<5}validation loss: {', '.join(texts)}"


def describe_losses(run: RunFolder) -> list[str]:
    """First and last loss of each split."""
    lines = []
    for split, title in SPLITS.items():
        losses = losses_of(run, split)
        if len(losses) > 1:
            first, last = min(losses), max(losses)
            text = f"{losses[first]:.4f} at step {first}, {losses[last]:.4f} at step {last}"
            lines.append(f"loss      {title}: {text}{_change(losses, last)}")
    return lines


def doubt_losses(run: RunFolder) -> str | None:
    """What to change if the losses did not fall, or rose again; None if all is well.

    Those on held-out images count if there are enough of them, else those on training images.
    """
    images = [event.get("images", 0) for event in run.events("heldout") if event.get("split") == "heldout"]
    split = "heldout" if len(images) > 1 and min(images) >= MIN_IMAGES else "train"
    losses = trained_losses(run, split)
    if len(losses) < 2:
        return None
    first, last, best = min(losses), max(losses), min(losses, key=lambda step: losses[step])
    config = run.read_config()
    train, title = config.train, SPLITS[split]
    if config.objective.layout_range:
        title += " at the timesteps that are trained"  # not the losses of the log, which are of all
    if losses[best] > (1 - FALL) * losses[first]:
        return (
            f"the loss on {title} did not fall (step {first}: {losses[first]:.4f}, step {last}: "
            f"{losses[last]:.4f}); try another train.learning_rate ({train.learning_rate:g}) or more "
            f"train.steps ({train.steps})"
        )
    if losses[last] < (1 + RISE) * losses[best]:
        return None
    line = (
        f"the loss on {title} rose again (step {best}: {losses[best]:.4f}, step {last}: {losses[last]:.4f}); "
        f"try fewer train.steps or a lower train.learning_rate ({train.learning_rate:g})"
    )
    saved = [step for step in run.saved_steps() if losses.get(step, losses[last]) < losses[last]]
    if not saved:
        return line
    step = min(saved, key=lambda step: losses[step])
    return (
        f"{line}, or use step {step} ({losses[step]:.4f}): {run.step_adapter(step)} "
        f"(`sdlora sample {run.path} --step {step}`)"
    )


def describe_rise(run: RunFolder) -> str | None:
    """A line for a run that learns its images by heart: two losses in a row above the least one.

    None else, and without enough held-out images to say so.
    """
    counts = [event.get("images", 0) for event in run.events("heldout") if event.get("split") == "heldout"]
    losses = trained_losses(run, "heldout")
    if not losses or not counts or min(counts) < MIN_IMAGES:
        return None
    best = min(losses, key=lambda step: losses[step])
    later = [losses[step] for step in sorted(losses) if step > best]
    if len(later) < 2 or min(later[-2:]) < (1 + RISE) * losses[best]:
        return None
    return (
        f"the loss on held-out images rises since step {best} ({losses[best]:.4f}, now {later[-1]:.4f}): the "
        "training images are learned by heart; Ctrl-C stops, and saved steps stay"
    )


def describe_state(run: RunFolder) -> list[str]:
    """State of a run, how to continue it, what went wrong, and its losses."""
    steps = run.read_config().train.steps or 0
    if run.is_finished(steps):
        state = f"finished at step {steps}"
    else:
        reached = max((event["step"] for event in run.events("step")), default=0)
        saved = max(run.checkpoint_steps(), default=0)
        state = f"step {reached} of {steps}; `sdlora resume {run.path}` continues at step {saved}"
    lines = [f"run       {run.path}, {state}"]
    if failures := list(run.events("failed")):
        lines.append(f"failed    {one_line(str(failures[-1].get('message')))}")
    if warnings := list(run.events("warning")):
        lines.append(f"warnings  {len(warnings)}; last: {one_line(str(warnings[-1].get('message')))}")
    lines += describe_losses(run)
    return [*lines, f"note      {doubt}"] if (doubt := doubt_losses(run)) else lines


def _change(losses: Mapping[int, float], step: int) -> str:
    """Relative change of a loss since the first one."""
    first = min(losses)
    return f" ({losses[step] / losses[first] - 1:+.0%})" if step > first and losses[first] > 0 else ""


def pipeline_code(source: str, family: str) -> list[str]:
    """Lines of Python that load a base, a folder, a file or a Hub id, into a stock pipeline `pipe`."""
    if source == "builtin":
        folder = 'Path(sdlora.__file__).parent / "builtin" / "base"'
        imports = ["from pathlib import Path", "", "import sdlora"]
        return [
            *imports,
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({folder})",
        ]
    name, method = "DiffusionPipeline", "from_pretrained"
    if source.endswith((".safetensors", ".ckpt")):
        name = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
        method = "from_single_file"
    quoted = json.dumps(source, ensure_ascii=False)
    return [f"from diffusers import {name}", "", f"pipe = {name}.{method}({quoted})"]


def describe_limits(runs: Sequence[RunFolder]) -> list[str]:
    """What the losses of these runs cannot show."""
    notes, plans = [], [next(run.events("plan"), {}) for run in runs]
    for key, what in (("dataset_digest", "images"), ("base_digest", "bases")):
        if len({plan.get(key) for plan in plans}) > 1:
            notes.append(f"these runs have different {what}: their losses cannot be compared")
    counts = [
        event.get("images", 0)
        for run in runs
        for event in run.events("heldout")
        if event["split"] == "heldout"
    ]
    if counts and min(counts) < MIN_IMAGES:
        notes.append(
            f"{min(counts)} held-out images are too few to rank runs by their loss; hold out {MIN_IMAGES}"
        )
    return notes
