"""The order is a function of (seed, epoch, global batch), exact to the count (R-04, R-15, R-16)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sdlora.config import DataSection
from sdlora.data.batches import BatchOrder, split_micro_batches
from sdlora.data.buckets import plan_buckets
from sdlora.data.cache import TensorCache, text_key
from sdlora.data.records import Size
from sdlora.errors import DataError
from tests.checks import raises

SIZES = ((512, 512),) * 7 + ((640, 320),) * 5 + ((320, 640),) * 3


def make_order(records, global_batch: int = 4, seed: int = 0, **settings: object) -> BatchOrder:
    """An order over the given records at 128 px."""
    section = DataSection(**settings)
    plan = plan_buckets(records, 128, section, seed=seed)
    return BatchOrder(records, plan, section, global_batch=global_batch, seed=seed)


@pytest.mark.parametrize("global_batch", [1, 3, 4, 100])
def test_every_image_exactly_once_an_epoch(make_records, global_batch: int) -> None:
    """R-15, R-16: each image N times an epoch, no step of two shapes, and the counts as announced."""
    records = [replace(record, repeats=1 + place % 3) for place, record in enumerate(make_records(*SIZES))]
    order = make_order(records, global_batch)
    per_bucket: Counter[Size] = Counter()
    for record in records:
        per_bucket[record.size] += record.repeats
    expected = sum(-(-samples // global_batch) for samples in per_bucket.values())
    assert order.steps_per_epoch == expected
    assert order.samples_per_epoch == sum(record.repeats for record in records)
    for epoch in range(3):
        steps = [order.step(epoch * expected + place) for place in range(expected)]
        assert all(len({sample.crop.size for sample in step}) == 1 for step in steps)
        assert all(1 <= len(step) <= global_batch for step in steps)
        seen = Counter(sample.record.name for step in steps for sample in step)
        assert seen == {record.name: record.repeats for record in records}


def test_index_counts_samples(make_records) -> None:
    """R-04: the sample's number counts every sample of the run once, short steps with their true length."""
    order = make_order(make_records(*SIZES))
    numbers = [sample.index for step in range(3 * order.steps_per_epoch) for sample in order.step(step)]
    assert numbers == list(range(3 * len(SIZES)))


def test_any_step_can_be_asked_first(make_records) -> None:
    """R-03, R-04: the order carries nothing from step to step, and ignores the ambient generators."""
    records = make_records(*SIZES)
    straight = make_order(records, crop="random", flip=True, caption_dropout=0.5)
    expected = [straight.step(step) for step in range(20)]
    random.seed(99)
    torch.manual_seed(99)
    for step in (19, 3, 11, 0):
        fresh = make_order(list(reversed(records)), crop="random", flip=True, caption_dropout=0.5)
        assert fresh.step(step) == expected[step]
    state = random.getstate()
    straight.step(5)
    assert random.getstate() == state


def test_epochs_and_seeds_differ(make_records) -> None:
    """R-04: another epoch or seed has another order; buckets are mixed within an epoch."""
    records = make_records(*((512, 512),) * 30, *((640, 320),) * 30)

    def names(order: BatchOrder, epoch: int) -> list[str]:
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        return [sample.record.name for step in steps for sample in order.step(step)]

    order, other = make_order(records), make_order(records, seed=1)
    assert names(order, 0) != names(order, 1)
    assert names(order, 0) != names(other, 0)
    shapes = [order.step(step)[0].crop.size for step in range(order.steps_per_epoch)]
    assert sum(one != two for one, two in pairwise(shapes)) > 2


def test_order_ignores_names(make_records) -> None:
    """R-04: renamed files give the same run."""
    records = make_records(*SIZES)
    renamed = [replace(record, name=f"z{100 - place}.png") for place, record in enumerate(records)]
    one, two = make_order(records), make_order(renamed)
    for step in range(one.steps_per_epoch):
        digests = [[sample.record.digest for sample in order.step(step)] for order in (one, two)]
        assert digests[0] == digests[1]


def test_dropout_gives_the_empty_caption(make_records) -> None:
    """R-35: dropout draws from the sample's own generator, at its share, and works with a text cache."""
    records = make_records(*((512, 512),) * 50)
    order = make_order(records, caption_dropout=0.2)
    samples = [sample for step in range(40 * order.steps_per_epoch) for sample in order.step(step)]
    share = sum(sample.caption == "" for sample in samples) / len(samples)
    assert abs(share - 0.2) < 0.03
    assert {sample.caption for sample in samples} == {"", "a cat"}
    cache = TensorCache(None)
    keys = {sample.caption: text_key(sample.caption, encoder_digest="aa", dtype="fp32") for sample in samples}
    for number, key in enumerate(keys.values()):
        cache.put(key, {"hidden": torch.full((2,), float(number))})
    assert len(keys) == 2
    assert all(cache.contains(keys[sample.caption]) for sample in samples)
    never = make_order(records, caption_dropout=0)
    assert all(sample.caption for step in range(50) for sample in never.step(step))


def test_dropout_does_not_move_other_draws(make_records) -> None:
    """R-04: crop and dropout have generators of their own."""
    records = make_records(*((2000, 300),) * 20)
    with_dropout = make_order(records, crop="random", caption_dropout=0.5)
    without = make_order(records, crop="random", caption_dropout=0)
    for step in range(10):
        crops = [[sample.crop for sample in order.step(step)] for order in (with_dropout, without)]
        assert crops[0] == crops[1]


def test_variants_and_flips_are_drawn(make_records) -> None:
    """R-20: over the epochs every fixed crop and its mirror image appears, and nothing else."""
    records = make_records((2000, 300))
    order = make_order(records, crop="random", flip=True)
    crops = plan_buckets(records, 128, DataSection(crop="random", flip=True)).crops["000.png"]
    seen = Counter(sample.crop for step in range(400) for sample in order.step(step))
    assert set(seen) == set(crops)
    assert min(seen.values()) > 25
    assert abs(sum(count for crop, count in seen.items() if crop.flipped) / 400 - 0.5) < 0.1


def test_no_images() -> None:
    """R-26: an order over nothing is an error, not an endless run."""
    with raises(DataError, "data.no-images"):
        make_order([])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_split_micro_batches(count: int, num_processes: int, batch_size: int) -> None:
    """R-16, R-17: every sample once over all processes, equal numbers of micro-batches, none too large."""
    shares = [
        split_micro_batches(
            range(count), batch_size=batch_size, process_index=place, num_processes=num_processes
        )
        for place in range(num_processes)
    ]
    assert sorted(sample for share in shares for batch in share for sample in batch) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == max(1, -(-count // (num_processes * batch_size)))
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    loads = [sum(map(len, share)) for share in shares]
    assert max(loads) - min(loads) <= 1


def test_empty_micro_batches() -> None:
    """R-17: a process without samples takes part with an empty micro-batch."""
    assert split_micro_batches([5], batch_size=2, process_index=1, num_processes=2) == [[]]
    assert split_micro_batches([5, 6, 7, 8], batch_size=1, process_index=0, num_processes=2) == [[5], [7]]
