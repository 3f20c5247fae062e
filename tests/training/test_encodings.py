"""Latents and text states: forged cache entries, and images that vanish during a run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.data.cache import cache_folder, seal
from sdlora.data.captions import OPERATIONS
from sdlora.errors import DataError
from sdlora.report.terminal import Terminal
from sdlora.training.plan import describe_plan
from tests.checks import raises


def test_a_cache_of_somebody_else_changes_nothing(
    make_images, small, make_trainer, snapshot, sdxl_folder, tmp_path, capsys
):
    """R-20, R-21: entries with other names, shapes or dtypes are encoded again; the run is the same."""
    images = make_images()
    config = small(images, base__source=str(sdxl_folder))
    one = make_trainer(config, tmp_path / "one")
    one.train()
    files = sorted(cache_folder().rglob("*.safetensors"))
    kept = {file: file.read_bytes() for file in files}
    assert {file.parent.parent.name for file in files} == {"latents", "text"}
    for number, file in enumerate(files):
        tensors = load_file(file)
        name = next(iter(tensors))
        forged = [
            {"nonsense": torch.ones(3)},
            {},
            {**tensors, name: tensors[name][..., :-1].contiguous()},
            {**tensors, name: tensors[name].flatten()},
            {**tensors, "more": torch.ones(1)},
            {**tensors, name: tensors[name].to(torch.int32)},
        ]
        file.write_bytes(seal(forged[number % len(forged)]))
    two = make_trainer(config, tmp_path / "two")
    two.prepared.encodings.check_cache(Terminal())
    printed = capsys.readouterr().out
    assert f" {len(files)} damaged" in printed
    assert str(files[0]) in printed
    # Forged entries were encoded again before the encoders left the device.
    two.prepared.base.load = None
    two.train()
    assert [result.loss for result in two.results] == [result.loss for result in one.results]
    assert all(torch.equal(tensor, snapshot(two)[name]) for name, tensor in snapshot(one).items())
    assert {file: file.read_bytes() for file in files} == kept


def test_a_picture_that_goes_in_mid_run(make_images, small, make_trainer, tmp_path):
    """The error names the image; with it restored, the run continues from its last checkpoint."""
    images = make_images(sizes=((64, 64),) * 2)
    config = small(images, data__cache=False, train__steps=5, train__save_every=2)
    trainer = make_trainer(config, tmp_path / "run")
    picture, record = images / "01.png", trainer.record

    def lose_picture(*arguments):
        record(*arguments)
        if trainer.step == 3:
            picture.rename(tmp_path / "away.png")

    trainer.record = lose_picture
    with raises(DataError, "data.image-gone", shows="01.png") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.run.checkpoint_steps() == [2]
    (tmp_path / "away.png").rename(picture)
    again = make_trainer(config, tmp_path / "run")
    again.resume()
    again.train()
    assert [result.step for result in again.results] == [3, 4, 5]


def test_nothing_to_encode_prints_nothing(capsys):
    """R-20: if everything is cached, neither progress nor an empty line is printed."""
    with Terminal().progress("encoding", 0):
        pass
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class ShuffleWords:
    """A caption operation of a user."""

    is_random: ClassVar[bool] = True

    def __call__(self, caption: str, rng: random.Random) -> str:
        words = caption.split()
        return " ".join(rng.sample(words, len(words)))


def test_caption_variants_are_encoded_once(make_images, tiny, make_trainer, tmp_path, monkeypatch):
    """R-20: an operation is one entry; its variants are counted, cached, drawn by the samples and traced."""
    monkeypatch.setitem(OPERATIONS, "shuffle", lambda data: ShuffleWords())
    monkeypatch.setattr("sdlora.data.captions.NUM_VARIANTS", 3)
    config = tiny(
        make_images(),
        data__caption_dropout=0.2,
        data__cache=True,
        train__batch_size=4,
        train__steps=8,
        train__trace=True,
    )
    one = make_trainer(config, tmp_path / "one")
    variants = {caption for record in one.plan.index.records for caption in record.captions}
    assert 4 < one.plan.as_event()["captions"] == len(variants) <= 12
    plain = {record.caption for record in one.plan.index.records}
    encoded = list((cache_folder() / "text").rglob("*.safetensors"))
    assert len(encoded) == len({*variants, *plain, "", *config.sample.prompts})
    # Every text was encoded before the encoders left the device.
    one.prepared.base.load = None
    one.train()
    drawn = [row["caption"] for row in one.run.trace()]
    assert "" in drawn
    assert len(variants & set(drawn)) > 4
    assert set(drawn) <= {*variants, ""}
    two = make_trainer(config, tmp_path / "two")
    two.train()
    assert list(two.run.trace()) == list(one.run.trace())


def test_views_with_other_colors_are_encoded_once(make_images, tiny, make_trainer, tmp_path):
    """R-20, R-28: the plan counts them and their disk; a mask stays; steps draw all of them."""
    images = make_images(sizes=((64, 64),) * 3)
    Image.new("L", (64, 64), 130).save(images / "00.mask.png")
    settings = {"data__masks": "files", "data__heldout": 0, "train__steps": 8, "train__batch_size": 4}
    config = tiny(images, data__color_jitter=0.3, data__crop_variants=3, data__cache=True, **settings)
    trainer = make_trainer(config, tmp_path / "run")
    [disk] = [line for line in describe_plan(trainer.plan) if line.startswith("disk")]
    assert "9 views" in disk
    assert len(list((cache_folder() / "latents").rglob("*.safetensors"))) == 9
    encodings, crops = trainer.prepared.encodings, trainer.plan.buckets.crops["00.png"]
    record = trainer.plan.index.records[0]
    means = [encodings.posterior(record, crop)[0] for crop in crops]
    assert not any(torch.equal(means[0], mean) for mean in means[1:])
    masks = [encodings.masks([(record, crop)]) for crop in crops]
    assert all(torch.equal(masks[0], mask) for mask in masks)
    seen = {sample.crop.colors for step in range(8) for sample in trainer.plan.order.step(step)}
    assert len(seen) == 7
