"""The run folder: complete files or none, and events that can be read back (R-23)."""

from __future__ import annotations

import json
import os
import platform
import resource

import psutil
import pytest

from sdlora.config import RunConfig
from sdlora.errors import RunError
from sdlora.runs import MOST_SILENT_SECONDS, RunFolder
from sdlora.writing import check_writable, next_free_folder, write_file, write_json, write_text
from tests.checks import raises


def test_a_failed_write_leaves_what_was_there(tmp_path):
    """R-23: temporary file, verify, rename; a failure at any point keeps the old file and no rest."""
    path = write_text(tmp_path / "a.txt", "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    def refuse(temporary):
        raise ValueError("not what was written")

    with pytest.raises(OSError, match="disk full"):
        write_file(path, fail)
    with pytest.raises(ValueError, match="not what"):
        write_file(path, lambda temporary: temporary.write_text("new"), refuse)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_run_is_never_overwritten(tmp_path):
    """A folder that holds a run is refused, with the way on."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {"device": "cpu"})
    with raises(RunError, "run.exists", shows="sdlora resume"):
        RunFolder.create(run.path, RunConfig(), {})
    assert run.read_config() == RunConfig()
    assert run.read_environment() == {"device": "cpu"}


def test_a_run_is_a_path(tmp_path):
    """Where a path is taken, a run is too."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {})
    assert os.fspath(run) == str(tmp_path / "run")
    assert RunFolder.open(run).path == run.path
    with raises(RunError, "run.exists"):
        RunFolder.create(run, RunConfig(), {})


def test_wrong_folders(tmp_path):
    """`resume` on a folder that is no run, or is not there."""
    with raises(RunError, "run.missing"):
        RunFolder.open(tmp_path / "none")
    with raises(RunError, "run.no-config", shows="config.json"):
        RunFolder.open(tmp_path)
    file = write_text(tmp_path / "file", "")
    with raises(RunError, "run.file"):
        RunFolder.open(file)
    with raises(RunError, "run.file", shows="--out"):
        RunFolder(file).check_free()
    with raises(RunError, "run.no-adapter"):
        _ = RunFolder(tmp_path).adapter


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path):
    """One line, before anything starts."""
    tmp_path.chmod(0o500)
    with raises(RunError, "option--out"):
        check_writable(tmp_path / "run")


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    """Nor can a folder be made below a file, by anyone."""
    file = write_text(tmp_path / "file", "")
    with raises(RunError, "option--out"):
        check_writable(file / "run")


def test_events_are_one_object_a_line(tmp_path):
    """R-45: read back in order, by name; a line that a crash cut short is skipped."""
    run = RunFolder(tmp_path / "run")
    run.append("plan", 0, steps=3)
    for step in (1, 2, 3):
        run.append("step", step, loss=0.5)
    with run.events_file.open("a") as handle:
        handle.write('{"event": "step", "st')
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]
    assert all({"event", "step", "time"} <= set(event) for event in run.events())
    run.cut_events(2)
    assert [(event["event"], event["step"]) for event in run.events()] == [
        ("plan", 0),
        ("step", 1),
        ("step", 2),
    ]


def test_lines_are_strict_json(tmp_path):
    """R-45: JSON has no NaN and no infinity; readers of other languages refuse them."""
    run = RunFolder(tmp_path)
    run.append("heldout", 1, loss=float("nan"), by_band={"0-199": float("-inf"), "200-399": 0.5})
    run.append("step", 2, norms=(float("inf"), 1), loss=0.25)
    lines = run.events_file.read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["loss"], first["by_band"]) == ("nan", {"0-199": "-inf", "200-399": 0.5})
    assert (second["norms"], second["loss"]) == (["inf", 1], 0.25)


def test_a_line_is_whole_or_not_there(tmp_path):
    """R-24: what a full disk cut short is taken back, so that the next line is one; the trace is cut too."""
    run = RunFolder(tmp_path / "run")
    run.append_trace([{"step": step, "image": f"{number}.png"} for step in (1, 2) for number in (0, 1)])
    before = run.trace_file.read_bytes()
    small = len(before) + 10
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run.append_trace([{"step": 3, "image": "long enough to be cut"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.trace_file.read_bytes() == before
    run.append_trace([{"step": 3, "image": "2.png"}])
    assert [row["step"] for row in run.trace()] == [1, 1, 2, 2, 3]
    run.append("step", 1)
    run.cut_events(1)
    assert [row["step"] for row in run.trace()] == [1, 1]


def test_paths_and_steps(tmp_path):
    """The layout of DESIGN 2, and the newest adapter of an unfinished run."""
    run = RunFolder(tmp_path / "run")
    for step in (20, 100):
        write_text(run.step_adapter(step), "x")
        write_text(run.checkpoint(step) / "state.json", "{}")
    assert run.saved_steps() == run.checkpoint_steps() == [20, 100]
    assert run.adapter == run.path / "adapters" / "step-000100.safetensors"
    assert run.saved_adapter(20) == run.path / "adapters" / "step-000020.safetensors"
    with raises(RunError, "run.no-step", shows="20, 100"):
        run.saved_adapter(30)
    run.remove_checkpoints(keep=1)
    assert run.checkpoint_steps() == [100]
    for step in (110, 120, 130):
        write_text(run.checkpoint(step) / "state.json", "{}")
    run.remove_checkpoints(keep=2, last=120)
    assert run.checkpoint_steps() == [110, 120]
    write_text(run.final_adapter(), "x")
    assert run.adapter.name == "final.safetensors"
    run.append("step", 110)
    # Of an earlier step, while the finished run is continued.
    assert run.adapter.name == "step-000100.safetensors"
    run.append("done", 130)
    assert run.adapter.name == "final.safetensors"
    assert run.final_adapter("kohya").name == "final.kohya.safetensors"
    assert run.sample_folder(7).name == "step-000007"


def test_a_free_name(tmp_path):
    """runs/NAME, or runs/NAME-2 when that is taken."""
    assert next_free_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert next_free_folder(tmp_path / "a") == tmp_path / "a-2"


def test_text_is_utf8(tmp_path):
    """R-29: every file names its encoding."""
    path = write_json(tmp_path / "設定 🎨.json", {"trigger": "水彩"})
    assert json.loads(path.read_bytes().decode("utf-8")) == {"trigger": "水彩"}


def test_line_separators_in_events(tmp_path):
    """R-45: a caption or a file's name may hold separators that end a line elsewhere."""
    run = RunFolder(tmp_path / "run")
    run.append("warning", 1, names=["a\u2028b\x85c.png", "\ud800"])
    run.append("step", 2)
    run.cut_events(2)
    assert [event["event"] for event in run.events()] == ["warning", "step"]
    assert next(run.events())["names"] == ["a\u2028b\x85c.png", "\ud800"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "null", "[" * 100_000, '{"lora": 3}', '{"lora": {"rank": 0}}', '{"x": {"y": 1}}'],
)
def test_a_configuration_that_was_tampered_with(tmp_path, content):
    """A run whose config.json is damaged, or of another program, is one line that names the file."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {"base_dtype": "fp32"})
    run.config_file.write_text(content, encoding="utf-8")
    with raises(RunError, "run.config", shows="config.json") as caught:
        run.read_config()
    assert "\n" not in str(caught.value)
    run.config_file.write_bytes(b"\xff\xfe")
    with raises(RunError, "run.config", shows="config.json"):
        run.read_config()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"base_dtype": "int8"}', '{"base_dtype": ["fp32"]}'])
def test_an_environment_that_was_tampered_with(tmp_path, content):
    """The dtype that a run has its base in is one of three, or one line says that it is not."""
    run = RunFolder.create(tmp_path / "run", RunConfig(), {"base_dtype": "bf16"})
    assert run.base_dtype == "bf16"
    run.environment_file.write_text(content, encoding="utf-8")
    with raises(RunError, "run.environment", shows="environment.json") as caught:
        _ = run.base_dtype
    assert "\n" not in str(caught.value)


def test_events_and_steps_that_are_none(tmp_path):
    """Lines that are no events, and files with other names, are passed over."""
    run = RunFolder(tmp_path / "run")
    run.append("step", 1)
    lines = [
        b"5",
        b"[]",
        b"null",
        b"{}",
        b'{"event": "step"}',
        b'{"event": "step", "step": "x"}',
        b'{"event": [], "step": 1}',
    ]
    with run.events_file.open("ab") as handle:
        handle.write(b"\n".join([*lines, b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b""]))
    assert [event["step"] for event in run.events()] == [1]
    for name in ("step-x", "step-1x", "step-٣", "step--1", "step-" + "9" * 200, "step-000002.kohya"):
        write_text(run.adapters / f"{name}.safetensors", "x")
        write_text(run.checkpoints / name / "state.json", "{}")
    write_text(run.step_adapter(7), "x")
    assert run.saved_steps() == [7]
    assert run.checkpoint_steps() == []


@pytest.mark.parametrize("damaged", ["[1]", "{", None])
def test_what_is_evaluated_adds_up(tmp_path, damaged):
    """R-25: the recommendation outlives a new measurement; a damaged file is written again."""
    run = RunFolder(tmp_path / "run")
    if damaged:
        write_text(run.evaluation_file, damaged)
    assert run.read_evaluation() == {}
    run.add_evaluation(choice={"step": 100})
    run.add_evaluation(loss=0.5)
    assert run.read_evaluation() == {"choice": {"step": 100}, "loss": 0.5}


def test_which_process_writes_a_run(tmp_path, sleeper):
    """R-23: one of this machine, also after its number went to another; one of another, while it is heard."""
    run = RunFolder(tmp_path)
    assert not run.is_written
    run.name_process(sleeper.pid)
    assert run.is_written
    with raises(RunError, "run.written", shows=(str(sleeper.pid), "kill")):
        run.check_unwritten()
    before = psutil.Process(sleeper.pid).create_time() - 3600
    os.utime(run.process_file, (before, before))
    assert run.is_written, "the clock of a network disk may be late"
    write_json(run.process_file, {"pid": sleeper.pid, "host": platform.node(), "started": before})
    assert not run.is_written
    run.check_unwritten()
    write_json(run.process_file, {"pid": 1, "host": platform.node() + "2"})
    assert run.is_written
    run.check_unwritten()  # of another machine, it may be dead
    for file in (run.process_file, run.events_file):
        file.touch()
        os.utime(file, (before - MOST_SILENT_SECONDS, before - MOST_SILENT_SECONDS))
    assert not run.is_written


def test_the_launcher_of_a_run_is_no_other_process(tmp_path):
    run = RunFolder(tmp_path)
    for pid in (os.getpid(), os.getppid()):
        run.name_process(pid)
        run.check_unwritten()
