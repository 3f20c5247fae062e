"""Latents and text states: what anybody may have put in the cache, and pictures that go while a run goes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sdlora.data.cache import cache_folder, seal
from sdlora.errors import DataError
from sdlora.training.console import Report


def test_a_cache_of_somebody_else_changes_nothing(
    make_images, small, make_trainer, snapshot, sdxl_folder, tmp_path, capsys
):
    """R-20, R-21: entries with other names, shapes or types are encoded anew; the run is the same."""
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
    two.prepared.encodings.check_cache(Report())
    assert f"the cache held {len(files)} damaged files, encoded anew: {files[0]}" in capsys.readouterr().out
    # What was forged has been encoded before the encoders leave.
    two.prepared.base.encoders_to("meta")
    two.train()
    assert [result.loss for result in two.results] == [result.loss for result in one.results]
    assert all(torch.equal(tensor, snapshot(two)[name]) for name, tensor in snapshot(one).items())
    assert {file: file.read_bytes() for file in files} == kept


def test_a_picture_that_goes_in_mid_run(make_images, small, make_trainer, tmp_path):
    """One clear line names the picture; with it back in its place the run goes on from its last state."""
    images = make_images(sizes=((64, 64),) * 2)
    config = small(images, data__cache=False, train__steps=5, train__save_every=2)
    trainer = make_trainer(config, tmp_path / "run")
    picture, record = images / "01.png", trainer.record

    def lose_picture(*arguments):
        record(*arguments)
        if trainer.step == 3:
            picture.rename(tmp_path / "away.png")

    trainer.record = lose_picture
    with pytest.raises(DataError, match=r"01\.png was there .*; put it back and go on") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.run.checkpoint_steps() == [2]
    (tmp_path / "away.png").rename(picture)
    again = make_trainer(config, tmp_path / "run")
    again.resume()
    again.train()
    assert [result.step for result in again.results] == [3, 4, 5]


def test_nothing_to_encode_prints_nothing(capsys):
    """R-20: where all is cached there is no progress to show, nor an empty line for it."""
    with Report().progress("encoding", 0):
        pass
    assert capsys.readouterr().out == ""
