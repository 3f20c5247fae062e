"""Measures on the built-in base what prior prediction keeps without the trigger, and what masks leave out."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.builtin.measure import load_pipeline, make_sheet, sample
from sdlora.builtin.measure_styles import SEEDS, Drawing, read_drawings, style_distance, style_share
from sdlora.builtin.script import BASE, Script
from sdlora.evaluation.features import DrawingFeatures, Rows

TRIGGER = "flat drawing"
HANDS = ("openmoji", "fluent-mono")
NUM_PROMPTS = 16
SIDE = 128


def train(images: Path, out: Path, given: Namespace, seed: int, **overrides: Any) -> Path:
    """Trains without grids and in-between saves; returns the adapter's file. What exists is kept."""
    import sdlora

    file = out / "adapters" / "final.safetensors"
    if not file.is_file():
        fixed = {"train.sample_every": 0, "train.save_every": 0, "train.evaluate_every": 0}
        settings = {**fixed, "train.seed": seed, "train.steps": given.steps, **overrides}
        sdlora.train(images, base="builtin", out=out, trigger=TRIGGER, overrides=settings, quiet=True)
    return file


def draw(pipeline: Any, adapter: Path | None, prompts: Sequence[str]) -> list[Image.Image]:
    """An image for each prompt, with an adapter or by the bare base."""
    if adapter is None:
        return sample(pipeline, prompts, 0)
    pipeline.load_lora_weights(adapter)
    images = sample(pipeline, prompts, 0)
    pipeline.unload_lora_weights()
    return images


def difference(image: Image.Image, other: Image.Image) -> float:
    """RMSE of two images, from 0 to 1."""
    pixels = (np.asarray(one.convert("RGB"), np.float64) / 255 for one in (image, other))
    return float(np.sqrt(np.square(np.subtract(*pixels)).mean()))


def interval(values: Sequence[float]) -> list[float]:
    """The mean and its 95 % interval, a bootstrap over prompts."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.array(values), (2000, len(values))).mean(axis=1)
    return [round(float(one), 3) for one in (np.mean(values), *np.percentile(means, (2.5, 97.5)))]


def measure_bleed(given: Namespace) -> dict[str, Any]:
    """With and without prior prediction: images without the trigger, and the style of those with it."""
    drawings = read_drawings(given.datasets / "openmoji" / "heldout")
    prompts = [drawing.caption for drawing in drawings[:NUM_PROMPTS]]
    styled = [f"{TRIGGER}, {prompt}" for prompt in prompts]
    real = [drawing.image for drawing in drawings]
    pipeline = load_pipeline(BASE, "cpu")
    base, base_styled = draw(pipeline, None, prompts), draw(pipeline, None, styled)
    far, top = style_distance(base_styled, real), style_distance(real[::2], real[1::2])
    rows: dict[str, Any] = {}
    for weight in (0, 1):
        changes, shares, sheet = [], [], list(base[:8])
        for seed in given.seeds:
            out = given.out / f"prior-{weight}-{seed}"
            file = train(given.datasets / "openmoji", out, given, seed, **{"objective.prior_weight": weight})
            plain, own = draw(pipeline, file, prompts), draw(pipeline, file, styled)
            changes.append([difference(*pair) for pair in zip(plain, base, strict=True)])
            shares.append(round(style_share(style_distance(own, real), far, top), 3))
            sheet += [*plain[:8], *own[:8]]
        make_sheet(sheet).save(given.out / f"prior-{weight}.png")
        change = interval(np.mean(changes, axis=0).tolist())
        rows[f"prior_weight {weight}"] = {"change without trigger": change, "style by seed": shares}
        print(json.dumps(rows), flush=True)
    return rows


def make_halves(given: Namespace) -> Path:
    """Images of two hands: the left half of one, the right half of the other, and masks of the left."""
    folder: Path = given.out / "halves"
    folder.mkdir(parents=True, exist_ok=True)
    left, right = ({one.concept: one for one in read_drawings(given.datasets / hand)} for hand in HANDS)
    for concept in sorted(left.keys() & right.keys()):
        image, other = (_square(part[concept]) for part in (left, right))
        image.paste(other.crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
        image.save(folder / f"{concept}.png")
        mask = Image.new("L", (SIDE, SIDE), 0)
        mask.paste(255, (0, 0, SIDE // 2, SIDE))
        mask.save(folder / f"{concept}.mask.png")
        (folder / f"{concept}.txt").write_text(left[concept].caption, encoding="utf-8")
    return folder


def _square(drawing: Drawing) -> Image.Image:
    image = drawing.image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return canvas


def parts_of(samples: Rows, base: Rows, hands: Sequence[Rows]) -> list[float]:
    """How far samples go from the base towards each hand, together: the base is (0, 0), a hand 1 of its own.

    Least squares of the mean style (D,) of the samples; all are rows (N, D).
    """
    ways = np.stack([hand.mean(axis=0) - base.mean(axis=0) for hand in hands], axis=1)
    found = np.linalg.lstsq(ways, samples.mean(axis=0) - base.mean(axis=0), rcond=None)[0]
    return [round(float(part), 3) for part in found]


def measure_masks(given: Namespace) -> dict[str, Any]:
    """With and without masks of the left half: how far samples go towards either hand, by training."""
    folder, style = make_halves(given), DrawingFeatures().style
    heldout = [read_drawings(given.datasets / hand / "heldout") for hand in HANDS]
    prompts = [f"{TRIGGER}, {one.caption}" for one in heldout[0][:NUM_PROMPTS]]
    pipeline = load_pipeline(BASE, "cpu")
    base = style(draw(pipeline, None, prompts))
    hands = [style([_square(one) for one in drawings]) for drawings in heldout]
    rows: dict[str, Any] = {}
    # Color is learned where layout is, too.
    settings = {"data.heldout": 0, "objective.timestep_range": [0, 700], "train.learning_rate": 1e-3}
    for name, more in (("no masks", {}), ("masks", {"data.masks": "files"})):
        parts, sheet = [], []
        for seed in given.seeds:
            out = given.out / f"{name.replace(' ', '-')}-{seed}"
            images = draw(pipeline, train(folder, out, given, seed, **settings, **more), prompts)
            parts.append(parts_of(style(images), base, hands))
            sheet += images[:8]
        make_sheet(sheet).save(given.out / f"{name.replace(' ', '-')}.png")
        rows[name] = dict(zip(HANDS, zip(*parts, strict=True), strict=True))
        print(json.dumps(rows), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_data", __doc__, "--datasets", "--threads")
    script.add_argument("what", choices=("bleed", "masks"))
    script.add_argument("--out", type=Path, required=True, help="folder for runs, sheets and figures")
    script.add_argument("--steps", type=int, default=100)
    script.add_argument("--seeds", type=int, nargs="+", default=SEEDS)

    def work(given: Namespace) -> None:
        found = {"bleed": measure_bleed, "masks": measure_masks}[given.what](given)
        file = given.out / f"{given.what}.json"
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
