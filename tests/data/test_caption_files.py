"""Captions are found without an option (R-05) and read in any encoding (R-29)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config import DataSection
from sdlora.data.caption_files import decode_text
from sdlora.data.records import DatasetIndex
from sdlora.data.scan import scan_dataset
from tests.checks import bounded


def scan(root: Path, **settings: object) -> DatasetIndex:
    """Scans with nothing held out."""
    return scan_dataset(root, DataSection(heldout=0, **settings))


def captions(index: DatasetIndex) -> dict[str, tuple[str, str]]:
    """Caption and source by name."""
    return {record.name: (record.caption, record.caption_source) for record in index.records}


def messages(index: DatasetIndex, severity: str) -> list[str]:
    """The messages of one severity."""
    return [finding.message for finding in index.findings if finding.severity == severity]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_encodings(encoding: str) -> None:
    """R-29: UTF-8 with and without a mark, UTF-16 with and without one, and cp1252 read alike."""
    text = "a café, déjà vu"
    decoded, found = decode_text(text.encode(encoding))
    assert decoded == text
    assert found.startswith({"utf-8-sig": "utf-8", "cp1252": "cp1252"}.get(encoding, encoding[:6]))


def test_utf16_with_mark_in_both_orders() -> None:
    """R-29: the byte order mark decides, also for text without Latin letters."""
    assert decode_text(b"\xff\xfe" + "猫の絵".encode("utf-16-le")) == ("猫の絵", "utf-16")
    assert decode_text(b"\xfe\xff" + "猫の絵".encode("utf-16-be")) == ("猫の絵", "utf-16")


def test_windows_text_is_a_notice(tmp_path: Path, write_image) -> None:
    """R-29: cp1252 is read, with a notice that names the file."""
    write_image("a.png").with_suffix(".txt").write_bytes("a café".encode("cp1252"))
    index = scan(tmp_path)
    assert captions(index) == {"a.png": ("a café", ".txt")}
    assert any("cp1252" in message and "a.txt" in message for message in messages(index, "notice"))


def test_all_four_places(tmp_path: Path, write_image) -> None:
    """R-05: .txt, .caption, metadata.jsonl and metadata.csv are found without an option."""
    write_image("a.png", caption="from text")
    write_image("b.png").with_suffix(".caption").write_text("from\n  caption \n", encoding="utf-8")
    write_image("sub/c.png")
    write_image("table/d e.png")
    rows = [{"file_name": "sub/c.png", "text": "from lines"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "table" / "metadata.csv").write_text(
        'file_name,prompt\r\nd e.png,"from, the ""table"""\r\n', encoding="utf-8-sig"
    )
    index = scan(tmp_path)
    assert captions(index) == {
        "a.png": ("from text", ".txt"),
        "b.png": ("from caption", ".caption"),
        "sub/c.png": ("from lines", "metadata.jsonl"),
        "table/d e.png": ('from, the "table"', "metadata.csv"),
    }
    assert index.findings == ()


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_columns(tmp_path: Path, write_image, column: str) -> None:
    """R-05: the caption may stand in text, caption or prompt."""
    write_image("a.png")
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", column: "a boat"}) + "\n\n", encoding="utf-8"
    )
    assert captions(scan(tmp_path)) == {"a.png": ("a boat", "metadata.jsonl")}


def test_metadata_of_the_nearest_folder_wins(tmp_path: Path, write_image) -> None:
    """R-05: a file deeper down knows better; the difference is a notice."""
    write_image("sub/a.png")
    for folder, text in ((tmp_path, "far"), (tmp_path / "sub", "near")):
        name = "a.png" if folder.name == "sub" else "sub\\a.png"
        row = json.dumps({"file_name": name, "text": text})
        (folder / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert captions(scan(tmp_path)) == {"sub/a.png": ("near", "metadata.jsonl")}


def test_row_without_a_picture_is_a_warning(tmp_path: Path, write_image) -> None:
    """R-05: a metadata row that points to nothing is named."""
    write_image("a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\ngone.png,y\n", encoding="utf-8")
    assert any("gone.png" in message for message in messages(scan(tmp_path), "warning"))


def test_conflict_names_the_winner(tmp_path: Path, write_image) -> None:
    """R-05: a sidecar and metadata that differ are a notice; the sidecar wins."""
    write_image("a.png", caption="mine")
    write_image("b.png", caption="same")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,yours\nb.png,same\n", encoding="utf-8")
    index = scan(tmp_path)
    assert captions(index)["a.png"] == ("mine", ".txt")
    assert messages(index, "notice") == [".txt and metadata.csv differ for 1 image; .txt wins: a.png"]


def test_broken_metadata_is_an_error(tmp_path: Path, write_image) -> None:
    """R-05: a line that is not JSON, and a table without the needed columns, stop the run."""
    write_image("a/1.png", caption="x")
    write_image("b/2.png", caption="x")
    write_image("c/3.png", caption="x")
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n{oops\n', "utf-8")
    (tmp_path / "b" / "metadata.csv").write_text("file,text\n2.png,x\n", "utf-8")
    (tmp_path / "c" / "metadata.csv").write_text("file_name,label\n3.png,x\n", "utf-8")
    errors = messages(scan(tmp_path), "error")
    assert any("a/metadata.jsonl" in error and "line 2" in error for error in errors)
    assert any("b/metadata.csv has no column file_name" in error for error in errors)
    assert any("c/metadata.csv has no column text, caption or prompt" in error for error in errors)


def test_no_caption_and_no_trigger_lists_the_files(tmp_path: Path, write_image) -> None:
    """R-05: without captions and without a trigger the files are listed, five of them."""
    for number in range(8):
        write_image(f"{number}.png")
    (error,) = messages(scan(tmp_path), "error")
    assert "no captions for 8 images" in error
    assert "0.png, 1.png, 2.png, 3.png, 4.png and 3 more" in error
    assert "data.trigger" in error


def test_no_caption_with_a_trigger(tmp_path: Path, write_image) -> None:
    """R-05: with a trigger and no captions at all, the trigger is the caption."""
    write_image("a.png")
    index = scan(tmp_path, trigger="sks style")
    assert captions(index) == {"a.png": ("sks style", "trigger")}
    assert messages(index, "error") == []


@pytest.mark.parametrize("trigger", [None, "sks"])
def test_mixed_coverage(tmp_path: Path, write_image, trigger: str | None) -> None:
    """R-05: captions for a part only are an error unless allowed; an empty caption file is no caption."""
    write_image("a.png", caption="a cat")
    write_image("b.png")
    write_image("c.png", caption="  \n")
    (error,) = messages(scan(tmp_path, trigger=trigger), "error")
    assert "2 of 3 images have no caption: b.png, c.png" in error
    assert "data.allow_missing_captions" in error
    index = scan(tmp_path, trigger=trigger, allow_missing_captions=True)
    assert messages(index, "error") == []
    assert captions(index)["b.png"] == (("sks", "trigger") if trigger else ("", ""))


def test_captions_above_the_folder_are_pointed_at(tmp_path: Path, write_image) -> None:
    """R-26: pointing at a leaf whose metadata lies above says where it is."""
    write_image("leaf/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nleaf/a.png,x\n", encoding="utf-8")
    (error,) = messages(scan(tmp_path / "leaf"), "error")
    assert str(tmp_path / "metadata.csv") in error


def test_caption_files_without_a_picture(tmp_path: Path, write_image) -> None:
    """R-05: leftover caption files are named; a licence is not taken for one."""
    write_image("a.png", caption="x")
    (tmp_path / "old.txt").write_text("x", encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("x", encoding="utf-8")
    (notice,) = messages(scan(tmp_path), "notice")
    assert "old.txt" in notice
    assert "LICENSE" not in notice


def test_accents_stored_apart(tmp_path: Path, write_image) -> None:
    """R-29: a name with decomposed accents, as some systems store it, meets its caption."""
    write_image("cafe\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,found\n", encoding="utf-8")
    assert next(iter(captions(scan(tmp_path)).values())) == ("found", "metadata.csv")


def test_placeholder_without_a_trigger(tmp_path: Path, write_image) -> None:
    """R-30: an unreplaced placeholder is an error that names the files."""
    write_image("a.png", caption="a {trigger} cat")
    (error,) = messages(scan(tmp_path), "error")
    assert "{trigger}" in error
    assert "a.png" in error
    assert captions(scan(tmp_path, trigger="sks")) == {"a.png": ("a sks cat", ".txt")}


def test_a_caption_of_megabytes(tmp_path: Path, write_image) -> None:
    """R-05: a caption file of 10 MB is something else; it is named and not read."""
    write_image("a.png", caption="x" * 10_000_000)
    write_image("b.png", caption="a cat")
    (error, _) = messages(scan(tmp_path), "error")
    assert error == (
        "1 caption file that cannot be read: a.txt is too large (10.0 MB; at most 0.1 MB are read); "
        "mend them, or move them away"
    )


def test_metadata_of_megabytes(tmp_path: Path, write_image) -> None:
    """R-05: tables of 100 MB, of millions of lines, and with captions of megabytes are one line each."""
    for name in ("a", "b", "c", "d"):
        write_image(f"{name}/1.png", caption="x")
    with (tmp_path / "a" / "metadata.jsonl").open("wb") as file:
        file.truncate(100_000_000)
    (tmp_path / "b" / "metadata.csv").write_text("\r" * 1_000_000, encoding="utf-8")
    row = {"file_name": "1.png", "text": "x" * 200_000}
    (tmp_path / "c" / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "d" / "metadata.csv").write_text(f"file_name,text\n1.png,{'x' * 200_000}\n", encoding="utf-8")
    with bounded():
        errors = messages(scan(tmp_path), "error")
    assert sorted(errors) == [
        "1 caption file that cannot be read: a/metadata.jsonl is too large (100.0 MB; at most 32.0 MB are "
        "read); mend them, or move them away",
        "b/metadata.csv has 1,000,000 lines; at most 500,000 are read, so split the folder",
        "c/metadata.jsonl has 1 caption of more than 100,000 letters: c/1.png (200,000); shorten them",
        "d/metadata.csv is not a CSV table: field larger than field limit (131072)",
    ]


def test_a_broken_table_is_one_line(tmp_path: Path, write_image) -> None:
    """R-05: the first few and a count, as of all that goes wrong with many files."""
    rows = []
    for number in range(10):
        write_image(f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": "x" * 100_001}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for number in range(10, 20):
        write_image(f"{number}.png", caption="x" * 100_001)
    long, unread = messages(scan(tmp_path), "error")[:2]
    assert long.startswith("metadata.jsonl has 10 captions of more than 100,000 letters: 0.png (100,001), 1")
    assert long.endswith("4.png (100,001) and 5 more; shorten them")
    assert unread.startswith("10 caption files that cannot be read: 10.txt is too large (")
    assert unread.endswith(" and 5 more; mend them, or move them away")


@pytest.mark.parametrize(
    "target", ["../../etc/passwd", "/etc/passwd", "../secret.png", "~/secret.png", "C:\\secret.png", "."]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_that_points_out(tmp_path: Path, write_image, target: str, kind: str) -> None:
    """R-05: a row that names a file elsewhere names nothing; only pictures of the folder get captions."""
    write_image("secret.png")
    write_image("set/a.png", caption="mine")
    rows = {
        "jsonl": "".join(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in (target, "a.png")),
        "csv": f"file_name,text\n{target},x\na.png,x\n",
    }
    (tmp_path / "set" / f"metadata.{kind}").write_text(rows[kind], encoding="utf-8")
    index = scan(tmp_path / "set")
    assert captions(index) == {"a.png": ("mine", ".txt")}
    assert any("names images that are not there (1)" in line for line in messages(index, "warning"))


def test_absolute_names_of_the_folder_itself(tmp_path: Path, write_image) -> None:
    """R-05: an absolute path is none of the table's names, wherever it leads."""
    path = write_image("a.png", caption="mine")
    row = {"file_name": str(path), "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert captions(scan(tmp_path)) == {"a.png": ("mine", ".txt")}


def test_letters_that_no_file_can_take(tmp_path: Path, write_image) -> None:
    """R-29: halves of pairs, zero bytes and terminal codes leave a caption; the joiners of emoji stay."""
    write_image("a.png", caption="a\x1b[31m cat\x07\x7f \x85 of\u2028 two 👩‍🎨\u3000colours")
    write_image("b.png")
    (tmp_path / "metadata.jsonl").write_text(r'{"file_name": "b.png", "text": "x\ud800y \u0000 z"}', "utf-8")
    found = captions(scan(tmp_path))
    assert found["a.png"][0] == "a[31m cat of two 👩‍🎨 colours"
    assert found["b.png"][0] == "xy z"


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png", "text": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 50_000,
        '"text"',
        "null",
    ],
    ids=lambda line: line[:12],
)
def test_lines_that_are_no_rows(tmp_path: Path, write_image, line: str) -> None:
    """R-05: JSON too deep or with numbers too long is named by its line."""
    write_image("a.png", caption="x")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}', "utf-8")
    (error,) = messages(scan(tmp_path), "error")
    assert error == "metadata.jsonl must hold one JSON object a line; correct line 2"


@pytest.mark.parametrize("value", ["null", "true", "[1, [2]]", '{"a": "b"}', "3.5", "7"])
def test_values_that_are_no_text(tmp_path: Path, write_image, value: str) -> None:
    """R-05: a number is its digits; lists, objects and nothing are no caption, as names no file."""
    write_image("a.png")
    rows = f'{{"file_name": "a.png", "text": {value}}}\n{{"file_name": {value}, "text": "x"}}'
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8")
    expected = {"3.5": "3.5", "7": "7", "true": "True"}.get(value, "")
    assert captions(scan(tmp_path, allow_missing_captions=True))["a.png"][0] == expected
