"""Captions edited in place: nothing is lost, everything can be undone."""

from __future__ import annotations

import json

import pytest

from sdlora.config import DataSection
from sdlora.data.scan import scan_dataset
from sdlora.errors import DataError
from sdlora.studio import captions
from sdlora.studio.captions import ImageFolder
from tests.checks import raises


@pytest.fixture
def folder(make_images, tmp_path):
    return ImageFolder(make_images(), tmp_path / "journal.jsonl")


def test_edit_and_undo(folder):
    """R-05: what is written is what training reads; undo restores the bytes, one edit after the other."""
    file = folder.path / "00.txt"
    original = b"\xef\xbb\xbfa circle  number 0  \r\n"
    file.write_bytes(original)
    assert folder.write({"00.png": ("a circle number 0", " a red \t circle ")}) == {"00.png": "a red circle"}
    records = {record.name: record for record in scan_dataset(folder.path, DataSection()).records}
    assert records["00.png"].caption == "a red circle"
    folder.write({"00.png": ("a red circle", "a blue circle"), "01.png": ("a circle number 1", "a dot")})
    assert folder.num_edits == 2
    assert folder.undo() == ({"00.png": "a red circle", "01.png": "a circle number 1"}, [])
    assert folder.undo() == ({"00.png": "a circle number 0"}, [])
    assert file.read_bytes() == original
    with raises(DataError, "caption.no-edit"):
        folder.undo()


def test_several_captions(folder):
    """One a line, whether the run reads them as several or as one."""
    (folder.path / "00.txt").write_text("a circle\n\na ring\n")
    assert folder.captions()["00.png"] == "a circle\na ring"
    folder.write({"00.png": ("a circle\na ring", "a disc\r\na ring")})
    assert (folder.path / "00.txt").read_text() == "a disc\na ring\n"


def test_a_new_caption_is_removed_again(folder):
    (folder.path / "02.txt").unlink()
    folder.write({"02.png": ("", "a circle")})
    folder.undo()
    assert not (folder.path / "02.txt").exists()


def test_another_tab_loses_nothing(folder):
    """All or none: a caption that has changed since it was seen is not overwritten, nor is any with it."""
    (folder.path / "01.txt").write_text("from an editor")
    with raises(DataError, "caption.changed", shows="01.png"):
        folder.write({"00.png": ("a circle number 0", "x"), "01.png": ("a circle number 1", "y")})
    assert folder.captions()["00.png"] == "a circle number 0"
    assert folder.num_edits == 0
    folder.write({"02.png": ("a circle number 2", "x")})
    folder.write({"01.png": ("from an editor", "y")})
    (folder.path / "01.txt").write_text("from an editor again")
    assert folder.undo() == ({"01.png": "from an editor again"}, ["01.txt"])
    assert (folder.path / "01.txt").read_text() == "from an editor again"
    # The edits before it can still be undone.
    assert folder.undo() == ({"02.png": "a circle number 2"}, [])


def test_a_file_that_cannot_be_written(folder, monkeypatch):
    """R-05: none is written then, and no edit stands in the way of Undo."""
    folder.write({"02.png": ("a circle number 2", "x")})
    edit = {"00.png": ("a circle number 0", "one"), "01.png": ("a circle number 1", "two")}
    with monkeypatch.context() as patch:
        real = captions.write_file

        def write(file, fill):
            if file.name == "01.txt":
                raise PermissionError(1, "Operation not permitted")
            real(file, fill)

        patch.setattr(captions, "write_file", write)
        with raises(DataError, "caption.unwritable", shows="01.txt"):
            folder.write(edit)
    assert folder.captions()["00.png"] == "a circle number 0"
    assert folder.undo() == ({"02.png": "a circle number 2"}, [])
    (folder.path / "00.txt").write_bytes(b"x" * 150_000)
    with raises(DataError, "caption.unreadable", shows="00.txt"):
        folder.write({"00.png": ("", "one")})
    with monkeypatch.context() as patch:
        patch.setattr(captions, "append_lines", lambda *_: folder.path.read_bytes())
        with raises(DataError, "caption.unwritable", shows="journal.jsonl"):
            folder.write({"01.png": ("a circle number 1", "two")})
    assert folder.captions()["01.png"] == "a circle number 1"


def test_undo_passes_over_what_cannot_be_read(folder, monkeypatch):
    """R-05: a folder of that name, or a file too large, stays; a journal that fails leaves all as it was."""
    folder.write({"00.png": ("a circle number 0", "one")})
    folder.write({"01.png": ("a circle number 1", "two")})
    (folder.path / "01.txt").write_bytes(b"x" * 150_000)
    assert folder.undo()[1] == ["01.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(captions, "append_lines", lambda *_: folder.path.read_bytes())
        with raises(DataError, "caption.unwritable"):
            folder.undo()
    assert folder.captions()["00.png"] == "one"
    assert folder.undo() == ({"00.png": "a circle number 0"}, [])


def test_metadata_stays(folder):
    """A caption from a table is overruled by a file, and the table is not touched."""
    (folder.path / "03.txt").unlink()
    table = folder.path / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": "03.png", "text": "from the table"}) + "\n")
    assert folder.captions()["03.png"] == "from the table"
    folder.write({"03.png": ("from the table", "from the page")})
    assert folder.captions()["03.png"] == "from the page"
    folder.undo()
    assert folder.captions()["03.png"] == "from the table"


def test_images_of_one_stem(folder):
    """`00.txt` is the caption of `00.png` and of `00.webp`: an edit of one must not change the other."""
    (folder.path / "00.webp").write_bytes((folder.path / "00.png").read_bytes())
    with raises(DataError, "caption.shared"):
        folder.write({"00.png": ("a circle number 0", "x")})
    (folder.path / "00.txt").unlink()
    folder.write({"00.webp": ("", "one"), "00.png": ("", "two")})
    assert (folder.captions()["00.webp"], folder.captions()["00.png"]) == ("one", "two")


def test_what_cannot_be_written(folder):
    for name in ("../out.png", "no.png", "00.txt"):
        with raises(DataError, "data.image-gone"):
            folder.write({name: ("", "x")})
    with raises(DataError, "data.caption-long"):
        folder.write({"00.png": ("a circle number 0", "x" * 100_001)})
    assert not folder.journal.exists()


def test_pages(client, make_images):
    """The frame comes at once; findings, buckets and captions follow; edits answer in JSON."""
    images = make_images(sizes=((64, 64), (64, 64), (100, 64)))
    (images / "02.txt").unlink()
    page = client(images)
    [name] = [part.split('"')[0] for part in page.get("/images").text.split("/images/")[1:]]
    assert "data-load" in page.get(f"/images/{name}").text
    full = page.get(f"/images/{name}?all").text
    assert "a circle number 1" in full
    assert "note error" in full
    assert "160x104" in full
    edit = {"changes": json.dumps({"02.png": ["", "a circle"]})}
    assert page.post(f"/captions/{name}", data=edit).json() == {
        "captions": {"02.png": "a circle"},
        "edits": 1,
    }
    refused = page.post(f"/captions/{name}", data=edit, headers={"accept": "application/json"})
    assert refused.status_code == 409
    assert "02.png" in refused.json()["error"]
    assert page.post(f"/undo/{name}").json() == {"captions": {"02.png": ""}, "edits": 0, "kept": []}
    assert page.post(f"/captions/{name}", data={"changes": "{"}).status_code == 409
