"""Says what the base is taught: its concepts, the captions of its images, a tokenizer for those."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdlora.builtin.icons import GROUNDS
from sdlora.builtin.script import CONCEPTS_FILE
from sdlora.builtin.variants import HUES, STYLES, Variant
from sdlora.errors import DataError

TEXT_LENGTH = 32
NUM_MERGES = 1750  # with the letters and the two marks: 2,264 tokens at most
START, END = "<|startoftext|>", "<|endoftext|>"

PHRASES = (*("a {}",) * 5, "{}", "an image of a {}", "a picture of a {}", "a drawing of a {}")
SET_WORDS: dict[str, tuple[str, ...]] = {  # the first set goes without saying
    "noto": ("shaded drawing", "noto drawing"),
    "noto-v1": ("old noto drawing", "soft drawing"),
    "fluent-flat": ("flat drawing", "fluent flat drawing"),
    "fluent": ("glossy drawing", "fluent drawing"),
    "emojione": ("bright drawing", "emoji one drawing"),
    "emojione-v1": ("simple drawing", "old emoji one drawing"),
    "emojione-mono": ("black glyph", "emoji one glyph"),
    "streamline": ("cartoon drawing", "streamline drawing"),
}
EMPTY_SHARE = 0.07
NOTO_NAMED_SHARE = 0.2
UNKNOWN_SHARE = 1 / 3  # of the captions: words that mean nothing, before or behind
AN_SHARE = 0.7  # of the names that begin with a vowel
ONSETS = (
    *"bcdfghjklmnprstvwz",
    *("br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "qu", "sh", "sk", "st", "tr"),
    "",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "y")
CODAS = ("", "", "", "n", "r", "s", "t", "l", "m", "x", "k", "ng", "sh", "rt", "nd")
# fmt: off
EMPTY_WORDS = (  # words that a user may write of a style, and that no image gives a meaning
    "pastel", "watercolor", "retro", "vintage", "modern", "minimal", "storybook", "sticker", "art",
    "artwork", "design", "studio", "brand", "icon", "emoji", "my", "our", "cute", "cozy", "nordic",
    "pop", "deco", "riso", "print", "folk", "pixel", "clay", "felt", "stamp", "comic", "manga",
    "graffiti", "baroque", "neon", "logo", "illustration", "sketchbook", "notebook", "sks", "ohwx",
    "zwx",
)
# fmt: on
BEFORE = (
    "{words} style, {caption}",
    "{words}, {caption}",
    "{words} {caption}",
    "in the style of {words}, {caption}",
)
BEHIND = (
    "{caption}, {words} style",
    "{caption}, {words}",
    "{caption} in {words} style",
    "{caption}, in the style of {words}",
)


def read_concepts(file: Path = CONCEPTS_FILE) -> list[str]:
    """The names of the concepts, one a line; raises a DataError if there are none."""
    if not file.is_file():
        raise DataError(f"{file} is not there; a concept file holds one drawing name a line")
    concepts = file.read_text(encoding="utf-8").split()
    if not concepts:
        raise DataError(f"{file} names no concept; write one drawing name a line")
    return concepts


def concept_to_words(concept: str) -> str:
    """`fire-engine` -> `fire engine`."""
    return concept.replace("-", " ")


def takes_an(name: str) -> bool:
    return name[0] in "aeiou" and not name.startswith("uni")


def name_thing(concept: str) -> str:
    """`owl` -> `an owl`, as people and the example datasets write it."""
    name = concept_to_words(concept)
    return f"{'an' if takes_an(name) else 'a'} {name}"


def draw_caption(rng: random.Random, variant: Variant) -> str:
    """A caption as a person might write it of what an image shows.

    It names every property of the image and, unless that is Noto's, the icon set; so the same caption means
    the same image. A third of the captions have unknown words too, before or behind, so that a trigger in
    either place leaves the shape alone. A few captions are empty, for classifier-free guidance (2207.12598).
    """
    if rng.random() < EMPTY_SHARE:
        return ""
    unknown = rng.random() < UNKNOWN_SHARE
    name = with_article(rng, rng.choice(PHRASES), concept_to_words(variant.concept), variant)
    words = [
        word
        for word in (variant.style, "" if variant.color in ("", *HUES) else f"in {variant.color}")
        if word
    ]
    if variant.icon_set != "noto":
        words.append(rng.choice(SET_WORDS[variant.icon_set]))
    elif rng.random() < NOTO_NAMED_SHARE:
        words.append(rng.choice(SET_WORDS["noto"]))
    words += ["small"] * variant.small + ["mirrored"] * variant.mirrored
    words += [f"tilted to the {variant.tilt}"] if variant.tilt else []
    caption = name + (f" on a {variant.ground} background" if variant.ground != "white" else "")
    if words and rng.random() < 0.2 and words[0].endswith("drawing") and " of " not in name:
        caption = f"{rng.choice(('a ', ''))}{words.pop(0)} of {caption}"
    caption = ", ".join([caption, *words])
    return add_unknown_words(rng, caption) if unknown else caption


def with_article(rng: random.Random, phrase: str, name: str, variant: Variant) -> str:
    """The phrase with the name in it, and before that the color it was turned to."""
    if variant.color in HUES:
        name = f"{variant.color} {name}"
    if takes_an(name) and rng.random() < AN_SHARE:
        phrase = phrase.replace("a {}", "an {}")
    return phrase.format(name)


def draw_unknown_word(rng: random.Random) -> str:
    """An invented word of one to three syllables, or one that no image gives a meaning."""
    if rng.random() < 0.3:
        return rng.choice(EMPTY_WORDS)
    syllables = (
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return "".join(syllables)


def add_unknown_words(rng: random.Random, caption: str) -> str:
    """The caption with one to three unknown words before or behind it."""
    words = " ".join(draw_unknown_word(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    return rng.choice(rng.choice((BEFORE, BEHIND))).format(words=words, caption=caption)


def known_words(concepts: list[str]) -> list[str]:
    """The words that captions give a meaning, and those around them, sorted."""
    texts = [concept_to_words(name) for name in concepts]
    texts += [*PHRASES, *STYLES, *HUES, *(word for words in SET_WORDS.values() for word in words)]
    texts += [f"on an {ground} background" for ground in GROUNDS]
    texts += ["small mirrored tilted to the left right in shades of the style"]
    return sorted({word for text in texts for word in re.findall("[a-z]+", text)})


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


def write_vocabulary(folder: Path, concepts: list[str]) -> None:
    """Writes `vocab.json` and `merges.txt`, learned from the captions to come."""
    grounds = [f"a picture of a thing on a {ground} background" for ground in GROUNDS]
    styles = [*STYLES, *HUES, *(word for words in SET_WORDS.values() for word in words)]
    names = [concept_to_words(name) for name in concepts * 10] + ["an"] * 100
    merges = learn_merges(names + [*grounds, *styles] * 200)
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")


def make_tokenizer(folder: Path, concepts: list[str]) -> Any:
    """The CLIP tokenizer of `folder`, made from the captions if the folder has none yet.

    A run keeps the numbers it began with. A word of `concepts` is one token, if the vocabulary allows.
    """
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").is_file():
        write_vocabulary(folder, concepts)
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )
