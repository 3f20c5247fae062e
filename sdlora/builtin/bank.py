"""A bank of latents on disk: each drawing encoded once as it is, and in one more variant a shard."""

from __future__ import annotations

import hashlib
import json
import random
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import BASE_SETS, fetch_icons, load_icons, to_array
from sdlora.builtin.script import Script
from sdlora.builtin.variants import HUES, RENDERED_PX, Variant, dominant_hue, draw_variant, render_variant
from sdlora.errors import ModelError
from sdlora.writing import to_lines, write_text

ENCODE_BATCH = 32
PLAIN_SHARE = 0.3  # of the images drawn: the drawing as it is
MOVED_SHARE = 0.05  # of the images drawn: shifted, scaled, turned or mirrored; more of them blur all shapes
HELDOUT_SHARE = 0.03  # of the drawings of the other sets: never trained on, to see whether sets generalize
NOTO_WEIGHT = 4.0  # against 1 of each other set: it is what a caption without a set means


def is_held_out(icon_set: str, concept: str) -> bool:
    """Whether the base is not taught this drawing; every concept is taught as Noto draws it."""
    drawn = random.Random(f"heldout/{icon_set}/{concept}").random()
    return icon_set != BASE_SETS[0] and drawn < HELDOUT_SHARE


class Bank:
    """Latents by number, and which of them show which concept; those held out have a number alone."""

    def __init__(self, folder: Path) -> None:
        """Opens every finished shard; raises a ModelError if there is none."""
        self.variants: list[Variant] = []
        self.shards: list[np.ndarray] = []
        self.places: list[tuple[int, int]] = []
        self.by_concept: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for file in sorted(folder.glob("*.npy")):
            latents = np.load(file, mmap_mode="r")
            for row, line in enumerate(file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()):
                facts = json.loads(line)
                variant = Variant(**{**facts, "shift": tuple(facts["shift"])})
                if not is_held_out(variant.icon_set, variant.concept):
                    self.by_concept[variant.concept][variant.icon_set].append(len(self.variants))
                self.variants.append(variant)
                self.places.append((len(self.shards), row))
            self.shards.append(latents)
        if not self.shards:
            raise ModelError(f"{folder} has no latents; make them with python -m sdlora.builtin.bank")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W."""
        shape: tuple[int, ...] = self.shards[0].shape[1:]
        return shape

    @property
    def concepts(self) -> list[str]:
        return sorted(self.by_concept)

    def draw(self, rng: random.Random, concept: str) -> int:
        """The number of an image of the concept: plain or a variant, Noto's more often than another set's."""
        sets = self.by_concept[concept]
        weights = [NOTO_WEIGHT if name == BASE_SETS[0] else 1.0 for name in sets]
        numbers = sets[rng.choices(list(sets), weights)[0]]
        # the first of a drawing's images is the plain one
        drawn = rng.random()
        if drawn < PLAIN_SHARE or len(numbers) == 1:
            return numbers[0]
        is_moved = drawn > 1 - MOVED_SHARE
        chosen = [number for number in numbers[1:] if self.variants[number].is_moved == is_moved]
        return rng.choice(chosen or numbers[1:])

    def latents(self, numbers: Sequence[int]) -> torch.Tensor:
        """Unscaled latents, (B, C, H, W), fp32."""
        rows = [self.shards[shard][row] for shard, row in (self.places[number] for number in numbers)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def plain_std(self) -> float:
        """Standard deviation of the latents of the plain drawings."""
        plain = [number for number, variant in enumerate(self.variants) if variant.is_plain]
        return float(self.latents(plain).std())


def load_vae(folder: Path) -> Any:
    """The VAE of a diffusers folder; raises a ModelError if there is none."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no VAE; make one with python -m sdlora.builtin.make_vae")
    return AutoencoderKL.from_pretrained(folder).float().eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: Any, images: Sequence[np.ndarray]) -> np.ndarray:
    """Means of the posteriors of images (3, H, W) in [-1, 1]; unscaled, fp16, (N, C, H, W)."""
    rows = []
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = torch.from_numpy(np.stack(images[start : start + ENCODE_BATCH])).to(vae.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):  # as the VAE was trained
            means = vae.encode(pixels).latent_dist.mean
        rows.append(means.contiguous().half().cpu().numpy())
    return np.concatenate(rows)


def vae_digest(folder: Path) -> str:
    """Tells the weights of one VAE from another's."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def claim_bank(out: Path, vae: Path) -> None:
    """Writes into the bank which VAE it is of; raises a ModelError if it is of another one."""
    out.mkdir(parents=True, exist_ok=True)
    file, digest = out / "vae.sha256", vae_digest(vae)
    if file.is_file() and file.read_text(encoding="utf-8") != digest:
        raise ModelError(f"{out} holds latents of another VAE; choose another --out")
    file.write_text(digest, encoding="utf-8")


def honest_variant(drawing: Image.Image, variant: Variant) -> Variant:
    """The variant, without a color where the drawing has none to turn."""
    turned = variant.color in HUES and dominant_hue(drawing) is None
    return replace(variant, color="") if turned else variant


def make_bank(out: Path, icons_folder: Path, vae_folder: Path, concepts: Sequence[str], shards: int) -> None:
    """Encodes the shards that `out` lacks; shard 0 holds the plain drawings.

    A shard's variants follow from its number and the drawing's name alone.
    """
    claim_bank(out, vae_folder)
    vae = load_vae(vae_folder).to(memory_format=torch.channels_last)
    icons = {name: load_icons(name, icons_folder) for name in BASE_SETS}
    drawings = {
        (name, concept): icons[name].render(concept, RENDERED_PX)
        for name in BASE_SETS
        for concept in concepts
        if concept in icons[name]
    }
    for shard in range(shards):
        file = out / f"{shard:03}.npy"
        if file.is_file():
            continue
        variants = [
            draw_variant(random.Random(f"{shard}/{name}/{concept}"), name, concept)
            if shard
            else Variant(name, concept)
            for name, concept in drawings
        ]
        variants = [honest_variant(drawings[v.icon_set, v.concept], v) for v in variants]
        images = [to_array(render_variant(drawings[v.icon_set, v.concept], v)) for v in variants]
        latents = encode_images(vae, images)
        write_text(file.with_suffix(".jsonl"), to_lines(map(asdict, variants)))
        partial = file.with_suffix(".partial")
        with partial.open("wb") as opened:
            np.save(opened, latents)
        partial.replace(file)
        print(f"{file}: {len(variants)} images", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("bank", __doc__, "--icons", "--vae", "--concepts")
    script.add_argument("--out", type=Path, required=True, help="folder of the shards")
    script.add_argument("--shards", type=int, default=24, help="the first holds the plain drawings")

    def work(given: Namespace) -> None:
        icons = given.icons or fetch_icons(BASE_SETS, given.out / "icons")
        make_bank(given.out, icons, given.vae, read_concepts(given.concepts), given.shards)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
