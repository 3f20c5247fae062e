"""From the text of a caption file to the text that is encoded: a pipeline of small operations.

    text of the file → operations → fixed variants of an image, each encoded once → the one a sample draws

A new operation is a class here and its entry in `OPERATIONS`.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sdlora.config import DataSection
from sdlora.data.records import ImageRecord
from sdlora.seeds import keyed_random

NUM_VARIANTS = 8
WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")


class Operation(Protocol):
    """Changes a caption; a random one draws from `rng` alone, and makes the variants of an image differ."""

    is_random: ClassVar[bool]

    def __call__(self, caption: str, rng: random.Random) -> str: ...


@dataclass(frozen=True)
class AddWords:
    """Puts words before and behind a caption, each with a space, as kohya does."""

    prefix: str
    suffix: str
    is_random: ClassVar[bool] = False

    def __call__(self, caption: str, rng: random.Random) -> str:
        return " ".join(filter(None, (self.prefix.strip(), caption, self.suffix.strip())))


@dataclass(frozen=True)
class ChooseWildcards:
    """Replaces each `{a|b}` by one of its parts, inner ones first."""

    is_random: ClassVar[bool] = True

    def __call__(self, caption: str, rng: random.Random) -> str:
        return _replace_wildcards(caption, rng.choice)


@dataclass(frozen=True)
class TakeFirst:
    """Replaces each `{a|b}` that is left, as in the plain caption, by its first part."""

    is_random: ClassVar[bool] = False

    def __call__(self, caption: str, rng: random.Random) -> str:
        return _replace_wildcards(caption, lambda parts: parts[0])


def _replace_wildcards(caption: str, choose: Callable[[list[str]], str]) -> str:
    while (changed := WILDCARD.sub(lambda match: choose(match[1].split("|")), caption)) != caption:
        caption = changed
    return caption


@dataclass(frozen=True)
class RemoveSeparator:
    """Puts a comma in the place of the separator of kept tags."""

    separator: str
    is_random: ClassVar[bool] = False

    def __call__(self, caption: str, rng: random.Random) -> str:
        parts = (part.strip(" ,") for part in caption.split(self.separator))
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class VaryTags:
    """Shuffles the tags of a caption behind the first ones, and leaves some out; at least one stays.

    With a separator, the tags before it are the first ones, and those behind a second one stay at the end.
    """

    shuffle: bool
    dropout: float
    num_kept: int
    separator: str = ""
    is_random: ClassVar[bool] = True

    def __call__(self, caption: str, rng: random.Random) -> str:
        kept, others, last = self._split(caption)
        if self.shuffle:
            rng.shuffle(others)
        left = [tag for tag in others if rng.random() >= self.dropout]
        return ", ".join(kept + left + last or others[:1])

    def _split(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        if self.separator and self.separator in caption:
            first, _, rest = caption.partition(self.separator)
            middle, _, last = rest.partition(self.separator)
            return _tags(first), _tags(middle), _tags(last.replace(self.separator, ","))
        tags = _tags(caption)
        return tags[: self.num_kept], tags[self.num_kept :], []


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


@dataclass(frozen=True)
class ReplacePlaceholder:
    """Substitutes the trigger for its placeholders."""

    settings: DataSection
    is_random: ClassVar[bool] = False

    def __call__(self, caption: str, rng: random.Random) -> str:
        return self.settings.fill_trigger(caption)


@dataclass(frozen=True)
class AddTrigger:
    """Puts the trigger at the start or the end of a caption that lacks it."""

    trigger: str
    position: str
    is_random: ClassVar[bool] = False

    def __call__(self, caption: str, rng: random.Random) -> str:
        if has_trigger(caption, self.trigger):
            return caption
        words = [self.trigger, caption] if self.position == "start" else [caption, self.trigger]
        return ", ".join(filter(None, words))


OPERATIONS: dict[str, Callable[[DataSection], Operation | None]] = {
    "choose_wildcards": lambda data: ChooseWildcards() if data.wildcards else None,
    "take_first": lambda data: TakeFirst() if data.wildcards else None,
    "add_words": lambda data: (
        AddWords(data.caption_prefix, data.caption_suffix)
        if (data.caption_prefix + data.caption_suffix).strip()
        else None
    ),
    "vary_tags": lambda data: (
        VaryTags(data.shuffle_tags, data.tag_dropout, data.keep_tags, data.keep_separator)
        if data.varies_tags
        else None
    ),
    "remove_separator": lambda data: RemoveSeparator(data.keep_separator) if data.keep_separator else None,
    "replace_placeholder": lambda data: ReplacePlaceholder(data) if data.trigger else None,
    "add_trigger": lambda data: AddTrigger(data.trigger, data.trigger_position) if data.trigger else None,
}
"""Makes each operation from the settings, in the order in which they apply; None if it is off."""


@dataclass(frozen=True)
class CaptionPipeline:
    """The operations of a run, in order, the share of samples with an empty caption, and the variants."""

    operations: Sequence[Operation]
    dropout: float = 0.0
    num_variants: int = NUM_VARIANTS

    def __call__(self, caption: str, rng: random.Random) -> str:
        for operation in self.operations:
            caption = operation(caption, rng)
        return caption

    def plain(self, caption: str) -> str:
        """The caption without the random operations: for held-out images, prompts and metadata."""
        fixed = [operation for operation in self.operations if not operation.is_random]
        return CaptionPipeline(fixed)(caption, random.Random(0))

    def variants(self, caption: str, seed: int, digest: str) -> tuple[str, ...]:
        """Training captions of the image with this digest; equal ones are kept once."""
        number = self.num_variants if any(operation.is_random for operation in self.operations) else 1
        draws = (keyed_random(seed, "caption", digest, variant) for variant in range(number))
        return tuple(dict.fromkeys(self(caption, draw) for draw in draws))

    def draw(self, record: ImageRecord, *, seed: int, index: int) -> str:
        """The caption of one sample: one of the image's variants, or empty.

        Variant and dropout have separate generators, so that neither changes the other.
        """
        if keyed_random(seed, "dropout", index).random() < self.dropout:
            return ""
        if len(record.captions) == 1:
            return record.captions[0]
        return keyed_random(seed, "caption", index).choice(record.captions)


def caption_pipeline(settings: DataSection) -> CaptionPipeline:
    operations = (make(settings) for make in OPERATIONS.values())
    given = [step for step in operations if step is not None]
    return CaptionPipeline(given, settings.caption_dropout, settings.caption_variants or NUM_VARIANTS)


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """Finds the trigger as words of its own, in any case and with any spaces."""
    # Scripts that are written without spaces have no word borders to look for.
    before = "" if _is_wide(trigger[0]) else r"(?<!\w)"
    after = "" if _is_wide(trigger[-1]) else r"(?!\w)"
    words = r"\s+".join(map(re.escape, trigger.split()))
    return re.compile(before + words + after, re.IGNORECASE)


def without_trigger(caption: str, trigger: str) -> str:
    """The caption without the trigger, and without the commas around it."""
    parts = trigger_pattern(trigger).sub("", caption).split(",")
    return ", ".join(" ".join(part.split()) for part in parts if part.strip())


def has_trigger(caption: str, trigger: str) -> bool:
    return trigger_pattern(trigger).search(caption) is not None


def _is_wide(letter: str) -> bool:
    return unicodedata.east_asian_width(letter) in ("W", "F")
