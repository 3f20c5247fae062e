"""Preflight says what will be trained on and what is wrong with it (R-05, R-15, R-16, R-28)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdlora.config import DataSection
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.doctor import contact_sheet, examine, summary
from sdlora.data.records import DatasetIndex
from sdlora.data.scan import scan_dataset
from sdlora.errors import join_names


@dataclass(frozen=True)
class Words:
    """A tokenizer's count where every word is a token."""

    used: int
    limit: int
    pieces: Sequence[str]
    lost: str


def count_words(caption: str) -> Words:
    """Takes six words, in lower case as CLIP does."""
    words = caption.lower().split()
    return Words(len(words), 6, words[:6], " ".join(words[6:]))


def prepare(
    root: Path, resolution: int = 64, **settings: object
) -> tuple[DatasetIndex, BucketPlan, DataSection]:
    """Scans and plans with nothing held out."""
    section = DataSection(**{"heldout": 0, **settings})
    index = scan_dataset(root, section)
    return index, plan_buckets(index.records, resolution, section, heldout=index.heldout), section


def lines_of(severity: str, found: list) -> list[str]:
    """The messages of one severity."""
    return [finding.message for finding in found if finding.severity == severity]


def test_findings_name_five() -> None:
    """R-35: a message stays one line, however many files it is about."""
    assert join_names("abc") == "a, b, c"
    assert join_names(map(str, range(5))) == "0, 1, 2, 3, 4"
    assert join_names(map(str, range(12))) == "0, 1, 2, 3, 4 and 7 more"


def test_errors_come_first_on_one_line(tmp_path: Path, write_image) -> None:
    """R-05, R-14: the doctor repeats what the scan found, errors first."""
    write_image("a.png", size=(8, 8), caption="x")
    write_image("b.png")
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "old.txt").write_text("x", encoding="utf-8")
    found = examine(*prepare(tmp_path), None)
    severities = [finding.severity for finding in found]
    assert severities == sorted(severities, key=("error", "warning", "notice").index)
    assert severities[0] == "error"
    assert len(lines_of("error", found)) == 2
    assert not any("\n" in finding.message for finding in found)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    """R-16: a folder in which every picture is skipped cannot be a run of nothing."""
    (tmp_path / "a.png").write_bytes(b"")
    index, plan, section = prepare(tmp_path, on_bad_image="skip", trigger="x")
    assert any(
        "is left to train on" in line for line in lines_of("error", examine(index, plan, section, None))
    )
    assert summary(index, plan, None)[0].startswith("0 images")
    contact_sheet(index, plan, section)


def test_tokens_cut_off_are_listed(tmp_path: Path, write_image) -> None:
    """R-28: captions over the limit are listed with the words lost; a trigger in front survives."""
    write_image("a.png", caption="one two three four five six seven eight")
    write_image("b.png", caption="short")
    index, plan, section = prepare(tmp_path, trigger="sks")
    found = examine(index, plan, section, count_words)
    (warning,) = (finding for finding in found if "tokens" in finding.message)
    assert warning.severity == "warning"
    assert warning.names == ("a.png",)
    assert "longer than 6 tokens: a.png loses 'six seven eight'" in warning.message
    assert lines_of("error", found) == []


def test_trigger_that_is_cut_off_is_an_error(tmp_path: Path, write_image) -> None:
    """R-28: a trigger that only stands behind the limit, or across it, is an error that names the file."""
    write_image("a.png", caption="one two three four five six in SKS ink")
    write_image("b.png", caption="one two three four five sks ink")
    write_image("c.png", caption="sks ink three four five six sks ink")
    index, plan, section = prepare(tmp_path, trigger="sks ink")
    (error,) = (f for f in examine(index, plan, section, count_words) if f.severity == "error")
    assert error.names == ("a.png", "b.png")
    assert "'sks ink' is cut off" in error.message


def test_heldout_captions_are_counted_too(tmp_path: Path, write_image) -> None:
    """R-28: held-out captions are measured against the limit as well."""
    write_image("a.png", caption="x")
    write_image("heldout/b.png", caption="1 2 3 4 5 6 7 8")
    found = examine(*prepare(tmp_path, heldout="auto"), count_words)
    assert any("heldout/b.png" in line for line in lines_of("warning", found))


def test_sizes_are_examined(tmp_path: Path, write_image) -> None:
    """R-15: pictures that lose much or are enlarged much are named, with their figures."""
    write_image("fits.png", size=(128, 128), caption="x")
    write_image("tiny.png", size=(32, 32), caption="x")
    write_image("small.png", size=(100, 100), caption="x")
    write_image("wide.png", size=(2000, 200), caption="x")
    found = examine(*prepare(tmp_path, 128), None)
    assert any("tiny.png 4.0 times" in line for line in lines_of("warning", found))
    assert any("small.png 1.28 times" in line for line in lines_of("notice", found))
    assert any("wide.png 60%" in line for line in lines_of("warning", found))
    assert not any("fits.png" in finding.message for finding in found)


@pytest.mark.parametrize(("resolution", "min_step", "expected"), [(128, 8, 0), (128, 32, 1), (64, 8, 1)])
def test_coarse_steps_are_a_finding(
    tmp_path: Path, write_image, resolution: int, min_step: int, expected: int
) -> None:
    """R-15: where no step keeps the loss below 8 %, a finding says so."""
    write_image("a.png", size=(256, 256), caption="x")
    index, _, section = prepare(tmp_path)
    plan = plan_buckets(index.records, resolution, section, min_step=min_step)
    warnings = lines_of("warning", examine(index, plan, section, None))
    assert sum("in steps of" in line for line in warnings) == expected


def test_summary_says_what_there_is(tmp_path: Path, write_image) -> None:
    """R-05, R-15, R-16: images, captions and where from, examples as tokens, buckets, worst crops."""
    for number in range(4):
        write_image(f"2_a/{number}.png", size=(128, 128), caption=f"a cat number {number} on a long red mat")
    write_image("b.png", size=(256, 100))
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,a dog\n", encoding="utf-8")
    index, plan, section = prepare(tmp_path, trigger="sks")
    lines = summary(index, plan, count_words)
    text = "\n".join(lines)
    assert "5 images to train on, 0 held out" in lines[0]
    assert "5 of 5 captioned (4 from .txt, 1 from metadata.csv)" in text
    assert "1 x 1, 4 x 2 = 9 samples an epoch" in text
    assert "sks, | a | cat | number | 0 | on (10 of 6 tokens)" in text
    assert sum(line.startswith("example ") for line in lines) == 3
    assert "64x64     4 images     8 samples an epoch" in text
    assert "most: b.png" in text
    assert any(": sks, a cat number" in line for line in summary(index, plan, None))
    order = BatchOrder(index.records, plan, section, global_batch=3, seed=0)
    assert order.samples_per_epoch == sum(samples for _, _, samples in plan.table()) == 9
    assert order.steps_per_epoch == 3 + 1


def test_summary_counts_trigger_only(tmp_path: Path, write_image) -> None:
    """R-05: captions that are only the trigger do not count as captions."""
    write_image("a.png")
    index, plan, _ = prepare(tmp_path, trigger="sks")
    assert "0 of 1 captioned (1 from trigger)" in summary(index, plan, None)


def test_contact_sheet_shows_crops(tmp_path: Path, write_image) -> None:
    """R-15: the sheet has a cell for each picture, up to sixty."""
    write_image("a.png", size=(300, 80), caption="x")
    index, plan, section = prepare(tmp_path)
    sheet = contact_sheet(index, plan, section)
    assert sheet.mode == "RGB"
    assert min(low for low, _ in sheet.getextrema()) < 100, "it is not blank"
    for number in range(70):
        shutil.copy(tmp_path / "a.png", tmp_path / f"{number}.png")
    many = contact_sheet(*prepare(tmp_path, trigger="x", allow_missing_captions=True))
    assert many.width > 9 * sheet.width
    assert many.height == 6 * sheet.height
