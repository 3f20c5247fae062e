"""R-13, R-16: scores of images where the truth is known, and what is recommended from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from sdlora.evaluation.choice import Cell, Choice, RunFacts, SpotChecks
from sdlora.evaluation.features import DrawingFeatures, thumbnails
from sdlora.evaluation.scores import (
    Accuracy,
    BootstrapWeights,
    CopyCheck,
    Reference,
    Score,
    _distances,
    content_kept,
    diversity,
    style_gain,
)

FEATURES = DrawingFeatures()
PROMPTS, SEEDS = 6, 2


def draw(shape: int, *, filled: bool = True, shift: int = 0, size: int = 64) -> Image.Image:
    """One of seven polygons: in color, or as a black outline."""
    image = Image.new("RGB", (size, size), "white")
    turn, corners = 13 * shape, 3 + shape % 7
    outline = None if filled else "black"
    fill = (220, 60 + 20 * shape, 40) if filled else "white"
    pen, middle = ImageDraw.Draw(image), size // 2 + shift
    pen.regular_polygon((middle, middle, size // 3), corners, turn, fill, outline, 1 if filled else 4)
    return image


def rows(**how: bool) -> list[Image.Image]:
    return [draw(shape, shift=seed, **how) for shape in range(PROMPTS) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def weights():
    return BootstrapWeights.draw(PROMPTS, SEEDS, 400)


def gain(weights: BootstrapWeights, images: list[Image.Image], *, leave_one_out: bool = False) -> Score:
    """The style gain of images from filled drawings (the base) to outlines (the set)."""
    heldout = [draw(shape, filled=False) for shape in range(7)]
    reference = Reference(FEATURES, heldout, leave_one_out=leave_one_out)
    return style_gain(weights, reference, reference.offsets(rows()), reference.offsets(images))


def test_weights_are_drawn_by_prompt_and_seed(weights):
    """Each draw sums to 1; the first is even; a prompt that is drawn twice brings seeds for each time."""
    assert weights.rows.sum(axis=1) == pytest.approx(1)
    assert weights.rows[0] == pytest.approx(1 / (PROMPTS * SEEDS))
    by_prompt = weights.rows.reshape(-1, PROMPTS, SEEDS).sum(axis=2) * PROMPTS
    assert np.allclose(by_prompt, by_prompt.round())
    assert weights.mean(np.ones(PROMPTS * SEEDS)).interval.low == pytest.approx(1)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_style_lies_between_the_base_and_real_images(weights, leave_one_out):
    """0 for the base's own images, about 1 for other images of the set, between for a mixture."""
    outlined = [draw(shape, filled=False, shift=seed) for shape in range(PROMPTS) for seed in range(SEEDS)]
    mixed = [Image.blend(a, b, 0.5) for a, b in zip(rows(), outlined, strict=True)]
    none, some, whole = (
        gain(weights, images, leave_one_out=leave_one_out) for images in (rows(), mixed, outlined)
    )
    assert none.value == 0
    assert whole.value > 0.85
    assert none.value < some.value < whole.value
    assert some.interval.low <= some.value <= some.interval.high


def test_content_is_that_of_the_base_in_any_hand():
    """Everything in the base's own images, most in outlines of the same shapes, nothing in other shapes."""
    base = FEATURES.content(rows())
    same = content_kept(FEATURES, base, FEATURES.content(rows(filled=False)), PROMPTS)
    other = content_kept(FEATURES, base, FEATURES.content([*rows()[SEEDS:], *rows()[:SEEDS]]), PROMPTS)
    assert content_kept(FEATURES, base, base, PROMPTS).tolist() == [1.0] * len(base)
    assert same.mean() > 0.5 > 0.2 > other.mean()


def test_a_lora_that_draws_one_thing_is_not_diverse(weights):
    base = FEATURES.content(rows())
    assert diversity(weights, base, base).value == pytest.approx(1)
    assert diversity(weights, base, FEATURES.content([draw(1)] * len(base))).value == pytest.approx(
        0, abs=1e-6
    )


def test_copies_are_found_mirrored_and_cut():
    """R-13: near to one training image and far from the others; a duplicate in the folder changes nothing."""
    images = [draw(shape) for shape in range(7)]
    check = CopyCheck([*images, images[0].copy()])
    cut = images[3].crop((6, 6, 58, 58)).resize((64, 64))
    assert check.copied([images[2], ImageOps.mirror(images[4]), cut]).tolist() == [1, 1, 1]
    assert check.copied([draw(2, filled=False), Image.new("RGB", (64, 64), "blue")]).tolist() == [0, 0]
    assert check.copied(images[:2], [images[0], draw(2, filled=False)]).tolist() == [0, 1]
    assert CopyCheck(images[:1]).copied(images).tolist() == [0] * 7


def test_what_is_near_to_several_images_is_no_copy():
    """R-13: a simple shape between two drawings is nearer to them than any two are, and copies neither."""
    images = [draw(shape) for shape in range(7)]
    between = [Image.blend(one, other, 0.5) for one, other in combinations(images, 2)]
    check = CopyCheck(images)
    distances = _distances(thumbnails(between), check.known).min(axis=1)
    assert min(distances) < check.closest  # as a distance alone would call a copy
    assert not check.copied(between).any()


def test_features_are_tried_on_what_is_known():
    """R-13: two kinds and two prompts that features tell apart, and noise that they do not."""
    random = np.random.default_rng(0)
    kinds = [random.standard_normal((12, 4)) + place for place in (4, -4)]
    things = np.repeat(random.standard_normal((6, 8)), 2, axis=0)
    shown = things + 0.01 * random.standard_normal((12, 8))
    good = Accuracy.measure(*kinds, shown, 6)
    assert (good.style, good.content, good.problem) == (1.0, 1.0, "")
    # With one seed, nothing is known of content.
    assert Accuracy.measure(*kinds, shown, 12).content is None
    noise = random.standard_normal((2, 200, 4))
    poor = Accuracy.measure(*noise, random.standard_normal((200, 8)), 100)
    assert poor.style == pytest.approx(0.5, abs=0.1)
    assert poor.content == pytest.approx(1 / 199, abs=0.05)
    assert "chance" in poor.problem
    assert Accuracy(0.9, 0.1).problem


def score(value: float, spread: float = 0.01, seed: int = 0) -> Score:
    return Score(value, value + spread * np.random.default_rng(seed).standard_normal(400))


def cell(step: int | str, strength: float, style: float, content: float, **changes: object) -> Cell:
    one = Cell(step, strength, score(style), score(content, seed=1), score(1.0), 0.0)
    return replace(one, **changes)


FACTS = RunFacts("drawing", True, Accuracy(0.95, 0.8), 60, 20, ["a cat", "a dog"], 8, (1e-3, 1e-3))
CELLS = [
    cell(100, 0.6, 0.2, 1.0),
    cell(100, 1.0, 0.4, 0.9),
    cell("final", 0.6, 0.3, 0.8),
    cell("final", 1.0, 0.6, 0.2),
]


def test_the_best_is_neither_the_base_nor_a_smear():
    """R-13: the best by style and content, and whether the others can be told from it."""
    choice = Choice(CELLS, FACTS)
    assert (choice.best.step, choice.best.strength) == (100, 1.0)
    assert choice.ties == []
    assert choice.warnings == []
    # A little more content is worth a little style: there is no edge at which a cell is out.
    near = Choice([cell(100, 1.0, 0.3, 0.9), cell(200, 1.0, 0.45, 0.84)], FACTS)
    assert near.best.step == 200
    close = Choice([*CELLS, replace(CELLS[1], step=200, strength=0.8, style=score(0.395, seed=2))], FACTS)
    assert [tie.step for tie in close.ties] == [200]
    assert "step 200" in close.reason
    assert close.to_json()["ties"] == [{"step": 200, "strength": 0.8}]


@pytest.mark.parametrize(
    ("facts", "shows"),
    [
        ({"is_validated": False}, "--features"),
        ({"prompts": 2}, "--prompt"),
        ({"accuracy": Accuracy(0.6, 0.8)}, "--features"),
        ({"accuracy": Accuracy(0.95, 0.1)}, "--features"),
    ],
)
def test_no_recommendation_without_what_it_needs(facts, shows):
    """R-13: it says what is missing instead."""
    choice = Choice(CELLS, replace(FACTS, **facts))
    assert choice.best is None
    assert choice.reason.startswith("none")
    assert shows in choice.reason
    assert choice.to_json()["step"] is None


@pytest.mark.parametrize("cells", [[cell(100, 1.0, 0.001, 1.0)], [cell(100, 1.0, 0.9, 0.4)]])
def test_no_style_or_torn_content_is_no_recommendation(cells):
    choice = Choice(cells, FACTS)
    assert choice.best is None
    assert choice.reason.startswith("none")


@pytest.mark.parametrize(("last", "shows"), [(-0.1, "train longer"), (-0.3, "later steps are farther")])
def test_more_steps_are_no_remedy_where_they_lead_away(last, shows):
    """R-13: what to change follows from how the scores change with the steps."""
    choice = Choice([cell(100, 1.0, -0.2, 0.9), cell(200, 1.0, last, 0.9)], FACTS)
    assert choice.best is None
    assert shows in choice.reason


@pytest.mark.parametrize(
    ("cells", "facts", "checks", "shows"),
    [
        (CELLS, {"captions": ["ink style"]}, None, "ink style"),
        (CELLS, {"training": 2}, None, "2 training images"),
        (CELLS, {"heldout": 2}, None, "data.heldout"),
        ([cell(100, 0.6, 0.5, 0.2)], {"learning_rate": (1e-2, 1e-3)}, None, "train.learning_rate"),
        ([cell(100, 0.6, 0.3, 0.9), cell(200, 0.6, 0.5, 0.2)], {}, None, "train.steps"),
        ([cell(100, 0.6, 0.5, 0.9, copies=0.5)], {}, None, "copies"),
        ([cell(100, 0.6, 0.5, 0.9)], {"training": 401}, None, "400 of the 401"),
        (CELLS, {}, SpotChecks((5, 8), "final at 1"), "5 of 8"),
    ],
)
def test_a_smear_is_called_one(cells, facts, checks, shows):
    """R-13: each cause has its warning, and only it."""
    (warning,) = Choice(cells, replace(FACTS, **facts), checks).warnings
    assert shows in warning
