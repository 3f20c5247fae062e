"""The order of training: the samples of each step, and their split into micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from sdlora.config import DataSection
from sdlora.data.buckets import BucketPlan, Crop
from sdlora.data.captions import caption_pipeline
from sdlora.data.records import ImageRecord, Size
from sdlora.errors import DataError
from sdlora.seeds import keyed_random

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as one step sees it, with the crop and the caption drawn for it; a dropped caption is empty.

    `index` counts the samples of the run and keys the random draws.
    """

    index: int
    record: ImageRecord
    crop: Crop
    caption: str


class BatchOrder:
    """The samples of every step, a function of (seed, epoch, global batch) alone.

    Within an epoch each image appears exactly `repeats` times, no step mixes shapes, and the last step of a
    bucket may be short. There is no state: any step can be requested at any time.

    Args:
        global_batch: Samples per step, over all processes and micro-batches.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        plan: BucketPlan,
        settings: DataSection,
        *,
        global_batch: int,
        seed: int,
    ) -> None:
        if not records:
            raise DataError("no images to train on; pass a folder with images", key="data.no-images")
        assert global_batch >= 1
        self._plan = plan
        self._captions = caption_pipeline(settings)
        self._global_batch = global_batch
        self._seed = seed
        # The order must not depend on the order of the files.
        self._records = sorted(records, key=lambda record: (record.digest, record.name))
        self._buckets: dict[Size, list[int]] = defaultdict(list)
        for number, record in enumerate(self._records):
            for size in plan.buckets_of(record.name):
                self._buckets[size] += [number] * record.repeats
        self.steps_per_epoch = sum(-(-len(bucket) // global_batch) for bucket in self._buckets.values())
        self.samples_per_epoch = sum(len(bucket) for bucket in self._buckets.values())
        self._epoch = -1
        self._steps: list[tuple[int, tuple[Size, list[int]]]] = []

    def step(self, step: int) -> list[Sample]:
        """The samples of an optimizer step, counted from 0; all have the same shape."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._order(epoch)
        before, (size, numbers) = self._steps[place]
        first = epoch * self.samples_per_epoch + before
        records = [self._records[number] for number in numbers]
        return [self._draw(first + offset, record, size) for offset, record in enumerate(records)]

    def _order(self, epoch: int) -> list[tuple[int, tuple[Size, list[int]]]]:
        """(samples of the epoch before it, its bucket and record numbers) for each step of an epoch."""
        draws = keyed_random(self._seed, "order", epoch)
        steps: list[tuple[Size, list[int]]] = []
        for size in sorted(self._buckets):
            numbers = list(self._buckets[size])
            draws.shuffle(numbers)
            starts = range(0, len(numbers), self._global_batch)
            steps += [(size, numbers[start : start + self._global_batch]) for start in starts]
        draws.shuffle(steps)
        counts = (len(numbers) for _, numbers in steps)
        return list(zip(accumulate(counts, initial=0), steps, strict=False))

    def _draw(self, index: int, record: ImageRecord, size: Size) -> Sample:
        """Crop and caption have separate generators, so that neither changes the other."""
        crops = [crop for crop in self._plan.crops[record.name] if crop.size == size]
        crop = keyed_random(self._seed, "variant", index).choice(crops)
        return Sample(index, record, crop, self._captions.draw(record, seed=self._seed, index=index))


def split_micro_batches(
    samples: Sequence[T], *, batch_size: int, process_index: int, num_processes: int
) -> list[list[T]]:
    """Micro-batches of this process in a step.

    Every process gets the same number, since all take part in each exchange of gradients; in a short step
    some are smaller or empty.
    """
    own = list(samples[process_index::num_processes])
    largest = -(-len(samples) // num_processes)
    count = max(1, -(-largest // batch_size))
    return [own[i * batch_size : (i + 1) * batch_size] for i in range(count)]
