"""Draws the image of the troubleshooting page: one prompt and seed, each time with another thing wrong.

python docs/draw_troubles.py runs/openmoji docs/pages/figures/troubles.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import sdlora

BASE = Path(sdlora.__file__).parent / "builtin" / "base"
PROMPT, SEED, SIDE, LABEL = "a fox", 0, 128, 22


def draw(pipe: Any, strength: float = 0.6) -> Image.Image:
    pipe.set_adapters(["style"], [strength])
    generator = torch.Generator().manual_seed(SEED)
    image: Image.Image = pipe(PROMPT, num_inference_steps=25, guidance_scale=5, generator=generator).images[0]
    return image


def main(run: str, file: str) -> None:
    """Draws with stock diffusers, in which these mistakes can be made."""
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pipe.load_lora_weights(sdlora.RunFolder(run).adapter, adapter_name="style")
    pipe.set_progress_bar_config(disable=True)
    tiles = {"as it should be": draw(pipe), "too weak": draw(pipe, 0.2), "too strong": draw(pipe, 2.0)}
    right = pipe.scheduler
    wrong = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[right.config.prediction_type]
    pipe.scheduler = DDIMScheduler.from_config(right.config, prediction_type=wrong)
    tiles["other prediction"] = draw(pipe)
    pipe.scheduler = right
    scaling = pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=scaling * 2)
    tiles["colors of another VAE"] = draw(pipe)
    pipe.vae.register_to_config(scaling_factor=scaling)
    tiles["black"] = Image.new("RGB", (SIDE, SIDE))
    sheet = Image.new("RGB", (len(tiles) * (SIDE + 8) - 8, SIDE + LABEL), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (title, tile) in enumerate(tiles.items()):
        left = number * (SIDE + 8)
        sheet.paste(tile.resize((SIDE, SIDE)), (left, LABEL))
        pen.text((left, 3), title, fill="black", font=font)
    sheet.quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
