"""A zip archive of a run or a LoRA file, where one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config import load_config
from sdlora.data.cache import cache_folder
from sdlora.errors import AdapterError, DataError
from sdlora.formats.archives import open_archive
from sdlora.formats.files import inspect_adapter, resolve_adapter, split_sum
from sdlora.runs import RunFolder
from sdlora.sampling.sources import find_subjects
from tests.checks import raises
from tests.data.test_sources import write_zip


@pytest.fixture
def lora(lora_file: Path) -> bytes:
    return lora_file.read_bytes()


def test_a_run_in_an_archive(lora: bytes, tmp_path: Path) -> None:
    """R-13: a saved step of it, in a sum too; its checkpoints, and what is hidden, stay in the archive."""
    run = RunFolder.create(tmp_path / "ink", load_config(images=tmp_path), {"base_dtype": "fp32"})
    files = {
        "ink/config.json": run.config_file.read_bytes(),
        "ink/adapters/step-000010.safetensors": lora,
        "ink/adapters/final.safetensors": lora,
        "ink/adapters/final.kohya.safetensors": lora,
        "ink/checkpoints/step-000010/state.safetensors": lora,
        "__MACOSX/ink/._config.json": b"x",
    }
    archive = write_zip(tmp_path / "mine.zip", files)
    found = resolve_adapter(archive, 10)
    assert found.run
    assert (found.run.name, found.file.name) == ("ink", "step-000010.safetensors")
    one, final = find_subjects(archive, [10, "final"])
    assert (one.step, final.step) == (10, "final")
    [both] = find_subjects(f"{archive}:0.6+{archive}:0.4", [None])
    assert [part.factor for part in both.parts] == [0.6, 0.4]
    assert both.parts[0].run
    assert sorted(file.name for file in (cache_folder() / "archives").rglob("*.*")) == [
        "config.json", "final.kohya.safetensors", "final.safetensors", "step-000010.safetensors"
    ]  # fmt: skip


def test_a_file_in_an_archive(lora: bytes, tmp_path: Path) -> None:
    """R-13: one LoRA in either dialect; another archive under the same name is unpacked anew."""
    pair = {"in/ink.safetensors": lora, "in/ink.kohya.safetensors": lora}
    archive = write_zip(tmp_path / "a.ZIP", pair)
    assert inspect_adapter(archive).path.name == "ink.safetensors"
    assert split_sum(archive) == [(archive, 1.0)]
    write_zip(archive, {"other.safetensors": lora})
    assert Path(open_archive(archive)).name == "other.safetensors"


def test_archives_without_one_adapter(lora: bytes, tmp_path: Path) -> None:
    """R-44: neither, several, and a file that would be written elsewhere are one line."""
    for files, key in (
        ({"a.png": b"x"}, "lora.archive"),
        ({"a.safetensors": b"x", "b.safetensors": b"x"}, "lora.archive"),
    ):
        with raises(AdapterError, key, shows="b.safetensors" if "b.safetensors" in files else "a.zip"):
            resolve_adapter(write_zip(tmp_path / "a.zip", files))
    with raises(DataError, "data.archive-path"):
        resolve_adapter(write_zip(tmp_path / "b.zip", {"../a.safetensors": lora}))
    assert not (tmp_path / "a.safetensors").exists()
