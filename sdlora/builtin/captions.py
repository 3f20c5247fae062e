"""Says what the base is taught: its concepts, the captions of its pictures, a tokenizer for those."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdlora.builtin.icons import GROUNDS
from sdlora.builtin.manners import PLAIN, Manner, all_manners, draw_manner
from sdlora.errors import DataError

CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
TEXT_LENGTH = 32
NUM_MERGES = 1750  # with the letters and the two marks: 2,264 tokens at most
START, END = "<|startoftext|>", "<|endoftext|>"

PHRASES = ("a {}", "a {}", "a {}", "a {}", "a {}", "a {}", "{}", "a picture of a {}")
HAND_SHARE = {"noto": 0.75, "fluent-flat": 0.25}
WHITE_SHARE = 0.6
EMPTY_SHARE = 0.1
SHADED_SHARE = 0.2
AN_SHARE = 0.3  # of the names that begin with a vowel; the other captions keep to "a NAME"


@dataclass(frozen=True)
class Picture:
    """What one training picture shows: a concept, drawn by a hand, on a ground, in a manner."""

    hand: str
    concept: str
    ground: str
    manner: Manner = PLAIN


def read_concepts(file: Path = CONCEPTS_FILE) -> list[str]:
    """The names of the concepts, one a line.

    Raises:
        DataError: The file is missing or empty.
    """
    if not file.is_file():
        raise DataError(f"{file} is not there; a concept file holds one drawing name a line")
    concepts = file.read_text(encoding="utf-8").split()
    if not concepts:
        raise DataError(f"{file} names no concept; write one drawing name a line")
    return concepts


def concept_to_words(concept: str) -> str:
    """`fire-engine` -> `fire engine`."""
    return concept.replace("-", " ")


def all_pictures(concepts: list[str], with_manners: bool = False) -> list[Picture]:
    """Every picture that the base is taught; manners other than the plain one are on white alone."""
    things = [(hand, concept) for hand in HAND_SHARE for concept in concepts]
    pictures = [Picture(*thing, ground) for thing in things for ground in GROUNDS]
    if with_manners:
        pictures += [Picture(*thing, "white", manner) for thing in things for manner in all_manners()[1:]]
    return pictures


def draw_picture(rng: random.Random, concept: str, with_manners: bool = False) -> Picture:
    """Draws the hand, the ground and the manner in which a concept is shown."""
    hand = rng.choices(list(HAND_SHARE), list(HAND_SHARE.values()))[0]
    manner = draw_manner(rng) if with_manners else PLAIN
    if manner != PLAIN:
        return Picture(hand, concept, "white", manner)
    named = [ground for ground in GROUNDS if ground != "white"]
    return Picture(hand, concept, "white" if rng.random() < WHITE_SHARE else rng.choice(named))


def draw_caption(rng: random.Random, picture: Picture, drop: bool = True) -> str:
    """A caption that tells the picture from every other: Noto's hand goes without saying, the other is named.

    With `drop`, one in ten is empty, for classifier-free guidance (2207.12598).
    """
    name = concept_to_words(picture.concept)
    phrase = rng.choice(PHRASES)
    if name[0] in "aeiou" and rng.random() < AN_SHARE:
        phrase = phrase.replace("a {}", "an {}")
    caption = phrase.format(name)
    if picture.ground != "white":
        caption += f" on a {picture.ground} background"
    if picture.hand == "fluent-flat":
        caption += ", flat drawing"
    elif rng.random() < SHADED_SHARE:
        caption += ", shaded drawing"
    caption += picture.manner.words()
    return "" if drop and rng.random() < EMPTY_SHARE else caption


def byte_letters() -> list[str]:
    """The printable stand-ins for the 256 bytes, as byte-level BPE has used them since GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def split_words(texts: list[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs, as letters of which the last is marked as the end."""
    words = (word for text in texts for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()))
    return Counter((*word[:-1], word[-1] + "</w>") for word in words)


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of the pair made one."""
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return tuple(merged)


def learn_merges(texts: list[str], count: int = NUM_MERGES) -> list[tuple[str, str]]:
    """Learns byte pair encoding (1508.07909) from example texts: the pairs to merge, in their order.

    The most frequent pair is merged first; of equals, the first in the alphabet, so that the same texts
    always give the same tokenizer (the trainer of the tokenizers library breaks ties by chance).
    """
    words = [(word, times) for word, times in sorted(split_words(texts).items())]
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = {}
    for index, (word, times) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times
            places.setdefault(pair, set()).add(index)
    merges: list[tuple[str, str]] = []
    while pairs and len(merges) < count:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for index in sorted(places.pop(best)):
            word, times = words[index]
            pairs.subtract({pair: times * number for pair, number in Counter(pairwise(word)).items()})
            word = merge_pair(word, best)
            words[index] = (word, times)
            for pair in pairwise(word):
                pairs[pair] += times
                places.setdefault(pair, set()).add(index)
        pairs = +pairs
    return merges


def write_vocabulary(folder: Path, concepts: list[str], other_names: list[str]) -> None:
    """Writes `vocab.json` and `merges.txt`, learnt from the captions to come and from other names."""
    grounds = [f"a picture of a thing on a {ground} background" for ground in GROUNDS]
    names = [concept_to_words(name) for name in concepts * 10 + other_names] + ["an"] * 100
    merges = learn_merges(names + [*grounds, "flat drawing, shaded drawing"] * 200)
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def make_tokenizer(folder: Path, concepts: list[str], other_names: list[str]) -> Any:
    """The CLIP tokenizer of `folder`, made from the captions where the folder holds none yet.

    Args:
        folder: Holds, or gets, `vocab.json` and `merges.txt`; a run keeps the numbers it began with.
        concepts: Names whose words should each be one token, if the vocabulary allows.
        other_names: Further names: what a user may type of things that the base does not know.
    """
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").is_file():
        write_vocabulary(folder, concepts, other_names)
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )
