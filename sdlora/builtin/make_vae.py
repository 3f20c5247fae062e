"""Trains the VAE of the built-in base: images of 128 px to 16 x 16 latents of 8 channels, and back."""

from __future__ import annotations

import random
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import (
    GROUNDS,
    ICON_SETS,
    IMAGE_PX,
    Icons,
    compose,
    fetch_icons,
    load_icons,
    to_array,
)
from sdlora.builtin.script import Script
from sdlora.builtin.state import TrainingState, learning_rate, save_folder, step_generators
from sdlora.writing import append_lines

BETAS = (0.9, 0.99)
CROP_PX = 64
CROP_GRID_PX = 8
EDGE_WEIGHT = 1.0
SQUARE_WEIGHT = 2.0
KL_WEIGHT = 4e-4
SAVE_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 150
    decay_share: float = 0.6
    average_decay: float = 0.998
    widths: tuple[int, ...] = (32, 64, 128, 128)
    channels: int = 8
    seed: int = 0


def make_vae(recipe: Recipe) -> Any:
    """An untrained VAE with factor 8."""
    levels = len(recipe.widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.widths,
        layers_per_block=1,
        latent_channels=recipe.channels,
        norm_num_groups=8,
        sample_size=IMAGE_PX,
        mid_block_add_attention=False,
    )


def draw_crop(drawings: Sequence[Image.Image], rng: random.Random) -> np.ndarray:
    """A crop of a drawing at a drawn size, on a drawn ground; float32 (3, 64, 64)."""
    drawing = rng.choice(drawings)
    size_px = round(IMAGE_PX * rng.uniform(0.8, 1.0))
    ground = "white" if rng.random() < 0.5 else rng.choice(list(GROUNDS))
    image = compose(drawing.resize((size_px, size_px), Image.Resampling.LANCZOS), ground)
    left, top = (rng.randrange(0, IMAGE_PX - CROP_PX + 1, CROP_GRID_PX) for _ in range(2))
    return to_array(image.crop((left, top, left + CROP_PX, top + CROP_PX)))


def draw_batch(
    recipe: Recipe, drawings: Sequence[Image.Image], step: int, device: str
) -> tuple[Tensor, torch.Generator]:
    """The crops of one step, (B, 3, 64, 64), and the generator of its noise."""
    rng, generator = step_generators(recipe.seed, step)
    crops = np.stack([draw_crop(drawings, rng) for _ in range(recipe.batch_size)])
    return torch.from_numpy(crops).to(device, memory_format=torch.channels_last), generator


def edge_error(redrawn: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels: it keeps outlines sharp."""
    return F.l1_loss(redrawn.diff(dim=-1), pixels.diff(dim=-1)) + F.l1_loss(
        redrawn.diff(dim=-2), pixels.diff(dim=-2)
    )


def vae_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Absolute, squared and edge error of the redrawn pixels, and a little KL divergence (1312.6114)."""
    with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        redrawn = vae.decode(posterior.mean + posterior.std * noise).sample
    redrawn = redrawn.float()
    divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss: Tensor = F.l1_loss(redrawn, pixels) + EDGE_WEIGHT * edge_error(redrawn, pixels)
    loss += SQUARE_WEIGHT * F.mse_loss(redrawn, pixels) + KL_WEIGHT * divergence
    return loss


def render_all(icons: Sequence[Icons], concepts: Sequence[str]) -> list[Image.Image]:
    """Every drawing of the concepts; icon sets that lack one are passed over."""
    return [icon_set.render(name, IMAGE_PX) for icon_set in icons for name in concepts if name in icon_set]


def train(
    recipe: Recipe, out: Path, drawings: Sequence[Image.Image], device: str, stop_after: int | None = None
) -> Any:
    """Trains the VAE, or continues from the state in `out`; returns it with its averaged weights.

    Drawings have a transparent ground; `stop_after` ends the run after that many steps.
    """
    torch.manual_seed(recipe.seed)
    vae = make_vae(recipe).to(device, memory_format=torch.channels_last)
    state, file = TrainingState({"vae": vae}, BETAS, recipe.average_decay), out / "vae.safetensors"
    if file.is_file():
        state.load(file)
    end = recipe.steps if stop_after is None else min(recipe.steps, state.step + stop_after)
    while state.step < end:
        loss = vae_loss(vae, *draw_batch(recipe, drawings, state.step, device))
        rate = learning_rate(
            state.step, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.decay_share
        )
        state.update(loss, rate)
        if state.step % SAVE_EVERY == 0 or state.step == end:
            state.save(file)
            facts = {"phase": "vae", "step": state.step, "loss": round(loss.item(), 4), "rate": rate}
            append_lines(out / "log.jsonl", [{**facts, "time": round(time.time())}])
    state.swap_average()
    return vae


def save_vae(vae: Any, folder: Path) -> None:
    """Writes a diffusers folder in fp16, all or nothing."""
    save_folder(folder, vae.to(memory_format=torch.contiguous_format).save_pretrained, "")


def main(arguments: Sequence[str] | None = None) -> int:
    default = Recipe()
    script = Script("make_vae", __doc__, "--icons", "--concepts", "--device")
    script.add_argument("--out", type=Path, required=True, help="folder for the state, the log and the VAE")
    script.add_argument("--steps", type=int, default=default.steps)
    script.add_argument("--batch-size", type=int, default=default.batch_size)
    script.add_argument("--seed", type=int, default=default.seed)

    def work(given: Namespace) -> None:
        recipe = Recipe(steps=given.steps, batch_size=given.batch_size, seed=given.seed)
        folder = given.icons or fetch_icons(tuple(ICON_SETS), given.out / "icons")
        icons = [load_icons(icon_set, folder) for icon_set in ICON_SETS]
        drawings = render_all(icons, read_concepts(given.concepts))
        save_vae(train(recipe, given.out, drawings, given.device), given.out / "vae")
        print(f"{given.out / 'vae'} is written")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
