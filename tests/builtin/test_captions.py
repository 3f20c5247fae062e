"""Captions decide the picture, and the tokenizer knows their words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sdlora.builtin.captions import (
    HAND_SHARE,
    TEXT_LENGTH,
    Picture,
    all_pictures,
    draw_caption,
    draw_picture,
    learn_merges,
    make_tokenizer,
    read_concepts,
)
from sdlora.builtin.icons import GROUNDS
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


def test_every_drawn_picture_is_among_all_pictures() -> None:
    """What training draws has been encoded before."""
    rng, known = random.Random(0), set(all_pictures(["owl", "pear"]))
    assert len(known) == 2 * len(HAND_SHARE) * len(GROUNDS)
    assert {draw_picture(rng, "owl") for _ in range(200)} <= known


def test_a_caption_decides_the_picture() -> None:
    """No caption is shared by two pictures, but for the empty one."""
    rng, seen = random.Random(0), dict[str, Picture]()
    for picture in all_pictures(["owl", "pear"]):
        for _ in range(40):
            caption = draw_caption(rng, picture, drop=False)
            assert seen.setdefault(caption, picture) == picture
    assert "a owl" in seen
    assert "an owl" in seen


def test_one_caption_in_ten_is_dropped() -> None:
    """The empty caption is taught, for guidance."""
    rng = random.Random(0)
    captions = [draw_caption(rng, Picture("noto", "pear", "white")) for _ in range(2000)]
    assert 0.08 < captions.count("") / len(captions) < 0.12


def test_the_tokenizer_knows_the_words(tmp_path: Path) -> None:
    """A taught word is one token, an unknown one is spelt, and the length is the base's."""
    tokenizer = make_tokenizer(tmp_path, ["owl", "fire-engine"], ["zebra"])
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
    first = make_tokenizer(tmp_path, ["owl"], []).get_vocab()
    assert make_tokenizer(tmp_path, ["pear"], []).get_vocab() == first
