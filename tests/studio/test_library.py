"""The list of runs: state, progress and thumbnails, from little reading."""

from __future__ import annotations

import json
import os
import platform
import time

import psutil
import pytest

from sdlora.errors import RunError
from sdlora.runs import RunFolder
from sdlora.studio.library import Library, read_tail
from sdlora.writing import write_json
from tests.checks import HANG_SECONDS, counted, raises


def test_states(make_run, runs, sleeper):
    """R-45: what a run does is read from its events, and from whether its process lives."""
    make_run("finished", grid=10)
    make_run("stopped", done=4)
    make_run("failed", done=4).append("failed", 4, message="out of memory")
    make_run("continued", done=4).append("failed", 4, message="once")
    make_run("continued-2", done=4)
    RunFolder(runs / "continued").append("step", 5, loss_ema=0.25)
    make_run("running", done=4).name_process(sleeper.pid)
    (runs / "group").mkdir()
    make_run("group/inside", done=2)
    (runs / "other").mkdir()
    found = {run.name: run for run in Library(runs).list_runs()}
    states = {name: run.state for name, run in found.items()}
    assert states == {
        "finished": "finished",
        "stopped": "stopped",
        "failed": "failed",
        "continued": "stopped",
        "continued-2": "stopped",
        "running": "running",
        "group/inside": "stopped",
    }
    assert next(iter(found)) == "running"
    assert found["failed"].problem == "out of memory"
    assert found["stopped"].problem == ""
    assert (found["continued"].step, found["continued"].steps, found["continued"].loss) == (5, 10, 0.25)
    assert found["finished"].grid is not None
    assert found["stopped"].grid is None


@pytest.mark.parametrize("done", [4, 10])
def test_a_resume_that_was_refused_says_why(make_run, runs, done):
    """R-45: what the process printed before it ended is newer than all events."""
    run = make_run("run", done=done)
    for line, problem in (
        ("sdlora: stopped at step 4 of 10", ""),
        ("sdlora: image folder gone does not exist", "image folder gone does not exist"),
    ):
        run.output_file.write_text(f"resuming\n{line}\n", encoding="utf-8")
        later = run.events_file.stat().st_mtime + 5
        os.utime(run.output_file, (later, later))
        [found] = Library(runs).list_runs()
        assert found.problem == problem


def test_a_killed_run_is_stopped(make_run, runs, sleeper):
    """R-23: killed, without a word in its events; and its number may belong to another process by then."""
    run, library = make_run(done=4), Library(runs)
    run.name_process(sleeper.pid)
    assert library.overview(run).state == "running"
    sleeper.kill()
    for _ in range(HANG_SECONDS * 20):
        if psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert library.overview(run).state == "stopped"
    assert "killed" in library.overview(run).problem
    run.name_process(psutil.Process().pid)
    assert run.process
    run.process_file.write_text(json.dumps({"pid": psutil.Process().pid, "host": platform.node() + "2"}))
    assert run.process is None
    # It may live on there.
    assert library.overview(run).problem == ""


def test_a_run_that_has_not_begun(runs):
    """R-23: killed while it loads, or stopped."""
    run = RunFolder(runs / "new")
    run.path.mkdir()
    for text, state in (("", "failed"), ("sdlora: stopped\n", "stopped"), ("sdlora: no images\n", "failed")):
        run.output_file.write_text(text, encoding="utf-8")
        assert Library(runs).overview(run).state == state


def test_a_later_process_of_the_same_number(make_run, sleeper):
    run = make_run(done=4)
    run.name_process(sleeper.pid)
    before = psutil.Process(sleeper.pid).create_time() - 3600
    write_json(run.process_file, {"pid": sleeper.pid, "host": platform.node(), "started": before})
    assert run.process is None


def test_damaged_runs_are_shown(make_run, runs, client):
    """R-45: whatever a crash, or a stranger, left in them."""
    make_run("no-events", done=4).events_file.unlink()
    make_run("cut", done=4).events_file.write_bytes(b'{"event": "step", "st')
    make_run("odd", done=4).events_file.write_text('{"event": "step", "step": "x"}\n[1]\nnull\n\xff\n')
    odd = '{"event": {}, "step": 1}\n{"event": "step", "step": 1e400}\n{"event": "step", "step": %s}\n'
    odd += '{"event": "step", "step": 2, "time": -Infinity, "loss_ema": %s, "loss": NaN}\n'
    make_run("numbers", done=1).events_file.write_text(odd % ("9" * 400, "9" * 400))
    damaged = {"empty": "", "list": "[]", "deep": "[" * 100_000, "types": '{"train": 3, "images": 1}'}
    damaged["null"] = '{"images": "a\\u0000b"}'
    for name, text in damaged.items():
        make_run(name, done=1).config_file.write_text(text)
    assert {run.state for run in Library(runs).list_runs()} == {"stopped"}
    page = client()
    for place in ("/", "/images", *(f"/run/{path.name}" for path in runs.iterdir())):
        assert page.get(place).status_code == 200, place


def test_many_runs(make_run, runs, client):
    """Each is read once, from its end; an unchanged one is not read again."""
    first = make_run("run-0", done=4)
    config, events = first.config_file.read_bytes(), first.events_file.read_bytes()
    for number in range(1, 200):
        run = RunFolder(runs / f"run-{number}")
        run.path.mkdir()
        run.config_file.write_bytes(config)
        run.events_file.write_bytes(events)
    library = Library(runs)
    with counted() as reading:
        assert len(library.list_runs()) == 200
    with counted() as again:
        library.list_runs()
    assert reading.count < 200_000
    assert again.count < reading.count / 4, (reading.count, again.count)
    assert client().get("/").text.count("<li>") == 200


def test_the_tail_is_short(make_run):
    run = make_run(done=4)
    for step in range(5, 3000):
        run.append("step", step, loss_ema=0.1)
    tail = read_tail(run.events_file)
    assert tail[-1]["step"] == 2999
    assert len(tail) < 100


def test_names(make_run, runs):
    make_run("group/inside")
    library = Library(runs)
    assert library.run("group/inside").path == runs / "group/inside"
    for name in ("group", "", ".", "group/inside/adapters", "nothing", "group//inside", "group/./inside"):
        with raises(RunError, "run.missing"):
            library.run(name)


def test_a_run_names_its_process(make_run):
    """`process.json` is there while a process writes the run, and gone after it, however it ends."""
    run = make_run(done=4)
    with run.occupied():
        assert run.process
    assert not run.process_file.exists()
    with pytest.raises(KeyboardInterrupt), run.occupied():
        raise KeyboardInterrupt
    assert not run.process_file.exists()
    with run.occupied(is_main=False):
        assert not run.process_file.exists()
