"""Fixtures of the data tests: images of any size, captions beside them, and the findings about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from sdlora.config import DataSection
from sdlora.data.buckets import plan_buckets
from sdlora.data.findings import examine
from sdlora.data.records import DatasetIndex, Finding, ImageRecord, Size

Write = Callable[..., Path]


@pytest.fixture
def write_image(tmp_path: Path) -> Write:
    """Writes a small image whose bytes differ for each name; with a caption file if one is given."""

    def write(
        name: str, size: tuple[int, int] = (48, 32), caption: str | None = None, look: str = ""
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).text((1, 1), look or name, fill="black")
        marked = sum(ord(letter) * (place + 1) for place, letter in enumerate(look or name))
        image.putpixel((0, 0), (marked % 256, marked // 256 % 256, 7))
        image.save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_records() -> Callable[..., list[ImageRecord]]:
    """Makes records without files, one for each size."""

    def make(*sizes: tuple[int, int], repeats: int = 1, caption: str = "a cat") -> list[ImageRecord]:
        return [
            ImageRecord(
                path=Path(f"/nowhere/{number:03d}.png"),
                name=f"{number:03d}.png",
                digest=f"{number:064x}",
                size=Size(*size),
                caption=caption,
                caption_source=".txt",
                repeats=repeats,
            )
            for number, size in enumerate(sizes)
        ]

    return make


@pytest.fixture(scope="session")
def found() -> Callable[..., dict[str, Finding]]:
    """What preflight finds in a folder apart from sizes and tokens, by severity and key."""

    def find(index: DatasetIndex, **settings: object) -> dict[str, Finding]:
        section = DataSection(**settings)
        findings = examine(index, plan_buckets((), 512, section), section, None)
        assert not any("\n" in finding.message for finding in findings)
        return {f"{finding.severity} {finding.key}": finding for finding in findings}

    return find
