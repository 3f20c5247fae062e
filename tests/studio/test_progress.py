"""A run followed as it writes, and its curves."""

from __future__ import annotations

import pytest

from sdlora.studio.progress import MAX_POINTS, Progress, draw_curve, ticks
from tests.studio.conftest import add_steps


def test_only_new_events_are_read(make_run):
    """R-45: what is appended arrives, a half line when it is whole."""
    run = make_run(done=3)
    progress = Progress(run.events_file).update()
    assert [step for step, _ in progress.means] == [1, 2, 3]
    with run.events_file.open("a") as file:
        file.write('{"event": "step", "step": 4, "loss": 0.1, "lo')
        file.flush()
        assert len(progress.update().means) == 3
        file.write('ss_ema": 0.2}\n')
    assert progress.update().means[-1] == (4, 0.2)
    run.append("heldout", 4, split="heldout", loss=0.3)
    run.append("warning", 4, message="look")
    run.append("step", 5, loss="nan", loss_ema=None)
    progress.update()
    assert progress.validation == {"heldout": [(4, 0.3)]}
    assert progress.warnings == ["look"]
    assert len(progress.losses) == 4


def test_a_resumed_run_is_read_anew(make_run):
    """R-23: it cuts what came after its checkpoint."""
    run = make_run(done=6)
    progress = Progress(run.events_file).update()
    run.cut_events(3)
    add_steps(run, 4, 4)
    assert [step for step, _ in progress.update().means] == [1, 2, 3, 4]
    run.events_file.unlink()
    assert progress.update().means == []


def test_time_left(make_run):
    """Measured over everything between steps, but not over the pause before a resumed run."""
    run = make_run(done=0)
    progress = Progress(run.events_file)
    assert progress.update().seconds_per_step is None
    lines = [{"event": "step", "step": 1, "time": 0.0}, {"event": "prepared", "step": 1, "time": 5000.0}]
    lines += [{"event": "step", "step": step, "time": 5000.0 + 3 * step} for step in (2, 3, 4)]
    for line in lines:
        progress._add(line)
    assert progress.seconds_per_step == 3
    assert progress.eta_seconds(10) == 18


@pytest.mark.parametrize(("low", "high"), [(0.24, 0.51), (0.1, 0.1), (0.0, 0.0), (1e-6, 3e-6), (5, 20000)])
def test_ticks_are_round_and_enclose(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low <= high <= found[-1]
    assert 1 <= len(found) <= 7


def test_curves_are_drawn_inside():
    """However many steps there are, and however far one lies out."""
    points = [(step, 1e6 if step == 500 else 1 / step) for step in range(1, 5001)]
    curve = draw_curve("Training loss", {"each step": points, "running mean": points[:600]})
    for _, path, _ in curve["lines"]:
        numbers = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
        assert len(numbers) <= MAX_POINTS + 1
        assert all(0 <= x <= curve["size"][0] and 0 <= y <= curve["size"][1] for x, y in numbers)
