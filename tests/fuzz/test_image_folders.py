"""Captions, tables and images in a folder that somebody made (R-05, R-14, R-29)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.buckets import plan_buckets
from sdlora.data.doctor import summarise
from sdlora.data.findings import examine
from sdlora.data.images import load_image, measure_file
from sdlora.data.scan import scan_dataset
from sdlora.errors import unfit_letters

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1")
LETTERS = st.characters() | st.sampled_from('{}",\n\r\t;\\/ \x00\x1b\ud800\u2028é猫')
TARGETS = (
    "1.png",
    "sub/2.png",
    "sub\\2.png",
    "./1.png",
    "../1.png",
    "/etc/passwd",
    "../../etc/passwd",
    "",
    "~",
)


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """A text in any of the encodings that are read, or none."""
    return st.builds(
        lambda text, encoding: text.encode("utf-8", "replace").decode().encode(encoding, "replace"),
        texts,
        st.sampled_from(ENCODINGS),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one in a folder below."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (9, 8), "red").save(tmp_path / "1.png")
    Image.new("RGB", (8, 16), "blue").save(tmp_path / "sub" / "2.png")
    return tmp_path


def scan(folder: Path, trigger: str | None) -> None:
    """Everything that preflight does with a folder."""
    settings = DataSection(trigger=trigger, heldout=0, allow_missing_captions=True)
    index = scan_dataset(folder, settings)
    assert [record.name for record in index.records] == ["1.png", "sub/2.png"]
    plan = plan_buckets(index.records, 64, settings)
    lines = [finding.message for finding in examine(index, plan, settings, None)] + summarise(
        index, plan, None
    )
    assert not any(unfit_letters(line) or len(line) > 4000 for line in lines)
    for record in index.records:
        assert record.caption == " ".join(record.caption.split())
        record.caption.encode("utf-8")
    assert len(index.digest) == 64


def test_caption_files(fuzz, damaged, folder: Path) -> None:
    """R-05, R-29: text files in any encoding, or no text at all."""
    texts = st.text(LETTERS, max_size=60) | st.sampled_from(
        ["{trigger}", "{trigger", "a, b", "\ufeff", "{}" * 50]
    )

    def read(example: tuple[bytes, bytes, str | None]) -> None:
        (folder / "1.txt").write_bytes(example[0])
        (folder / "sub" / "2.caption").write_bytes(example[1])
        scan(folder, example[2])

    captions = damaged(encoded(texts))
    fuzz(st.tuples(captions, captions, st.sampled_from([None, "sks", "猫", "c++", "(a+)+$"])), read)


@st.composite
def rows(draw: st.DrawFn, json_values: st.SearchStrategy[Any]) -> str:
    """Lines of JSON: images with captions, or anything."""
    lines = []
    for _ in range(draw(st.integers(0, 4))):
        row: Any = {
            "file_name": draw(st.sampled_from(TARGETS) | json_values),
            "text": draw(st.text(LETTERS) | json_values),
        }
        row |= draw(st.dictionaries(st.sampled_from(["caption", "prompt", "x"]), json_values, max_size=2))
        row = draw(st.sampled_from([row] * 5 + [None])) or draw(json_values)
        line = json.dumps(row, ensure_ascii=draw(st.booleans()))
        lines.append(
            draw(st.sampled_from([line] * 9 + ["[" * 5000, '{"text": ' + "9" * 5000 + "}", "{" * 99]))
        )
    return "\n".join(lines)


def test_metadata_jsonl(fuzz, damaged, json_values, folder: Path) -> None:
    """R-05: metadata.jsonl with rows of any kind."""

    def read(content: bytes) -> None:
        (folder / "metadata.jsonl").write_bytes(content)
        scan(folder, None)

    fuzz(damaged(encoded(rows(json_values))), read)


def test_metadata_csv(fuzz, damaged, folder: Path) -> None:
    """R-05: metadata.csv with quotes, separators and line ends anywhere."""
    cells = st.sampled_from([*TARGETS, "text", "caption", "file_name", '"', '""', "\r", "a\nb"]) | st.text(
        LETTERS
    )
    lines = st.lists(cells, max_size=4).map(",".join)
    tables = st.builds(
        lambda head, body, end: end.join([head, *body]),
        st.sampled_from(["file_name,text", "file_name,prompt,x", "text,file_name", "file_name", ""]) | lines,
        st.lists(lines, max_size=5),
        st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    )

    def read(content: bytes) -> None:
        (folder / "sub" / "metadata.csv").write_bytes(content)
        scan(folder, None)

    fuzz(damaged(encoded(tables)), read)


def sound_pictures() -> list[bytes]:
    """One small image of each kind that is read."""
    image = Image.linear_gradient("L").resize((16, 12)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16")),
        *(("JPEG", mode, {"exif": exif}) for mode in ("RGB", "L", "CMYK")),
        *(
            ("TIFF", "RGB", {"compression": name})
            for name in ("raw", "tiff_lzw", "jpeg", "tiff_deflate", "packbits")
        ),
        ("TIFF", "F", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}),
        ("GIF", "P", {"save_all": True, "append_images": [image.convert("P")]}),
        *((kind, "RGB", {}) for kind in ("BMP", "PPM", "TGA", "AVIF")),
    ]
    files = []
    for kind, mode, options in kinds:
        file = io.BytesIO()
        (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(
            file, kind, **options
        )
        files.append(file.getvalue())
    return files


def test_pictures(fuzz, damaged, tmp_path: Path) -> None:
    """R-14: an image loads in the size that was measured, or is named."""
    path = tmp_path / "x.png"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _, size, _ = measure_file(path)
        assert load_image(path).size == (size.width, size.height)

    fuzz(damaged(st.sampled_from(sound_pictures())), read)
