"""The order of training as laws that hold for any dataset, batch, process count and accumulation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sdlora.config import DataSection
from sdlora.data.batches import BatchOrder, Sample, split_micro_batches
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.records import ImageRecord, Size


@dataclass(frozen=True)
class Split:
    """How a global batch is spread: over processes, and in each over micro-batches."""

    num_processes: int
    accumulate: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        return self.num_processes * self.accumulate * self.batch_size


@dataclass(frozen=True)
class Case:
    """A dataset and the settings that its order depends on."""

    records: list[ImageRecord]
    plan: BucketPlan
    settings: DataSection
    seed: int

    def order(self, global_batch: int) -> BatchOrder:
        return BatchOrder(self.records, self.plan, self.settings, global_batch=global_batch, seed=self.seed)


sides = st.integers(8, 3000) | st.sampled_from([64, 512, 1024])
# Few different images: copies share a digest, and several share a bucket.
images = st.tuples(st.tuples(sides, sides), st.integers(1, 5), st.integers(0, 8))
splits = st.builds(Split, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any folder: sizes, repeats, copies; crops, flips and dropout on or off."""
    records = [
        ImageRecord(
            path=Path(f"/nowhere/{number}.png"),
            name=f"{number}.png",
            digest=f"{digest:064x}",
            size=Size(*size),
            caption=f"image {number}",
            caption_source=".txt",
            repeats=repeats,
        )
        for number, (size, repeats, digest) in enumerate(draw(st.lists(images, min_size=1, max_size=12)))
    ]
    settings = DataSection(
        crop=draw(st.sampled_from(["center", "random"])),
        flip=draw(st.booleans()),
        caption_dropout=draw(st.sampled_from([0.0, 0.5])),
    )
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(records, plan_buckets(records, 64, settings, seed=seed), settings, seed)


def shares_of(samples: list[Sample], split: Split) -> list[list[list[Sample]]]:
    """The micro-batches of every process."""
    return [
        split_micro_batches(
            samples, batch_size=split.batch_size, process_index=place, num_processes=split.num_processes
        )
        for place in range(split.num_processes)
    ]


@given(cases(), splits, st.integers(0, 3))
def test_an_epoch_is_exact_for_any_split(case: Case, split: Split, epoch: int) -> None:
    """R-15, R-16: over all processes each image `repeats` times an epoch, and no step of two shapes."""
    order = case.order(split.global_batch)
    seen: Counter[str] = Counter()
    first = epoch * order.steps_per_epoch
    for step in range(first, first + order.steps_per_epoch):
        shares = shares_of(order.step(step), split)
        batches = [batch for share in shares for batch in share]
        samples = [sample for batch in batches for sample in batch]
        seen.update(sample.record.name for sample in samples)
        assert 1 <= len(samples) <= split.global_batch
        assert len({sample.crop.size for sample in samples}) == 1
        assert all(sample.crop.size == case.plan.bucket_of(sample.record.name) for sample in samples)
        assert all(len(batch) <= split.batch_size for batch in batches)
        # All processes take part in each exchange of gradients, or a run with several would hang.
        assert len({len(share) for share in shares}) == 1
        assert 1 <= len(shares[0]) <= split.accumulate
    assert seen == {record.name: record.repeats for record in case.records}


@given(cases(), splits, st.data())
def test_splits_of_one_global_batch_train_the_same(case: Case, split: Split, data: st.DataObject) -> None:
    """R-16, R-17: whatever the split of a global batch, a step has the same samples, draws and numbers."""
    order = case.order(split.global_batch)
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    divisors = [number for number in range(1, split.global_batch + 1) if split.global_batch % number == 0]
    processes = data.draw(st.sampled_from(divisors))
    other = Split(processes, 1, split.global_batch // processes)
    found = [
        sorted(
            (sample for share in shares_of(order.step(step), way) for batch in share for sample in batch),
            key=lambda sample: sample.index,
        )
        for way in (split, other)
    ]
    assert found[0] == found[1] == order.step(step)


@given(cases(), st.integers(1, 20), st.data())
def test_an_order_starts_anywhere(case: Case, global_batch: int, data: st.DataObject) -> None:
    """R-03, R-04: any step asked first is the step of the straight run; numbers count every sample once."""
    straight = case.order(global_batch)
    count = straight.steps_per_epoch * 2 + 1
    steps = [straight.step(step) for step in range(count)]
    indices = [sample.index for samples in steps for sample in samples]
    assert indices == list(range(len(indices)))
    for step in data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4)):
        assert case.order(global_batch).step(step) == steps[step]
