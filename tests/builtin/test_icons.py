"""Drawings: read from a folder, rendered, put on a ground; what is missing is said in one line."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sdlora.builtin.icons import (
    GROUNDS,
    ICON_SETS,
    Icons,
    compose,
    drawing_px,
    fetch_icons,
    load_icons,
    to_array,
)
from sdlora.errors import DataError


def test_a_drawing_is_rendered_and_composed(tiny_icons: Path) -> None:
    """A drawing keeps a transparent ground; composing puts it in the middle of a ground of any size."""
    drawing = load_icons("noto", tiny_icons).render("apple", 64)
    assert drawing.size == (64, 64)
    assert drawing.getpixel((0, 0))[3] == 0
    image = compose(drawing, "teal", (96, 128))
    assert image.size == (96, 128)
    assert image.getpixel((0, 0)) == GROUNDS["teal"]
    assert image.getpixel((16 + 16, 32 + 32)) == (0xDD, 0x33, 0x33)


def test_pixels_lie_between_minus_one_and_one(tiny_icons: Path) -> None:
    """The array of an image has its channels first and white at 1."""
    array = to_array(compose(load_icons("noto", tiny_icons).render("apple", drawing_px(128))))
    assert array.shape == (3, 128, 128)
    assert array.dtype == np.float32
    assert array.max() == 1
    assert array.min() >= -1


def test_an_archive_of_npm_is_read(tmp_path: Path) -> None:
    """The archive that `npm pack` leaves is read as it is."""
    contents = json.dumps({"icons": {"dot": {"body": ""}}}).encode()
    with tarfile.open(tmp_path / ICON_SETS["noto"].archive, "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(contents)
        archive.addfile(member, io.BytesIO(contents))
    assert list(load_icons("noto", tmp_path).drawings) == ["dot"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package, drawing or npm is one line that says what to do."""
    with pytest.raises(DataError, match="--icons"):
        load_icons("noto", tmp_path)
    with pytest.raises(DataError, match="'nothing'"):
        Icons({"icons": {}}).render("nothing", 16)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="needs npm"):
        fetch_icons(("noto",), tmp_path)


def test_missing_resvg_is_named(tiny_icons: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without resvg_py the error names the extra to install."""
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"sdlora\[builtin\]"):
        load_icons("noto", tiny_icons).render("apple", 16)
