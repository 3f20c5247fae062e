"""One optimizer step; an optimizer that trains at another point than its result (schedule-free)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora.formats.files import load_adapter


class Averaged(torch.optim.SGD):
    """SGD whose result is the mean of its points; `eval()` moves there, `train()` back (not exactly)."""

    is_training = False

    def step(self, closure=None):
        assert self.is_training
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["count"] = state.get("count", torch.zeros(())) + 1
            mean = state.get("mean", torch.zeros_like(parameter))
            state["mean"] = mean + (parameter.detach() - mean) / state["count"]

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    def _swap(self, is_training):
        if self.is_training != is_training:
            self.is_training = is_training
            for parameter, state in self.state.items():
                point = parameter.detach().clone()
                parameter.data.copy_(state["mean"])
                state["mean"] = point * (1 + 1e-6)


@pytest.fixture
def averaging(monkeypatch):
    """Makes the optimizer available at an import path."""
    monkeypatch.setattr(torch.optim, "Averaged", Averaged, raising=False)
    return {"train__optimizer": "torch.optim.Averaged", "train__learning_rate": 0.3}


def test_the_average_is_what_is_saved(make_images, small, make_trainer, tmp_path, averaging):
    """R-10: a file contains the average, and training continues at its own point."""
    trainer = make_trainer(
        small(make_images(), train__steps=3, train__save_every=3, **averaging), tmp_path / "a"
    )
    trainer.train()
    runner = trainer.runner
    means = {id(parameter): state["mean"] for parameter, state in runner.optimizer.optimizer.state.items()}
    saved = load_adapter(trainer.run.step_adapter(3))
    for name, tensor in runner.adapter.named_tensors().items():
        before = tensor.detach().clone()
        with runner.inference_weights():
            assert not torch.equal(tensor, before)
        assert torch.equal(tensor, before), name
        if name.endswith(".up"):
            expected = means[id(tensor)] * runner.adapter.scale
            stored = saved.modules[name.removesuffix(".up")].up * saved.scale
            torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=1e-6)


def test_looking_does_not_disturb(make_images, small, make_trainer, snapshot, tmp_path, averaging):
    """R-04: saving and evaluating in between change no bit of the trained point."""
    images = make_images()
    plain = make_trainer(small(images, **averaging), tmp_path / "plain")
    busy = make_trainer(
        small(images, train__save_every=1, train__evaluate_every=1, **averaging), tmp_path / "b"
    )
    for trainer in (plain, busy):
        trainer.train()
    for name, tensor in snapshot(plain).items():
        assert torch.equal(tensor, snapshot(busy)[name]), name


def test_fp16_in_a_process_without_samples(make_images, tiny, make_trainer, tmp_path):
    """R-17: a process without samples in the first step has scaled nothing; it takes part with zeros."""
    runner = make_trainer(tiny(make_images()), tmp_path / "run").runner
    accelerator = runner.accelerator
    # As on a GPU: fp16 is refused on a CPU.
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    accelerator.state._mixed_precision = "fp16"
    assert runner._all_reduce(torch.zeros(())) == 0
    assert runner.clip_gradients() == 0
    assert not any(tensor.grad.any() for tensor in runner.parameters)


class Reads(TorchDispatchMode):
    """Counts how often the CPU waits for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_step_does_not_wait_for_its_numbers(make_images, small, make_trainer, tmp_path):
    """R-18: passes, clipping and update read no number; after them, one check of the trained values does."""
    config = small(make_images(), train__accumulate=2, train__ema_decay=0.9)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train_step()  # the first one checks more
    with Reads() as reads:
        trainer.train_step()
    assert reads.count <= 1
