"""The images of a report: what each run drew for a prompt and seed, at every step and strength."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.reading import UnfitFileError, parse_json, read_bytes
from sdlora.runs import RunFolder
from sdlora.sampling.targets import find_run_targets

MAX_TILES = 320
# The side of a tile, by the number of tiles: together they stay below 5 MB.
SIDES = ((60, 512), (160, 384), (MAX_TILES, 256))
MAX_IMAGE_BYTES, MAX_SIDE_PX = 500_000, 2400
ANSWERED, SCORES = ("first", "second"), {"first": 1.0, "second": 0.0, "equal": 0.5}
MAX_RATINGS_BYTES, MIN_ANSWERS = 2**24, 5


@dataclass(frozen=True)
class Tile:
    """An image that an adapter drew."""

    step: int
    strength: float
    image: str


@dataclass
class Stage:
    """What one run drew for a prompt and seed."""

    base: str | None = None
    tiles: list[Tile] = field(default_factory=list)


@dataclass(frozen=True)
class Card:
    """A prompt and seed: a stage for each run, and the image that the prompt is the caption of."""

    prompt: str
    seed: int
    stages: Sequence[Stage]
    target: str | None


@dataclass(frozen=True, slots=True)
class _Found:
    prompt: str
    seed: int
    step: int
    strength: float
    file: Path


def make_cards(runs: Sequence[RunFolder]) -> list[Card]:
    """Cards of all prompts and seeds with samples; if there are too many, of the first ones."""
    found = [
        {(one.prompt, one.seed, one.step, one.strength): one for one in find_images(run)} for run in runs
    ]
    keys = dict.fromkeys((prompt, seed) for own in found for prompt, seed, _, _ in own)
    count, cards = sum(map(len, found)), list[Card]()
    side = next((side for most, side in SIDES if count <= most), SIDES[-1][1])
    targets: dict[str, Image.Image] = {}
    for run in reversed(runs):
        config = run.read_config()
        own = find_run_targets(config, [prompt for prompt, _ in keys]) if config.images else None
        targets |= own.images if own else {}
    room = MAX_TILES
    for prompt, seed in keys:
        picked = [[one for key, one in own.items() if key[:2] == (prompt, seed)] for own in found]
        room -= sum(map(len, picked))
        if cards and room < 0:
            break
        target = embed(targets[prompt], side) if prompt in targets else None
        cards.append(Card(prompt, seed, [_make_stage(own, side) for own in picked], target))
    return cards


def _make_stage(found: Sequence[_Found], side: int) -> Stage:
    stage = Stage()
    for one in sorted(found, key=lambda one: (one.step, one.strength)):
        if (image := embed(one.file, side)) is None:
            continue
        if one.strength:
            stage.tiles.append(Tile(one.step, one.strength, image))
        else:
            stage.base = stage.base or image
    return stage


def find_images(run: RunFolder) -> Iterator[_Found]:
    """The images of a run's grids and of its evaluation, by what their files say."""
    for folder in sorted(run.samples.glob("step-*[0-9]")):
        images = []
        for file in sorted(folder.glob("[0-9]*.png")):
            with suppress(OSError, UnfitFileError, KeyError, TypeError, ValueError, AttributeError):
                with Image.open(file) as image:
                    values = parse_json(image.info["sdlora"])
                own = _read(values, int(folder.name.removeprefix("step-")), file)
                images += [] if values.get("blank") else [(values.get("adapter"), own)]
        # A child's grid has a column for its parent, too, before its own.
        last = next((name for name, one in reversed(images) if one.strength), None)
        yield from (one for name, one in images if name == last or not one.strength)
    for values in _as_list(read_choice(run).get("images")):
        with suppress(KeyError, TypeError, ValueError):
            step = values["step"]
            step = run.step_of(run.adapter) if step == "final" else step
            file = (run.path / values["file"]).resolve()
            if file.is_relative_to(run.path.resolve()):
                yield _read(values, int(step or 0), file)


def _read(values: Mapping[str, Any], step: int, file: Path) -> _Found:
    strength = float(values["strength"])
    return _Found(str(values["prompt"]), int(values["seed"]), step if strength else 0, strength, file)


def read_choice(run: RunFolder) -> Mapping[str, Any]:
    """The recommendation in a run's `evaluation.json`; empty if there is none, or it cannot be read."""
    choice = run.read_evaluation().get("choice")
    return choice if isinstance(choice, dict) else {}


def read_ratings(run: RunFolder) -> list[dict[str, Any]]:
    """The answers of people to blind comparisons; damaged lines are left out."""
    rows = []
    with suppress(OSError, UnfitFileError):
        for line in read_bytes(run.ratings_file, MAX_RATINGS_BYTES).splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                sides = [(row[side]["run"], row[side]["grid"], row[side]["strength"]) for side in ANSWERED]
                # An answer names what it is about, and can be counted by it.
                hash((row["prompt"], row["seed"], *sides))
                rows.append({**row, "score": SCORES[row["choice"]]})
    return rows


def count_wins(run: RunFolder) -> list[dict[str, Any]]:
    """How often each sample column was preferred, of how many answers."""
    wins: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in read_ratings(run):
        for side, won in ((row["first"], row["score"]), (row["second"], 1 - row["score"])):
            wins[side["run"], side["grid"], side["strength"]].append(won)
    return [
        {"run": name, "grid": step, "strength": strength, "wins": sum(won), "answers": len(won)}
        for (name, step, strength), won in sorted(wins.items())
    ]


def describe_ratings(run: RunFolder) -> str:
    """What people preferred in blind comparisons; empty with few answers."""
    own = [row for row in count_wins(run) if row["run"] == run.name and row["answers"] >= MIN_ANSWERS]
    if not own:
        return ""
    best = max(own, key=lambda row: (row["wins"] / row["answers"], row["answers"]))
    return (
        f"step {best['grid']} at {best['strength']:g} was preferred in {best['wins']:g} of {best['answers']} "
        "blind comparisons"
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def embed(source: Path | Image.Image, side: int = MAX_SIDE_PX) -> str | None:
    """An image as a data URI, in WebP of at most `MAX_IMAGE_BYTES`; None if it cannot be read."""
    try:
        image = (Image.open(source) if isinstance(source, Path) else source).convert("RGB")
    except OSError:
        return None
    side = min(max(image.size), side)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer := io.BytesIO(), "WEBP", quality=85, method=3)
        if buffer.tell() <= MAX_IMAGE_BYTES:
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        side = side * 4 // 5
