"""How far a LoRA file travels through the code until it is an image."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

import sdlora
from sdlora import cli
from sdlora.export.export import export_adapter

# 44 when it was first counted.
MAX_FILES = 36
PACKAGE = Path(sdlora.__file__).parent


def test_files_entered_by_sampling(tmp_path, base, adapter, monkeypatch):
    """`sdlora sample FILE`, alone in a folder and without a parent, runs functions of few files."""
    file = export_adapter(adapter, tmp_path / "ink.safetensors").path
    options = ["--base", "builtin", "--prompt", "x", "--seeds", "0", "--steps", "1", "--size", "64x64"]
    monkeypatch.setattr(
        sys, "argv", ["sdlora", "sample", str(file), *options, "--out", str(tmp_path / "out")]
    )
    entered: set[str] = set()

    def note(frame, event, _):
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        if event == "call" and is_function and Path(code.co_filename).is_relative_to(PACKAGE):
            entered.add(str(Path(code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.setprofile(None)
    assert stopped.value.code == 0
    assert (tmp_path / "out" / "grid.png").is_file()
    assert len(entered) <= MAX_FILES, sorted(entered)
