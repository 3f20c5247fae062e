"""The shipped base: an ordinary diffusers folder, small, quiet, and able to draw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.builtin.captions import TEXT_LENGTH, read_concepts
from sdlora.builtin.measure import load_pipeline, sample

BASE = Path(__file__).parents[2] / "sdlora" / "builtin" / "base"
LOADING = f"""
import sys, warnings
from diffusers import StableDiffusionPipeline
print("imported", file=sys.stderr, flush=True)
warnings.simplefilter("always")
StableDiffusionPipeline.from_pretrained({str(BASE)!r})
"""


def test_it_is_a_plain_diffusers_folder() -> None:
    """The usual parts under their usual names, no safety checker, weights as safetensors only."""
    index = json.loads((BASE / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    weights = {str(file.relative_to(BASE)) for file in BASE.rglob("*") if file.stat().st_size > 1_000_000}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_it_is_small_and_of_the_right_types() -> None:
    """Under 50 MB; UNet and VAE in fp16, the text encoder in fp32."""
    assert sum(file.stat().st_size for file in BASE.rglob("*") if file.is_file()) < 50_000_000
    types = {
        part: {value.dtype for value in load_file(file).values() if value.is_floating_point()}
        for part in ("unet", "vae", "text_encoder")
        for file in (BASE / part).glob("*.safetensors")
    }
    assert types == {"unet": {torch.float16}, "vae": {torch.float16}, "text_encoder": {torch.float32}}


def test_it_is_shaped_as_sd1() -> None:
    """Attention in every level, one text width, v-prediction, latents of factor 8."""
    unet = json.loads((BASE / "unet" / "config.json").read_text())
    assert {kind[:9] for kind in unet["down_block_types"] + unet["up_block_types"]} == {"CrossAttn"}
    text = json.loads((BASE / "text_encoder" / "config.json").read_text())
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert text["max_position_embeddings"] == TEXT_LENGTH
    scheduler = json.loads((BASE / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_stock_diffusers_loads_it_without_a_word() -> None:
    """A fresh process prints nothing but progress bars while it loads the folder (importing may say more)."""
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, check=True)
    _, _, said = done.stderr.partition("imported\n")
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip("\x1b[A ")]
    assert lines
    assert not [line for line in lines if not line.strip("\x1b[A ").startswith("Loading ")]
    assert not done.stdout


def test_nothing_tells_where_it_was_made() -> None:
    """No configuration holds a path."""
    configs = sorted(BASE.rglob("*.json"))
    assert len(configs) >= 6
    assert not [config for config in configs if "_name_or_path" in config.read_text()]


def test_the_words_of_the_concepts_fit() -> None:
    """The longest caption of a concept leaves room for a style's words."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    lengths = [
        len(tokenizer(f"an image of a {concept.replace('-', ' ')} on a yellow background")["input_ids"])
        for concept in read_concepts()
    ]
    assert max(lengths) <= TEXT_LENGTH - 12


@pytest.mark.slow
def test_it_knows_its_colors() -> None:
    """An image asked for on a colored ground has that ground in its corners."""
    pipeline = load_pipeline(BASE, "cpu")
    images = sample(pipeline, ["a red apple", "a bell on a blue background"], 0)
    corners = [torch.tensor(image.getpixel((3, 3)), dtype=torch.float) for image in images]
    assert corners[0].min() > 225
    assert corners[1].argmax() == 2
    assert corners[1][0] < 140
