"""Folders as other tools and systems leave them: what is no image to train on is left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config import DataSection, RunConfig, read_config
from sdlora.data.records import DatasetIndex
from sdlora.data.scan import read_captions, scan_dataset
from sdlora.errors import DataError
from tests.checks import raises


def scan(root: Path, **settings: object) -> DatasetIndex:
    """Scans with a trigger and nothing held out."""
    return scan_dataset(root, DataSection(heldout=0, **{"trigger": "ink", **settings}))


def repeats(index: DatasetIndex) -> dict[str, int]:
    return {record.name: record.repeats for record in index.records}


@pytest.mark.parametrize("folder", ["@eaDir/p0.png", "#recycle", "$RECYCLE.BIN", "lost+found"])
def test_thumbnails_and_deleted_files(tmp_path: Path, write_image, found, folder: str) -> None:
    """R-26: what network storage and systems keep beside images is left out, as hidden folders are."""
    write_image("p0.png")
    write_image("@artist/p1.png")
    write_image(f"{folder}/thumb.jpg")
    index = scan(tmp_path)
    assert repeats(index) == {"p0.png": 1, "@artist/p1.png": 1}
    assert found(index)["notice data.image-system"].names == (f"{folder}/thumb.jpg",)
    with raises(DataError, "data.image-system", shows="thumb.jpg"):
        scan(write_image("alone/@eaDir/thumb.jpg").parents[1])


def test_a_whole_kohya_project(tmp_path: Path, write_image, found) -> None:
    """R-26: `img/` is trained on; regularization, previews and logs are left out and named."""
    for name in ("img/10_ink style/p0.png", "img/10_ink style/p1.png", "reg/1_style/r0.png"):
        write_image(name)
    write_image("model/sample/ink_e000000_00.png")
    index = scan(tmp_path)
    assert repeats(index) == {"img/10_ink style/p0.png": 10, "img/10_ink style/p1.png": 10}
    assert found(index)["notice data.regularization"].names == ("reg/1_style/r0.png",)
    assert found(index)["notice data.image-project"].names == ("model/sample/ink_e000000_00.png",)
    assert [path.name for path, _ in read_captions(tmp_path, DataSection(trigger="ink"))] == [
        "p0.png",
        "p1.png",
    ]


def test_a_run_inside_the_images(tmp_path: Path, write_image, found) -> None:
    """R-26: its grids and samples are no images to train on."""
    write_image("p0.png")
    for name in ("config.json", "environment.json"):
        (write_image("runs/ink/samples/step-000010/grid.png").parents[2] / name).write_text("{}")
    write_image("ink/config.json.png")
    index = scan(tmp_path)
    assert repeats(index) == {"p0.png": 1, "ink/config.json.png": 1}
    assert found(index)["notice data.image-run"].names == ("runs/ink/samples/step-000010/grid.png",)


def test_regularization_beside_the_images(tmp_path: Path, write_image, found) -> None:
    """R-26: `reg/` is left out beside numbered folders too, but a folder of that name alone is not."""
    write_image("10_ink/p.png")
    write_image("reg/1_style/r.png")
    index = scan(tmp_path)
    assert repeats(index) == {"10_ink/p.png": 10}
    assert found(index)["notice data.regularization"].names == ("reg/1_style/r.png",)
    assert repeats(scan(tmp_path / "reg")) == {"1_style/r.png": 1}
    write_image("other/img/a.png")
    write_image("other/model/b.png")
    assert repeats(scan(tmp_path / "other")) == {"img/a.png": 1, "model/b.png": 1}


def test_zero_repeats_switch_a_folder_off(tmp_path: Path, write_image, found) -> None:
    """R-26: as in kohya's trainer; the folder itself, if it is the one asked for, counts once."""
    write_image("2_a/p.png")
    write_image("0_b/q.png")
    index = scan(tmp_path)
    assert repeats(index) == {"2_a/p.png": 2}
    assert found(index)["notice data.repeats-zero"].names == ("0_b/q.png",)
    assert repeats(scan(tmp_path / "0_b")) == {"q.png": 1}


def test_masks_of_other_tools(tmp_path: Path, write_image, found) -> None:
    """R-14: a mask is no image; an image whose name only looks like one is."""
    for name in ("p.png", "p-masklabel.png", "p.mask.png", "zorro.mask.png", "carnival_mask.png"):
        write_image(name)
    index = scan(tmp_path)
    assert [*repeats(index)] == ["carnival_mask.png", "p.png", "zorro.mask.png"]
    assert found(index)["notice data.image-mask"].names == ("p-masklabel.png", "p.mask.png")


def test_runs_of_earlier_versions_keep_their_images(tmp_path: Path, write_image) -> None:
    """R-03: a run without recorded rules is resumed and sampled with the images that it began with."""
    for name in ("p.png", "@eaDir/p.jpg", "0_b/q.png", "p-masklabel.png"):
        write_image(name)
    settings = RunConfig(images=str(tmp_path)).model_dump(mode="json")
    assert settings["data"].pop("rules") == 2
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    old = read_config(file).data
    assert old.rules == 1
    assert repeats(scan(tmp_path, rules=1)) == dict.fromkeys(
        ("0_b/q.png", "@eaDir/p.jpg", "p-masklabel.png", "p.png"), 1
    )
    assert repeats(scan(tmp_path)) == {"p.png": 1}
    file.write_text(RunConfig().model_dump_json(), encoding="utf-8")
    assert read_config(file).data.rules == 2
