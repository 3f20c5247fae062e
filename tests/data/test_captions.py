"""The caption pipeline: the trigger is placed (R-30), variants are fixed, each sample draws one (R-04)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from sdlora.config import DataSection, load_config
from sdlora.data.captions import (
    NUM_VARIANTS,
    OPERATIONS,
    CaptionPipeline,
    VaryTags,
    caption_pipeline,
    has_trigger,
)
from sdlora.data.scan import scan_dataset
from sdlora.errors import ConfigError
from tests.checks import raises


@dataclass(frozen=True)
class ShuffleTags:
    """An operation as others may add one: the tags in another order."""

    is_random: ClassVar[bool] = True

    def __call__(self, caption: str, rng: random.Random) -> str:
        tags = caption.split(", ")
        return ", ".join(rng.sample(tags, len(tags)))


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in the table, before the trigger is put first."""
    monkeypatch.setattr(
        "sdlora.data.captions.OPERATIONS", {"shuffle": lambda data: ShuffleTags(), **OPERATIONS}
    )


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "sks", "sks, a cat"),
        ("a cat in SKS style", "sks", "a cat in SKS style"),
        ("sksing", "sks", "sks, sksing"),
        ("a mask of masks", "sks", "sks, a mask of masks"),
        ("he asks", "sks", "sks, he asks"),
        ("a {trigger} cat", "sks", "a sks cat"),
        ("", "sks", "sks"),
        ("a cat, blue  ink", "blue ink", "a cat, blue  ink"),
        ("blue inkwell", "blue ink", "blue ink, blue inkwell"),
        ("一只猫的画", "猫", "一只猫的画"),
        ("c++ drawing", "c++", "c++ drawing"),
        ("a cat", None, "a cat"),
    ],
)
def test_trigger_placement(caption: str, trigger: str | None, expected: str) -> None:
    """R-30: put first where it is lacking as a word, in any case; the placeholder is replaced."""
    pipeline = caption_pipeline(DataSection(trigger=trigger))
    assert pipeline.plain(caption) == expected
    assert pipeline.plain(expected) == expected
    assert pipeline.variants(caption, seed=0, digest="aa") == (expected,)
    if trigger:
        assert has_trigger(expected, trigger)


def test_placeholders_of_other_tools(tmp_path: Path, write_image: Callable, found: Callable) -> None:
    """R-30: that of ai-toolkit is the trigger's, others are named; runs of earlier versions keep them."""
    write_image("a.png", caption="[trigger] a drawing")
    write_image("b.png", caption="a drawing, [filewords]")
    index = scan_dataset(tmp_path, DataSection(trigger="ink", heldout=0))
    assert [record.caption for record in index.records] == ["ink a drawing", "ink, a drawing, [filewords]"]
    assert found(index)["notice data.placeholder-foreign"].names == ("b.png",)
    errors = found(scan_dataset(tmp_path, DataSection(heldout=0)))
    assert errors["error data.placeholder"].names == ("a.png",)
    assert caption_pipeline(DataSection(trigger="ink", rules=1)).plain("[trigger] x") == "ink, [trigger] x"
    with raises(ConfigError, "sample.prompts", shows=("[trigger] a cat", "data.trigger")):
        load_config(None, {"sample.prompts": "[trigger] a cat"})


@pytest.mark.parametrize("position", ["start", "end"])
def test_trigger_position(position: str) -> None:
    """R-30: added at the start or at the end; other trainers' words for the two are understood."""
    words = {"start": "sks, a cat", "end": "a cat, sks"}
    other = {"start": "prefix", "end": "suffix"}
    for name in (position, other[position]):
        pipeline = caption_pipeline(
            load_config(None, {"data.trigger": "sks", "data.trigger_position": name}).data
        )
        assert pipeline.plain("a cat") == words[position]
        assert pipeline.plain("") == "sks"
        assert pipeline.plain("a sks cat") == "a sks cat"


def test_variants_are_fixed_and_keyed_by_seed_and_image() -> None:
    """R-04: the same variants in every run of a seed; another image or seed has others; copies count once."""
    pipeline = CaptionPipeline([ShuffleTags()])
    text = "a, b, c, d, e, f, g"
    variants = pipeline.variants(text, seed=3, digest="aa")
    assert len(set(variants)) == len(variants) == NUM_VARIANTS
    assert all(sorted(variant.split(", ")) == text.split(", ") for variant in variants)
    assert pipeline.variants(text, seed=3, digest="aa") == variants
    assert pipeline.variants(text, seed=4, digest="aa") != variants
    assert pipeline.variants(text, seed=3, digest="bb") != variants
    assert pipeline.variants("alone", seed=3, digest="aa") == ("alone",)
    assert pipeline.plain(text) == text


TAGS = "ink, a cat, red, blue, two houses, sky"


def vary(text: str, number: int = 200, **settings: object) -> set[str]:
    pipeline = caption_pipeline(DataSection(caption_variants=number, **settings))
    return {*pipeline.variants(text, seed=0, digest="aa")}


def test_words_around_captions() -> None:
    """R-30: before and behind each caption, as kohya joins them; the trigger is not added twice."""
    pipeline = caption_pipeline(DataSection(caption_prefix="drawing of ", caption_suffix=", {trigger}"))
    assert pipeline.plain("a cat") == "drawing of a cat , {trigger}"
    settings = DataSection(caption_prefix="{trigger} drawing of", caption_suffix="on paper", trigger="ink")
    assert caption_pipeline(settings).plain("a cat") == "ink drawing of a cat on paper"
    assert caption_pipeline(DataSection(caption_suffix="on paper")).plain("") == "on paper"


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    """R-04: the same tags in many orders, the first ones in their place, the trigger in front."""
    shuffled = vary(TAGS, shuffle_tags=True, keep_tags=2)
    assert len(shuffled) == 24
    assert all(sorted(text.split(", ")) == sorted(TAGS.split(", ")) for text in shuffled)
    assert all(text.startswith("ink, a cat, ") for text in shuffled)
    assert vary("a, b", shuffle_tags=True, keep_tags=5) == {"a, b"}
    assert vary("a ,b,, ", shuffle_tags=True) == {"a, b", "b, a"}
    assert all(text.startswith("sks, ") for text in vary("a, b, c", shuffle_tags=True, trigger="sks"))


def test_tags_are_left_out() -> None:
    """R-04: each with the same probability; kept ones never, the last one never, and not in plain text."""
    drawn = [VaryTags(False, 0.25, 1)(TAGS, random.Random(number)).split(", ") for number in range(2000)]
    counts = Counter(tag for tags in drawn for tag in tags)
    assert counts.pop("ink") == 2000
    assert all(1400 < count < 1600 for count in counts.values())
    assert all(tags == [tag for tag in TAGS.split(", ") if tag in tags] for tags in drawn)
    assert vary("a cat on a roof", tag_dropout=0.9) == {"a cat on a roof"}
    assert "" not in vary("a, b", tag_dropout=0.9)
    assert all("sks" in text for text in vary("sks, a, b", tag_dropout=0.5, trigger="sks"))
    assert caption_pipeline(DataSection(shuffle_tags=True, tag_dropout=0.5)).plain(TAGS) == TAGS


def test_settings_without_effect_are_refused() -> None:
    """R-35: kept tags and variants, where tags stay as they are."""
    for key in ("keep_tags", "caption_variants"):
        with raises(ConfigError, f"data.{key}", shows="data.shuffle_tags"):
            load_config(None, {f"data.{key}": 3})
        assert load_config(None, {f"data.{key}": 3, "data.tag_dropout": 0.1})
    assert len(caption_pipeline(DataSection(shuffle_tags=True)).variants(TAGS, seed=0, digest="a")) == 8


def test_samples_draw_variants_beside_dropout(make_records: Callable) -> None:
    """R-04, R-35: all variants are drawn alike, and dropout takes the same samples as without variants."""
    (one,) = make_records((64, 64))
    many = replace(one, variants=("a", "b", "c"))
    pipeline = CaptionPipeline([], dropout=0.25)
    drawn = [pipeline.draw(many, seed=1, index=index) for index in range(4000)]
    plain = [pipeline.draw(one, seed=1, index=index) for index in range(4000)]
    assert [text == "" for text in drawn] == [text == "" for text in plain]
    counts = Counter(drawn)
    assert set(counts) == {"", "a", "b", "c"}
    assert all(900 < count < 1100 for count in counts.values())


@pytest.mark.usefixtures("shuffled")
def test_heldout_captions_are_plain(tmp_path: Path, write_image: Callable) -> None:
    """R-12: images to train on have variants, each with the trigger; held-out ones one caption."""
    write_image("a.png", caption="x, y, z, w")
    write_image("heldout/b.png", caption="x, y, z, w")
    index = scan_dataset(tmp_path, DataSection(trigger="sks"), seed=5)
    assert index.records[0].caption == index.heldout[0].caption == "sks, x, y, z, w"
    assert len(index.records[0].captions) == index.num_captions > 1
    assert all(caption.startswith("sks, ") for caption in index.records[0].captions)
    assert index.heldout[0].captions == ("sks, x, y, z, w",)
    assert scan_dataset(tmp_path, DataSection(trigger="sks"), seed=5) == index
    assert scan_dataset(tmp_path, DataSection(trigger="sks"), seed=6).digest == index.digest


def test_wildcards(tmp_path: Path, write_image: Callable) -> None:
    """R-28: fixed variants of a caption, each of which is counted; the first part for everything else."""
    write_image("a.png", caption="a {red|blue|{dark|light} green} cat, {trigger}")
    write_image("b.png", caption="a dog")
    index = scan_dataset(tmp_path, DataSection(trigger="ink", heldout=0, wildcards=True, caption_variants=40))
    cat, dog = index.records
    assert cat.caption == "a red cat, ink"
    colors = ("red", "blue", "dark green", "light green")
    assert sorted(cat.variants) == sorted(f"a {color} cat, ink" for color in colors)
    assert dog.variants == ()
    assert index.num_captions == 5
    [plain] = scan_dataset(tmp_path, DataSection(trigger="ink", heldout=0)).records[:1]
    assert plain.caption == "a {red|blue|{dark|light} green} cat, ink"


def test_a_separator_of_kept_tags() -> None:
    """As kohya's keep_tokens_separator: what is before the first and behind the second stays in place."""
    settings = DataSection(shuffle_tags=True, keep_separator="|||", caption_variants=60)
    pipeline = caption_pipeline(settings)
    found = pipeline.variants("x, y ||| a, b, c ||| z", seed=0, digest="d")
    assert {caption[:5] for caption in found} == {"x, y,"}
    assert {caption[-3:] for caption in found} == {", z"}
    assert len({*found}) == 6
    assert pipeline.plain("x, y ||| a, b, c ||| z") == "x, y, a, b, c, z"
    assert {*pipeline.variants("a, b", seed=0, digest="d")} == {"a, b", "b, a"}


def test_several_captions(tmp_path: Path, write_image: Callable) -> None:
    """Lines of a file, or a list in metadata; each has its variants. Not asked for, lines are one caption."""
    write_image("a.png", caption="a cat\n\n a black cat \na cat\n")
    write_image("deep/b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/b.png", "text": ["one", "two"]}\n')
    settings = {"heldout": 0, "trigger": "ink"}
    index = scan_dataset(tmp_path, DataSection(**settings, several_captions=True, caption_suffix="x"))
    assert [record.captions for record in index.records] == [
        ("ink, a cat x", "ink, a black cat x"),
        ("ink, one x", "ink, two x"),
    ]
    assert [record.caption for record in index.records] == ["ink, a cat x", "ink, one x"]
    joined = scan_dataset(tmp_path, DataSection(**settings, allow_missing_captions=True)).records
    assert [record.captions for record in joined] == [("ink, a cat a black cat a cat",), ("ink",)]


def test_further_placeholders() -> None:
    settings = DataSection(trigger="ink", placeholders=["[name]", "<trigger>"])
    assert caption_pipeline(settings).plain("[name] of a <trigger> cat") == "ink of a ink cat"
