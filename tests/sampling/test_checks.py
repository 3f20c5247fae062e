"""What cannot be sampled is refused in one line."""

from __future__ import annotations

import pytest

from sdlora.errors import ConfigError
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.sampling.checks import check_prompts
from sdlora.sampling.generate import generate
from sdlora.sampling.pictures import SampleSettings

PROMPTS = ["a tractor"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "sample.prompts is empty"),
        (["a cat", "  "], "holds an empty prompt"),
        (["a cat, {trigger}"], r"has \{trigger\} in it but no trigger is set"),
        (["a {animal}"], r"has the placeholder \{animal\} left in it"),
    ],
)
def test_bad_prompts(base: StableDiffusion, prompts: list[str], message: str) -> None:
    """R-30: empty, or with a placeholder left in it: one line, exit 2, before anything is computed."""
    with pytest.raises(ConfigError, match=message) as error:
        generate(base, None, prompts, [0], [])
    assert len(error.value.problems) == 1


def test_good_prompts_pass() -> None:
    """R-30: other brackets are a matter of taste."""
    check_prompts(["a cat (sitting:1.2) [sleeping]", "größe, 猫"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SampleSettings(width=130), r"pictures' width = 130 must be a multiple of 8 pixels; use 128"),
        (SampleSettings(height=4), r"pictures' height = 4 must be a multiple of 8 pixels; use 8"),
        (SampleSettings(steps=3, scheduler="PNDM"), "sample.steps = 3 is too few for PNDMScheduler"),
        (SampleSettings(steps=5000), r"sample.steps = 5000 must be 1 to 1000"),
        (
            SampleSettings(scheduler="DDIMSchedular"),
            r"'DDIMSchedular' is no scheduler .* did you mean DDIMScheduler\?",
        ),
        (SampleSettings(scheduler="FlowMatchEulerDiscreteScheduler"), "is no scheduler that fits"),
    ],
)
def test_bad_settings(base: StableDiffusion, settings: SampleSettings, message: str) -> None:
    """R-35: each names the key, the value and the remedy."""
    with pytest.raises(ConfigError, match=message):
        generate(base, None, PROMPTS, [0], [], settings)
