"""Measures a base: are its concepts recognised in its samples, how well does its VAE redraw other hands."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdlora.builtin.captions import CONCEPTS_FILE, concept_to_words, read_concepts
from sdlora.builtin.icons import (
    BASE_HANDS,
    HANDS,
    STYLE_HANDS,
    Icons,
    compose,
    drawing_px,
    fetch_icons,
    load_icons,
    to_array,
)
from sdlora.errors import ModelError, SdloraError

STEPS = 20
GUIDANCE = 3.0
BATCH = 32
SEED = 8
SHEET_COLUMNS = 8
SHEET_PROMPTS = (
    "a cat face",
    "a red apple on a blue background",
    "a tractor",
    "a broken heart on a teal background",
    "a bell",
    "a rainbow",
    "a cookie on a black background",
    "a rocket",
    "a crown on a purple background",
    "an octopus",
    "a fire engine",
    "a pear on a pink background",
    "a sunflower",
    "a house",
    "an airplane, flat drawing",
    "a dog face on a yellow background",
)


@dataclass(frozen=True)
class Recognition:
    """For how many of `asked` concepts the nearest drawing, or one of the five nearest, is of the concept."""

    asked: int
    top1: int
    top5: int


def load_pipeline(folder: Path, device: str) -> Any:
    """The stock pipeline of a diffusers folder, quiet.

    Raises:
        ModelError: The folder is none.
    """
    from diffusers import StableDiffusionPipeline

    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is no diffusers folder; pass the folder that holds model_index.json")
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """One picture for each prompt, with the settings of all figures: 20 steps of DDIM, guidance 3."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        generator = torch.Generator().manual_seed(seed + start)
        done = pipeline(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator)
        pictures += done.images
    return pictures


@torch.no_grad()
def encode(vae: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Means of the posteriors, flattened, (N, C * H * W)."""
    rows = []
    for start in range(0, len(pictures), BATCH):
        pixels = torch.from_numpy(
            np.stack([to_array(picture) for picture in pictures[start : start + BATCH]])
        )
        rows.append(vae.encode(pixels.to(vae.device)).latent_dist.mean.flatten(1).cpu())
    return torch.cat(rows)


def draw_all(
    icons: dict[str, Icons], concepts: Sequence[str], size_px: int
) -> tuple[list[str], list[Image.Image]]:
    """All drawings of the concepts on white: which concept each shows, and the pictures."""
    names, pictures = [], []
    for hand in icons.values():
        for concept in concepts:
            names.append(concept)
            drawing = hand.render(concept, drawing_px(size_px))
            pictures.append(compose(drawing, size=(size_px, size_px)))
    return names, pictures


def recognise(pipeline: Any, icons: dict[str, Icons], concepts: Sequence[str], count: int) -> Recognition:
    """Samples "a NAME" for `count` concepts and looks for the nearest drawings in latent space."""
    size_px = pipeline.vae.config.sample_size
    names, pictures = draw_all(icons, concepts, size_px)
    known = encode(pipeline.vae, pictures)
    asked = random.Random(SEED).sample(sorted(concepts), min(count, len(concepts)))
    samples = sample(pipeline, [f"a {concept_to_words(concept)}" for concept in asked], SEED)
    nearest = torch.cdist(encode(pipeline.vae, samples), known).argsort(dim=1)[:, :5].tolist()
    found = [[names[index] for index in row] for row in nearest]
    top1 = sum(row[0] == concept for row, concept in zip(found, asked, strict=True))
    top5 = sum(concept in row for row, concept in zip(found, asked, strict=True))
    return Recognition(len(asked), top1, top5)


@torch.no_grad()
def redraw_psnr(vae: Any, icons: Icons, concepts: Sequence[str]) -> float:
    """PSNR in dB of the VAE's reconstruction of one hand's drawings on white, over all pixels."""
    drawn = draw_all(
        {"": icons}, [concept for concept in concepts if concept in icons], vae.config.sample_size
    )[1]
    errors = []
    for start in range(0, len(drawn), BATCH):
        pixels = torch.from_numpy(np.stack([to_array(picture) for picture in drawn[start : start + BATCH]]))
        pixels = pixels.to(vae.device)
        redrawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(F.mse_loss(redrawn, pixels, reduction="none").mean(dim=(1, 2, 3)))
    return float(10 * torch.log10(4 / torch.cat(errors).mean()))


def make_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in rows of eight."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * min(SHEET_COLUMNS, len(pictures)), height * rows), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, SHEET_COLUMNS)
        sheet.paste(picture, (width * column, height * row))
    return sheet


def measure(pipeline: Any, icons_folder: Path, concepts: Sequence[str], count: int) -> dict[str, Any]:
    """All figures of a base, as plain data."""
    base_icons = {hand: load_icons(hand, icons_folder) for hand in BASE_HANDS}
    figures: dict[str, Any] = {"recognition": vars(recognise(pipeline, base_icons, concepts, count))}
    held_out = {hand: load_icons(hand, icons_folder) for hand in STYLE_HANDS}
    psnr = {hand: round(redraw_psnr(pipeline.vae, icons, concepts), 2) for hand, icons in held_out.items()}
    return {**figures, "vae_psnr_db": psnr}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser(prog="python -m sdlora.builtin.measure", description=__doc__)
    parser.add_argument("base", type=Path, nargs="?", default=Path(__file__).with_name("base"))
    parser.add_argument("--icons", type=Path, help="folder of the vector packages; left out: npm pack")
    parser.add_argument("--concepts", type=Path, default=CONCEPTS_FILE, help="file of concept names")
    parser.add_argument("--count", type=int, default=192, help="concepts asked for")
    parser.add_argument("--sheet", type=Path, help="write a sheet of samples to this PNG")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        pipeline = load_pipeline(given.base, given.device)
        icons = given.icons or fetch_icons(tuple(HANDS), Path(".icons"))
        print(json.dumps(measure(pipeline, icons, read_concepts(given.concepts), given.count)))
    except SdloraError as error:
        print(error)
        return error.exit_code
    if given.sheet:
        make_sheet(sample(pipeline, SHEET_PROMPTS, 0)).save(given.sheet, optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
