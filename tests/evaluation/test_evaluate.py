"""Evaluation of a run: distances between images, bleed, and the full base beside the quantised one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from sdlora.config import BaseSection
from sdlora.data.captions import has_trigger, without_trigger
from sdlora.data.tensors import image_to_tensor
from sdlora.evaluation.evaluate import (
    Evaluation,
    Gap,
    ImageDistance,
    compare_untriggered,
    image_distances,
    mean_distance,
    remove_triggers,
)
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.models.info import inspect_base
from sdlora.models.load import full_base, load_base


@pytest.fixture(scope="module")
def base():
    return load_base(inspect_base(BaseSection()), dtype=torch.float32, device="cpu")


def draw(shift: int = 0, color: str = "red") -> torch.Tensor:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12 + shift, 12, 50 + shift, 50), fill=color, outline="black", width=3)
    return image_to_tensor(image)


def distance(base, sample: torch.Tensor, drawing: torch.Tensor) -> ImageDistance:
    return image_distances(base, [sample], [drawing])[0]


def test_order_of_distances(base):
    """Zero for the same image; a moved outline is closer than another color; symmetric."""
    same, moved, other = (distance(base, draw(), draw(*how)) for how in ((), (1,), (0, "blue")))
    assert (same.style, same.content) == (0, 0)
    assert 0 < moved.content < other.content
    assert moved.style < other.style
    assert distance(base, draw(0, "blue"), draw()) == other
    mean = mean_distance(image_distances(base, [draw(), draw()], [draw(1), draw(0, "blue")]))
    assert mean.style == pytest.approx((moved.style + other.style) / 2)
    assert mean.content == pytest.approx((moved.content + other.content) / 2)


def test_style_does_not_ask_where_things_lie(base):
    """A drawing far aside is of the same style, and far away in content."""
    aside = distance(base, draw(), draw(8))
    assert aside.style < 0.2 * aside.content
    assert aside.style < 0.1 * distance(base, draw(), draw(0, "blue")).style


def test_style_distance_by_hand(base):
    """The root mean square over the differences of each channel's mean and standard deviation."""
    one, two = (base.encode_images(image[None])[0][0].numpy() for image in (draw(), draw(3, "green")))
    gaps = [
        f(a) - f(b)
        for f in (lambda x: x.mean(), lambda x: x.std(ddof=1))
        for a, b in zip(one, two, strict=True)
    ]
    by_hand = (sum(gap**2 for gap in gaps) / len(gaps)) ** 0.5
    assert distance(base, draw(), draw(3, "green")).style == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("caption", "trigger", "bare"),
    [
        ("woodcut, a cat", "woodcut", "a cat"),
        ("a cat, Woodcut, night", "woodcut", "a cat, night"),
        ("a woodcut", "woodcut", "a"),
        ("woodcutter", "woodcut", "woodcutter"),
        ("woodcut", "woodcut", ""),
        ("<ink>, a cat", "<ink>", "a cat"),
        ("a cat in ink style!", "ink style!", "a cat in"),
        ("ink  wash, a cat", "ink wash", "a cat"),
        ("水墨風の猫", "水墨風", "の猫"),
    ],
)
def test_captions_without_the_trigger(caption, trigger, bare):
    """R-30: what bleed is measured with; a trigger need not begin and end with a letter."""
    assert has_trigger(caption, trigger) == (caption != bare)
    assert without_trigger(caption, trigger) == bare


def loss_of(*losses: float) -> HeldoutLoss:
    return HeldoutLoss(sum(losses) / len(losses), {}, len(losses), losses)


def far(*styles: float) -> list[ImageDistance]:
    return [ImageDistance(style, 1.0) for style in styles]


def evaluation(count: int, loss: float, spread: float = 0.0) -> Evaluation:
    """`count` images; the losses of the base are 1, those with the LoRA `loss` and `spread` to both sides."""
    losses = [loss + spread * (-1) ** number for number in range(count)]
    return Evaluation(
        count, loss_of(*[1.0] * count), loss_of(*losses), far(*[0.8] * count), far(*[0.1] * count)
    )


def test_a_verdict_needs_eight_images_and_a_clear_interval():
    """R-13: a loss that halves on seven images, or a style distance that falls by 88 %, is no verdict."""
    seven, eight = evaluation(7, 0.5), evaluation(8, 0.5, spread=0.01)
    assert seven.loss_change is None
    assert seven.verdict.startswith("none")
    assert "8" in seven.verdict
    assert "%" not in "".join(seven.lines())
    assert eight.loss_change.high < 0
    assert "lowers" in eight.verdict
    assert "raises" in evaluation(8, 1.5, spread=0.01).verdict
    unclear = evaluation(8, 0.98, spread=0.5)
    assert not unclear.loss_change.is_clear
    assert unclear.verdict.startswith("none")
    # Distances in VAE latents are printed, and take no part in it.
    assert replace(unclear, style_distances=far(*[0.8] * 8)).verdict == unclear.verdict


def test_bleed():
    """R-30: what is there without the trigger is measured against the base's sample of the same caption."""
    base, style = far(*[0.8] * 8), far(*[0.4] * 8)
    found = compare_untriggered(base, style, far(*[0.7] * 8), far(*[0.4] * 8))
    assert found.share.value == pytest.approx(0.75)
    measured = replace(evaluation(8, 0.5), untriggered=found)
    assert measured.bleed == pytest.approx(0.75)
    assert any("75%" in line for line in measured.lines())
    assert found.images == 8
    # A LoRA that does nothing without its trigger, on a base that the trigger leads astray.
    assert compare_untriggered(base, style, far(*[0.5] * 8), far(*[0.5] * 8)).share.value == 0
    assert compare_untriggered(base[:7], style[:7], base[:7], style[:7]).share is None
    assert compare_untriggered(style, base, style, base).share is None
    assert evaluation(8, 0.5).bleed is None


def test_captions_that_are_the_trigger_alone_say_nothing_about_bleed():
    """R-30: the empty prompt, or words that nobody wrote, are not the prompt without the trigger."""
    captions = {0: "woodcut", 1: "woodcut, a cat", 2: "Woodcut,"}
    assert remove_triggers(captions, "woodcut") == {1: "a cat"}
    assert remove_triggers({0: "woodcut"}, "woodcut") == {}


def test_the_full_base_comes_and_goes(sd15_folder):
    """R-18, R-48: another UNet, the same encoders; afterwards all is as before, after an error too."""
    info = inspect_base(BaseSection(source=str(sd15_folder), quantize="int8"))
    small = load_base(info, dtype=torch.float32, device="cpu")
    unet = small.denoiser

    def fail():
        with full_base(small) as full:
            assert full.denoiser is not unet
            assert full.vae is small.vae
            assert full.info.quantize == "none"
            assert full.dtypes["unet"] == "float32"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert small.denoiser is unet
    assert small.info.quantize == "int8"


def test_a_gap_in_words():
    """R-48: both losses, and by how much the second is larger."""
    assert all(part in str(Gap("nf4", 0.25, 0.26, 8)) for part in ("nf4", "0.2500", "0.2600", "+4.00%", "8"))
