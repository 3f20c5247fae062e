"""Any folder works, and what is in it is known before a model loads (R-14, R-21, R-26, R-29)."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora.config import DataSection, SetSection
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import plan_buckets
from sdlora.data.cache import TensorCache
from sdlora.data.folders import list_files
from sdlora.data.images import load_image
from sdlora.data.records import DatasetIndex, Noticed
from sdlora.data.scan import scan_dataset
from sdlora.errors import ConfigError, DataError
from tests.checks import raises


def scan(root: Path, **settings: object) -> DatasetIndex:
    """Scans with nothing held out."""
    return scan_dataset(root, DataSection(**{"heldout": 0, **settings}))


def names(index: DatasetIndex) -> list[str]:
    """The names trained on."""
    return [record.name for record in index.records]


def test_leaf_and_parent_give_the_same_set(tmp_path: Path, write_image) -> None:
    """R-26: flat, nested and N_name folders; pointing at the leaf or the parent changes nothing."""
    for number in range(3):
        write_image(f"set/5_style/{number}.png", caption=f"number {number}")
    outer, inner = scan(tmp_path / "set"), scan(tmp_path / "set" / "5_style")
    assert names(outer) == ["5_style/0.png", "5_style/1.png", "5_style/2.png"]
    assert names(inner) == ["0.png", "1.png", "2.png"]
    assert outer.digest == inner.digest
    assert {record.repeats for record in (*outer.records, *inner.records)} == {5}


def test_repeats_of_nested_folders(tmp_path: Path, write_image, found) -> None:
    """R-26: the nearest N_name counts, whatever lies between."""
    write_image("2_a/x.png", caption="x")
    write_image("2_a/deep/y.png", caption="y")
    write_image("2_a/7_b/z.png", caption="z")
    write_image("plain/w.png", caption="w")
    write_image("10style/v.png", caption="v")
    write_image("2021_holiday/u.png", caption="u")
    index = scan(tmp_path)
    assert {record.name: record.repeats for record in index.records} == {
        "10style/v.png": 1,
        "2021_holiday/u.png": 2021,
        "2_a/7_b/z.png": 7,
        "2_a/deep/y.png": 2,
        "2_a/x.png": 2,
        "plain/w.png": 1,
    }
    assert found(index)["warning data.repeats"].names == ("2021",)


def test_digest_is_about_content(tmp_path: Path, write_image) -> None:
    """R-42: the dataset's digest follows images, captions and repeats, not names."""
    write_image("a/x.png", caption="one", look="x")
    write_image("b/other.png", caption="one", look="x")
    write_image("c/x.png", caption="two", look="x")
    write_image("d/x.png", caption="one", look="y")
    write_image("2_e/x.png", caption="one", look="x")
    digests = [scan(tmp_path / name).digest for name in ("a", "b", "c", "d", "2_e")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_folder_missing_or_a_file(tmp_path: Path, write_image) -> None:
    """R-26: a folder that is not there names its nearest neighbour; a file names its folder."""
    path = write_image("images/a.png")
    with raises(DataError, "data.folder-missing", shows=f"{tmp_path}/images"):
        scan(tmp_path / "imges")
    with raises(DataError, "data.folder-is-file", shows=f"{tmp_path}/images"):
        scan(path)


def test_paths_that_are_too_long(tmp_path: Path, write_image) -> None:
    """R-26: a path that no system takes is one line, of a length that can be read."""
    write_image("a.png", caption="x")
    with raises(DataError, "data.folder-unreadable", shows="File name too long") as caught:
        scan(tmp_path / ("x" * 5000))
    assert len(str(caught.value)) < 400
    with raises(DataError, "data.heldout", shows="xxx") as caught:
        scan(tmp_path, heldout="x" * 5000)
    assert len(str(caught.value)) < 400


def test_no_images_tells_what_is_there(tmp_path: Path, write_image) -> None:
    """R-26: what was found, and the nearest folder that has images."""
    write_image("shoot/photos/a.png")
    notes = tmp_path / "shoot" / "notes" / "deep"
    notes.mkdir(parents=True)
    with raises(DataError, "data.no-images", shows=("empty", f"{tmp_path}/shoot/photos")):
        scan(notes)
    (notes / "a.txt").write_text("x", encoding="utf-8")
    (notes / "b.txt").write_text("x", encoding="utf-8")
    (notes / "c.pdf").write_bytes(b"x")
    with raises(DataError, "data.no-images", shows="2 .txt, 1 .pdf"):
        scan(notes)


def test_only_heldout_or_only_hidden(tmp_path: Path, write_image) -> None:
    """R-26: images that are all held out, or all hidden, are said to be."""
    write_image("a/heldout/x.png")
    write_image("b/.cache/x.png")
    with raises(DataError, "data.heldout"):
        scan(tmp_path / "a", heldout="auto")
    with raises(DataError, "data.image-hidden", shows=".cache/x.png"):
        scan(tmp_path / "b")


def test_hidden_files_are_ignored(tmp_path: Path, write_image, found) -> None:
    """R-26: hidden files, hidden folders and __MACOSX are left out, with a notice where it matters."""
    write_image("a.png", caption="x")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    assert found(scan(tmp_path)) == {}
    write_image(".thumbs/a.png")
    write_image("__MACOSX/b.png")
    index = scan(tmp_path)
    assert names(index) == ["a.png"]
    assert found(index)["notice data.image-hidden"].names == (".thumbs/a.png", "__MACOSX/b.png")


def test_kinds_that_are_not_read(tmp_path: Path, write_image, found) -> None:
    """R-14: files of an image format that is not read are named, not passed over in silence."""
    write_image("a.png", caption="x")
    (tmp_path / "b.PSD").write_bytes(b"x")
    assert found(scan(tmp_path))["warning data.image-format"].names == ("b.PSD",)


def test_links_do_not_go_in_circles(tmp_path: Path, write_image, found) -> None:
    """R-26: links inside the folder are followed, a link to a parent is not walked twice."""
    write_image("set/real/a.png", caption="x")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "set" / "real", target_is_directory=True)
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "b.png").symlink_to("real/a.png")
    (tmp_path / "set" / "b.txt").symlink_to("real/a.txt")
    index = scan(tmp_path / "set")
    assert names(index) == ["b.png", "link/a.png"]
    assert not any(key.startswith("error") for key in found(index))


def test_the_folder_itself_may_be_a_link(tmp_path: Path, write_image) -> None:
    """R-26: what the user names is theirs, through however many links."""
    write_image("real/deep/a.png", caption="x")
    (tmp_path / "real" / "b.png").symlink_to("deep/a.png")
    (tmp_path / "real" / "b.txt").symlink_to("deep/a.txt")
    (tmp_path / "one").symlink_to("real", target_is_directory=True)
    (tmp_path / "two").symlink_to("one", target_is_directory=True)
    assert names(scan(tmp_path / "two")) == ["b.png", "deep/a.png"]


def test_links_out_of_the_folder(tmp_path: Path, write_image, found) -> None:
    """Nothing outside the folder is read unless the user says so: an image, a caption, a folder."""
    write_image("private/secret.png", caption="my password")
    write_image("set/a.png", caption="x")
    write_image("set/c.png")
    for name, target in (
        ("b.png", "../private/secret.png"),
        ("c.txt", "../private/secret.txt"),
        ("folder", "../private"),
        ("disk", "/"),
        (".hidden", "/"),
        ("metadata.jsonl", "../private/secret.txt"),
        ("gone.png", "../private/none.png"),
    ):
        (tmp_path / "set" / name).symlink_to(target)
    index = scan(tmp_path / "set", allow_missing_captions=True)
    assert names(index) == ["a.png", "c.png"]
    assert [record.caption for record in index.records] == ["x", ""]
    ((key, finding),) = found(index).items()
    assert key == "error data.link-outside"
    assert set(finding.names) == {"b.png", "c.txt", "disk", "folder", "gone.png", "metadata.jsonl"}
    assert f"b.png -> {tmp_path}/private/secret.png" in finding.message
    assert "data.follow_links=true" in finding.message


def test_links_that_are_meant(tmp_path: Path, write_image, found) -> None:
    """Datasets of links (a subset, a download cache) load with one setting; a broken link is named."""
    write_image("store/1.png", caption="one")
    write_image("store/deep/2.png", caption="two")
    (tmp_path / "set").mkdir()
    for name, target in (
        ("a.png", "../store/1.png"),
        ("a.txt", "../store/1.txt"),
        ("more", "../store/deep"),
        ("gone.png", "../store/none.png"),
        ("self.png", "self.png"),
    ):
        (tmp_path / "set" / name).symlink_to(target)
    with raises(DataError, "data.link-outside", shows="data.follow_links=true"):
        scan(tmp_path / "set")
    index = scan(tmp_path / "set", follow_links=True)
    assert [(record.name, record.caption) for record in index.records] == [
        ("a.png", "one"),
        ("more/2.png", "two"),
    ]
    assert found(index)["error data.image-unreadable"].names == ("gone.png", "self.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are a matter of POSIX")
def test_pipes_and_devices(tmp_path: Path, write_image, found) -> None:
    """R-14: nothing waits for a pipe or reads a device to its end; both are named."""
    write_image("set/a.png", caption="x")
    for name in ("b.png", "b.txt", "metadata.csv"):
        os.mkfifo(tmp_path / "set" / name)
    (tmp_path / "set" / "c.png").symlink_to("/dev/zero")
    index = scan(tmp_path / "set", follow_links=True)
    assert names(index) == ["a.png"]
    findings = found(index)
    assert findings["error data.image-unreadable"].names == ("b.png", "c.png")
    assert findings["warning data.file-unreadable"].names == ("b.txt", "metadata.csv")
    assert findings["error data.image-unreadable"].message.count("pipe") == 2


def test_names_that_are_no_text(tmp_path: Path, write_image, found) -> None:
    """R-29: a name that fits in no JSON file or steers the terminal is refused by name, in one line."""
    write_image("a.png", caption="x")
    for name in (b"\xff.png", b"b\x1b[2J.png", b"c\nd.png", "e\u2028f.png".encode()):
        shutil.copy(tmp_path / "a.png", os.fsencode(tmp_path) + b"/" + name)
    index = scan(tmp_path)
    assert names(index) == ["a.png"]
    error = found(index)["error data.image-unreadable"]
    assert len(error.names) == 4
    assert error.message.isprintable()
    for shown in (r"\udcff.png", r"b\x1b[2J.png", r"c\nd.png", r"e\u2028f.png"):
        assert shown in error.message


def test_folders_of_any_depth(tmp_path: Path) -> None:
    """R-26: folders in folders, as archives can have by the thousand, need no stack."""
    (tmp_path / "a.png").touch()
    tmp_path.joinpath(*["d"] * 200).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert list_files(tmp_path, Noticed(dict)) == ["a.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_repeats_of_a_whole_set(tmp_path: Path, write_image) -> None:
    """R-16: `data.repeats` is for images outside `data.sets`, times that of their folder."""
    for name in ("a.png", "2_ink/b.png", "more/c.png", "heldout/d.png"):
        write_image(name, caption="x")
    sets = [SetSection(folder="more", repeats=4)]
    index = scan_dataset(tmp_path, DataSection(repeats=3, sets=sets))
    assert {one.name: one.repeats for one in index.records} == {"a.png": 3, "2_ink/b.png": 6, "more/c.png": 4}
    assert [one.repeats for one in index.heldout] == [1]


def test_a_date_is_no_number_of_repeats(tmp_path: Path, write_image, found) -> None:
    """R-26: a folder named after a day stops with one line instead of twenty million samples."""
    write_image("20240131_holiday/a.png", caption="x")
    write_image("202401311200_holiday/b.png", caption="x")
    index = scan(tmp_path)
    assert found(index)["error data.repeats-excessive"].names == ("20240131",)
    assert {record.name: record.repeats for record in index.records}["202401311200_holiday/b.png"] == 1


def test_bad_images_stop_or_are_skipped(tmp_path: Path, write_image, found) -> None:
    """R-14: truncated, empty and text files are listed by name in the scan; skipping is a setting."""
    write_image("good.png", caption="x")
    for bad in ("cut.jpg", "empty.png", "text.png"):
        (tmp_path / bad).with_suffix(".txt").write_text("x", encoding="utf-8")
    Image.effect_noise((300, 300), 80).convert("RGB").save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 9 // 10])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    for setting, expected in (
        ("stop", "error data.image-unreadable"),
        ("skip", "warning data.image-skipped"),
    ):
        index = scan(tmp_path, on_bad_image=setting)
        ((key, finding),) = found(index, on_bad_image=setting).items()
        assert key == expected
        assert set(finding.names) == {"cut.jpg", "empty.png", "text.png"}
        assert all(name in finding.message for name in finding.names)
        assert names(index) == ["good.png"]


def test_animations_are_reported(tmp_path: Path, found) -> None:
    """R-14: that only the first frame of an animation is used is a notice."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    index = scan(tmp_path, trigger="sks")
    assert found(index)["notice data.image-frames"].names == ("a.gif",)


def test_size_is_the_one_that_loads(tmp_path: Path, write_image) -> None:
    """R-14: the size that buckets are planned with is the size of the loaded image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (333, 222), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (333, 222), "red").save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (17, 5), "red").save(tmp_path / "tiny.jpg")
    index = scan(tmp_path, trigger="sks")
    assert len(index.records) == 3
    for record in index.records:
        assert (record.size.width, record.size.height) == load_image(record.path).size


def test_one_stem_twice_and_exact_copies(tmp_path: Path, write_image, found) -> None:
    """R-21: two images with one stem, and exact copies, are reported."""
    write_image("a.png", caption="x")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.jpg")
    write_image("b.png", caption="x", look="same")
    shutil.copy(tmp_path / "b.png", tmp_path / "c.png")
    shutil.copy(tmp_path / "b.txt", tmp_path / "c.txt")
    warnings = found(scan(tmp_path))
    assert warnings["warning data.stem-shared"].names == ("a.jpg", "a.png")
    assert "b.png = c.png" in warnings["warning data.copies"].message
    for number in range(10):
        shutil.copy(tmp_path / "b.png", tmp_path / f"c{number}.png")
    many = found(scan(tmp_path, allow_missing_captions=True))["warning data.copies"].message
    assert "b.png = c.png = c0.png = c1.png = c2.png = c3.png and 6 more" in many


def test_odd_paths(tmp_path: Path, write_image) -> None:
    """R-29: spaces, CJK, emoji and paths of more than 200 characters pass."""
    deep = "/".join(["a long folder name " * 4] * 4)
    odd = ["with space.png", "写真/猫.png", "🎨/🐱 cat.png", f"{deep}/z.png", "a'b\"c%d.png"]
    for name in odd:
        write_image(name, caption=f"caption of {name}")
    index = scan(tmp_path)
    assert sorted(names(index)) == sorted(odd)
    assert {record.caption for record in index.records} == {
        " ".join(f"caption of {name}".split()) for name in odd
    }
    assert max(len(str(record.path)) for record in index.records) > 200
    assert all(load_image(record.path).size == (48, 32) for record in index.records)


def test_heldout_folder_is_never_trained_on(tmp_path: Path, write_image, found) -> None:
    """R-12: the folder heldout inside IMAGES is the default, classes in it and it in classes included."""
    for name in ("a.png", "heldout/b.png", "heldout/deep/c.png", "class/heldout/d.png", "class/e.png"):
        write_image(name, caption=name)
    index = scan(tmp_path, heldout="auto")
    assert names(index) == ["a.png", "class/e.png"]
    held = ["class/heldout/d.png", "heldout/b.png", "heldout/deep/c.png"]
    assert [record.name for record in index.heldout] == held
    for other in (0, 0.5):
        index = scan(tmp_path, heldout=other)
        assert not {*names(index), *(record.name for record in index.heldout)} & set(held)
        assert set(found(index)["notice data.heldout-unused"].names) == set(held)


def test_heldout_default_share(tmp_path: Path, write_image) -> None:
    """R-12: 10 %, at least 2, from 12 images on; else nothing."""
    for number in range(11):
        write_image(f"{number:02d}.png", caption="x")
    assert scan(tmp_path, heldout="auto").heldout == ()
    write_image("11.png", caption="x")
    assert len(scan(tmp_path, heldout="auto").heldout) == 2
    for number in range(12, 30):
        write_image(f"{number:02d}.png", caption="x")
    index = scan(tmp_path, heldout="auto")
    assert (len(index.records), len(index.heldout)) == (27, 3)


def test_heldout_share_is_fixed_and_spread(tmp_path: Path, write_image) -> None:
    """R-12: the share depends on digests and seed, not on names, and takes from each folder."""
    for number in range(20):
        write_image(f"one/{number:02d}.png", caption="x", look=f"one {number}")
        write_image(f"two/{number:02d}.png", caption="x", look=f"two {number}")
    settings = DataSection(heldout=0.2)
    first = scan_dataset(tmp_path, settings, seed=3)
    again = scan_dataset(tmp_path, settings, seed=3)
    other = scan_dataset(tmp_path, settings, seed=4)
    assert first == again
    assert len(first.heldout) == 8
    assert {record.digest for record in first.heldout} != {record.digest for record in other.heldout}
    assert [record.name.split("/")[0] for record in first.heldout].count("one") == 4
    for path in sorted((tmp_path / "one").glob("*")):
        path.rename(path.with_name(f"renamed {path.name}"))
    renamed = scan_dataset(tmp_path, settings, seed=3)
    assert {record.digest for record in renamed.heldout} == {record.digest for record in first.heldout}


def test_heldout_copies_stay_together(tmp_path: Path, write_image) -> None:
    """R-12: a copy of a held-out image is not trained on either; with one image nothing is held out."""
    for number in range(6):
        write_image(f"{number}.png", caption="x")
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"copy {number}.png")
        shutil.copy(tmp_path / f"{number}.txt", tmp_path / f"copy {number}.txt")
    index = scan(tmp_path, heldout=0.5)
    assert not {r.digest for r in index.records} & {r.digest for r in index.heldout}
    assert (len(index.records), len(index.heldout)) == (6, 6)
    write_image("single/x.png", caption="x")
    assert scan(tmp_path / "single", heldout=0.5).heldout == ()


def test_heldout_folder_of_ones_own(tmp_path: Path, write_image, found) -> None:
    """R-12: data.heldout may be a folder inside or elsewhere; one that is not there is an error."""
    write_image("set/a.png", caption="x")
    write_image("set/keep/b.png", caption="x")
    write_image("away/2_c/c.png", caption="x")
    shutil.copy(tmp_path / "set" / "a.png", tmp_path / "away" / "leak.png")
    (tmp_path / "away" / "leak.txt").write_text("x", encoding="utf-8")
    inside = scan(tmp_path / "set", heldout="keep")
    assert names(inside) == ["a.png"]
    assert [record.name for record in inside.heldout] == ["keep/b.png"]
    outside = scan(tmp_path / "set", heldout=str(tmp_path / "away"))
    assert names(outside) == ["a.png", "keep/b.png"]
    assert [record.name for record in outside.heldout] == ["away/2_c/c.png", "away/leak.png"]
    assert {record.repeats for record in outside.heldout} == {1}
    assert found(outside)["warning data.heldout-trained"].names == ("away/leak.png",)
    with raises(DataError, "data.heldout", shows="nowhere"):
        scan(tmp_path / "set", heldout="nowhere")


def test_background_is_checked_first(tmp_path: Path, write_image) -> None:
    """R-35: a color that is none stops before images are read."""
    write_image("a.png", caption="x")
    with raises(ConfigError, "data.background", shows="whitish"):
        scan(tmp_path, background="whitish")


def test_dataset_objects_pickle_under_spawn(tmp_path: Path, write_image) -> None:
    """R-29: index, order of batches and cache work in a spawned process."""
    for number in range(5):
        write_image(f"{number}.png", caption=f"number {number}")
    settings = DataSection(heldout=0.2, crop="random", flip=True)
    index = scan_dataset(tmp_path, settings)
    plan = plan_buckets(index.records, 64, settings, heldout=index.heldout)
    order = BatchOrder(index.records, plan, settings, global_batch=2, seed=1)
    cache = TensorCache(tmp_path / "cache")
    cache.put("text/ab", {"hidden": torch.ones(2)})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(getattr, (index, "digest")) == index.digest
        assert pool.apply(order.step, (7,)) == order.step(7)
        assert pool.apply(plan.table) == plan.table()
        assert pool.apply(cache.contains, ("text/ab",))
        assert not pool.apply(cache.contains, ("text/cd",))


def test_preflight_needs_no_torch(repository: Path) -> None:
    """R-35: scanning, buckets and the doctor do not import torch."""
    code = "import sys, sdlora.data.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)
