"""The JSON of somebody's run folder: environment, events and the state of a checkpoint (R-44)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from sdlora.runs import RunFolder
from sdlora.training.checkpoint import read_checkpoint, read_state, save_checkpoint, seal_state


def test_environments_and_events(fuzz, damaged, json_values, tmp_path: Path) -> None:
    """R-44, R-45: what is no event is passed over; a dtype is one of three or an error."""
    run = RunFolder(tmp_path)
    event = st.fixed_dictionaries(
        {"event": json_values | st.just("step"), "step": json_values | st.integers(0, 9)}
    )
    lines = st.lists((event | json_values).map(json.dumps), max_size=4).map("\n".join)
    environment = st.fixed_dictionaries({"base_dtype": st.sampled_from(["fp32", "bf16"]) | json_values})

    def read(example: tuple[bytes, bytes]) -> None:
        run.events_file.write_bytes(example[0])
        run.environment_file.write_bytes(example[1])
        assert all(isinstance(record["step"], int) for record in run.events())
        run.cut_events(4)
        assert all(record["step"] <= 4 for record in run.events("step"))
        run.is_finished(3)
        assert run.base_dtype in ("fp32", "bf16", "fp16")

    texts = damaged(lines.map(str.encode))
    fuzz(st.tuples(texts, damaged((environment | json_values).map(json.dumps).map(str.encode))), read)


def test_states(fuzz, damaged, json_values, tmp_path: Path) -> None:
    """R-23, R-44: a state is to the bit what was saved, or refused; a sealed one of any content is read."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    folder = tmp_path / "step-000002"
    save_checkpoint(
        folder, tensors={"a": parameter}, optimizer=optimizer.state_dict(), state={"counters": {}}
    )
    file, state = folder / "state.json", read_state(folder)
    sound = file.read_bytes()

    def forge(key: str, value: Any) -> bytes:
        return seal_state({**state, key: value}).encode()

    maps = json_values.map(lambda value: {"__map__": value}) | json_values.map(
        lambda value: {"__tensor__": value}
    )
    values = (
        json_values | maps | st.lists(st.tuples(json_values, maps), max_size=2).map(lambda p: {"__map__": p})
    )
    forged = st.builds(forge, st.sampled_from(["optimizer", "digests", "counters", "x"]), values)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_checkpoint(folder)

    fuzz(damaged(st.just(sound) | forged), read)
