"""What cannot be sampled is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import AdapterError, ConfigError, ModelError
from sdlora.formats.files import save_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import LowRank
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.sampling.images import SampleSettings, check_prompts
from sdlora.sampling.session import sample
from tests.checks import raises
from tests.sampling.drawing import generate

PROMPTS = ["a tractor"]


@pytest.mark.parametrize(
    ("prompts", "shows"),
    [
        ([], "at least one prompt"),
        (["a cat", "  "], "empty prompt"),
        (["a cat, {trigger}"], "data.trigger"),
        (["a {animal}"], "{animal}"),
    ],
)
def test_bad_prompts(base: StableDiffusion, prompts: list[str], shows: str) -> None:
    """R-30: empty, or with a placeholder left in it: one line, exit 2, before anything is computed."""
    with raises(ConfigError, "sample.prompts", shows=shows) as error:
        generate(base, None, prompts, [0], [])
    assert len(str(error.value).splitlines()) == 1


def test_good_prompts_pass() -> None:
    """R-30: other brackets are a matter of taste."""
    check_prompts(["a cat (sitting:1.2) [sleeping]", "größe, 猫"])


@pytest.mark.parametrize(
    ("settings", "keys", "shows"),
    [
        (SampleSettings(width=130), ["option--size"], ["width = 130", "8 pixels", "use 128"]),
        (SampleSettings(height=4), ["option--size"], ["height = 4", "use 8"]),
        (SampleSettings(steps=3, scheduler="PNDM"), ["sample.steps"], ["= 3", "PNDMScheduler"]),
        (SampleSettings(steps=5000), ["sample.steps"], ["= 5000", "1 to 1000"]),
        (SampleSettings(width=4, steps=0), ["option--size", "sample.steps"], ["width = 4", "= 0"]),
        (
            SampleSettings(scheduler="DDIMSchedular"),
            ["sample.scheduler"],
            ["DDIMSchedular", "DDIMScheduler?"],
        ),
        (
            SampleSettings(scheduler="FlowMatchEulerDiscreteScheduler"),
            ["sample.scheduler"],
            ["FlowMatchEuler"],
        ),
    ],
)
def test_bad_settings(
    base: StableDiffusion, settings: SampleSettings, keys: list[str], shows: list[str]
) -> None:
    """R-35: each names the key, the value and the remedy."""
    with raises(ConfigError, *keys, shows=tuple(shows)):
        generate(base, None, PROMPTS, [0], [], settings)


def test_a_misfit_is_said_before_any_weight_is_loaded(
    sd15_folder: Path, copy_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """R-41: without a family in its metadata, a file is checked by its modules; the error names both."""
    base = copy_folder(sd15_folder)
    weights = base / "text_encoder" / "model.safetensors"
    weights.unlink()
    save_file({}, weights, {"format": "pt"})
    pair = LowRank(torch.ones(1, 16), torch.ones(16, 1))
    name = "down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q"
    file = save_adapter(tmp_path / "other.safetensors", Adapter({name: pair}, 1, 1.0))
    with raises(AdapterError, "lora.other-base", shows=(str(file), name)):
        sample(file, base=str(base), prompts=["a cat"], out=tmp_path / "grid")
    with pytest.raises(ModelError, match=r"lacks .* weights of its text_encoder"):
        sample(base=str(base), prompts=["a cat"], out=tmp_path / "grid")
