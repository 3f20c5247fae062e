"""The moving average of the trained values, and the checkpoint that keeps both (train.ema_decay)."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.formats.files import load_adapter
from sdlora.training.checkpoint import EMA_PREFIX, read_checkpoint
from sdlora.training.step import EMA
from sdlora.training.train import train
from tests.checks import raises


def test_the_average_is_the_formula():
    """Weights decay with age and sum to one; the initial values have none."""
    values = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensor = torch.full((3,), 100.0, dtype=torch.float64)
    average = EMA({"a": tensor}, 0.7)
    for value in values:
        tensor.copy_(value)
        average.update()
    weights = torch.tensor([0.7**age for age in (4, 3, 2, 1, 0)], dtype=torch.float64) * 0.3 / (1 - 0.7**5)
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(average.values["a"], weights @ values, rtol=1e-12, atol=0)
    with average.swapped_in():
        assert torch.equal(tensor, average.values["a"])
    assert torch.equal(tensor, values[-1])


def test_the_average_is_what_is_given_away(make_images, quick, make_trainer, tmp_path):
    """R-10: the average is evaluated, saved and exported; training continues at its own point."""
    images = make_images(sizes=((64, 64),) * 8)
    keys = {"train__save_every": 4, "data__heldout": 0.25, "export__precision": "fp32"}
    plain = make_trainer(quick(images, **keys), tmp_path / "plain")
    averaged = make_trainer(quick(images, train__ema_decay=0.5, **keys), tmp_path / "averaged")
    names = list(plain.runner.adapter.named_tensors())
    points = []
    for _ in range(4):
        for trainer in (plain, averaged):
            trainer.record(trainer.train_step(), 1.0)
        points.append([parameter.detach().clone() for parameter in plain.runner.parameters])
    assert [r.loss for r in plain.results] == [r.loss for r in averaged.results]
    expected = [
        sum(weight * value for weight, value in zip((1, 2, 4, 8), values, strict=True)) / 15
        for values in zip(*points, strict=True)
    ]
    for trainer in (plain, averaged):
        trainer.save_if_due()
    saved = load_adapter(averaged.run.step_adapter(4)).named_tensors()
    for name, mean in zip(names, expected, strict=True):
        torch.testing.assert_close(saved[name], mean, rtol=1e-5, atol=1e-7)
    assert plain.evaluate("heldout") != averaged.evaluate("heldout")
    with averaged.runner.inference_weights():
        assert plain.evaluate("heldout") != averaged.evaluate("heldout")
    tensors, _, state = read_checkpoint(averaged.run.checkpoint(4))
    for name, tensor in plain.runner.adapter.named_tensors().items():
        assert torch.equal(tensors[name], tensor)
        assert not torch.equal(tensors[EMA_PREFIX + name], tensor)
    assert state["num_averaged"] == 4


def test_no_average_of_an_average(make_images, quick, tmp_path, monkeypatch):
    """R-35: a conflict names both settings, before a weight is loaded."""
    schedule_free = type("ScheduleFree", (torch.optim.SGD,), {"eval": lambda self: None})
    monkeypatch.setattr(torch.optim, "ScheduleFree", schedule_free, raising=False)
    config = quick(make_images(), train__ema_decay=0.9, train__optimizer="torch.optim.ScheduleFree")
    with raises(ConfigError, "train.ema_decay", shows=("0.9", "train.optimizer")):
        train(config.images, config=config, out=tmp_path / "run", quiet=True)
