"""Sets with settings of their own, and class images."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config import DataSection, SetSection, load_config
from sdlora.data.captions import without_trigger
from sdlora.data.scan import read_captions, scan_dataset
from sdlora.data.sets import describe_sets
from sdlora.errors import ConfigError, DataError
from tests.checks import raises


def test_settings_of_its_own(tmp_path: Path, write_image, found) -> None:
    """R-29, R-30: what is given for a set, inside or elsewhere, holds for it; the rest as for all."""
    home = tmp_path / "home"
    write_image("home/a.png", caption="a cat")
    write_image("home/2_b/b.png", caption="a dog")
    write_image("home/2_b/deep/c.png", caption="x, y, z")
    write_image("else/d.png")
    settings = DataSection(
        trigger="ink",
        caption_suffix="on paper",
        sets=[
            {"folder": "2_b", "trigger": "oil", "weight": 0.5, "repeats": 3},
            {"folder": "2_b/deep", "shuffle_tags": True, "caption_suffix": ""},
            {"folder": str(tmp_path / "else"), "default_caption": "a hen", "trigger_position": "end"},
        ],
    )
    index = scan_dataset(home, settings)
    seen = {record.name: (record.caption, record.repeats, record.weight) for record in index.records}
    assert seen == {
        "a.png": ("ink, a cat on paper", 1, 1.0),
        "2_b/b.png": ("oil, a dog on paper", 6, 0.5),
        "2_b/deep/c.png": ("ink, x, y, z", 2, 1.0),
        "else/d.png": ("a hen on paper, ink", 1, 1.0),
    }
    assert {record.name for record in index.records if record.variants} == {"2_b/deep/c.png"}
    assert "error" not in " ".join(found(index))
    assert dict(read_captions(home, settings)) == {record.path: record.caption for record in index.records}
    assert "3 images, trigger 'ink'; 1 image, trigger 'oil', weight 0.5" in describe_sets(index.records)
    one = scan_dataset(home, DataSection(trigger="ink"))
    assert describe_sets(one.records) == ""


def test_class_images(tmp_path: Path, write_image, found) -> None:
    """R-26: kohya's `reg/`, when named: no trigger, captions from its folder, never held out nor a prompt."""
    for number in range(20):
        write_image(f"img/10_ink style/p{number}.png")
    write_image("reg/1_drawing of a cat/r.png")
    for name in "stuv":
        write_image(f"reg/1_drawing of a cat/{name}.png", caption="a dog")
    settings = DataSection(trigger="ink", sets=[{"folder": "reg", "weight": 0.7}], heldout=0.2)
    index = scan_dataset(tmp_path, settings)
    classes = {record.name: record for record in index.records if record.is_class}
    assert [(record.caption, record.trigger, record.weight) for record in classes.values()] == [
        ("drawing of a cat", "", 0.7),
        *[("a dog", "", 0.7)] * 4,
    ]
    assert (len(index.styled), len(index.heldout)) == (16, 4)
    assert not any(record.name.startswith("reg") for record in index.heldout)
    assert "notice data.regularization" not in found(index)
    assert "notice data.caption-same" not in found(index), "class images may have one caption"
    assert "error" not in " ".join(found(index))
    assert not {path for path, _ in read_captions(tmp_path, settings)} & {
        one.path for one in classes.values()
    }


def test_class_images_alone_are_refused(tmp_path: Path, write_image) -> None:
    """R-26: there is no style to learn."""
    write_image("reg/1_cat/r.png")
    settings = DataSection(trigger="ink", sets=[{"folder": "reg"}], heldout=0)
    with raises(DataError, "data.only-classes"):
        scan_dataset(tmp_path, settings)


@pytest.mark.parametrize(
    ("one", "is_class"),
    [
        ({"folder": "x/reg"}, True),
        ({"folder": "reg", "class_images": False}, False),
        ({"folder": "a"}, False),
    ],
)
def test_what_is_a_class_set(one: dict[str, object], is_class: bool) -> None:
    assert SetSection(**one).is_class is is_class


def test_a_set_that_is_wrong(tmp_path: Path, write_image) -> None:
    """R-35: a folder that is missing, empty, or the image folder; a key that is none; one without effect."""
    write_image("home/a.png")
    (tmp_path / "empty").mkdir()
    for folder, shown in (("gone", "gone"), (".", "home"), (str(tmp_path / "empty"), "empty")):
        with raises(DataError, "data.sets", shows=shown):
            scan_dataset(tmp_path / "home", DataSection(trigger="ink", sets=[{"folder": folder}]))
    for table, key, shows in (
        ("{foldr='a'}", "data.sets", ("foldr", "default_caption")),
        ("{folder='a', weight=0}", "data.sets", ("0",)),
        ("{folder='a', keep_tags=1}", "data.sets", ("keep_tags", "shuffle_tags")),
    ):
        with raises(ConfigError, key, shows=shows):
            load_config(None, [f"data.sets=[{table}]"])
    with raises(ConfigError, "objective.prior_weight", shows="data.trigger"):
        load_config(None, ["objective.prior_weight=1"])
    load_config(None, ["objective.prior_weight=1", "data.sets=[{folder='a', trigger='b'}]"])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("ink wash, a cat", "a cat"),
        ("a cat, Ink  wash", "a cat"),
        ("a cat, ink wash, red", "a cat, red"),
        ("an ink wash of a cat", "an of a cat"),
        ("ink wash", ""),
        ("ink washes", "ink washes"),
    ],
)
def test_without_trigger(caption: str, expected: str) -> None:
    assert without_trigger(caption, "ink wash") == expected
