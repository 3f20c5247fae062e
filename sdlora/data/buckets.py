"""Aspect-ratio buckets: sizes of about equal area, and the crops of each image for its bucket."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sdlora.config import DataSection
from sdlora.data.records import ImageRecord, Size
from sdlora.seeds import keyed_random

STEPS = (64, 32, 16, 8)
MAX_LOSS = 0.08
MAX_ASPECT = 4.0
MERGE_LOSS = 0.15
"""Share of an image that may be lost when it moves to a bucket with more samples (`data.merge_buckets`)."""


@dataclass(frozen=True, slots=True)
class Crop:
    """How an image becomes a sample: scale to `resized`, crop `size` at (left, top), then mirror.

    `colors` are the changes of brightness (the exponent's inverse), contrast and saturation, 1 being none,
    with `data.color_jitter`.
    """

    resized: Size
    left: int
    top: int
    size: Size
    flipped: bool = False
    colors: tuple[float, float, float] | None = None

    @property
    def lost_share(self) -> float:
        """Share of the area of the image that is cut off."""
        return 1.0 - self.size.area / self.resized.area

    @property
    def shown_left(self) -> int:
        """Pixels removed at the left after mirroring, as the model sees it."""
        return self.resized.width - self.size.width - self.left if self.flipped else self.left


@dataclass(frozen=True)
class BucketPlan:
    """The bucket and the crops of every training image.

    Attributes:
        resolution: Side of the square with the area of the buckets, in pixels.
        step: Sides of buckets are multiples of this, in pixels.
        crops: By image name, for each resolution, mirrored ones last. Held-out images have one center crop.
        moved: (image name, bucket that it left, its bucket), with `data.merge_buckets`.
        least: Samples per epoch that a bucket should have, `data.merge_buckets`.
    """

    resolution: int
    step: int
    records: tuple[ImageRecord, ...]
    crops: Mapping[str, tuple[Crop, ...]]
    moved: tuple[tuple[str, Size, Size], ...] = ()
    least: int = 0

    def bucket_of(self, name: str) -> Size:
        return self.crops[name][0].size

    def buckets_of(self, name: str) -> list[Size]:
        """The bucket at each resolution, without repetitions."""
        return list(dict.fromkeys(crop.size for crop in self.crops[name]))

    def table(self) -> list[tuple[Size, int, int]]:
        """Rows (bucket, images, samples per epoch) of the training images, by size."""
        repeats: dict[Size, list[int]] = defaultdict(list)
        for record in self.records:
            for size in self.buckets_of(record.name):
                repeats[size].append(record.repeats)
        return [(size, len(repeats[size]), sum(repeats[size])) for size in sorted(repeats)]

    def lost_share(self, name: str) -> float:
        """Share of the area of an image that its crop removes."""
        return self.crops[name][0].lost_share

    def small(self) -> list[tuple[Size, int]]:
        """(bucket, samples) of those that still have fewer than `least`."""
        return [(size, samples) for size, _, samples in self.table() if samples < self.least]

    def upscale(self, record: ImageRecord) -> float:
        """Factor by which an image is scaled to cover its bucket; above 1, it is enlarged."""
        return self.crops[record.name][0].resized.width / record.size.width


def plan_buckets(
    records: Sequence[ImageRecord],
    resolution: int,
    settings: DataSection,
    *,
    heldout: Sequence[ImageRecord] = (),
    min_step: int = 8,
    seed: int = 0,
) -> BucketPlan:
    """Assigns a bucket and crops to each image.

    Args:
        records: The training images.
        resolution: Side of the square with the area of the buckets, in pixels.
        settings: How to crop, and whether to mirror.
        heldout: Images that get one center crop.
        min_step: The base needs sides that are multiples of this, in pixels.
        seed: Keys the random crops, together with each image's digest.
    """
    step = choose_step(resolution, min_step)
    crops: dict[str, list[Crop]] = defaultdict(list)
    moved: list[tuple[str, Size, Size]] = []
    for side in dict.fromkeys((resolution, *settings.more_resolutions)):
        own_step = choose_step(side, min_step)
        buckets = list_buckets(side, own_step)
        for record in heldout if side == resolution else ():
            crops[record.name].append(_center_crop(record.size, buckets, side))
        centers = {}
        for record in records:
            centers[record.name] = _center_crop(record.size, buckets, side)
            if settings.no_upscale and centers[record.name].resized.width > record.size.width:
                centers[record.name] = _own_size_crop(record.size, own_step)
        others = _merge_small(records, centers, settings)
        moved += [(name, centers[name].size, crop.size) for name, crop in sorted(others.items())]
        centers |= others
        for record in records:
            variants = _variants(record, centers[record.name], settings, seed)
            mirrored = [replace(crop, flipped=True) for crop in variants] if settings.flip else []
            crops[record.name] += [crop for crop in (*variants, *mirrored) if crop not in crops[record.name]]
    made = {name: tuple(found) for name, found in crops.items()}
    return BucketPlan(resolution, step, tuple(records), made, tuple(moved), settings.merge_buckets)


def choose_step(resolution: int, min_step: int = 8) -> int:
    """The largest of 64, 32, 16, 8 px, multiples of `min_step`, for which no usual image loses 8 %.

    If there is none, `min_step`.
    """
    steps = [step for step in STEPS if step % min_step == 0]
    return next((step for step in steps if worst_loss(resolution, step) < MAX_LOSS), min_step)


def list_buckets(resolution: int, step: int) -> list[Size]:
    """All buckets: for each side, the other side that comes nearest to the area, in both orientations."""
    square = max(1, round(resolution / step)) * step
    sizes = {Size(square, square)}
    for multiple in range(1, int(2 * resolution / step) + 1):
        long = multiple * step
        short = max(1, round(resolution**2 / long / step)) * step
        if short <= long <= MAX_ASPECT * short:
            sizes |= {Size(long, short), Size(short, long)}
    return sorted(sizes, key=lambda size: (size.aspect, size))


def worst_loss(resolution: int, step: int) -> float:
    """Largest share of area lost by an image of aspect 1:2 to 2:1.

    The worst image between two neighbouring buckets has the geometric mean of their aspects.
    """
    aspects = sorted({size.aspect for size in list_buckets(resolution, step)})
    middles = [(low * high) ** 0.5 for low, high in pairwise(aspects)]
    worst = [0.5, 2.0, *(aspect for aspect in middles if 0.5 <= aspect <= 2.0)]
    return max(min(_loss(aspect, bucket) for bucket in aspects) for aspect in worst)


def _loss(aspect: float, bucket: float) -> float:
    return 1.0 - min(aspect / bucket, bucket / aspect)


def _center_crop(size: Size, buckets: Iterable[Size], resolution: int) -> Crop:
    """A crop to the bucket that loses least; of equal ones, to the one nearer to the area."""

    def badness(bucket: Size) -> tuple[float, int, Size]:
        return round(_loss(size.aspect, bucket.aspect), 9), abs(bucket.area - resolution**2), bucket

    return _cover(size, min(buckets, key=badness))


def _cover(size: Size, bucket: Size) -> Crop:
    """The center crop of an image that is scaled to cover a bucket."""
    scale = max(bucket.width / size.width, bucket.height / size.height)
    width = max(bucket.width, round(size.width * scale))
    height = max(bucket.height, round(size.height * scale))
    return Crop(Size(width, height), (width - bucket.width) // 2, (height - bucket.height) // 2, bucket)


def _own_size_crop(size: Size, step: int) -> Crop:
    """A crop of at most the image's own size, with sides that are multiples of the step, up to 4:1.

    Only an image smaller than a step is enlarged.
    """
    longest = MAX_ASPECT * max(step, min(size.width, size.height))
    width, height = (int(min(side, longest)) // step * step or step for side in (size.width, size.height))
    bucket = Size(width, height)
    scale = max(1.0, bucket.width / size.width, bucket.height / size.height)
    resized = Size(round(size.width * scale), round(size.height * scale))
    left, top = (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2
    return Crop(resized, left, top, bucket)


def _merge_small(
    records: Sequence[ImageRecord], centers: Mapping[str, Crop], settings: DataSection
) -> dict[str, Crop]:
    """New crops for the images of buckets with fewer samples than `data.merge_buckets`, the loneliest first.

    All images of a bucket move, each to a bucket that then has enough if one is near, else to another near
    one; or all of them stay.
    """
    least, moved = settings.merge_buckets, dict[str, Crop]()
    members: dict[Size, list[ImageRecord]] = defaultdict(list)
    for record in records if least else ():
        members[centers[record.name].size].append(record)

    def samples(bucket: Size) -> tuple[int, Size]:
        return sum(record.repeats for record in members[bucket]), bucket

    stays: set[Size] = set()
    while small := [size for size in members if size not in stays and samples(size)[0] < least]:
        number, bucket = min(map(samples, small))
        leaving = members.pop(bucket)
        enough = [size for size in members if samples(size)[0] + number >= least]
        new: dict[str, Crop] = {}
        for record in leaving:
            size, center = record.size, centers[record.name]
            crop = _nearest(size, center, enough, settings) or _nearest(size, center, members, settings)
            new |= {record.name: crop} if crop else {}
        if len(new) < len(leaving):
            members[bucket] = leaving
            stays.add(bucket)
            continue
        moved |= new
        for record in leaving:
            members[new[record.name].size].append(record)
    return moved


def _nearest(size: Size, center: Crop, buckets: Iterable[Size], settings: DataSection) -> Crop | None:
    """The crop to one of the buckets that loses least, at most `MERGE_LOSS`; None if there is none."""
    widest = max(size.width, center.resized.width) if settings.no_upscale else math.inf
    crops = [
        crop
        for crop in (_cover(size, bucket) for bucket in buckets)
        if crop.lost_share <= MERGE_LOSS
        and crop.resized.width <= widest
        and crop.resized.area >= (1 - MERGE_LOSS) * center.resized.area
    ]
    return min(crops, key=lambda crop: (crop.lost_share, crop.size), default=None)


def _variants(record: ImageRecord, center: Crop, settings: DataSection, seed: int) -> list[Crop]:
    """Fixed crops, at random offsets or with colors of their own if asked; equal ones are kept once.

    The first has the colors of the image.
    """
    crops = [center] * settings.num_crops
    if settings.crop == "random":
        draws = keyed_random(seed, "crop", record.digest)
        right, bottom = center.resized.width - center.size.width, center.resized.height - center.size.height
        crops = [replace(crop, left=draws.randint(0, right), top=draws.randint(0, bottom)) for crop in crops]
    if (most := settings.color_jitter) > 0:
        draws = keyed_random(seed, "colour", record.digest)
        for number in range(1, len(crops)):
            brightness, contrast, saturation = (round(draws.uniform(1 - most, 1 + most), 3) for _ in range(3))
            crops[number] = replace(crops[number], colors=(brightness, contrast, saturation))
    return list(dict.fromkeys(crops))
