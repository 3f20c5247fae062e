"""Trains the example styles on a base, and measures what they keep of a thing's shape and what they learn."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.builtin.bank import is_held_out
from sdlora.builtin.captions import SET_WORDS, concept_to_words, read_concepts
from sdlora.builtin.icons import BASE_SETS, STYLE_SETS, fetch_icons, load_icons
from sdlora.builtin.judge import Judge, ceiling, load_judge, open_rgb, recognise
from sdlora.builtin.measure import load_pipeline, make_sheet, sample
from sdlora.builtin.script import BASE, Script
from sdlora.builtin.variants import RENDERED_PX, Variant, render_variant
from sdlora.training.train import train

SEEDS = (0, 1, 2)  # of the trainings
NUM_SAMPLES = 4  # of each caption
STRENGTHS = (1.0, 0.6)
COLOR_BINS = 4
EDGE_BINS = 8
RESAMPLES = 1000
SHEET_CAPTIONS = 16
OWN_STYLES = ("", "outlined", "thick outlines", "woodcut", "stencil")  # in which its own loss is measured


@dataclass(frozen=True)
class Drawing:
    """A real drawing of a dataset."""

    concept: str
    caption: str
    image: Image.Image


def read_drawings(folder: Path) -> list[Drawing]:
    """The images of a folder with their captions."""
    return [
        Drawing(file.stem, file.with_suffix(".txt").read_text(encoding="utf-8").strip(), open_rgb(file))
        for file in sorted(folder.glob("*.png"))
    ]


def style_features(image: Image.Image) -> np.ndarray:
    """How an image is drawn, whatever it shows: the shares of its colors, and of its weak and strong edges.

    No weights are used, so they are neither the base's nor the judge's.
    """
    pixels = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BOX)).astype(int)
    inked = pixels.min(axis=2) < 245
    codes = (pixels * COLOR_BINS // 256) @ np.array([COLOR_BINS**2, COLOR_BINS, 1])
    colors = np.bincount(codes[inked], minlength=COLOR_BINS**3) / max(1, inked.sum())
    gray = pixels.mean(axis=2)
    slopes = np.hypot(np.diff(gray, axis=1)[:-1], np.diff(gray, axis=0)[:, :-1])[inked[:-1, :-1]]
    edges = np.histogram(slopes, EDGE_BINS, (0, 256))[0] / max(1, slopes.size)
    return np.concatenate([np.sqrt(colors), np.sqrt(edges)])  # Hellinger's distance


def style_distance(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Distance between the mean style features of two sets of images."""
    one, other = (np.mean([style_features(image) for image in part], axis=0) for part in (images, others))
    return float(np.linalg.norm(one - other))


def style_share(samples: float, base: float, real: float) -> float:
    """A distance as a share of the way from the bare base (0) to other real drawings of the set (1)."""
    return (base - samples) / (base - real)


def share_interval(hits: dict[str, float], top: float) -> dict[str, float]:
    """The mean of each caption's share of recognised samples, over the ceiling, and its 95 % interval.

    The interval is a bootstrap over captions: the samples of one caption are not independent.
    """
    values, rng = list(hits.values()), random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) / top for _ in range(RESAMPLES))
    mean = sum(values) / len(values)
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    facts = {"recognised": mean, "of_ceiling": mean / top, "low": low, "high": high}
    return {name: round(value, 3) for name, value in facts.items()}


def recognised_shares(
    judge: Judge, images: Sequence[Image.Image], concepts: Sequence[str]
) -> dict[str, float]:
    """For each concept, the share of its samples that are recognised."""
    found = recognise(judge, images)
    hits: dict[str, list[bool]] = {}
    for names, concept in zip(found, concepts, strict=True):
        hits.setdefault(concept, []).append(names[0] == concept)
    return {concept: sum(values) / len(values) for concept, values in hits.items()}


def sample_style(
    pipeline: Any, drawings: Sequence[Drawing], strength: float, guidance: float, prompt: str = "{}"
) -> list[Image.Image]:
    """Samples of every caption, put in a prompt, at a strength of the adapter; 0 is the bare base."""
    if strength:
        pipeline.set_adapters(["style"], [strength])
    images: list[Image.Image] = []
    captions = [prompt.format(drawing.caption) for drawing in drawings]
    for number in range(NUM_SAMPLES):
        images += sample(pipeline, captions, 1000 * number, guidance)
    return images


def train_style(dataset: Path, config: Path | None, base: Path, seed: int, out: Path, trigger: str) -> Any:
    """One training with the preset, or with no setting at all."""
    overrides = {"train.seed": seed, "train.sample_every": 0, "train.save_every": 0}
    return train(
        dataset,
        # by its name, it has its own defaults
        base="builtin" if base.resolve() == BASE.resolve() else str(base),
        config=config,
        out=out,
        trigger=trigger or None,
        overrides=overrides,
        quiet=True,
    )


def prompt_of(data: dict[str, Any]) -> str:
    """The place of a caption among a run's trigger words, from its settings of the section `data`."""
    trigger = data["trigger"]
    if not trigger:
        return "{}"
    return f"{trigger}, {{}}" if data["trigger_position"] == "start" else f"{{}}, {trigger}"


def heldout_losses(run: Any) -> list[float]:
    """The losses on the held-out drawings, the base's own first."""
    return [event["loss"] for event in run.events("heldout") if event["split"] == "heldout"]


def measure_style(
    dataset: Path,
    config: Path | None,
    base: Path,
    judge: Judge,
    seeds: Sequence[int],
    sheets: Path,
    trigger: str,
) -> dict[str, Any]:
    """All rows of one style, over the seeds; a sheet of each training's samples is written to `sheets`."""
    heldout, others = read_drawings(dataset / "heldout"), read_drawings(dataset)
    concepts = [drawing.concept for drawing in heldout] * NUM_SAMPLES
    real = [drawing.image for drawing in heldout]
    top = ceiling(judge, dataset)[0]
    bare_images = sample_style(load_pipeline(base, "cpu"), heldout, 0, 3.0)
    bare = style_distance(bare_images, real)
    best = style_distance([drawing.image for drawing in others], real)
    shares: dict[float, list[dict[str, float]]] = {strength: [] for strength in STRENGTHS}
    styles: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    losses = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            run = train_style(dataset, config, base, seed, Path(folder) / "run", trigger)
            losses.append(heldout_losses(run))
            settings = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
            guidance, prompt = settings["sample"]["guidance"], prompt_of(settings["data"])
            pipeline = load_pipeline(base, "cpu")
            pipeline.load_lora_weights(str(run.adapter), adapter_name="style")
        for strength in STRENGTHS:
            images = sample_style(pipeline, heldout, strength, guidance or 3.0, prompt)
            shares[strength].append(recognised_shares(judge, images, concepts))
            styles[strength].append(style_share(style_distance(images, real), bare, best))
            sheets.mkdir(parents=True, exist_ok=True)
            sheet = make_sheet([*real[:SHEET_CAPTIONS], *images[:SHEET_CAPTIONS]])
            sheet.save(sheets / f"{dataset.name}-{seed}-{strength}.png", optimize=True)
    figures: dict[str, Any] = {"ceiling": round(top, 3)}
    figures["bare base"] = share_interval(recognised_shares(judge, bare_images, concepts), top)
    for strength in STRENGTHS:
        means = {
            concept: sum(found[concept] for found in shares[strength]) / len(seeds)
            for concept in shares[strength][0]
        }
        row = share_interval(means, top)
        figures[f"strength {strength}"] = {**row, "style": [round(share, 3) for share in styles[strength]]}
    return {**figures, "heldout_losses": losses}


def loss_on_own_sets(base: Path, icons_folder: Path, style: str = "") -> float:
    """The base's loss on drawings of its own sets that it was not taught, as a training measures it.

    With a style, on these drawings in it: outlines and hard edges cost more loss, however well known.
    """
    icons = {name: load_icons(name, icons_folder) for name in BASE_SETS}
    unseen = [
        Variant(name, concept, style=style)
        for name, concept in itertools.product(BASE_SETS, read_concepts())
        if concept in icons[name] and is_held_out(name, concept)
    ]
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        (images / "heldout").mkdir(parents=True)
        for place, variants in ((images, unseen[:4]), (images / "heldout", unseen)):
            for one in variants:
                drawing = icons[one.icon_set].render(one.concept, RENDERED_PX)
                file = place / f"{one.icon_set}-{one.concept}.png"
                render_variant(drawing, one).save(file)
                words = filter(None, (concept_to_words(one.concept), style, SET_WORDS[one.icon_set][0]))
                file.with_suffix(".txt").write_text(f"a {', '.join(words)}\n", encoding="utf-8")
        overrides = {"train.steps": 1, "train.sample_every": 0, "train.evaluate_every": 1}
        run = train(images, base=str(base), out=Path(folder) / "run", overrides=overrides, quiet=True)
        return heldout_losses(run)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_styles", __doc__, "--judge", "--datasets", "--icons", "--threads")
    script.add_argument("base", type=Path, nargs="?", default=BASE)
    script.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the presets")
    script.add_argument("--no-preset", action="store_true", help="train with no setting at all")
    script.add_argument("--trigger", default="", help='words put before every caption, as "openmoji style"')
    script.add_argument("--styles", nargs="+", default=STYLE_SETS, choices=STYLE_SETS)
    script.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    script.add_argument("--sheets", type=Path, default=Path("sheets"), help="folder of the sheets")
    script.add_argument("--own", action="store_true", help="measure the loss on the base's own sets too")

    def work(given: Namespace) -> None:
        judge = load_judge(given.judge)
        for name in given.styles:
            config = None if given.no_preset else given.configs / f"{name}.toml"
            figures = measure_style(
                given.datasets / name, config, given.base, judge, given.seeds, given.sheets, given.trigger
            )
            print(json.dumps({name: figures}, indent=1), flush=True)
        if given.own:
            icons = given.icons or fetch_icons(BASE_SETS, Path(".icons"))
            losses = {style: loss_on_own_sets(given.base, icons, style) for style in OWN_STYLES}
            print(json.dumps({"loss on its own sets": losses}))

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
