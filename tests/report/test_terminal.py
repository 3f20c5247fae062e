"""What a run prints where there is no terminal, and `train.log` (R-16, R-45)."""

from __future__ import annotations

import warnings

import pytest
from rich.console import Console

from sdlora.report import terminal as module
from sdlora.report.terminal import Terminal


def test_a_log_lives(capsys, monkeypatch):
    """Without a terminal, a line with what is done, its rate and the rest comes in place of a bar."""
    now = [0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Terminal().progress("training", 100, done=10) as meter:
        for now[0] in range(2, 62, 2):
            meter.advance(note="loss 0.1234")
    beats = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line and "a second" in line]
    assert beats == [
        "training 25/100: loss 0.1234, 0.5 a second, ETA 0:02:30",
        "training 40/100: loss 0.1234, 0.5 a second, ETA 0:02:00",
    ]


def test_another_total_has_a_rate_of_its_own(capsys, monkeypatch):
    """R-16: of a few more images after a pause, the rate is not that of the pause."""
    now = [0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Terminal().progress("sampling", 1) as meter:
        meter.show(0, 100)
        now[0] = 20
        meter.show(100, 100)
        now[0] = 200
        meter.show(0, 20)
        now[0] = 235
        meter.show(7, 20)
    assert "sampling 7/20: 0.2 a second, ETA 0:01:05" in capsys.readouterr().out


def fail(terminal: Terminal, how: str) -> None:
    """A run that prints a name that is not text, and ends."""
    terminal.warn("odd \udcff name")
    terminal.beat("training 1/2")
    raise RuntimeError(how)


def test_a_log_file_has_all_lines(tmp_path, capsys):
    """Those before the run had a folder too, also if quiet, and what ended the run."""
    file, terminal = tmp_path / "train.log", Terminal(quiet=True)
    terminal.print("device    cpu")
    for last in ("first", "second"):
        with pytest.raises(RuntimeError), terminal.keep(file):
            fail(terminal, last)
    expected = "device    cpu\nwarning: odd ? name\ntraining 1/2\nRuntimeError: first\n"
    assert file.read_text("utf-8") == expected + expected.replace("first", "second").partition("\n")[2]
    assert capsys.readouterr().out == ""


def test_a_log_that_cannot_be_written(tmp_path):
    """R-45: no disk, no log, but a run."""
    with Terminal(quiet=True).keep(tmp_path / "missing" / "train.log"):
        pass
    terminal = Terminal(quiet=True)
    with terminal.keep(tmp_path):
        terminal.print("a line")


def test_a_bar_in_a_notebook(capsys):
    """R-42: tqdm's, which needs no further package; no line of Rich's, and no warning about widgets."""
    terminal = Terminal()
    terminal.console.is_jupyter = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with terminal.progress("training", 4) as meter:
            meter.advance(3, note="loss 0.5")
            meter.show(4, 4)
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "training" in shown.err
    assert shown.out == ""


def test_lines_break_between_words(capsys, tmp_path):
    """R-16: below the text of a label; paths stay whole; a file has whole lines."""
    path = f"/a/very/{'long' * 20}/path-of-a-file.png"
    line = f"memory    needs 2 GB, of which {'much ' * 9}is in {path}"
    terminal = Terminal()
    terminal.console = Console(force_terminal=True, width=40, highlight=False, soft_wrap=True)
    with terminal.keep(tmp_path / "train.log"):
        terminal.print("short", line)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "short"
    assert " ".join(part.strip() for part in printed[1:]) == line
    assert all(part.startswith(" " * 10) for part in printed[2:])
    assert [part for part in printed if len(part) > 40] == [
        f"{' ' * 10}/a/very/{'long' * 20}/path-of-a-file.png"
    ]
    assert line in (tmp_path / "train.log").read_text(encoding="utf-8")
