"""Schedulers by name, with the base's own schedule."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from PIL import Image

from sdlora.errors import ConfigError
from sdlora.models.info import BaseInfo
from sdlora.sampling.images import (
    SCHEDULERS,
    SampledImage,
    SampleSettings,
    _parameters_text,
    make_scheduler,
    resolve_settings,
)
from tests.checks import raises

# diffusers' schedulers speak to numpy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

OPTIONAL = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in OPTIONAL])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_scheduler_takes_the_base_s_schedule(info: BaseInfo, name: str, kind: str) -> None:
    """R-32: betas and prediction type are the base's, whatever the scheduler."""
    config = {**info.scheduler_config, "prediction_type": kind, "beta_end": 0.02}
    scheduler = make_scheduler(replace(info, scheduler_config=config), name)
    assert type(scheduler).__name__ == name
    assert scheduler.config.prediction_type == kind
    assert scheduler.config.beta_end == 0.02
    assert scheduler.config.beta_schedule == info.scheduler_config["beta_schedule"]


def test_names_may_be_short(info: BaseInfo) -> None:
    """R-35: with or without the ending, in any case; the base's own if none is given."""
    assert type(make_scheduler(info, "ddim")).__name__ == "DDIMScheduler"
    assert type(make_scheduler(info)).__name__ == info.scheduler_config["_class_name"]


def test_names_of_uis(info: BaseInfo) -> None:
    """R-35: those of A1111 too; its spacing of the sigmas stays when the settings are resolved."""
    for name in ("Euler a", "euler A"):
        assert type(make_scheduler(info, name)).__name__ == "EulerAncestralDiscreteScheduler"
    settings = resolve_settings(info, SampleSettings(scheduler="DPM++ 2M Karras"))
    assert settings.scheduler == "DPMSolverMultistepScheduler Karras"
    for name in ("DPM++ 2M Karras", settings.scheduler):
        assert make_scheduler(info, name).config.use_karras_sigmas is True
    assert make_scheduler(info, "DPM++ 2M").config.use_karras_sigmas is False
    image = SampledImage(Image.new("RGB", (8, 8)), "a cat", 0, 1.0, settings=settings)
    assert "Sampler: DPM++ 2M Karras" in _parameters_text(image, {})
    for name in ("DDIM Karras", "Euler b"):
        with raises(ConfigError, "sample.scheduler", shows=name):
            make_scheduler(info, name)


def test_a_base_with_a_scheduler_of_its_own(info: BaseInfo) -> None:
    """R-35: without sample.scheduler, the error names the base and its scheduler; setting it helps."""
    other = replace(info, scheduler_config={**info.scheduler_config, "_class_name": "OwnScheduler"})
    with raises(ConfigError, "base.scheduler", "sample.scheduler", shows=("builtin", "OwnScheduler")):
        make_scheduler(other)
    assert type(make_scheduler(other, "DDIM")).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("name", OPTIONAL)
def test_missing_package_is_one_line(info: BaseInfo, name: str) -> None:
    """R-27: a scheduler that needs another package works, or the error names the package."""
    if importlib.util.find_spec(OPTIONAL[name]):
        assert type(make_scheduler(info, name)).__name__ == name
        return
    with raises(ConfigError, "sample.scheduler", "scheduler-package", shows=OPTIONAL[name]):
        make_scheduler(info, name)
