"""Measures features where the truth is known: the same things, drawn by many hands."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import ICON_SETS, IMAGE_PX, compose, drawing_px, fetch_icons, load_icons
from sdlora.builtin.script import Script
from sdlora.evaluation.features import Features, Rows, load_features, unit_rows

EVERY = 4  # of the concepts
SET_SIZE, TRIALS = 8, 60


def draw_hands(icons_folder: Path) -> dict[tuple[str, str], Image.Image]:
    """Drawings on white, by icon set and concept."""
    found = {}
    for name in ICON_SETS:
        icons = load_icons(name, icons_folder)
        for concept in read_concepts()[::EVERY]:
            if concept in icons:
                found[name, concept] = compose(icons.render(concept, drawing_px(IMAGE_PX)))
    return found


def style_retrieval(rows: Rows, hands: Sequence[str], concepts: Sequence[str]) -> tuple[float, float]:
    """How often the nearest is of the same hand, over hands: among images, and among sets of `SET_SIZE`.

    What is compared never shows the same concept.
    """
    hand, concept = np.array(hands), np.array(concepts)
    distances = np.square(rows[:, None] - rows[None]).sum(axis=2)
    distances[concept[:, None] == concept[None]] = np.inf
    hits = hand[distances.argmin(axis=1)] == hand
    names = sorted(set(hands))
    one = float(np.mean([hits[hand == name].mean() for name in names]))
    random, found = np.random.default_rng(0), []
    for _ in range(TRIALS):
        half = set(random.permutation(sorted(set(concepts)))[::2])
        is_first = np.array([name in half for name in concepts])
        means = [
            np.stack([rows[_choose(random, (hand == name) & side)].mean(0) for name in names])
            for side in (is_first, ~is_first)
        ]
        nearest = np.square(means[0][:, None] - means[1][None]).sum(axis=2).argmin(axis=1)
        found.append(float((nearest == np.arange(len(names))).mean()))
    return one, float(np.mean(found))


def _choose(random: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    return random.choice(np.flatnonzero(mask), SET_SIZE, replace=False)


def content_retrieval(rows: Rows, hands: Sequence[str], concepts: Sequence[str]) -> tuple[float, float]:
    """Over pairs of hands: how often the nearest drawing by the other hand is of the same concept, and the
    share of the other's drawings that are farther than that of the same concept."""
    hand, concept = np.array(hands), np.array(concepts)
    unit = unit_rows(rows - rows.mean(axis=0))
    likeness, hits, beaten = unit @ unit.T, [], []
    for one in sorted(set(hands)):
        for other in sorted(set(hands) - {one}):
            theirs = np.flatnonzero(hand == other)
            own = [number for number in np.flatnonzero(hand == one) if concept[number] in concept[theirs]]
            block = likeness[np.ix_(own, theirs)]
            match = concept[own][:, None] == concept[theirs][None]
            hits.append(match[np.arange(len(own)), block.argmax(axis=1)].mean())
            right = np.where(match, block, -np.inf).max(axis=1)
            beaten.append((block < right[:, None]).sum(axis=1).mean() / (len(theirs) - 1))
    return float(np.mean(hits)), float(np.mean(beaten))


def measure(features: Features, drawings: dict[tuple[str, str], Image.Image]) -> dict[str, float]:
    """All figures of one extractor."""
    hands, concepts = [hand for hand, _ in drawings], [concept for _, concept in drawings]
    images = list(drawings.values())
    style = style_retrieval(features.style(images), hands, concepts)
    content = content_retrieval(features.content(images), hands, concepts)
    names = ("style, one image", f"style, {SET_SIZE} images", "content, first", "content, share beaten")
    return dict(zip(names, (round(value, 2) for value in (*style, *content)), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_features", __doc__, "--icons")
    script.add_argument(
        "features", nargs="*", default=["drawing"], help="drawing, or folders of vision models"
    )

    def work(given: Namespace) -> None:
        drawings = draw_hands(given.icons or fetch_icons(tuple(ICON_SETS), Path(".icons")))
        for source in given.features:
            print(json.dumps({source: measure(load_features(source), drawings)}), flush=True)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
