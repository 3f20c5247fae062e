"""Captions decide the picture, and the tokenizer knows their words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sdlora.builtin.captions import (
    EMPTY_WORDS,
    SET_WORDS,
    TEXT_LENGTH,
    add_unknown_words,
    draw_caption,
    draw_unknown_word,
    learn_merges,
    make_tokenizer,
    read_concepts,
)
from sdlora.builtin.icons import BASE_SETS
from sdlora.builtin.measure import UNSEEN_WORDS
from sdlora.builtin.variants import Variant, draw_variant
from sdlora.errors import DataError


def test_concepts_are_distinct() -> None:
    """The shipped list names each concept once, and enough of them for the datasets."""
    concepts = read_concepts()
    assert len(concepts) == len(set(concepts)) >= 190


def test_a_missing_concept_file_is_named(tmp_path: Path) -> None:
    """A concept file that is missing or empty is one line."""
    with pytest.raises(DataError, match="is not there"):
        read_concepts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="names no concept"):
        read_concepts(tmp_path / "empty.txt")


def captions_of(variant: Variant, count: int = 400) -> list[str]:
    """Captions of one image, without the empty ones."""
    rng = random.Random(0)
    return [caption for caption in (draw_caption(rng, variant) for _ in range(count)) if caption]


def test_a_caption_names_what_is_shown() -> None:
    """Every property that the eye sees is in every caption."""
    variant = Variant("fluent-flat", "owl", "teal", "line drawing", small=True, mirrored=True)
    for caption in captions_of(variant):
        assert all(
            word in caption for word in ("owl", "teal background", "line drawing", "small", "mirrored")
        )
    shaded = Variant("noto", "pear", color="shades of blue", tilt="left")
    assert all("in shades of blue" in caption for caption in captions_of(shaded))
    assert all("tilted to the left" in caption for caption in captions_of(shaded))
    assert all("green pear" in caption for caption in captions_of(Variant("noto", "pear", color="green")))


def test_every_set_but_the_first_is_named() -> None:
    """A caption says which set it is: without one, it means the first set."""
    for name in BASE_SETS[1:]:
        captions = captions_of(Variant(name, "owl"))
        assert all(any(words in caption for words in SET_WORDS[name]) for caption in captions)
    plain = captions_of(Variant("noto", "owl"))
    assert 0.1 < sum("drawing" in caption.replace("a drawing of", "") for caption in plain) / len(plain) < 0.3
    every = [words for both in SET_WORDS.values() for words in both]
    assert len(every) == len(set(every))


def test_a_third_have_unknown_words() -> None:
    """Before or behind, over an unchanged caption."""
    rng = random.Random(0)
    written = [add_unknown_words(rng, "an owl") for _ in range(200)]
    assert all("an owl" in caption for caption in written)
    assert 60 < sum(caption.startswith("an owl") for caption in written) < 140
    known = {"a", "an", "owl", "image", "picture", "drawing", "of", "shaded", "noto", ","}
    captions = captions_of(Variant("noto", "owl"))
    strange = [set(caption.replace(",", " ,").split()) - known != set() for caption in captions]
    assert 0.25 < sum(strange) / len(strange) < 0.42


def test_few_captions_are_empty() -> None:
    """The empty caption is taught, for guidance."""
    rng = random.Random(0)
    captions = [draw_caption(rng, Variant("noto", "pear")) for _ in range(2000)]
    assert 0.05 < captions.count("") / len(captions) < 0.09


def test_unseen_words_are_unseen() -> None:
    """What a base is measured with is not what it was trained with."""
    unseen = {word for words in UNSEEN_WORDS for word in words.split()} - {"my"}
    assert not unseen & set(EMPTY_WORDS)
    rng = random.Random(0)
    assert not unseen & {draw_unknown_word(rng) for _ in range(3000)}


def test_articles_are_written() -> None:
    """`an owl` more often than `a owl`, never `an unicorn`."""
    assert any("an owl" in caption for caption in captions_of(Variant("noto", "owl")))
    assert not any("an unicorn" in caption for caption in captions_of(Variant("noto", "unicorn")))


def test_captions_fit(tmp_path: Path) -> None:
    """At most 6 in 100 are cut off: of variants with several named properties."""
    concepts, rng = read_concepts(), random.Random(0)
    tokenizer = make_tokenizer(tmp_path, concepts)
    variants = [draw_variant(rng, rng.choice(BASE_SETS), rng.choice(concepts)) for _ in range(400)]
    lengths = [len(tokenizer(draw_caption(rng, variant))["input_ids"]) for variant in variants]
    assert sum(length > TEXT_LENGTH for length in lengths) < 24


def test_the_tokenizer_knows_the_words(tmp_path: Path) -> None:
    """A taught word is one token, an unknown one is spelt, and the length is the base's."""
    tokenizer = make_tokenizer(tmp_path, ["owl", "fire-engine"])
    ids = tokenizer("a fire engine on a teal background")["input_ids"]
    assert len(ids) == 7 + 2
    assert (
        tokenizer.decode(tokenizer("a xyloquartz")["input_ids"], skip_special_tokens=True) == "a xyloquartz"
    )
    padded = tokenizer([""], padding="max_length", max_length=TEXT_LENGTH)["input_ids"][0]
    assert len(padded) == TEXT_LENGTH == tokenizer.model_max_length


def test_merges_are_learnt_by_frequency_then_alphabet() -> None:
    """The most frequent pair comes first and ties are broken by name, whatever the order of the texts."""
    merges = learn_merges(["low low", "lots"], count=4)
    assert merges == [("l", "o"), ("lo", "w</w>"), ("lo", "t"), ("lot", "s</w>")]
    assert learn_merges(["lots", "low low"], count=4) == merges


def test_a_run_keeps_its_tokens(tmp_path: Path) -> None:
    """A folder that holds a vocabulary keeps it: the text encoder knows words by their numbers."""
    first = make_tokenizer(tmp_path, ["owl"]).get_vocab()
    assert make_tokenizer(tmp_path, ["pear"]).get_vocab() == first
