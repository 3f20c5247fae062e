"""Checks before a run, without a model, and the defaults that depend on the base or the images."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from sdlora.config import DataSection, RunConfig
from sdlora.data.cache import cache_folder
from sdlora.data.captions import caption_pipeline
from sdlora.data.doctor import Checkup, check_images
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, spread
from sdlora.diffusion.schedule import make_sampler, schedule_from_config
from sdlora.errors import ConfigError
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.tokenizer import count_tokens, load_tokenizer
from sdlora.sampling.images import (
    SampleSettings,
    as_prompt,
    check_prompts,
    make_scheduler,
    resolve_settings,
)

SUBJECTS = ("a house", "a fish", "a sailboat", "a rocket")
MIN_STEPS = 100
NUM_SAVES = 10
# Images of the validation loss: held-out ones, and of training, which are there to compare.
NUM_HELDOUT, NUM_TRAINING = 64, 16
SAMPLING_SHARE = 0.2
# Grids of a run, and their sizes: prompts of each split, and seeds.
NUM_GRIDS = (NUM_SAVES, 5, 2)
GRID_SIZES = ((4, 2), (4, 1), (3, 1), (2, 1), (1, 1))
# A sample in training, forward and backward, and decoding an image, in forward passes of the denoiser. In SD
# 1.5 at 512 px a pass takes 0.81 TFLOP, the backward pass of frozen weights 0.91, and decoding 2.5.
TRAINING_PASSES, DECODING_PASSES = 2, 3


def check_folder(config: RunConfig, sheet: Path | None = None) -> Checkup:
    """Examines the image folder as `train` would, and the images themselves.

    `sheet` is the path of a contact sheet to draw.
    """
    info = inspect_base(config.base, config.objective, config.data)
    return check_for_base(with_base_defaults(config, info), info, sheet, cache_folder())


def check_for_base(
    config: RunConfig, info: BaseInfo, sheet: Path | None = None, cache: Path | None = None
) -> Checkup:
    """Examines the image folder with the tokenizer and size of an inspected base.

    With a cache folder, it looks at the images themselves too, which takes a while.
    """
    checkup = check_images(
        config,
        resolution=info.resolution,
        min_step=info.min_step,
        count_tokens=partial(count_tokens, load_tokenizer(info), info),
        sheet=sheet,
        cache=cache,
    )
    return replace(checkup, findings=[*(Finding("notice", text) for text in info.notices), *checkup.findings])


def check_objective(config: RunConfig, info: BaseInfo) -> None:
    """Raises a ConfigError if the objective does not suit the base, such as ε predicted from pure noise."""
    asked = config.objective.prediction_type
    if asked and asked != info.prediction_type and not config.objective.force_prediction_type:
        problem = f"objective.prediction_type = {asked} but base {info.name} predicts {info.prediction_type}"
        raise ConfigError(f"{problem}; remove the setting, or set objective.force_prediction_type=true")
    schedule = schedule_from_config(info.scheduler_config, asked)
    low, high = config.objective.timestep_range
    if low >= (count := schedule.num_timesteps):
        problem = f"objective.timestep_range = [{low}, {high}] starts beyond the base's {count} timesteps"
        raise ConfigError(f"{problem}; lower it")
    layout = config.objective.layout_range
    if layout and layout[1] > count:
        problem = f"objective.layout_range = [{layout[0]}, {layout[1]}] ends beyond"
        raise ConfigError(f"{problem} the base's {count} timesteps; lower it")
    if schedule.prediction_type == "epsilon" and schedule.has_zero_snr and high >= count:
        remedy = f"exclude that timestep with objective.timestep_range=[{min(low, count - 2)}, {count - 1}]"
        if asked:
            remedy = f"remove objective.prediction_type, or {remedy}"
        raise ConfigError(
            "objective.prediction_type = epsilon cannot be learned with rescale_betas_zero_snr = true of the "
            f"base {info.name} (timestep {count - 1} is pure noise); {remedy}"
        )
    make_sampler(schedule, config.objective)


def check_sampling(config: RunConfig, info: BaseInfo) -> None:
    """Raises a ConfigError if the grids of a run could not be drawn: before it, not at the first of them."""
    sample = config.sample
    if config.train.sample_every:
        resolve_settings(info, SampleSettings.of(sample, (info.resolution, info.resolution)))
        check_prompts([config.data.fill_trigger(prompt) for prompt in sample.prompts])
    elif sample.scheduler:
        make_scheduler(info, sample.scheduler)


def resolve_config(config: RunConfig, info: BaseInfo, index: DatasetIndex, num_processes: int) -> RunConfig:
    """Resolves the defaults that depend on the base and the images."""
    config = with_base_defaults(config, info)
    train, data, sample, defaults = config.train, config.data, config.sample, info.defaults
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
    tenth = max(1, round(steps / NUM_SAVES))
    cadence = {
        name: tenth if getattr(train, name) is None else getattr(train, name)
        for name in ("save_every", "evaluate_every")
    }
    resolution = data.resolution or info.resolution
    for name, side in (
        ("resolution", resolution),
        *(("more_resolutions", one) for one in data.more_resolutions),
    ):
        if side % (step := info.min_step):
            problem = f"data.{name} = {side} must be a multiple of {step} for the base {info.name}"
            raise ConfigError(f"{problem}; use {max(1, round(side / step)) * step}")
    config = config.replace(
        data={"resolution": resolution},
        lora={"alpha": config.lora.trained_alpha},
        train={"steps": steps, "batch_size": batch_size, **cadence},
        sample={"guidance": defaults.guidance if sample.guidance is None else sample.guidance},
    )
    return choose_grids(config, index, steps * batch)


def choose_grids(config: RunConfig, index: DatasetIndex, images_seen: int) -> RunConfig:
    """Resolves how often grids are made, their prompts and their seeds; what was given stays.

    By default they take up to `SAMPLING_SHARE` of the time: the largest grid that this allows at least twice,
    as often as it allows; in a short run, the smallest, at the end alone.
    """
    train, sample = config.train, config.sample
    for (num_prompts, num_seeds), num_grids in (*product(GRID_SIZES, NUM_GRIDS), (GRID_SIZES[-1], 1)):
        prompts = sample.prompts or default_prompts(index, config.data, num_prompts)
        prompts = [config.data.fill_trigger(prompt) for prompt in prompts]
        seeds = sample.seeds if "seeds" in sample.model_fields_set else sample.seeds[:num_seeds]
        spaced = math.ceil((train.steps or 0) / num_grids)
        every = spaced if train.sample_every is None else train.sample_every
        chosen = config.replace(train={"sample_every": every}, sample={"prompts": prompts, "seeds": seeds})
        if sampling_share(chosen, images_seen) <= SAMPLING_SHARE:
            break
    return chosen


def sampling_share(config: RunConfig, images_seen: int) -> float:
    """The share of a run's time that its grids take, from the denoiser's passes in training and sampling.

    A function of the settings alone, which all processes, and a resumed run, see alike.
    """
    train, sample = config.train, config.sample
    if not train.sample_every:
        return 0.0
    # A run draws the base, and the parent, once.
    fixed = 1 if config.lora.parent is None else 2
    columns = fixed + math.ceil((train.steps or 0) / train.sample_every) * len({*sample.strengths} - {0.0})
    passes = sample.steps * (2 if (sample.guidance or 0) > 1 else 1) + DECODING_PASSES
    sampling = len(sample.prompts) * len(sample.seeds) * columns * passes
    training = images_seen * (TRAINING_PASSES + (train.gradient_checkpointing is True))
    return sampling / (sampling + training)


def choose_validated(index: DatasetIndex) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Images of training, and held-out ones, that the validation loss is measured on."""
    records, heldout = index.styled, spread(index.heldout, NUM_HELDOUT)
    most = len(heldout) or max(2, len(records) // 10)
    return spread(records, min(most, NUM_TRAINING)), heldout


def global_batch(config: RunConfig, num_processes: int) -> int:
    """batch_size × accumulate × num_processes."""
    return config.train.micro_batch * config.train.accumulate * num_processes


def default_prompts(index: DatasetIndex, settings: DataSection, count: int) -> list[str]:
    """Up to `count` captions of the training images and as many of the held-out ones, spread evenly.

    Without captions, the trigger with things that any base can draw.
    """
    if all(record.caption == (settings.trigger or "") for record in index.styled):
        return [caption_pipeline(settings).plain(subject) for subject in SUBJECTS[: 2 * count]]
    prompts: list[str] = []
    for records in (index.styled, index.heldout):
        captions = list(dict.fromkeys(as_prompt(record.caption) for record in records if record.caption))
        prompts += spread(captions, count)
    return list(dict.fromkeys(prompts))
