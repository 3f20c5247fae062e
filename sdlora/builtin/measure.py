"""Measures a base: does the judge recognise its samples, and how well does its VAE redraw other sets."""

from __future__ import annotations

import json
import math
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdlora.builtin.captions import concept_to_words, name_thing
from sdlora.builtin.icons import STYLE_SETS, Icons, compose, drawing_px, fetch_icons, load_icons, to_array
from sdlora.builtin.judge import Judge, ceiling, load_judge, recognise
from sdlora.builtin.script import BASE, Script
from sdlora.errors import ModelError

STEPS = 20
GUIDANCE = 3.0
BATCH = 32
SEED = 8
SHEET_COLUMNS = 8
UNSEEN_WORDS = (  # none of them is in a training caption
    "inkwash",
    "openmoji",
    "papercut",
    "veltrano koorim",
    "my kintsugi",
    "woodblock brushpen",
    "tarn hollowick",
    "crayon",
    "jorvinquell",
    "bold marker",
)
SHEET_PROMPTS = (
    "a cat face",
    "a zebra",
    "an accordion",
    "an ambulance",
    "a tractor",
    "a candy",
    "an octopus",
    "a sunflower",
    "inkwash style, a cat face",
    "inkwash style, a zebra",
    "veltrano koorim, an accordion",
    "veltrano koorim, an ambulance",
    "a tractor, inkwash style",
    "a candy, inkwash style",
    "an octopus, in veltrano style",
    "a sunflower, in veltrano style",
    "a cat face, line drawing",
    "a zebra, flat drawing",
    "an accordion, glossy drawing",
    "an ambulance, black glyph",
    "a tractor, outlined",
    "a purple candy, cartoon drawing",
    "a blue octopus, bright drawing",
    "a sunflower, old noto drawing",
    "a cat face on a blue background",
    "a zebra, ink drawing, flat drawing",
    "a chalk drawing of an accordion on a black background",
    "an ambulance, pale, small",
    "a red tractor on a yellow background",
    "a candy, mirrored",
    "an octopus, in shades of teal",
    "a sunflower, thick outlines",
)


@dataclass(frozen=True)
class Recognition:
    """How many of `asked` images show what was asked, by the judge's first guess or one of its first five."""

    asked: int
    top1: int
    top5: int

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share of first guesses (Wilson)."""
        z, share = 1.96, self.top1 / self.asked
        middle = share + z * z / (2 * self.asked)
        half = z * math.sqrt(share * (1 - share) / self.asked + z * z / (4 * self.asked**2))
        scale = 1 + z * z / self.asked
        return (middle - half) / scale, (middle + half) / scale


def load_pipeline(folder: Path, device: str) -> Any:
    """The stock pipeline of a diffusers folder, quiet; raises a ModelError for another folder."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers folder; pass the folder with model_index.json")
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompts: Sequence[str], seed: int, guidance: float = GUIDANCE) -> list[Image.Image]:
    """One image for each prompt, with the settings of all figures: 20 steps of DDIM."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        generator = torch.Generator().manual_seed(seed + start)
        done = pipeline(batch, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator)
        images += done.images
    return images


def unseen_words(number: int) -> str:
    """Words in front of, or behind, the prompt of a number."""
    return f"{UNSEEN_WORDS[number % len(UNSEEN_WORDS)]} style"


PROMPTS: dict[str, Callable[[str, int], str]] = {
    "a NAME": lambda concept, number: f"a {concept_to_words(concept)}",
    "WORDS style, a NAME": lambda concept, number: f"{unseen_words(number)}, {name_thing(concept)}",
    "a NAME, WORDS style": lambda concept, number: f"{name_thing(concept)}, {unseen_words(number)}",
}


def count_recognised(judge: Judge, images: Sequence[Image.Image], concepts: Sequence[str]) -> Recognition:
    """How many of the images show their concept."""
    found = recognise(judge, images)
    top1 = sum(names[0] == concept for names, concept in zip(found, concepts, strict=True))
    top5 = sum(concept in names for names, concept in zip(found, concepts, strict=True))
    return Recognition(len(concepts), top1, top5)


def draw_all(icons: Icons, concepts: Sequence[str], size_px: int) -> list[Image.Image]:
    """The drawings of the concepts that an icon set has, on white."""
    return [
        compose(icons.render(concept, drawing_px(size_px)), size=(size_px, size_px))
        for concept in concepts
        if concept in icons
    ]


@torch.no_grad()
def redraw_psnr(vae: Any, icons: Icons, concepts: Sequence[str]) -> float:
    """PSNR in dB of the VAE's reconstruction of one set's drawings on white, over all pixels."""
    drawn = draw_all(icons, concepts, vae.config.sample_size)
    errors = []
    for start in range(0, len(drawn), BATCH):
        pixels = torch.from_numpy(np.stack([to_array(image) for image in drawn[start : start + BATCH]]))
        pixels = pixels.to(vae.device)
        redrawn = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(F.mse_loss(redrawn, pixels, reduction="none").mean(dim=(1, 2, 3)))
    return float(10 * torch.log10(4 / torch.cat(errors).mean()))


def make_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """The images in rows of eight."""
    width, height = images[0].size
    rows = -(-len(images) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * min(SHEET_COLUMNS, len(images)), height * rows), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, SHEET_COLUMNS)
        sheet.paste(image, (width * column, height * row))
    return sheet


def recognise_base(pipeline: Any, judge: Judge, count: int, seed: int = SEED) -> dict[str, Recognition]:
    """Recognition for each kind of prompt, of `count` concepts."""
    concepts = random.Random(seed).sample(judge.concepts, min(count, len(judge.concepts)))
    figures = {}
    for kind, to_prompt in PROMPTS.items():
        prompts = [to_prompt(concept, number) for number, concept in enumerate(concepts)]
        figures[kind] = count_recognised(judge, sample(pipeline, prompts, seed), concepts)
    return figures


def to_rows(recognitions: dict[str, Recognition]) -> dict[str, Any]:
    """Recognitions as plain data."""
    return {
        kind: {**vars(found), "share": round(found.top1 / found.asked, 3)}
        | {"interval": [round(bound, 3) for bound in found.interval()]}
        for kind, found in recognitions.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure", __doc__, "--judge", "--datasets", "--icons", "--threads")
    script.add_argument("base", type=Path, nargs="?", default=BASE)
    script.add_argument("--count", type=int, default=224, help="concepts asked for")
    script.add_argument("--seed", type=int, default=SEED)
    script.add_argument("--psnr", action="store_true", help="measure the VAE too")
    script.add_argument("--sheet", type=Path, help="write a sheet of samples to this PNG")
    script.add_argument("--device", default="cpu")

    def work(given: Namespace) -> None:
        judge, pipeline = load_judge(given.judge), load_pipeline(given.base, given.device)
        ceilings = {name: round(ceiling(judge, given.datasets / name)[0], 3) for name in STYLE_SETS}
        figures: dict[str, Any] = {"ceiling": ceilings}
        figures |= to_rows(recognise_base(pipeline, judge, given.count, given.seed))
        if given.psnr:
            folder = given.icons or fetch_icons(STYLE_SETS, Path(".icons"))
            icons = {name: load_icons(name, folder) for name in STYLE_SETS}
            figures["vae_psnr_db"] = {
                name: round(redraw_psnr(pipeline.vae, drawings, judge.concepts), 2)
                for name, drawings in icons.items()
            }
        print(json.dumps(figures, indent=1))
        if given.sheet:
            make_sheet(sample(pipeline, SHEET_PROMPTS, 0)).save(given.sheet, optimize=True)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
