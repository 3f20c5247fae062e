"""Checkpoints are complete or absent, and contain no pickles (R-03, R-23, R-44)."""

from __future__ import annotations

import pytest
import torch

from sdlora.errors import RunError
from sdlora.training.checkpoint import read_checkpoint, save_checkpoint
from tests.checks import raises


def train_a_little(optimizer_class=torch.optim.AdamW, **arguments):
    parameters = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.zeros(4))]
    optimizer = optimizer_class(parameters, lr=0.1, **arguments)
    for scale in (1.0, 2.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "arguments"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, optimizer_class, arguments):
    """R-03: values, moments and counters of any optimizer are restored to the bit."""
    parameters, optimizer = train_a_little(optimizer_class, **arguments)
    tensors = {"a.down": parameters[0], "a.up": parameters[1]}
    save_checkpoint(
        tmp_path / "step-000002",
        tensors=tensors,
        optimizer=optimizer.state_dict(),
        state={"step": 2, "x": None},
    )
    read, read_optimizer, state = read_checkpoint(tmp_path / "step-000002")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert state == {"step": 2, "x": None}

    again = optimizer_class(
        [torch.nn.Parameter(read["a.down"]), torch.nn.Parameter(read["a.up"])], lr=0.5, **arguments
    )
    again.load_state_dict(read_optimizer)
    for one, other in ((optimizer, again),):
        for parameter in [*one.param_groups[0]["params"], *other.param_groups[0]["params"]]:
            parameter.grad = torch.full_like(parameter, 0.3)
        one.step()
        other.step()
    for one, other in zip(optimizer.param_groups[0]["params"], again.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


def test_only_safetensors_and_json(tmp_path):
    """R-44: no file can contain code."""
    parameters, optimizer = train_a_little()
    save_checkpoint(
        tmp_path / "s", tensors={"a": parameters[0]}, optimizer=optimizer.state_dict(), state={"step": 2}
    )
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_state_is_noticed(tmp_path, name):
    """R-23: a file that is cut short, or has one bit or its content changed, is refused."""
    parameters, optimizer = train_a_little()
    save_checkpoint(
        tmp_path / "s", tensors={"a": parameters[0]}, optimizer=optimizer.state_dict(), state={"step": 2}
    )
    file = tmp_path / "s" / name
    sound = file.read_bytes()
    changed = sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]
    for content in (sound[:-7], changed, b"", b"{}", b"[1]", b'{"state": {}}', b"[" * 100_000):
        file.write_bytes(content)
        with raises(RunError, "checkpoint-incomplete", shows=(str(tmp_path / "s"), name)) as caught:
            read_checkpoint(tmp_path / "s")
        assert "\n" not in str(caught.value)
    file.unlink()
    file.mkdir()
    with raises(RunError, "checkpoint-incomplete", shows="folder"):
        read_checkpoint(tmp_path / "s")


def test_a_failed_save_leaves_nothing(tmp_path):
    """R-24: a folder that cannot be written is an error, and no partial checkpoint is left."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r".+"):
        save_checkpoint(tmp_path / "checkpoints" / "step-000001", tensors={}, optimizer={}, state={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]


def test_shared_tables_are_kept(tmp_path):
    """8-bit optimizers keep one table in the state of every parameter; safetensors refuses shared memory."""
    table = torch.arange(4)
    optimizer = {"state": {0: {"q": table}, 1: {"q": table}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    save_checkpoint(tmp_path / "s", tensors={"a": table}, optimizer=optimizer, state={})
    _, read, _ = read_checkpoint(tmp_path / "s")
    assert torch.equal(read["state"][1]["q"], table)
    assert read["param_groups"][0]["betas"] == [0.9, 0.99]
