"""Aspect-ratio buckets: sizes of about equal area, and the crops of each image for its bucket."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Crop:
    """How an image becomes a sample: scale to `resized`, crop `size` at (left, top), then mirror."""

    resized: Size
    left: int
    top: int
    size: Size
    flipped: bool = False

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
    """

    resolution: int
    step: int
    records: tuple[ImageRecord, ...]
    crops: Mapping[str, tuple[Crop, ...]]

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
        crop = self.crops[name][0]
        return 1.0 - crop.size.area / crop.resized.area

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
    for side in dict.fromkeys((resolution, *settings.more_resolutions)):
        own_step = choose_step(side, min_step)
        buckets = list_buckets(side, own_step)
        for record in heldout if side == resolution else ():
            crops[record.name].append(_center_crop(record.size, buckets, side))
        for record in records:
            center = _center_crop(record.size, buckets, side)
            if settings.no_upscale and center.resized.width > record.size.width:
                center = _own_size_crop(record.size, own_step)
            variants = (
                [center] if settings.crop == "center" else _random_crops(record, center, settings, seed)
            )
            mirrored = [replace(crop, flipped=True) for crop in variants] if settings.flip else []
            crops[record.name] += [crop for crop in (*variants, *mirrored) if crop not in crops[record.name]]
    return BucketPlan(resolution, step, tuple(records), {name: tuple(made) for name, made in crops.items()})


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

    bucket = min(buckets, key=badness)
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


def _random_crops(record: ImageRecord, center: Crop, settings: DataSection, seed: int) -> list[Crop]:
    """Fixed crops at random offsets; equal ones are kept once."""
    draws = keyed_random(seed, "crop", record.digest)
    right, bottom = center.resized.width - center.size.width, center.resized.height - center.size.height
    crops = (
        replace(center, left=draws.randint(0, right), top=draws.randint(0, bottom))
        for _ in range(settings.num_crops)
    )
    return list(dict.fromkeys(crops))
