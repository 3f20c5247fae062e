"""A zip archive, or a data set of the hub, where an image folder is taken."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from sdlora.config import DataSection
from sdlora.data import sources
from sdlora.data.cache import clear_cache, measure_cache
from sdlora.data.scan import read_captions, scan_dataset
from sdlora.data.sources import open_source
from sdlora.errors import DataError
from tests.checks import raises
from tests.models.test_hub_fetch import ID, Hub


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_an_archive_is_a_folder(tmp_path: Path, write_image, cache: Path) -> None:
    """R-26: images and captions of a zip are those of the folder; it is unpacked once, and cleared."""
    folder = tmp_path / "set"
    for number in range(3):
        write_image(f"set/in/{number}.png", caption=f"a cat {number}")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    archive = write_zip(tmp_path / "10_ink.zip", {**files, "run.sh": b"", "__MACOSX/in/._0.png": b"x"})
    settings = DataSection(heldout=0)
    index, plain = scan_dataset(archive, settings), scan_dataset(folder, settings)
    assert [(one.name, one.digest, one.caption) for one in index.records] == [
        (one.name, one.digest, one.caption) for one in plain.records
    ]
    assert index.records[0].repeats == 10, "the name of the archive is that of the folder"
    assert [text for _, text in read_captions(archive, settings)] == [one.caption for one in index.records]
    assert not list(cache.rglob("run.sh"))
    assert len(list((cache / "archives").iterdir())) == 1
    assert {kind: files for kind, files, _ in measure_cache(cache)}["archives"] == 7
    assert clear_cache(cache) > 0
    assert not (cache / "archives").exists()


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "in/../../a.png", "..\\a.png", "c:a.png", "a\x07.png"]
)
def test_no_file_leaves_the_cache(tmp_path: Path, name: str) -> None:
    """R-44: an archive that would write elsewhere is refused as a whole."""
    archive = write_zip(tmp_path / "a.zip", {"ok.png": b"x", name: b"x"})
    with raises(DataError, "data.archive-path", shows="a.zip"):
        open_source(archive)
    assert not list(tmp_path.rglob("*.png"))


def test_unfit_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-44: links are left out; what is too large, damaged or no archive is one line, and leaves nothing."""
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert not list(open_source(tmp_path / "link.zip").iterdir())
    large = write_zip(tmp_path / "large.zip", {"a.png": bytes(5000), "b.png": bytes(5000)})
    for limit, size in (("MAX_FILES", 1), ("MAX_FILE_BYTES", 4999), ("MAX_TOTAL_BYTES", 9999)):
        with monkeypatch.context() as patched:
            patched.setattr(sources, limit, size)
            with raises(DataError, "data.archive-size", shows="large.zip"):
                open_source(large)
    damaged = tmp_path / "damaged.zip"
    whole = write_zip(tmp_path / "whole.zip", {"a.png": bytes(range(256)) * 20}).read_bytes()
    for data in (b"no archive", whole[:60] + b"\xff" * 20 + whole[80:]):
        damaged.write_bytes(data)
        with raises(DataError, "data.archive", shows="damaged.zip"):
            open_source(damaged)
    assert not list((tmp_path / "cache").rglob("tmp*"))


def test_a_data_set_of_the_hub(tmp_path: Path, write_image) -> None:
    """R-26: an id is fetched where there is no such folder: images and captions, nothing else."""
    for name in ("hub/a.png", "hub/in/b.PNG"):
        write_image(name, caption="a cat")
    (tmp_path / "hub" / "train.parquet").write_bytes(b"x")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "hub", []))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    code = f"from sdlora.data.sources import open_source; print(open_source({ID!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    index = scan_dataset(done.stdout.strip(), DataSection(heldout=0))
    assert [(one.name, one.caption) for one in index.records] == [("a.png", "a cat"), ("in/b.PNG", "a cat")]
    assert not list(index.root.rglob("*.parquet"))


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-26: the hub is asked for names that look like an id, where no folder of that name could be."""
    monkeypatch.chdir(tmp_path)
    with raises(DataError, "data.folder-missing", shows="nobody/nothing"):
        open_source("nobody/nothing")  # tests are offline
    (tmp_path / "nobody").mkdir()
    for source in ("nobody/nothing", "nothing", "a/b/c", tmp_path / "nothing"):
        assert open_source(source) == Path(source)
