"""Says what the base is taught: its concepts, the captions of its pictures, a tokenizer for those."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.builtin.icons import GROUNDS
from sdlora.builtin.manners import PLAIN, Manner, all_manners, draw_manner
from sdlora.errors import DataError

CONCEPTS_FILE = Path(__file__).with_name("concepts.txt")
TEXT_LENGTH = 32
VOCABULARY_SIZE = 2046  # and two marks: start and end of text
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


def learn_merges(texts: list[str]) -> list[str]:
    """Learns the merges of a byte-level BPE, `left right` each, from example texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=byte_letters(),
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def make_tokenizer(folder: Path, concepts: list[str], other_names: list[str]) -> Any:
    """Writes a CLIP tokenizer for the captions into `folder` and returns it.

    Args:
        folder: Gets `vocab.json` and `merges.txt`.
        concepts: Names whose words should each be one token, if the vocabulary allows.
        other_names: Further names: what a user may type of things that the base does not know.
    """
    from transformers import CLIPTokenizer

    grounds = [f"a picture of a thing on a {ground} background" for ground in GROUNDS]
    hands = ["flat drawing, shaded drawing"]
    names = [concept_to_words(name) for name in concepts * 10 + other_names] + ["an"] * 100
    merges = learn_merges(names + (grounds + hands) * 200)
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocabulary_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(vocabulary_file),
        merges=str(merges_file),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )
