"""Preflight says what will be trained on and what is wrong with it (R-05, R-15, R-16, R-28)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdlora.config import DataSection, load_config
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.doctor import check_images, contact_sheet, summarise
from sdlora.data.findings import examine
from sdlora.data.records import DatasetIndex, Finding, raise_errors
from sdlora.data.scan import scan_dataset
from sdlora.errors import ConfigError, DataError, join_names
from tests.checks import raises


@dataclass(frozen=True)
class Words:
    """A tokenizer's count where every word is a token."""

    used: int
    limit: int
    pieces: Sequence[str]
    lost: str
    is_known: bool = False


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


def by_key(found: list[Finding]) -> dict[str, Finding]:
    """The findings by severity and key."""
    return {f"{finding.severity} {finding.key}": finding for finding in found}


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
    assert severities.count("error") == 2
    assert not any("\n" in finding.message for finding in found)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    """R-16: a folder in which every image is skipped cannot be a run of nothing."""
    (tmp_path / "a.png").write_bytes(b"")
    index, plan, section = prepare(tmp_path, on_bad_image="skip", trigger="x")
    assert "error data.no-images-left" in by_key(examine(index, plan, section, None))
    assert summarise(index, plan, None)[0].startswith("0 images")
    contact_sheet(index, plan, section)


def test_tokens_cut_off_are_listed(tmp_path: Path, write_image) -> None:
    """R-28: captions over the limit are listed with the words lost; a trigger in front survives."""
    write_image("a.png", caption="one two three four five six seven eight")
    write_image("b.png", caption="short")
    index, plan, section = prepare(tmp_path, trigger="sks")
    found = by_key(examine(index, plan, section, count_words))
    warning = found.pop("warning data.caption-truncated")
    assert warning.names == ("a.png",)
    assert "'six seven eight'" in warning.message
    assert "6 tokens" in warning.message
    assert not any(key.startswith("error") for key in found)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_known_trigger_may_be_read_in_fragments(tmp_path: Path, write_image, is_known: bool) -> None:
    """A small base has learned words that its tokenizer splits."""
    write_image("a.png", caption="a fox")
    index, plan, section = prepare(tmp_path, trigger="woodcut")

    def count(caption: str) -> Words:
        return Words(5, 6, ["wo", "o", "d", "c", "ut"], "", is_known)

    found = by_key(examine(index, plan, section, count))
    assert ("warning data.trigger-split" in found) != is_known


def test_trigger_that_is_cut_off_is_an_error(tmp_path: Path, write_image) -> None:
    """R-28: a trigger that only stands behind the limit, or across it, is an error that names the file."""
    write_image("a.png", caption="one two three four five six in SKS ink")
    write_image("b.png", caption="one two three four five sks ink")
    write_image("c.png", caption="sks ink three four five six sks ink")
    index, plan, section = prepare(tmp_path, trigger="sks ink")
    (error,) = (f for f in examine(index, plan, section, count_words) if f.severity == "error")
    assert error.key == "data.trigger-truncated"
    assert error.names == ("a.png", "b.png")


def test_heldout_captions_are_counted_too(tmp_path: Path, write_image) -> None:
    """R-28: held-out captions are measured against the limit as well."""
    write_image("a.png", caption="x")
    write_image("heldout/b.png", caption="1 2 3 4 5 6 7 8")
    found = by_key(examine(*prepare(tmp_path, heldout="auto"), count_words))
    assert found["warning data.caption-truncated"].names == ("heldout/b.png",)


def test_sizes_are_examined(tmp_path: Path, write_image) -> None:
    """R-15: images that lose much or are enlarged much are named, with their figures."""
    write_image("fits.png", size=(128, 128), caption="x")
    write_image("tiny.png", size=(32, 32), caption="x")
    write_image("small.png", size=(100, 100), caption="x")
    write_image("wide.png", size=(2000, 200), caption="x")
    found = by_key(examine(*prepare(tmp_path, 128), None))
    for key, shown in (
        ("warning data.image-blurred", "tiny.png 4.0 times"),
        ("notice data.image-enlarged", "small.png 1.28 times"),
        ("warning data.image-cropped", "wide.png 60%"),
    ):
        assert shown in found[key].message
    assert not any("fits.png" in finding.names for finding in found.values())


@pytest.mark.parametrize(("resolution", "min_step", "expected"), [(128, 8, 0), (128, 32, 1), (64, 8, 1)])
def test_coarse_steps_are_a_finding(
    tmp_path: Path, write_image, resolution: int, min_step: int, expected: int
) -> None:
    """R-15: where no step keeps the loss below 8 %, a finding says so."""
    write_image("a.png", size=(256, 256), caption="x")
    index, _, section = prepare(tmp_path)
    plan = plan_buckets(index.records, resolution, section, min_step=min_step)
    found = by_key(examine(index, plan, section, None))
    assert ("warning data.resolution" in found) == bool(expected)


def test_summary_says_what_there_is(tmp_path: Path, write_image) -> None:
    """R-05, R-15, R-16: images, captions and where from, examples as tokens, buckets, worst crops."""
    for number in range(4):
        write_image(f"2_a/{number}.png", size=(128, 128), caption=f"a cat number {number} on a long red mat")
    write_image("b.png", size=(256, 100))
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,a dog\n", encoding="utf-8")
    index, plan, section = prepare(tmp_path, trigger="sks")
    lines = summarise(index, plan, count_words)
    text = "\n".join(lines)
    assert "5 images to train on, 0 held out" in lines[0]
    assert "5 of 5 captioned (4 from .txt, 1 from metadata.csv)" in text
    assert "1 x 1, 4 x 2 = 9 samples per epoch" in text
    assert "sks, | a | cat | number | 0 | on (10 of 6 tokens)" in text
    assert sum(line.startswith("example ") for line in lines) == 3
    assert "64x64     4 images     8 samples per epoch" in text
    assert "most: b.png" in text
    assert any(": sks, a cat number" in line for line in summarise(index, plan, None))
    order = BatchOrder(index.records, plan, section, global_batch=3, seed=0)
    assert order.samples_per_epoch == sum(samples for _, _, samples in plan.table()) == 9
    assert order.steps_per_epoch == 3 + 1


def test_summary_counts_trigger_only(tmp_path: Path, write_image) -> None:
    """R-05: captions that are only the trigger do not count as captions."""
    write_image("a.png")
    index, plan, _ = prepare(tmp_path, trigger="sks")
    assert "0 of 1 captioned (1 from trigger)" in summarise(index, plan, None)


def test_contact_sheet_shows_crops(tmp_path: Path, write_image) -> None:
    """R-15: the sheet has a cell for each image, up to sixty."""
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


def test_checkup_is_what_the_doctor_prints(tmp_path: Path, write_image) -> None:
    """R-05, R-15: summary, findings and the sheet without a base; errors mean that training would refuse."""
    write_image("images/a.png", size=(128, 128), caption="x")
    config = load_config(None, {"data.heldout": 0}, images=tmp_path / "images")
    sheet = tmp_path / "sheet.png"
    good = check_images(config, resolution=128, min_step=8, sheet=sheet)
    assert not good.has_errors
    assert sheet.is_file()
    assert str(sheet) in "\n".join(good.lines())
    assert good.lines()[: len(good.summary)] == good.summary
    write_image("images/b.png", size=(128, 128))
    bad = check_images(config, resolution=128, min_step=8)
    assert bad.has_errors
    assert [finding.key for finding in bad.findings] == ["data.captions-partial"]
    assert bad.findings[0].message in "\n".join(bad.lines())
    with raises(ConfigError, "option--contact-sheet", shows=str(tmp_path / "images")):
        check_images(config, resolution=128, min_step=8, sheet=tmp_path / "images" / "sheet.png")
    with raises(DataError, "data.captions-partial", shows="b.png"):
        raise_errors(bad.findings)
    # A table that was not read may have them.
    (tmp_path / "images" / "metadata.json").write_text("{}")
    bad = check_images(config, resolution=128, min_step=8)
    with raises(DataError, "data.table-name", shows=("b.png", "metadata.json")):
        raise_errors(bad.findings)
