"""Recognizing the prediction type by the answers of a UNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.evaluation.heldout import HeldoutItem, recognise_prediction
from sdlora.models.base import Condition
from sdlora.models.checks import PREDICTIONS
from sdlora.models.folder import BUILTIN
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.training.train import train

SCHEDULE = schedule_from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
CPU = torch.device("cpu")


@pytest.fixture
def items() -> list[HeldoutItem]:
    generator = torch.Generator().manual_seed(0)
    return [
        HeldoutItem(f"digest {n}", torch.randn(4, 8, 8, generator=generator), Condition(torch.zeros(3, 5)))
        for n in range(2)
    ]


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("configured", PREDICTIONS)
def test_each_type_is_recognised(items: list[HeldoutItem], kind: str, configured: str) -> None:
    """R-32: from answers with an error like a trained UNet's, whatever the configuration says."""
    clean = torch.stack([item.latents for item in items])
    error = torch.Generator().manual_seed(1)

    def denoise(noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
        signal, sigma = SCHEDULE.signal_and_noise(timesteps)
        target = replace(SCHEDULE, prediction_type=kind).target(
            clean, (noisy - signal * clean) / sigma, timesteps
        )
        return target + 0.4 * target.std() * torch.randn(target.shape, generator=error)

    assert recognise_prediction(denoise, replace(SCHEDULE, prediction_type=configured), items, CPU) == kind


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 3.0])
def test_an_untrained_network_says_nothing(items: list[HeldoutItem], size: float) -> None:
    """R-32: random weights cause no warning."""

    def denoise(noisy: torch.Tensor, *_: object) -> torch.Tensor:
        return size * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(2))

    assert recognise_prediction(denoise, SCHEDULE, items, CPU) is None


def test_the_builtin_base_predicts_v() -> None:
    """R-32: a trained UNet, on drawings it has never seen."""
    base = load_base(inspect_base(BaseSection()), dtype=torch.float32, device="cpu")
    schedule = schedule_from_config(base.info.scheduler_config)
    pixels = torch.full((1, 3, 128, 128), 1.0)
    pixels[:, :, 30:90, 40:100] = torch.tensor([0.8, -0.5, -0.6])[:, None, None]
    mean, _ = base.encode_images(pixels)
    item = HeldoutItem("a square", mean[0], base.encode_captions(["a red square"])[0])
    assert recognise_prediction(base.denoise, schedule, [item], CPU) == "v_prediction"


def test_a_wrong_configuration_is_a_warning(
    make_images: Callable[..., Path], copy_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """R-32: before the first step, as a warning that stays with the run; the right one is silent."""
    settings = {
        "data.resolution": 128,
        "lora.rank": 2,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.sample_every": 0,
        "train.evaluate_every": 0,
        "export.formats": ["diffusers"],
    }
    images = make_images(sizes=((128, 128),) * 3)
    wrong = copy_folder(BUILTIN, "wrong", scheduler__scheduler_config={"prediction_type": "epsilon"})
    found = {}
    for base in (wrong, "builtin"):
        run = train(images, base=str(base), out=tmp_path / Path(base).name, overrides=settings, quiet=True)
        found[base] = [event["message"] for event in run.events("warning") if "predict" in event["message"]]
    assert found["builtin"] == []
    [line] = found[wrong]
    assert "objective.prediction_type = epsilon" in line
    assert "objective.prediction_type=v_prediction" in line


def test_the_middle_of_a_large_image_is_enough() -> None:
    """R-46: the check before the first step is one small pass, whatever the sizes of the images."""
    seen = []

    def denoise(noisy: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(noisy.shape)
        return torch.zeros_like(noisy)

    items = [
        HeldoutItem("a", torch.zeros(4, *size), Condition(torch.zeros(3, 5))) for size in ((64, 96), (96, 24))
    ]
    recognise_prediction(denoise, SCHEDULE, items, CPU)
    assert seen == [(2, 4, 32, 24)]
