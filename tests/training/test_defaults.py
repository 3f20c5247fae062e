"""Defaults that depend on the base or the images (DESIGN 2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sdlora.config import BaseSection, DataSection, load_config
from sdlora.data.records import DatasetIndex, ImageRecord, Size
from sdlora.errors import ConfigError
from sdlora.models.info import inspect_base, with_base_defaults
from sdlora.training.preflight import (
    SAMPLING_SHARE,
    check_objective,
    default_prompts,
    resolve_config,
    sampling_share,
    spread,
)
from tests.checks import raises

INFO = inspect_base(BaseSection())


def make_index(count: int, heldout: int = 0, repeats: int = 1) -> DatasetIndex:
    records = tuple(
        ImageRecord(Path(f"{n}.png"), f"{n}.png", f"{n}", Size(64, 64), f"picture {n}", ".txt", repeats)
        for n in range(count + heldout)
    )
    return DatasetIndex(Path(), records[:count], records[count:], ())


@pytest.mark.parametrize(
    ("count", "repeats", "overrides", "num_processes", "steps"),
    [
        (3, 1, {}, 1, 100),  # never under 100
        (8, 1, {}, 1, 160),  # 80 × 8 / 4
        (8, 10, {}, 1, 160),  # whatever the repeats
        (10, 1, {"train.batch_size": 2, "train.accumulate": 2}, 2, 100),
        (1000, 1, {}, 1, 400),  # never over the base's maximum
        (20, 1, {"train.steps": 7}, 1, 7),
    ],
)
def test_steps(count, repeats, overrides, num_processes, steps):
    """R-16: clamp(80 × images / global batch, 100, the base's maximum); a tenth of them between saves."""
    config = resolve_config(
        load_config(None, overrides), INFO, make_index(count, repeats=repeats), num_processes
    )
    assert config.train.steps == steps
    assert config.train.save_every == config.train.evaluate_every
    assert config.train.save_every == max(1, round(steps / 10))


def test_nothing_is_left_open():
    """R-33, R-35: alpha is the rank, resolution and guidance are the base's; a run stores them all."""
    config = resolve_config(load_config(None, {"lora.rank": 8}), INFO, make_index(30, 5), 1)
    assert config.lora.alpha == 8
    assert config.data.resolution == INFO.resolution
    assert config.sample.guidance == INFO.defaults.guidance
    assert config.train.batch_size == 4
    assert config.train.sample_every
    assert config.sample.prompts


@pytest.mark.parametrize(
    ("overrides", "every", "prompts", "seeds"),
    [
        ({}, 500, 2, [0]),
        ({"train.accumulate": 3}, 500, 8, [0]),  # the largest grid that may be drawn twice
        ({"train.accumulate": 20}, 100, 8, [0, 1]),  # at most ten
        ({"sample.strengths": [0.5, 1.0]}, 1000, 2, [0]),
        ({"sample.guidance": 1.0}, 500, 4, [0]),
        ({"train.steps": 100}, 100, 2, [0]),  # the final grid, whatever it costs
        ({"train.sample_every": 30}, 30, 2, [0]),
        ({"train.sample_every": 0}, 0, 8, [0, 1]),
        ({"sample.seeds": [3, 4]}, 1000, 2, [3, 4]),
        ({"sample.seeds": [3], "sample.prompts": ["a"] * 40, "train.sample_every": 7}, 7, 40, [3]),
    ],
)
def test_grids_take_a_fifth_of_the_time(overrides, every, prompts, seeds):
    """R-16: as many and as large as a fifth of the time allows; what was given stays, also on resuming."""
    asked = load_config(
        None,
        {
            "train.batch_size": 1,
            "train.steps": 1000,
            "sample.guidance": 3.0,
            "sample.strengths": [1.0],
            **overrides,
        },
    )
    config = resolve_config(asked, INFO, make_index(20, 5), 1)
    shown = (config.train.sample_every, len(config.sample.prompts), config.sample.seeds)
    assert shown == (every, prompts, seeds)
    within = sampling_share(config, config.train.steps * config.train.accumulate) <= SAMPLING_SHARE
    assert within == (not any(key in overrides for key in ("train.steps", "train.sample_every")) or not every)
    assert resolve_config(config, INFO, make_index(9, 9), 1) == config


def test_default_prompts():
    """A few captions of the training images, and a few of the held-out ones."""
    data = DataSection()
    assert default_prompts(make_index(9, 2), data, 4) == [
        "picture 0",
        "picture 3",
        "picture 5",
        "picture 8",
        "picture 9",
        "picture 10",
    ]
    assert default_prompts(make_index(2), data, 4) == ["picture 0", "picture 1"]
    assert [record.name for record in spread(make_index(5).records, 2)] == ["0.png", "4.png"]


def test_default_prompts_without_captions():
    """R-27, R-30: the trigger alone shows little of a style; the prompts name things that bases can draw."""
    index = make_index(3)
    records = tuple(replace(record, caption="inkwash", caption_source="trigger") for record in index.records)
    data = DataSection(trigger="inkwash")
    prompts = default_prompts(replace(index, records=records), data, 4)
    assert prompts[0] == "inkwash, a house"
    assert INFO.describe_unknown_words(prompts, data.trigger) is None


def test_defaults_of_the_base():
    """R-33: settings that were left out follow the base; those that were given stay."""
    own = INFO.defaults
    config = with_base_defaults(load_config(), INFO)
    assert config.train.learning_rate == own.learning_rate > 1e-4
    assert tuple(config.sample.strengths) == own.strengths
    assert config.data.trigger_position == own.trigger_position
    given = load_config(None, {"train.learning_rate": 1e-4, "sample.strengths": [0.3]})
    assert with_base_defaults(given, INFO).train.learning_rate == 1e-4
    assert with_base_defaults(given, INFO).sample.strengths == [0.3]
    other = replace(INFO, source="elsewhere")
    assert with_base_defaults(load_config(), other).train.learning_rate == 1e-4


def test_unknown_words_of_prompts():
    """Words that a small base was never trained on are named, the trigger's apart."""
    prompts = ["inkwash style, a lighthouse", "a red apple, line drawing"]
    assert "lighthouse" in (INFO.describe_unknown_words(prompts, "inkwash style") or "")
    assert INFO.describe_unknown_words(prompts[1:], None) is None
    assert "inkwash" in (INFO.describe_unknown_words(prompts, None) or "")
    assert replace(INFO, path=Path("elsewhere")).describe_unknown_words(prompts, None) is None


def test_the_trigger_is_placed_in_prompts():
    """R-30: `{trigger}` in a sample prompt is replaced."""
    overrides = {"data.trigger": "inkwash", "sample.prompts": ["{trigger}, a cat"]}
    assert resolve_config(load_config(None, overrides), INFO, make_index(3), 1).sample.prompts == [
        "inkwash, a cat"
    ]


def test_prediction_types():
    """R-32: the base's own type; another is an error that names both, unless forced."""
    check_objective(load_config(), INFO)
    other = {"objective.prediction_type": "epsilon"}
    with raises(ConfigError, "objective.prediction_type", shows=("epsilon", "v_prediction")):
        check_objective(load_config(None, other), INFO)
    check_objective(load_config(None, {**other, "objective.force_prediction_type": True}), INFO)
    with raises(ConfigError, "objective.timestep_range", shows=("[1000, 1200]", "1000 timesteps")):
        check_objective(load_config(None, {"objective.timestep_range": [1000, 1200]}), INFO)
    with raises(ConfigError, "objective.layout_range", shows=("[1000, 1200]", "1000 timesteps")):
        check_objective(load_config(None, {"objective.layout_range": [1000, 1200]}), INFO)


def test_zero_terminal_snr():
    """R-32: ε cannot be learned from pure noise; the error names both settings and the remedies."""
    zero = {**INFO.scheduler_config, "rescale_betas_zero_snr": True}
    check_objective(load_config(), replace(INFO, scheduler_config=zero))
    forced = {"objective.prediction_type": "epsilon", "objective.force_prediction_type": True}
    shows = ("rescale_betas_zero_snr", "objective.timestep_range=[0, 999]")
    with raises(ConfigError, "objective.prediction_type", shows=shows):
        check_objective(load_config(None, forced), replace(INFO, scheduler_config=zero))
    own = replace(INFO, scheduler_config={**zero, "prediction_type": "epsilon"})
    with raises(ConfigError, "objective.prediction_type", shows=shows):
        check_objective(load_config(), own)
    check_objective(load_config(None, {"objective.timestep_range": [0, 999]}), own)


def test_timesteps_are_checked_early():
    """R-35: a distribution that misses the range is refused before anything is loaded."""
    asked = {"objective.timesteps": "style_friendly", "objective.timestep_range": [0, 9]}
    check_objective(load_config(None, asked), INFO)
    with pytest.raises(ConfigError):
        check_objective(load_config(None, {**asked, "objective.timestep_std": 0.5}), INFO)
