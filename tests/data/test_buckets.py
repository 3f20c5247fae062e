"""Buckets lose little, share one area, and give fixed crops (R-15)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from sdlora.config import DataSection
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import (
    MAX_LOSS,
    MERGE_LOSS,
    STEPS,
    choose_step,
    list_buckets,
    plan_buckets,
    worst_loss,
)
from sdlora.data.records import Size

CENTRE = DataSection()
RESOLUTIONS = (128, 256, 512, 768, 1024)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_default_loses_less_than_8_percent(resolution: int, make_records) -> None:
    """R-15: for every aspect from 1:2 to 2:1, large and small, the crop keeps more than 92 %."""
    sizes = []
    for place in range(401):
        aspect = 2 ** (place / 200 - 1)
        for long in (150, 700, 4000):
            width = long if aspect >= 1 else round(long * aspect)
            height = long if aspect < 1 else round(long / aspect)
            if 0.5 <= width / height <= 2:
                sizes.append((width, height))
    assert len(sizes) > 1000
    records = make_records(*sizes)
    plan = plan_buckets(records, resolution, CENTRE)
    assert max(plan.lost_share(record.name) for record in records) < MAX_LOSS
    assert worst_loss(plan.resolution, plan.step) < MAX_LOSS


@pytest.mark.parametrize(("resolution", "step"), [(128, 8), (256, 16), (512, 32), (768, 32), (1024, 64)])
def test_step_is_the_largest_that_meets_the_bound(resolution: int, step: int) -> None:
    """R-15: of 64, 32, 16, 8 px the largest with which less than 8 % is lost."""
    assert choose_step(resolution) == step
    assert all(worst_loss(resolution, larger) >= MAX_LOSS for larger in STEPS if larger > step)


@pytest.mark.parametrize(("resolution", "min_step", "step"), [(128, 32, 32), (512, 64, 64), (64, 8, 8)])
def test_step_that_the_base_needs(resolution: int, min_step: int, step: int) -> None:
    """R-15: the base's own step is kept to where none is fine enough."""
    assert choose_step(resolution, min_step) == step
    assert worst_loss(resolution, step) >= MAX_LOSS


@pytest.mark.parametrize("resolution", [*RESOLUTIONS, 500, 96, 72])
def test_buckets_have_one_area(resolution: int) -> None:
    """R-15: sides are multiples of the step, areas are within 10 % of the square's, the square is one."""
    step = choose_step(resolution)
    buckets = list_buckets(resolution, step)
    square = round(resolution / step) * step
    assert Size(square, square) in buckets
    assert len(set(buckets)) == len(buckets) > 10
    for bucket in buckets:
        assert bucket.width % step == bucket.height % step == 0
        assert abs(bucket.area / resolution**2 - 1) < 0.1 or bucket == Size(square, square)
        assert Size(bucket.height, bucket.width) in buckets
        assert 1 / 4 <= bucket.aspect <= 4


def test_crop_covers_its_bucket(make_records) -> None:
    """R-15: scaling keeps the aspect, covers the bucket and touches it on one side."""
    records = make_records((640, 480), (100, 333), (4000, 100), (1, 1), (3, 2000))
    plan = plan_buckets(records, 128, CENTRE)
    for record in records:
        (crop,) = plan.crops[record.name]
        assert crop.resized.width >= crop.size.width
        assert crop.resized.height >= crop.size.height
        assert crop.resized.width == crop.size.width or crop.resized.height == crop.size.height
        assert crop.left == (crop.resized.width - crop.size.width) // 2
        assert crop.top == (crop.resized.height - crop.size.height) // 2
        scale = max(crop.size.width / record.size.width, crop.size.height / record.size.height)
        assert math.isclose(crop.resized.width, record.size.width * scale, abs_tol=0.51)
        assert math.isclose(crop.resized.height, record.size.height * scale, abs_tol=0.51)


def test_table_counts_images_and_samples(make_records) -> None:
    """R-15, R-16: the table's sums are the images and the samples of an epoch."""
    records = make_records((512, 512), (600, 600), (640, 320), repeats=3)
    plan = plan_buckets(records, 512, CENTRE, heldout=make_records((1, 1))[:0])
    assert plan.table() == [(Size(512, 512), 2, 6), (Size(736, 352), 1, 3)]
    assert plan.bucket_of("002.png") == Size(736, 352)
    assert math.isclose(plan.upscale(records[0]), 1.0)
    assert math.isclose(plan.upscale(records[2]), 736 / 640)


def test_random_crops_are_fixed(make_records) -> None:
    """R-04, R-20: random crops are drawn from (seed, digest), lie inside, and do not depend on the rest."""
    settings = DataSection(crop="random", crop_variants=6)
    records = make_records((300, 190), (512, 512), (2000, 300), (2000, 300))
    plan = plan_buckets(records, 256, settings, seed=5)
    assert plan.crops["002.png"] != plan.crops["003.png"]
    assert plan.crops == plan_buckets(records, 256, settings, seed=5).crops
    assert plan.crops["000.png"] == plan_buckets(records[:1], 256, settings, seed=5).crops["000.png"]
    assert plan.crops["002.png"] != plan_buckets(records, 256, settings, seed=6).crops["002.png"]
    assert len(plan.crops["002.png"]) == 6
    assert len(plan.crops["001.png"]) == 1, "an image that fits has no second crop"
    for crops in plan.crops.values():
        for crop in crops:
            assert 0 <= crop.left <= crop.resized.width - crop.size.width
            assert 0 <= crop.top <= crop.resized.height - crop.size.height


def test_flips_are_variants(make_records) -> None:
    """R-20: with flips on, each crop has its mirror image beside it."""
    records = make_records((2000, 300))
    plan = plan_buckets(records, 256, DataSection(crop="random", flip=True))
    crops = plan.crops["000.png"]
    assert [crop.flipped for crop in crops] == [False] * 4 + [True] * 4
    assert [(crop.left, crop.top) for crop in crops[:4]] == [(crop.left, crop.top) for crop in crops[4:]]


def test_heldout_has_one_center_crop(make_records) -> None:
    """R-12: held-out images are cropped in the center and never mirrored."""
    records = make_records((512, 512), (700, 300))
    settings = DataSection(crop="random", flip=True)
    plan = plan_buckets(records[:1], 256, settings, heldout=records[1:])
    (crop,) = plan.crops["001.png"]
    assert not crop.flipped
    assert crop.left == (crop.resized.width - crop.size.width) // 2
    assert sum(images for _, images, _ in plan.table()) == 1


def test_no_records() -> None:
    """R-15: an index without usable images still gives a plan, so that the doctor can speak."""
    assert plan_buckets([], 512, CENTRE).table() == []


def test_no_upscale(make_records):
    """R-15: a smaller image keeps its size, cut to the step; others are as without the setting."""
    sizes = ((1000, 600), (300, 200), (301, 207), (2000, 100), (20, 10), (512, 512))
    records = make_records(*sizes)
    plan = plan_buckets(records, 512, DataSection(no_upscale=True))
    usual = plan_buckets(records, 512, DataSection())
    own = [plan.crops[record.name][0] for record in records]
    assert own[0] == usual.crops["000.png"][0]
    assert own[5] == usual.crops["005.png"][0]
    assert [str(crop.size) for crop in own[1:5]] == ["288x192", "288x192", "384x96", "32x32"]
    assert [plan.upscale(record) for record in records[1:4]] == [1, 1, 1]
    assert all(
        crop.resized.width >= crop.left + crop.size.width
        and crop.resized.height >= crop.top + crop.size.height
        for crop in own
    )


def test_more_resolutions(make_records):
    """R-15, R-16: each image is in a bucket at each resolution, N times an epoch; no step mixes them."""
    records = [replace(record, repeats=2) for record in make_records((256, 256), (256, 128), (40, 40))]
    settings = DataSection(more_resolutions=[64, 128], crop="random", flip=True, no_upscale=True)
    plan = plan_buckets(records, 128, settings)
    assert [len(plan.buckets_of(record.name)) for record in records] == [2, 2, 1]
    order = BatchOrder(records, plan, settings, global_batch=3, seed=0)
    seen = Counter()
    for step in range(order.steps_per_epoch):
        samples = order.step(step)
        assert len({sample.crop.size for sample in samples}) == 1
        seen.update((sample.record.name, sample.crop.size) for sample in samples)
    assert seen == {(record.name, size): 2 for record in records for size in plan.buckets_of(record.name)}
    assert sum(images for _, images, _ in plan.table()) == 5
    assert sum(samples for _, _, samples in plan.table()) == order.samples_per_epoch == 10


def test_small_buckets_merge(make_records):
    """R-15: images of small buckets move to near ones if that crops little; the plan says which."""
    sizes = [(512, 512)] * 5 + [(640, 480)] * 4 + [(600, 480), (768, 512), (1600, 400)]
    records = make_records(*sizes, (480, 640), (470, 680), (450, 660))
    usual, plan = plan_buckets(records, 512, CENTRE), plan_buckets(records, 512, DataSection(merge_buckets=3))
    assert (usual.moved, usual.small()) == ((), [])
    assert len(plan.table()) < len(usual.table())
    assert sum(images for _, images, _ in plan.table()) == len(records)
    assert plan.small() == [(usual.bucket_of("011.png"), 1)], "nothing is near a panorama"
    assert {name for name, _, _ in plan.moved} >= {"010.png"}
    for name, old, new in plan.moved:
        assert (usual.bucket_of(name), plan.bucket_of(name)) == (old, new) != (new, new)
        assert usual.lost_share(name) < plan.lost_share(name) <= MERGE_LOSS
    still = set(plan.crops) - {name for name, _, _ in plan.moved}
    assert all(plan.crops[name] == usual.crops[name] for name in still)
    # Near each other, though far from all else.
    tall = {plan.bucket_of(record.name) for record in records[-3:]}
    assert len(tall) == 1
    order = BatchOrder(records, plan, CENTRE, global_batch=3, seed=0)
    seen = [sample.record.name for step in range(order.steps_per_epoch) for sample in order.step(step)]
    assert sorted(seen) == sorted(plan.crops)


def test_repeats_count_for_a_bucket(make_records):
    """R-16: an image that is seen often fills its bucket; one alone at its own size is never enlarged."""
    alone = DataSection(merge_buckets=3)
    often = [replace(record, repeats=3) for record in make_records((512, 512), (640, 480))]
    assert plan_buckets(often, 512, alone).moved == ()
    small = make_records((300, 200), (300, 205), (300, 230), (512, 512))
    plan = plan_buckets(small, 512, DataSection(merge_buckets=3, no_upscale=True))
    assert [plan.bucket_of(record.name) for record in small[:3]] == [Size(288, 192)] * 3
    assert max(map(plan.upscale, small)) == 1


@pytest.mark.parametrize("crop", ["center", "random"])
def test_colors_are_fixed_views(make_records, crop: str) -> None:
    """R-04, R-20: the first view as it is, others with colors drawn from (seed, digest); none held out."""
    records = make_records((512, 512), (700, 300), (300, 500))
    settings = DataSection(color_jitter=0.1, crop=crop, flip=True)
    plan = plan_buckets(records[:2], 256, settings, heldout=records[2:], seed=5)
    assert plan.crops == plan_buckets(records[:2], 256, settings, heldout=records[2:], seed=5).crops
    assert plan.crops != plan_buckets(records[:2], 256, settings, heldout=records[2:], seed=6).crops
    usual = plan_buckets(records, 256, DataSection(crop=crop), seed=5)
    for record in records[:2]:
        views = plan.crops[record.name]
        assert views[0] == usual.crops[record.name][0]
        assert [view.colors for view in views[4:]] == [view.colors for view in views[:4]]
        assert len({view.colors for view in views}) == 4
        assert {replace(view, colors=None, flipped=False) for view in views} == {*usual.crops[record.name]}
        factors = [factor for view in views for factor in view.colors or ()]
        assert 0.9 <= min(factors) < 1 < max(factors) <= 1.1
    [heldout] = plan.crops["002.png"]
    assert heldout.colors is None
