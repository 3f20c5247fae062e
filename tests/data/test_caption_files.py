"""Captions are found without an option (R-05) and read in any encoding (R-29)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config import DataSection, load_config
from sdlora.data.caption_files import decode_text
from sdlora.data.records import DatasetIndex
from sdlora.data.scan import scan_dataset
from sdlora.errors import ConfigError
from tests.checks import bounded, raises


def scan(root: Path, **settings: object) -> DatasetIndex:
    """Scans with nothing held out."""
    return scan_dataset(root, DataSection(heldout=0, **settings))


def captions(index: DatasetIndex) -> dict[str, tuple[str, str]]:
    """Caption and source by name."""
    return {record.name: (record.caption, record.caption_source) for record in index.records}


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


def test_windows_text_is_a_notice(tmp_path: Path, write_image, found) -> None:
    """R-29: cp1252 is read, with a notice that names the file."""
    write_image("a.png").with_suffix(".txt").write_bytes("a café".encode("cp1252"))
    index = scan(tmp_path)
    assert captions(index) == {"a.png": ("a café", ".txt")}
    assert found(index)["notice data.caption-encoding"].names == ("a.txt",)


@pytest.mark.parametrize(
    ("encoding", "texts"),
    [
        ("cp932", ["水墨画の丸、赤い", "猫が座っている、白い背景", "1girl, 青い髪"]),
        ("euc_jp", ["水墨画の丸、赤い", "猫が座っている、白い背景"]),
        ("gb18030", ["水墨画，红色的圆", "一只猫坐在椅子上", "ink, 红色房子"]),
        ("big5", ["水墨畫，紅色的圓", "一隻貓坐在椅子上", "山水風景畫"]),
        ("cp949", ["빨간 집", "고양이가 앉아 있다", "수묵화의 원, 빨강"]),
    ],
)
def test_encodings_of_east_asia(tmp_path: Path, write_image, found, encoding: str, texts: list[str]) -> None:
    """R-29: one encoding is found for all captions of a folder, and named; Latin ones keep theirs."""
    write_image("latin.png").with_suffix(".txt").write_bytes("a café".encode("cp1252"))
    for number, text in enumerate(texts):
        write_image(f"{number}.png").with_suffix(".txt").write_bytes(text.encode(encoding))
    index = scan(tmp_path)
    assert [record.caption for record in index.records] == [*texts, "a café"]
    message = found(index)["notice data.caption-encoding"].message
    assert f"0.txt ({encoding})" in message
    assert "latin.txt (cp1252)" in message


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "cp1255", "cp874"])
def test_an_encoding_that_is_not_clear_is_an_error(tmp_path: Path, write_image, found, encoding: str) -> None:
    """R-29: no text is guessed; the file and the setting are named, and with it the text is read."""
    text = {"cp1255": "בית אדום", "cp874": "บ้านสีแดง"}.get(encoding, "красный дом")
    write_image("a.png").with_suffix(".txt").write_bytes(text.encode(encoding))
    error = found(scan(tmp_path))["error data.caption-undecodable"]
    assert error.names == ("a.txt",)
    assert "data.caption_encoding" in error.message
    index = scan(tmp_path, caption_encoding=encoding)
    assert captions(index) == {"a.png": (text, ".txt")}
    assert found(index) == {}


def test_captions_that_the_encoding_does_not_have(tmp_path: Path, write_image, found) -> None:
    """R-29: a given encoding is not forced; a name that is none is a mistake in the settings."""
    write_image("a.png").with_suffix(".txt").write_bytes(b"\x81\x20 a house")
    assert (
        "(not cp932)"
        in found(scan(tmp_path, caption_encoding="cp932"))["error data.caption-undecodable"].message
    )
    for name in ("no-such", "base64", "utf-16", "cp037"):
        with raises(ConfigError, "data.caption_encoding", shows=name):
            load_config(None, {"data.caption_encoding": name})


def test_runs_of_earlier_versions_keep_their_captions(tmp_path: Path, write_image) -> None:
    """R-03: they are resumed with the text that they were trained on, however it looks."""
    data = "水墨画の丸、赤い".encode("cp932")
    write_image("a.png").with_suffix(".txt").write_bytes(data)
    assert captions(scan(tmp_path, rules=1)) == {"a.png": (data.decode("cp1252", errors="replace"), ".txt")}


def test_all_four_places(tmp_path: Path, write_image, found) -> None:
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
    assert found(index) == {}


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


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_tables_of_other_delimiters(tmp_path: Path, write_image, found, delimiter: str) -> None:
    """R-05: a table as spreadsheets of other countries write it, with commas in its captions."""
    write_image("a.png")
    rows = [delimiter.join(row) for row in (("file_name", "text"), ("a.png", "a cat, number 1"))]
    (tmp_path / "metadata.csv").write_text("\r\n".join(rows) + "\r\n", encoding="utf-8-sig")
    index = scan(tmp_path)
    assert captions(index) == {"a.png": ("a cat, number 1", "metadata.csv")}
    assert found(index) == {}
    assert captions(scan(tmp_path, rules=1)) == {"a.png": ("", "")}


@pytest.mark.parametrize(
    "name", ["captions.csv", "metadata.json1", "sub/Metadata.CSV", "x.tsv", "meta_cap.json"]
)
def test_a_table_of_another_name(tmp_path: Path, write_image, found, name: str) -> None:
    """R-05: it is named, with the name that it must have; data of other kinds is not taken for one."""
    write_image("sub/a.png", caption="x")
    for other in (name, "sub/a.json", "readme.csv"):
        (tmp_path / other).write_text("image,caption\na.png,x\n", encoding="utf-8")
    warning = found(scan(tmp_path))["warning data.table-name"]
    assert warning.names == (name,)
    assert "metadata.csv" in warning.message


def test_row_without_an_image_is_a_warning(tmp_path: Path, write_image, found) -> None:
    """R-05: a metadata row that points to nothing is named."""
    write_image("a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\ngone.png,y\n", encoding="utf-8")
    (finding,) = found(scan(tmp_path)).items()
    assert finding[0] == "warning data.row-unmatched"
    assert finding[1].names == ("gone.png",)
    assert "metadata.csv" in finding[1].message


def test_conflict_names_the_winner(tmp_path: Path, write_image, found) -> None:
    """R-05: a sidecar and metadata that differ are a notice; the sidecar wins."""
    write_image("a.png", caption="mine")
    write_image("b.png", caption="same")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,yours\nb.png,same\n", encoding="utf-8")
    index = scan(tmp_path)
    assert captions(index)["a.png"] == ("mine", ".txt")
    conflict = found(index)["notice data.captions-differ"]
    assert conflict.names == ("a.png",)
    assert ".txt wins over metadata.csv" in conflict.message


def test_broken_metadata_is_an_error(tmp_path: Path, write_image, found) -> None:
    """R-05: a line that is not JSON, and a table without the needed columns, stop the run."""
    write_image("a/1.png", caption="x")
    write_image("b/2.png", caption="x")
    write_image("c/3.png", caption="x")
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n{oops\n', "utf-8")
    (tmp_path / "b" / "metadata.csv").write_text("file,text\n2.png,x\n", "utf-8")
    (tmp_path / "c" / "metadata.csv").write_text("file_name,label\n3.png,x\n", "utf-8")
    errors = found(scan(tmp_path))
    assert errors["error data.table-json"].names == ("a/metadata.jsonl",)
    assert "line 2" in errors["error data.table-json"].message
    assert errors["error data.table-columns"].names == ("b/metadata.csv", "c/metadata.csv")
    for shown in ("file_name", "text, caption or prompt", "file, text", "file_name, label"):
        assert shown in errors["error data.table-columns"].message


def test_no_caption_and_no_trigger_lists_the_files(tmp_path: Path, write_image, found) -> None:
    """R-05: without captions and without a trigger the files are listed, five of them."""
    for number in range(8):
        write_image(f"{number}.png")
    ((key, error),) = found(scan(tmp_path)).items()
    assert key == "error data.captions-missing"
    assert error.names == tuple(f"{number}.png" for number in range(8))
    assert "4.png" in error.message
    assert "5.png" not in error.message
    assert "data.trigger" in error.message


def test_no_caption_with_a_trigger(tmp_path: Path, write_image, found) -> None:
    """R-05: with a trigger and no captions at all, the trigger is the caption, and a notice advises more."""
    write_image("a.png")
    index = scan(tmp_path, trigger="sks style")
    assert captions(index) == {"a.png": ("sks style", "trigger")}
    assert set(found(index)) == {"notice data.captions-trigger"}


@pytest.mark.parametrize("trigger", [None, "sks"])
def test_mixed_coverage(tmp_path: Path, write_image, found, trigger: str | None) -> None:
    """R-05: captions for a part only are an error unless allowed; an empty caption file is no caption."""
    write_image("a.png", caption="a cat")
    write_image("b.png")
    write_image("c.png", caption="  \n")
    findings = found(scan(tmp_path, trigger=trigger))
    assert findings.keys() == {"error data.captions-partial", "warning data.caption-empty"}
    error = findings["error data.captions-partial"]
    assert error.names == ("b.png", "c.png")
    assert "data.allow_missing_captions" in error.message
    index = scan(tmp_path, trigger=trigger, allow_missing_captions=True)
    assert found(index).keys() == {"warning data.caption-empty"}
    assert captions(index)["b.png"] == (("sks", "trigger") if trigger else ("", ""))


def test_captions_above_the_folder_are_pointed_at(tmp_path: Path, write_image, found) -> None:
    """R-26: for a leaf folder whose metadata lies above it, the metadata is named."""
    write_image("leaf/a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nleaf/a.png,x\n", encoding="utf-8")
    errors = found(scan(tmp_path / "leaf"))
    assert errors.keys() == {"error data.captions-missing", "error data.captions-above"}
    assert errors["error data.captions-above"].names == (str(tmp_path / "metadata.csv"),)


def test_caption_files_without_an_image(tmp_path: Path, write_image, found) -> None:
    """R-05: leftover caption files are named; a licence is not taken for one."""
    write_image("a.png", caption="x")
    (tmp_path / "old.txt").write_text("x", encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("x", encoding="utf-8")
    ((key, notice),) = found(scan(tmp_path)).items()
    assert key == "notice data.caption-unmatched"
    assert notice.names == ("old.txt",)


def test_accents_stored_apart(tmp_path: Path, write_image) -> None:
    """R-29: a name with decomposed accents, as some systems store it, meets its caption."""
    write_image("cafe\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,found\n", encoding="utf-8")
    assert next(iter(captions(scan(tmp_path)).values())) == ("found", "metadata.csv")


def test_placeholder_without_a_trigger(tmp_path: Path, write_image, found) -> None:
    """R-30: an unreplaced placeholder is an error that names the files."""
    write_image("a.png", caption="a {trigger} cat")
    ((key, error),) = found(scan(tmp_path)).items()
    assert key == "error data.placeholder"
    assert error.names == ("a.png",)
    assert "{trigger}" in error.message
    assert captions(scan(tmp_path, trigger="sks")) == {"a.png": ("a sks cat", ".txt")}


def test_a_caption_of_megabytes(tmp_path: Path, write_image, found) -> None:
    """R-05: a caption file of 10 MB is something else; it is named and not read."""
    write_image("a.png", caption="x" * 10_000_000)
    write_image("b.png", caption="a cat")
    error = found(scan(tmp_path))["error data.caption-unreadable"]
    assert error.names == ("a.txt",)
    assert "10.0 MB" in error.message


def test_metadata_of_megabytes(tmp_path: Path, write_image, found) -> None:
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
        errors = {key: error.names for key, error in found(scan(tmp_path)).items()}
    assert errors == {
        "error data.caption-unreadable": ("a/metadata.jsonl",),
        "error data.table-lines": ("b/metadata.csv",),
        "error data.caption-long": ("c/1.png",),
        "error data.table-csv": ("d/metadata.csv",),
    }


def test_a_broken_table_is_one_line(tmp_path: Path, write_image, found) -> None:
    """R-05: the first few and a count, as of all that goes wrong with many files."""
    rows = []
    for number in range(10):
        write_image(f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": "x" * 100_001}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for number in range(10, 20):
        write_image(f"{number}.png", caption="x" * 100_001)
    errors = found(scan(tmp_path))
    long, unread = errors["error data.caption-long"], errors["error data.caption-unreadable"]
    assert len(long.names) == len(unread.names) == 10
    assert "metadata.jsonl" in long.message
    assert "100,001" in long.message
    assert all(finding.message.count("and 5 more") == 1 for finding in (long, unread))


@pytest.mark.parametrize(
    "target", ["../../etc/passwd", "/etc/passwd", "../secret.png", "~/secret.png", "C:\\secret.png", "."]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_that_points_out(tmp_path: Path, write_image, found, target: str, kind: str) -> None:
    """R-05: a row that names a file elsewhere names nothing; only images of the folder get captions."""
    write_image("secret.png")
    write_image("set/a.png", caption="mine")
    rows = {
        "jsonl": "".join(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in (target, "a.png")),
        "csv": f"file_name,text\n{target},x\na.png,x\n",
    }
    (tmp_path / "set" / f"metadata.{kind}").write_text(rows[kind], encoding="utf-8")
    index = scan(tmp_path / "set")
    assert captions(index) == {"a.png": ("mine", ".txt")}
    assert found(index)["warning data.row-unmatched"].names == (target,)


def test_absolute_names_of_the_folder_itself(tmp_path: Path, write_image) -> None:
    """R-05: an absolute path is none of the table's names, wherever it leads."""
    path = write_image("a.png", caption="mine")
    row = {"file_name": str(path), "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert captions(scan(tmp_path)) == {"a.png": ("mine", ".txt")}


def test_letters_that_no_file_can_take(tmp_path: Path, write_image) -> None:
    """R-29: halves of pairs, zero bytes and terminal codes leave a caption; the joiners of emoji stay."""
    write_image("a.png", caption="a\x1b[31m cat\x07\x7f \x85 of\u2028 two 👩‍🎨\u3000colors")
    write_image("b.png")
    (tmp_path / "metadata.jsonl").write_text(r'{"file_name": "b.png", "text": "x\ud800y \u0000 z"}', "utf-8")
    found = captions(scan(tmp_path))
    assert found["a.png"][0] == "a[31m cat of two 👩‍🎨 colors"
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
def test_lines_that_are_no_rows(tmp_path: Path, write_image, found, line: str) -> None:
    """R-05: JSON too deep or with numbers too long is named by its line."""
    write_image("a.png", caption="x")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}', "utf-8")
    ((key, error),) = found(scan(tmp_path)).items()
    assert key == "error data.table-json"
    assert error.names == ("metadata.jsonl",)
    assert "line 2" in error.message


@pytest.mark.parametrize("value", ["null", "true", "[1, [2]]", '{"a": "b"}', "3.5", "7"])
def test_values_that_are_no_text(tmp_path: Path, write_image, value: str) -> None:
    """R-05: a number is its digits; lists, objects and nothing are no caption, as names no file."""
    write_image("a.png")
    rows = f'{{"file_name": "a.png", "text": {value}}}\n{{"file_name": {value}, "text": "x"}}'
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8")
    expected = {"3.5": "3.5", "7": "7", "true": "True"}.get(value, "")
    assert captions(scan(tmp_path, allow_missing_captions=True))["a.png"][0] == expected
