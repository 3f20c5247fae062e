"""Preflight findings: everything that is wrong or remarkable in an image folder, and its wording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Protocol

from sdlora.config import DataSection
from sdlora.data.buckets import MAX_LOSS, BucketPlan, worst_loss
from sdlora.data.captions import has_trigger
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, Noticed, Severity, count_of
from sdlora.data.style_words import examine_words
from sdlora.errors import join_names

# A mask of half the size may round a side to the next pixel.
MASK_TOLERANCE = 0.03
MANY_REPEATS = 100
MAX_REPEATS = 10_000
LARGE_LOSS = 0.15
LARGE_UPSCALE = 2.0
# Letters per token, on average, of a word that a tokenizer reads in fragments.
FRAGMENT = 1.6

# Messages by key. {names} lists the first five names, each with its detail; {count:image} counts all.
MESSAGES: dict[Severity, dict[str, str]] = {
    "error": {
        "data.no-images-left": "no usable image in {names}; see the other errors",
        "data.link-outside": "{count:link} out of the image folder: {names}; copy the files, or set "
        "data.follow_links=true",
        "data.image-unreadable": "cannot use {count:image}: {names}; replace or remove them, or set "
        "data.on_bad_image=skip",
        "data.mask-unreadable": "cannot use {count:mask}: {names}; replace or remove them",
        "data.mask-shape": "{count:mask} of another shape than the image: {names}; save them with its width "
        "and height, or half of both",
        "data.caption-unreadable": "cannot read {count:caption file}: {names}; fix or remove them",
        "data.caption-undecodable": "{count:caption file} in an unknown encoding: {names}; save as UTF-8, or "
        "set data.caption_encoding, for example to cp932 (Japanese), gb18030 (Chinese) or cp1251 (Cyrillic)",
        "data.caption-long": "{count:caption} too long: {names}; shorten them",
        "data.captions-partial": "{count:image} without a caption, although others have one: {names}; write "
        "the missing ones, or set data.allow_missing_captions=true",
        "data.captions-missing": "no captions for {count:image}: {names}; write .txt files beside them (see "
        "`sdlora caption`), or set data.trigger (--trigger WORDS)",
        "data.captions-above": "{names} is outside the image folder; pass its folder to use it",
        "data.placeholder": "a placeholder for the trigger in {count:caption}, but data.trigger is not set: "
        "{names}; set it",
        "data.table-lines": "{names}; split the folder",
        "data.table-csv": "{names}; fix or remove it",
        "data.table-json": "{names}; write one JSON object per line",
        "data.table-columns": "{names}; rename the column",
        "data.repeats-excessive": "a folder name asks for {names} repeats of each image; if it is a date, "
        "rename the folder",
        "data.trigger-truncated": "the token limit cuts off the trigger of {count:caption}: {names}; move it "
        "to the front, or set data.trigger_position=start",
    },
    "warning": {
        "data.image-skipped": "skipped {count:image}: {names}",
        "data.image-format": "{count:image} in an unsupported format: {names}; convert to PNG or JPEG "
        "(for HEIC and JXL: pip install 'sdlora[formats]')",
        "data.file-unreadable": "cannot read {count:file}: {names}",
        "data.folder-unreadable": "cannot open {count:folder}: {names}",
        "data.row-unmatched": "{count:metadata row} without a matching image: {names}",
        "data.table-name": "{count:table} not read: {names}; rename one with the columns file_name and text "
        "to metadata.csv, or one of JSON lines to metadata.jsonl",
        "data.stem-shared": "{count:image} sharing a caption file with another: {names}; rename one of each",
        "data.copies": "exact copies: {names}; keep one of each",
        "data.near-copies": "{count:near-copy|near-copies}: {names}; they count twice and are learned by "
        "heart, so keep one of each: --fix moves the others aside",
        "data.image-dark": "{count:image} almost black, lightest parts: {names}; new ones become "
        "as dark, so replace or brighten them",
        "data.image-soft": "{count:image} out of focus, or enlarged from a smaller one: {names}; its blur is "
        "learned too, so use sharper files",
        "data.image-bordered": "{count:image} with a border or bars: {names} of a side; they are drawn into "
        "new images, so crop them off",
        "data.image-marked": "{count:image} with the same mark in a corner, such as a watermark: {names}; it "
        "is drawn into new images, so remove or crop it",
        "data.masks-missing": "data.masks=files, but no image has a mask beside it, such as {names}",
        "data.caption-empty": "{count:caption file} empty: {names}; these images have no caption for now, so "
        "fill them in",
        "data.caption-style": "{count:caption} naming a style or medium: {names}; the style is learned with "
        "those words then, not with the trigger, so describe the content alone: --fix removes them from "
        "caption files",
        "data.caption-constant": "{count:word} in nearly every caption: {names}; the style is learned with "
        "them, so prompts need them too; remove them, or use them as the trigger",
        "data.caption-same": "{count:caption} the same as others: {names}; what images have in common cannot "
        "be told from the style, so describe each image",
        "data.trigger-common": "data.trigger = {names} is a word that the base knows, and mixes the style "
        "with its meaning; use a made-up word, or two",
        "data.trigger-split": "data.trigger is read letter by letter: {names}; a plainer word is easier to "
        "learn",
        "data.heldout-trained": "{count:held-out image} also trained on: {names}; remove one of each",
        "data.repeats": "a folder name asks for {names} repeats of each image; if it is a date, rename the "
        "folder",
        "data.resolution": "data.resolution = {names} of an image between 1:2 and 2:1; a larger one crops "
        "less",
        "data.image-cropped": f"{{count:image}} cropped by more than {LARGE_LOSS:.0%}: {{names}}",
        "data.image-blurred": "{count:image} enlarged more than twice, so blurred: {names}; use larger files "
        "or a smaller data.resolution",
        "data.caption-truncated": "{count:caption} over the token limit: {names}; shorten them",
    },
    "notice": {
        "data.caption-subject": "one subject dominates: {names}; new images lean towards it, so add others",
        "data.image-frames": "{count:image} with several frames, using the first: {names}",
        "data.image-hidden": "ignored {count:image} in hidden files or folders: {names}",
        "data.image-system": "ignored {count:image} in folders of the system or of network storage: {names}",
        "data.image-run": "ignored {count:image} that a run inside the folder has written: {names}",
        "data.image-project": "ignored {count:image} outside img/, which has the images of a kohya project: "
        "{names}; pass another folder to use them",
        "data.regularization": "ignored {count:regularization image} in reg/: {names}; to train on them as "
        "class images, set data.sets=[{{folder='reg'}}]",
        "data.image-mask": "ignored {count:mask}: {names}; data.masks=files uses those beside an image",
        "data.repeats-zero": "ignored {count:image} in folders with zero repeats: {names}",
        "data.image-enlarged": "{count:image} enlarged: {names}",
        "data.heldout-unused": "ignored {count:image} in folders named heldout, never trained on: {names}",
        "data.placeholder-foreign": "placeholders of other tools in {count:caption}, taken as text: {names}; "
        "write {{trigger}} or the words themselves, or list those of the trigger in data.placeholders",
        "data.caption-weights": "weights in {count:caption}, taken as text: {names}; set "
        "data.prompt_weights=true to read them",
        "data.caption-encoding": "{count:file} not in UTF-8, read in an encoding that seems to fit: {names}; "
        "save as UTF-8 if characters look wrong, or set data.caption_encoding",
        "data.caption-unmatched": "{count:caption file} without a matching image: {names}",
        "data.captions-trigger": "{count:image} with the trigger as the whole caption: {names}; a style is "
        "learned better from captions that say what each image shows; `sdlora caption` writes them "
        "(for the built-in base, with --model builtin)",
        "data.captions-differ": "{count:image} with several captions: {names}",
    },
}


class TokenCount(Protocol):
    """How a tokenizer reads a caption: the tokens it needs, as text too, and the text beyond the limit."""

    @property
    def used(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def pieces(self) -> Sequence[str]: ...
    @property
    def lost(self) -> str: ...
    @property
    def is_known(self) -> bool: ...


CountTokens = Callable[[str], TokenCount]


def examine(
    index: DatasetIndex, plan: BucketPlan, settings: DataSection, count_tokens: CountTokens | None
) -> list[Finding]:
    """All findings, errors first; tokens are counted if there is a base."""
    noticed: Noticed = defaultdict(dict, {key: dict(names) for key, names in index.noticed.items()})
    if not index.records:
        noticed["data.no-images-left"][str(index.root)] = ""
    if settings.on_bad_image == "skip" and "data.image-unreadable" in noticed:
        noticed["data.image-skipped"] = noticed.pop("data.image-unreadable")
    _examine_records(index.records, index.heldout, noticed)
    _examine_sizes(plan, noticed)
    examine_words(index.records, noticed)
    if count_tokens is not None:
        if settings.trigger:
            _examine_trigger(settings.trigger, count_tokens, noticed)
        _examine_tokens([*index.records, *index.heldout], settings.trigger, count_tokens, noticed)
    assert noticed.keys() <= {key for messages in MESSAGES.values() for key in messages}
    return [
        _word(severity, key, message, noticed[key])
        for severity, messages in MESSAGES.items()
        for key, message in messages.items()
        if noticed[key]
    ]


class _Count(int):
    """`{count:image}` prints the number with its noun."""

    def __format__(self, noun: str) -> str:
        one, _, many = noun.partition("|")
        return f"{int(self)} {many}" if many and self != 1 else count_of(int(self), one)


def _word(severity: Severity, key: str, message: str, details: Mapping[str, str]) -> Finding:
    names = join_names(f"{name} {detail}" if detail else name for name, detail in details.items())
    return Finding(severity, message.format(count=_Count(len(details)), names=names), tuple(details), key)


def _examine_records(
    training: Sequence[ImageRecord], heldout: Iterable[ImageRecord], noticed: Noticed
) -> None:
    """Shared stems, exact copies, held-out images that are trained on, unlikely repeats."""
    stems: dict[PurePosixPath, list[str]] = defaultdict(list)
    copies: dict[str, list[str]] = defaultdict(list)
    for record in training:
        stems[PurePosixPath(record.name).with_suffix("")].append(record.name)
        copies[record.digest].append(record.name)
    shared = [name for names in stems.values() if len(names) > 1 for name in names]
    noticed["data.stem-shared"] |= dict.fromkeys(shared, "")
    for first, *others in copies.values():
        if others:
            noticed["data.copies"][first] = f"= {join_names(others, separator=' = ')}"
    for record in training:
        size = record.mask.size if record.mask else None
        if size and abs(size.aspect / record.size.aspect - 1) > MASK_TOLERANCE:
            noticed["data.mask-shape"][record.name] = f"({size}; the image is {record.size})"
    leaked = [record.name for record in heldout if record.digest in copies]
    noticed["data.heldout-trained"] |= dict.fromkeys(leaked, "")
    if (most := max((record.repeats for record in training), default=0)) > MANY_REPEATS:
        noticed["data.repeats-excessive" if most > MAX_REPEATS else "data.repeats"][str(most)] = ""


def _examine_sizes(plan: BucketPlan, noticed: Noticed) -> None:
    """Resolutions that crop much, and the images that lose or are enlarged most."""
    if (loss := worst_loss(plan.resolution, plan.step)) >= MAX_LOSS:
        detail = f"with buckets in steps of {plan.step} px can crop {loss:.0%}"
        noticed["data.resolution"][str(plan.resolution)] = detail
    for share, name in largest_first((plan.lost_share(record.name), record.name) for record in plan.records):
        if share > LARGE_LOSS:
            noticed["data.image-cropped"][name] = f"{share:.0%}"
    for factor, name in largest_first((plan.upscale(record), record.name) for record in plan.records):
        if factor > LARGE_UPSCALE:
            noticed["data.image-blurred"][name] = f"{factor:.1f} times"
        elif factor > 1.0:
            noticed["data.image-enlarged"][name] = f"{factor:.2f} times"


def largest_first(pairs: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def _examine_tokens(
    records: Sequence[ImageRecord], trigger: str | None, count_tokens: CountTokens, noticed: Noticed
) -> None:
    """Which captions are cut, which words are lost, and whether the trigger survives."""
    count_once = cache(count_tokens)
    for record in records:
        for caption in record.captions:
            if not (count := count_once(caption)).lost:
                continue
            lost = count.lost if len(count.lost) <= 60 else f"{count.lost[:57]}..."
            noticed["data.caption-truncated"][record.name] = f"loses {lost!r} (limit {count.limit} tokens)"
            if trigger and not has_trigger(_kept(caption, count.lost), trigger):
                noticed["data.trigger-truncated"][record.name] = ""


def _examine_trigger(trigger: str, count_tokens: CountTokens, noticed: Noticed) -> None:
    """A trigger of one word that the tokenizer knows whole, and unknown words that it reads in fragments."""
    words = [word for word in trigger.split() if word.lower() != "style"]
    counts = {word: count_tokens(word) for word in words}
    if len(words) == 1 and len(counts[words[0]].pieces) == 1 and words[0].isalpha():
        noticed["data.trigger-common"][words[0]] = ""
    for word, count in counts.items():
        if len(count.pieces) > max(3, len(word) / FRAGMENT) and not count.is_known:
            noticed["data.trigger-split"][word] = f"= {' + '.join(count.pieces)}"


def _kept(caption: str, lost: str) -> str:
    """The caption without the end that was cut off; tokenizers may have changed case and spaces."""
    squeezed, tail = " ".join(caption.lower().split()), " ".join(lost.lower().split())
    place = squeezed.rfind(tail)
    return squeezed[: place if place >= 0 else max(0, len(squeezed) - len(tail))]
