"""A base's own safety checker: honoured, labelled, and switched off only when asked (R-47)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.models.base import quiet
from sdlora.models.folder import BUILTIN
from sdlora.models.info import inspect_base
from sdlora.models.load import DTYPE, load_base
from sdlora.models.safety import SafetyChecker, missing_checker
from sdlora.sampling.images import FLAGGED, SampleSettings
from sdlora.sampling.session import sample
from tests.checks import assert_same_image, raises
from tests.sampling.drawing import generate

PROMPTS = ["a tractor", "a red apple on a blue background"]
SETTINGS = SampleSettings(steps=3, width=64, height=64, guidance=3.0, batch_size=1)


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory, base: Any) -> Path:
    """The built-in base with a tiny safety checker that knows the second prompt's image, and no other."""
    folder = tmp_path_factory.mktemp("careful") / "base"
    shutil.copytree(BUILTIN, folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    images = generate(base, None, PROMPTS, [0], [], SETTINGS)
    with torch.no_grad():
        pixels = extractor([image.image for image in images], return_tensors="pt").pixel_values
        plain, known = checker.visual_projection(checker.vision_model(pixels)[1])
        likeness = float(torch.cosine_similarity(plain, known, dim=0))
        checker.concept_embeds.copy_(known.expand(17, -1))
        checker.concept_embeds_weights.fill_((1 + likeness) / 2)
        checker.special_care_embeds_weights.fill_(2.0)
    assert likeness < 0.99
    with quiet():
        checker.save_pretrained(folder / "safety_checker")
        extractor.save_pretrained(folder / "feature_extractor")
    return folder


def test_as_the_stock_pipeline_withholds(careful: Path) -> None:
    """R-47: the same answers as diffusers gives; the others are its images."""
    info = inspect_base(BaseSection(source=str(careful)))
    with quiet():
        stock = diffusers.StableDiffusionPipeline.from_pretrained(careful, **{DTYPE: torch.float32})
        stock.set_progress_bar_config(disable=True)
        answers = [
            stock(
                prompt,
                num_inference_steps=3,
                guidance_scale=3.0,
                width=64,
                height=64,
                generator=torch.Generator().manual_seed(0),
            )
            for prompt in PROMPTS
        ]
    assert [answer.nsfw_content_detected for answer in answers] == [[False], [True]]
    images = generate(load_base(info, dtype=torch.float32, device="cpu"), None, PROMPTS, [0], [], SETTINGS)
    assert [image.blank for image in images] == ["", FLAGGED]
    assert_same_image(images[0].image, answers[0].images[0])
    assert np.asarray(answers[1].images[0]).max() == 0
    assert np.asarray(images[1].image).min() > 200


def test_images_are_not_changed(careful: Path, base: Any) -> None:
    """R-47: the checker answers; the caller decides what is shown instead."""
    images = [image.image for image in generate(base, None, PROMPTS, [0], [], SETTINGS)]
    before = [np.asarray(image).copy() for image in images]
    checker = SafetyChecker(careful, "cpu")
    assert checker(images) == checker(images) == [False, True]
    assert all(np.array_equal(np.asarray(p), b) for p, b in zip(images, before, strict=True))


def test_switched_off(careful: Path, base: Any, tmp_path: Path) -> None:
    """R-47: `sample.safety_checker=false` shows what the base made; the default labels it."""
    asked = {"prompts": PROMPTS[1:], "seeds": [0], "steps": 3, "guidance": 3.0}
    changes = {"base": str(careful), "size": (64, 64), **asked}
    shown = sample(out=tmp_path / "shown", safety_checker=False, **changes)
    withheld = sample(out=tmp_path / "withheld", **changes)
    plain = generate(base, None, PROMPTS[1:], [0], [], replace(SETTINGS, batch_size=4))
    files = [Image.open(grid.parent / "00.png") for grid in (shown, withheld)]
    assert np.array_equal(np.asarray(files[0]), np.asarray(plain[0].image))
    texts = [json.loads(file.text["sdlora"]) for file in files]
    assert [text["withheld"] for text in texts] == [False, True]
    assert [text["safety_checker"] for text in texts] == [False, True]


def test_a_checker_that_is_named_but_not_there(careful: Path, tmp_path: Path) -> None:
    """R-47: its absence is said, once, and nothing is looked for on the hub (R-39)."""
    folder = tmp_path / "base"
    shutil.copytree(careful, folder)
    shutil.rmtree(folder / "safety_checker")
    info = inspect_base(BaseSection(source=str(folder)))
    assert load_base(info, dtype=torch.float32, device="cpu").safety_checker is None
    said: list[str] = []
    asked: dict[str, Any] = {"base": str(folder), "prompts": PROMPTS[:1], "steps": 1, "size": (64, 64)}
    sample(out=tmp_path / "one", warn=said.append, **asked)
    assert said == [missing_checker(info)]
    assert "names a safety checker" in said[0]
    sample(out=tmp_path / "two", warn=said.append, safety_checker=False, **asked)
    assert len(said) == 1
    assert missing_checker(inspect_base(BaseSection())) is None


def test_a_checker_that_is_not_whole(careful: Path, tmp_path: Path) -> None:
    """R-25, R-47: half a download is named before the base is loaded; no checker is left at random."""
    folder = tmp_path / "base"
    shutil.copytree(careful, folder)
    file = folder / "safety_checker" / "model.safetensors"
    state = load_file(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    asked: dict[str, Any] = {"base": str(folder), "prompts": PROMPTS[:1], "steps": 1, "size": (64, 64)}
    with raises(ModelError, "file.incomplete", shows="safety_checker/model.safetensors"):
        sample(out=tmp_path / "half", **asked)
    sample(out=tmp_path / "without", safety_checker=False, **asked)
    state.pop("visual_projection.weight")
    save_file(state, file, {"format": "pt"})
    with raises(ModelError, "sample.safety_checker", shows="lacks 1 weights"):
        sample(out=tmp_path / "part", **asked)
    file.write_bytes(whole)
    config = json.loads((folder / "safety_checker" / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["num_attention_heads"] = 7
    (folder / "safety_checker" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with raises(ModelError, "sample.safety_checker", shows="cannot load"):
        sample(out=tmp_path / "other", **asked)
