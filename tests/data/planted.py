"""A labelled set for the doctor: faults planted into clean images, and precision and recall of each check.

`python -m tests.data.planted` prints the table of docs/pages/doctor.md.
"""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from sdlora.config import DataSection, RunConfig
from sdlora.data.buckets import plan_buckets
from sdlora.data.findings import CountTokens, examine
from sdlora.data.image_checks import examine_images, measure_records
from sdlora.data.images import load_image
from sdlora.data.records import DatasetIndex, ImageRecord, Noticed, Size
from sdlora.data.scan import scan_dataset
from sdlora.data.style_words import examine_words
from sdlora.models.info import inspect_base
from sdlora.models.tokenizer import count_tokens, load_tokenizer

# With what is left of each.
STYLED = {
    "a watercolor painting of a boat": "a boat",
    "a house, line art": "a house",
    "a dog in the style of an old master": "a dog",
    "a tree, flat colors": "a tree",
    "a cat, inkwash style": "a cat",
    "an oil painting, a hill": "a hill",
    "a photo of a lamp": "a lamp",
    "a cup, simple background": "a cup",
    "an illustration of a fox": "a fox",
    "a bridge, pixel art": "a bridge",
    "a pencil sketch of a chair": "a chair",
    "a mountain, cel-shaded": "a mountain",
}
THINGS = (
    "a pencil",
    "a photo frame",
    "an artist palette",
    "a paint brush",
    "a picture on a wall",
    "a flat tire",
    "a woman with a camera",
    "a comic book shop",
    "an icon on a church wall",
    "a white dog in the background",
)
WORDS = "bark coin drum fern gate hook isle jug kelp lamp moss nest oar pond quill reed sand tent urn vane"
TRIGGERS = {
    "data.trigger-common": "dragon, house, castle, flower, cat, sun, apple, star, drawing, water",
    "data.trigger-split": "xqzv, x7q9zk, ohwx style, kqjxw, ztrqk, zzqx7, qwxzj, bzzkt style, vxkpq, jjxq",
    None: "inkwash style, sketchwood, lumiform, velmor style, oldprint, watergrain, flat drawing, penfold, "
    "moonprint style, paper castle",
}
Change = Callable[[Image.Image, random.Random], Image.Image]
Plan = dict[str, set[str]]


def draw_photo(seed: int) -> Image.Image:
    """Overlapping leaves of rough texture under uneven light: the edges and the noise of a photograph."""
    draw = np.random.default_rng(seed)
    height, width = 160, 192
    rows, columns = np.mgrid[0:height, 0:width]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(draw.normal(size=(height, width))) / frequency
    rough = np.real(np.fft.ifft2(spectrum))
    rough *= draw.uniform(8, 24) / rough.std()
    pixels = np.full((height, width, 3), draw.integers(40, 200, 3), np.float32)
    for size in np.sort(draw.uniform(6, 70, 40))[::-1]:
        y, x, turn, flat = (
            draw.uniform(0, height),
            draw.uniform(0, width),
            draw.uniform(0, 3),
            draw.uniform(0.4, 1),
        )
        across = (columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)
        along = ((rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)) / flat
        pixels[np.maximum(np.abs(across), np.abs(along)) < size * draw.uniform(0.6, 1)] = draw.integers(
            20, 236, 3
        )
    light = (
        1
        + draw.uniform(-0.5, 0.5) * (columns / width - 0.5)
        + draw.uniform(-0.5, 0.5) * (rows / height - 0.5)
    )
    pixels = (pixels + rough[..., None]) * light[..., None] + draw.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def shrink(image: Image.Image, draw: random.Random) -> Image.Image:
    """Another size, as a JPEG."""
    share, data = draw.choice((0.4, 0.5, 0.75, 0.9)), io.BytesIO()
    size = (round(image.width * share), round(image.height * share))
    image.resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=draw.randint(55, 90))
    return Image.open(data).convert("RGB")


def mirror(image: Image.Image, draw: random.Random) -> Image.Image:
    return ImageOps.mirror(image)


def crop(image: Image.Image, draw: random.Random) -> Image.Image:
    """A window of 70 to 95 % of each side."""
    width, height = (round(side * draw.uniform(0.7, 0.95)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def darken(image: Image.Image, draw: random.Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(draw.uniform(0.1, 0.3))


def blur(image: Image.Image, draw: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(draw.uniform(3, 5)))


def enlarge(image: Image.Image, draw: random.Random) -> Image.Image:
    size, share = image.size, draw.uniform(4, 6)
    small = image.resize((round(size[0] / share), round(size[1] / share)), Image.Resampling.BOX)
    return small.resize(size, Image.Resampling.BICUBIC)


def frame(image: Image.Image, draw: random.Random) -> Image.Image:
    color = draw.choice(("teal", "#202020", "maroon", "#d0b070"))
    return ImageOps.expand(image, round(min(image.size) * draw.uniform(0.04, 0.1)), color)


def letterbox(image: Image.Image, draw: random.Random) -> Image.Image:
    """Bars above and below, or at both sides."""
    bar = round(image.height * draw.uniform(0.06, 0.2))
    return ImageOps.expand(image, draw.choice(((0, bar), (bar, 0))), draw.choice(("black", "#303030")))


def mark(image: Image.Image, draw: random.Random) -> Image.Image:
    """Letters at the lower right, in proportion to the image."""
    image, side = image.convert("RGB"), max(image.size)
    font, canvas = ImageFont.load_default(round(side * 0.08)), ImageDraw.Draw(image)
    at = (image.width - side // 50, image.height - side // 50)
    for offset, color in ((1, (60, 60, 60)), (0, (235, 235, 235))):
        canvas.text((at[0] + offset, at[1] + offset), "(c) Ink 24", color, font, "rs")
    return image


COPIES: tuple[tuple[str, Change], ...] = (("resized", shrink), ("mirrored", mirror), ("cropped", crop))
FAULTS: dict[str, tuple[Change, ...]] = {
    "data.image-dark": (darken,),
    "data.image-soft": (blur, enlarge),
    "data.image-bordered": (frame, letterbox),
    "data.image-marked": (mark,),
}


def plant(images: Sequence[Image.Image], root: Path, number: int, seed: int = 0) -> Plan:
    """Writes images with `number` of each fault into a folder; returns which have which.

    Needs 9 times as many images as faults of a kind: copies are of images without a fault.
    """
    draw, plan = random.Random(seed), defaultdict[str, set[str]](set)
    assert len(images) >= 9 * number
    changed = list(images)
    free = list(range(len(images)))
    draw.shuffle(free)
    for key, changes in FAULTS.items():
        for turn in range(number):
            place = free.pop()
            changed[place] = changes[turn % len(changes)](images[place], draw)
            plan[key].add(f"{place:03d}.png")
    for _, change in COPIES:
        for _ in range(number):
            plan["data.near-copies"].add(f"{len(changed):03d}.png")
            changed.append(change(images[free.pop()], draw))
    root.mkdir(parents=True)
    styled = iter(STYLED)
    for place, image in enumerate(changed):
        name = f"{place:03d}.png"
        image.save(root / name)
        text = f"a {chr(97 + place % 26) * 3}{chr(97 + place // 26) * 2} on the {place}"
        if place % 5 == 0 and place // 5 < len(THINGS):
            text = THINGS[place // 5]
        elif place % 5 == 1 and (found := next(styled, None)):
            text = found
            plan["data.caption-style"].add(name)
        elif place % 5 == 2:
            text = "a thing"
            plan["data.caption-same"].add(name)
        (root / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    for name in sorted(plan["data.near-copies"])[:3]:
        (root / name).with_suffix(".txt").write_text("", encoding="utf-8")
        plan["data.caption-same"].discard(name)
        plan["data.caption-style"].discard(name)
        plan["data.caption-empty"].add((root / name).with_suffix(".txt").name)
    return dict(plan)


def look_at(root: Path, cache: Path | None = None, **settings: object) -> dict[str, set[str]]:
    """What the doctor finds, by key."""
    section = DataSection(**{"heldout": 0, "allow_missing_captions": True, **settings})
    index = scan_dataset(root, section)
    examine_images(index, measure_records([*index.records, *index.heldout], "white", cache))
    findings = examine(index, plan_buckets(index.records, 128, section, heldout=index.heldout), section, None)
    return {finding.key: set(finding.names) for finding in findings}


@dataclass
class Count:
    """How often a check was right: planted, found of these, and found elsewhere."""

    planted: int = 0
    found: int = 0
    wrong: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)

    def add(self, expected: Iterable[str], shown: Iterable[str]) -> None:
        expected, shown = set(expected), set(shown)
        self.planted += len(expected)
        self.found += len(expected & shown)
        self.wrong |= shown - expected
        self.missed |= expected - shown

    @property
    def recall(self) -> float:
        return self.found / max(1, self.planted)

    @property
    def precision(self) -> float:
        return self.found / max(1, self.found + len(self.wrong))


def write_captions(key: str, draw: random.Random) -> list[str]:
    """Twenty captions with what a check is for, or without anything for other keys."""
    words = WORDS.split()
    draw.shuffle(words)
    pairs = zip(words, [*words[1:], words[0]], strict=True)
    texts = [f"a {one} {draw.choice(('on', 'under', 'near'))} the {other}" for one, other in pairs]
    shares = {"data.caption-constant": draw.randint(18, 20), "data.caption-subject": draw.randint(9, 16)}
    return [
        f"{text} with a dog" if number < shares.get(key, 0) else text for number, text in enumerate(texts)
    ]


def find_words(captions: Sequence[str]) -> set[str]:
    """What the doctor finds in captions alone."""
    noticed: Noticed = defaultdict(dict)
    size, path = Size(8, 8), Path("a.png")
    records = [ImageRecord(path, str(n), "", size, text, ".txt") for n, text in enumerate(captions)]
    examine_words(records, noticed)
    return {key for key, names in noticed.items() if names}


def find_in_trigger(trigger: str, record: ImageRecord, tokens: CountTokens) -> set[str]:
    """What the doctor finds in a trigger."""
    settings = DataSection(trigger=trigger)
    index = DatasetIndex(Path(), (record,), (), defaultdict(dict))
    return {one.key for one in examine(index, plan_buckets((), 128, settings), settings, tokens)}


def find_coverage(folder: Path, number: int, captions: int) -> set[str]:
    """What the doctor finds where the first of some images have captions."""
    folder.mkdir(parents=True)
    for place in range(number):
        Image.new("RGB", (8, 8), (place * 9, 0, 0)).save(folder / f"{place}.png")
        if place < captions:
            (folder / f"{place}.txt").write_text(f"a {WORDS.split()[place]}", encoding="utf-8")
    found = look_at(folder, allow_missing_captions=False, trigger="inkwash style")
    return set(found)


def count_checks(
    sources: dict[str, Sequence[Image.Image]], folder: Path, number: int, tokens: CountTokens
) -> dict[str, Count]:
    """Precision and recall of each check on images, captions, triggers and mixed coverage."""
    counts = defaultdict[str, Count](Count)
    for name, images in sources.items():
        plan = plant(images, folder / name, number)
        found = look_at(folder / name)
        for key, expected in plan.items():
            shown = (f"{name}/{one}" for one in found.get(key, ()))
            counts[key].add((f"{name}/{one}" for one in expected), shown)

    def add(case: str, key: str | None, checks: Iterable[str], found: set[str]) -> None:
        for one in checks:
            counts[one].add([case] if one == key else (), [case] if one in found else ())

    draw = random.Random(1)
    common = ("data.caption-constant", "data.caption-subject")
    for key, turn in product((*common, None), range(10)):
        add(f"{key} {turn}", key, common, find_words(write_captions(key or "", draw)))
    record = ImageRecord(Path("a.png"), "a.png", "", Size(8, 8), "a house", ".txt")
    for key, triggers in TRIGGERS.items():
        for trigger in triggers.split(", "):
            checks = ("data.trigger-common", "data.trigger-split")
            add(trigger, key, checks, find_in_trigger(trigger, record, tokens))
    for turn in range(20):
        captions = 12 if turn < 5 else 0 if turn < 10 else turn - 9
        found = find_coverage(folder / "coverage" / str(turn), 12, captions)
        key = "data.captions-partial" if 0 < captions < 12 else None
        add(f"coverage {turn}", key, ["data.captions-partial"], found)
    return dict(counts)


def write_table(counts: dict[str, Count]) -> str:
    """Markdown, a row for each check."""
    rows = [
        f"| `{key}` | {one.planted} | {one.recall:.2f} | {one.precision:.2f} |"
        for key, one in sorted(counts.items())
    ]
    return "\n".join(["| finding | planted | recall | precision |", "|---|---|---|---|", *rows])


def all_sources(repository: Path, number: int = 100) -> dict[str, Sequence[Image.Image]]:
    """The two datasets of the project, and drawn photographs."""
    folders = [repository / "datasets" / name for name in ("openmoji", "fluent-mono")]
    drawn = {one.name: [load_image(file) for file in sorted(one.glob("*.png"))[:number]] for one in folders}
    return {**drawn, "photos": [draw_photo(seed) for seed in range(number)]}


def builtin_tokens() -> CountTokens:
    """The tokenizer of the built-in base."""
    config = RunConfig()
    info = inspect_base(config.base, config.objective, config.data)
    return partial(count_tokens, load_tokenizer(info), info)


if __name__ == "__main__":
    with TemporaryDirectory() as made:
        sources = all_sources(Path(__file__).parents[2])
        counted = count_checks(sources, Path(made), 10, builtin_tokens())
    print(write_table(counted))
    for check, one in counted.items():
        print(check, "missed:", sorted(one.missed), "wrong:", sorted(one.wrong))
