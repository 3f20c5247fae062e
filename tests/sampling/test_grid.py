"""The grid as an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdlora.sampling.grid import Measures, make_grid
from sdlora.sampling.images import FLAGGED, SampledImage
from sdlora.sampling.targets import Targets

RED, GREEN, BLUE, BLANK = (200, 30, 30), (30, 160, 60), (40, 60, 200), (230, 230, 230)


def image(color: tuple[int, int, int], prompt: str, seed: int, strength: float, **more: Any) -> SampledImage:
    size = more.pop("size", (128, 96))
    return SampledImage(Image.new("RGB", size, color), prompt, seed, strength, **more)


def cells(grid: Image.Image, color: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """The bounding box of a color's pixels, if it fills it."""
    mask = (np.asarray(grid) == color).all(axis=2)
    if not mask.any():
        return []
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return [box] if mask[box[1] : box[3], box[0] : box[2]].all() else [(-1, -1, -1, -1)]


def test_images_stand_in_their_cells_unchanged() -> None:
    """R-13: base left of the strength, one row for each prompt, pixels not resampled."""
    grid = make_grid([image(GREEN, "a", 0, 1.0), image(RED, "a", 0, 0), image(BLUE, "b", 0, 0)])
    (red,), (green,), (blue,) = cells(grid, RED), cells(grid, GREEN), cells(grid, BLUE)
    for box in (red, green, blue):
        assert (box[2] - box[0], box[3] - box[1]) == (128, 96)
    assert red[1] == green[1]
    assert red[2] < green[0]
    assert (blue[0], blue[2]) == (red[0], red[2])
    assert blue[1] > red[3]


def test_large_images_are_reduced() -> None:
    """R-13: a grid of 1024 px images stays one that a viewer opens."""
    grid = make_grid([image(RED, "a", 0, s, size=(1024, 768)) for s in (0, 0.5, 1)])
    mask = (np.asarray(grid) == RED).all(axis=2)
    assert mask.any(axis=0).sum() == 3 * 512
    assert mask.any(axis=1).sum() == 384


def _ink(grid: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels in a region that are not paper."""
    region = np.asarray(grid.crop(box).convert("L"), dtype=np.int32)
    return int((region < 200).sum())


def test_words_are_written_beside_and_above() -> None:
    """R-13: prompt and seed at the left, column names and title above."""
    images = [image(RED, "a red square", 4, 0), image(GREEN, "a red square", 4, 1)]
    grid, bare = make_grid(images, title="a title"), make_grid(images)
    (red,), (green,) = cells(grid, RED), cells(grid, GREEN)
    assert _ink(grid, (0, red[1], red[0] - 2, red[1] + 20)) > 40
    assert _ink(grid, (0, red[3] - 20, red[0] - 2, red[3])) > 20
    assert _ink(grid, (red[0], red[1] - 22, red[2], red[1] - 2)) > 20
    assert _ink(grid, (green[0], green[1] - 22, green[2], green[1] - 2)) > 20
    assert grid.height > bare.height
    assert _ink(grid, (0, 0, grid.width, grid.height - bare.height)) > 40


@pytest.mark.parametrize("prompt", ["word " * 80, "x" * 400, "猫" * 200, "short"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_long_prompts_never_reach_the_images_or_the_next_row(prompt: str, seeds: int) -> None:
    """R-13: wrapped at words or anywhere, cut with an ellipsis, within its own rows."""
    images = [image(RED, prompt, seed, 0) for seed in range(seeds)] + [image(BLUE, "next", 0, 0)]
    grid = make_grid(images)
    measure = Measures(128, 96)
    (blue,) = cells(grid, BLUE)
    edge = measure.margin + measure.prompts
    assert _ink(grid, (edge + 1, measure.margin, blue[0] - 2, blue[3])) == 0
    assert _ink(grid, (0, blue[1] - measure.gap + 2, edge, blue[1] - 2)) == 0


def test_withheld_images_are_labelled() -> None:
    """R-47: the cell has a label; the cell of a missing sample is empty."""
    images = [image(RED, "a", 0, 0), image(BLANK, "a", 0, 1, blank=FLAGGED)]
    grid = make_grid(images)
    (red,) = cells(grid, RED)
    cell = (red[2] + 6, red[1] + 2, red[2] + 130, red[3] - 2)
    assert _ink(grid, cell) > 60
    missing = make_grid([*images[:1], image(GREEN, "b", 0, 1)])
    (red,) = cells(missing, RED)
    assert _ink(missing, (red[2] + 6, red[1] + 2, red[2] + 130, red[3] - 2)) == 0


def test_several_adapters_share_one_base_column() -> None:
    """R-13: images of two calls joined; the first base stands for both."""
    images = [
        image(RED, "a", 0, 0, adapter="one"),
        image(GREEN, "a", 0, 1, adapter="one"),
        image(BLANK, "a", 0, 0, adapter="two"),
        image(BLUE, "a", 0, 1, adapter="two"),
    ]
    grid = make_grid(images)
    boxes = [cells(grid, color)[0] for color in (RED, GREEN, BLUE)]
    assert boxes == sorted(boxes)
    assert len({box[1] for box in boxes}) == 1
    assert not (np.asarray(grid) == BLANK).all(axis=2)[boxes[0][1] :].any()


def test_same_images_give_the_same_grid() -> None:
    """R-10: to the pixel."""
    images = [image(RED, "a red square", seed, strength) for seed in (0, 1) for strength in (0, 1)]
    assert make_grid(images, title="t").tobytes() == make_grid(images, title="t").tobytes()


def test_many_prompts_stand_in_panels() -> None:
    """R-13: eight prompts and two columns fit a screen; each row still has the base left of its strength."""
    images = [
        image((number, 9, 9), f"prompt {number}", 0, strength) for number in range(8) for strength in (0, 1)
    ]
    grid = make_grid(images, title="a title")
    assert 1 < grid.width / grid.height < 2.2
    boxes = []
    for number in range(8):
        mask = (np.asarray(grid) == (number, 9, 9)).all(axis=2)
        assert mask.sum() == 2 * 128 * 96
        boxes.append((int(np.flatnonzero(mask.any(axis=0))[0]), int(np.flatnonzero(mask.any(axis=1))[0])))
    assert boxes == sorted(boxes)
    assert len({left for left, _ in boxes}) == 2
    assert boxes[0][1] == boxes[4][1]


def test_targets_stand_in_the_last_column() -> None:
    """R-13: the image that a prompt is the caption of, once beside its samples and in a cell's size."""
    samples = [image(RED, prompt, seed, 0) for prompt in "ab" for seed in (0, 1)]
    targets = Targets({"b": Image.new("RGB", (400, 300), BLUE)}, [])
    grid = make_grid(samples, targets=targets)
    (blue,) = cells(grid, BLUE)
    assert (blue[2] - blue[0], blue[3] - blue[1]) == (128, 96)
    assert _ink(grid, (blue[0], 0, blue[2], 60)) > 20  # its heading
    mask = (np.asarray(grid) == RED).all(axis=2)
    assert blue[0] > np.flatnonzero(mask.any(axis=0))[-1]
    assert blue[1] > grid.height / 2


def test_examples_stand_above_the_samples() -> None:
    """R-13: prompts that are no captions have a strip of the image folder above them, as wide as the grid."""
    samples = [image(RED, "a", 0, 0)]
    examples = [Image.new("RGB", (64, 64), BLUE)] * 40
    grid, bare = make_grid(samples, targets=Targets({}, examples)), make_grid(samples)
    assert grid.width == bare.width
    rows = np.flatnonzero((np.asarray(grid) == BLUE).all(axis=2).any(axis=1))
    (red,) = cells(grid, RED)
    assert rows[-1] < red[1]
    assert grid.height > bare.height
