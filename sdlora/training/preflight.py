"""Checks before a run, without a model, and the defaults that depend on the base or the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdlora.config import DataSection, RunConfig
from sdlora.data.captions import caption_pipeline
from sdlora.data.doctor import Checkup, check_images
from sdlora.data.records import DatasetIndex, Finding, ImageRecord
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.diffusion.timesteps import make_sampler
from sdlora.errors import ConfigError
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.tokenizer import count_tokens, load_tokenizer

NUM_PROMPTS = 4
SUBJECTS = ("a house", "a fish", "a sailboat", "a rocket")
MIN_STEPS = 100


def check_folder(config: RunConfig, sheet: Path | None = None) -> Checkup:
    """Examines the image folder as `train` would.

    Args:
        config: `images`, `base` and `data` are used.
        sheet: Path of the contact sheet to draw.

    Raises:
        SdloraError: If there are no images at all, or the base is missing.
        ConfigError: If the sheet would be one of the images.
    """
    info = inspect_base(config.base, config.objective)
    return check_for_base(with_base_defaults(config, info), info, sheet)


def check_for_base(config: RunConfig, info: BaseInfo, sheet: Path | None = None) -> Checkup:
    """Examines the image folder with the tokenizer and size of an inspected base."""
    checkup = check_images(
        config,
        resolution=info.resolution,
        min_step=info.min_step,
        count_tokens=partial(count_tokens, load_tokenizer(info), info.text_length),
        sheet=sheet,
    )
    return replace(checkup, findings=[*(Finding("notice", text) for text in info.notices), *checkup.findings])


def check_objective(config: RunConfig, info: BaseInfo) -> None:
    """Checks that the objective suits the base.

    Raises:
        ConfigError: If it predicts something else, has fewer timesteps, or would predict ε from pure noise.
    """
    asked = config.objective.prediction_type
    if asked and asked != info.prediction_type and not config.objective.force_prediction_type:
        raise ConfigError(
            f"objective.prediction_type = {asked} but the base {info.name} predicts {info.prediction_type}; "
            "remove the setting, or set objective.force_prediction_type=true"
        )
    schedule = schedule_from_config(info.scheduler_config, asked)
    low, high = config.objective.timestep_range
    if low >= schedule.num_timesteps:
        raise ConfigError(
            f"objective.timestep_range = [{low}, {high}] starts beyond the base's "
            f"{schedule.num_timesteps} timesteps"
        )
    if schedule.prediction_type == "epsilon" and schedule.has_zero_snr and high >= schedule.num_timesteps:
        last = schedule.num_timesteps - 1
        remedy = f"exclude that timestep with objective.timestep_range=[{min(low, last - 1)}, {last}]"
        if asked:
            remedy = f"remove objective.prediction_type, or {remedy}"
        raise ConfigError(
            "objective.prediction_type = epsilon cannot be learned with rescale_betas_zero_snr = true of the "
            f"base {info.name} (timestep {last} is pure noise); {remedy}"
        )
    make_sampler(schedule, config.objective)


def resolve_config(config: RunConfig, info: BaseInfo, index: DatasetIndex, num_processes: int) -> RunConfig:
    """Resolves the defaults that depend on the base and the images."""
    config = with_base_defaults(config, info)
    train, defaults = config.train, info.defaults
    if train.batch_size == "auto" and train.accumulate == 1:
        raise ConfigError(
            "train.batch_size = auto divides the train.accumulate samples of each process in a step, and "
            "train.accumulate = 1 cannot be divided; set a larger one, such as train.accumulate=8"
        )
    batch_size = train.batch_size or defaults.batch_size
    micro_batch = 1 if batch_size == "auto" else batch_size
    # Repeats weight images against each other: 10_name for all of them does not mean ten times the steps.
    batch = micro_batch * train.accumulate * num_processes
    epoch = len(index.records) / batch
    steps = train.steps or min(defaults.max_steps, max(MIN_STEPS, round(defaults.epochs * epoch)))
    tenth = max(1, round(steps / 10))
    cadence = {
        name: tenth if getattr(train, name) is None else getattr(train, name)
        for name in ("save_every", "sample_every", "evaluate_every")
    }
    trigger = config.data.trigger
    prompts = config.sample.prompts or default_prompts(index, config.data)
    prompts = [prompt.replace("{trigger}", trigger) if trigger else prompt for prompt in prompts]
    resolution = config.data.resolution or info.resolution
    if resolution % info.min_step:
        raise ConfigError(
            f"data.resolution = {resolution} must be a multiple of {info.min_step} for the base {info.name}"
        )
    return config.replace(
        data={"resolution": resolution},
        lora={"alpha": config.lora.trained_alpha},
        train={"steps": steps, "batch_size": batch_size, **cadence},
        sample={
            "prompts": prompts,
            "guidance": defaults.guidance if config.sample.guidance is None else config.sample.guidance,
        },
    )


def global_batch(config: RunConfig, num_processes: int) -> int:
    """batch_size × accumulate × num_processes."""
    return config.train.micro_batch * config.train.accumulate * num_processes


def default_prompts(index: DatasetIndex, settings: DataSection) -> list[str]:
    """A few captions of the training images and a few of the held-out ones, spread evenly.

    Without captions, the trigger with things that any base can draw.
    """
    if all(record.caption == settings.trigger for record in index.records):
        return [caption_pipeline(settings).plain(subject) for subject in SUBJECTS]
    prompts: list[str] = []
    for records in (index.records, index.heldout):
        captions = list(dict.fromkeys(record.caption for record in records if record.caption))
        prompts += [captions[i] for i in _spread(len(captions), NUM_PROMPTS)]
    return list(dict.fromkeys(prompts))


def spread_records(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """Up to `count` records, evenly spaced."""
    return [records[i] for i in _spread(len(records), count)]


def _spread(length: int, count: int) -> list[int]:
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]
