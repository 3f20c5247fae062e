"""The cache is keyed by content, written atomically, and forgives damage (R-20, R-21, R-44)."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sdlora.data import cache as cache_module
from sdlora.data.buckets import Crop
from sdlora.data.cache import (
    TensorCache,
    cache_folder,
    clear_cache,
    latent_key,
    measure_cache,
    seal,
    text_key,
)
from sdlora.data.records import Size

CROP = Crop(Size(140, 128), 6, 0, Size(128, 128))
OTHER_CROPS = [
    replace(CROP, resized=Size(150, 128)),
    replace(CROP, left=7),
    replace(CROP, top=1),
    replace(CROP, size=Size(128, 120)),
    replace(CROP, flipped=True),
]


def test_each_ingredient_changes_the_latent_key(make_records, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-21: image bytes, VAE, size, crop, flip, alpha color, dtype and version are all in the key."""
    record, other = make_records((64, 64), (64, 64))
    settings = {"vae_digest": "aa", "background": "white", "dtype": "fp32"}
    keys = [
        latent_key(record, CROP, **settings),
        latent_key(other, CROP, **settings),
        *(latent_key(record, crop, **settings) for crop in OTHER_CROPS),
        latent_key(record, CROP, **{**settings, "vae_digest": "bb"}),
        latent_key(record, CROP, **{**settings, "background": "black"}),
        latent_key(record, CROP, **{**settings, "dtype": "bf16"}),
    ]
    monkeypatch.setattr(cache_module, "CACHE_VERSION", cache_module.CACHE_VERSION + 1)
    keys.append(latent_key(record, CROP, **settings))
    assert len(set(keys)) == len(keys) == 11


def test_what_does_not_matter_is_not_in_the_key(make_records) -> None:
    """R-21: name, place, caption and the spelling of a color leave the key as it is."""
    (record,) = make_records((64, 64))
    settings = {"vae_digest": "aa", "dtype": "fp32"}
    moved = replace(record, name="b.png", path=Path("/else/b.png"), caption="other", repeats=9)
    one = latent_key(record, CROP, background="white", **settings)
    assert one == latent_key(moved, CROP, background="#ffffff", **settings)


def test_each_ingredient_changes_the_text_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-21, R-35: caption, encoder, dtype and version; the empty caption has a key of its own."""
    keys = [
        text_key("a cat", encoder_digest="aa", dtype="fp32"),
        text_key("", encoder_digest="aa", dtype="fp32"),
        text_key("a cat 猫", encoder_digest="aa", dtype="fp32"),
        text_key("a cat", encoder_digest="bb", dtype="fp32"),
        text_key("a cat", encoder_digest="aa", dtype="bf16"),
    ]
    monkeypatch.setattr(cache_module, "CACHE_VERSION", 99)
    keys.append(text_key("a cat", encoder_digest="aa", dtype="fp32"))
    assert len(set(keys)) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_through_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    """R-20: what was put comes back to the bit, in another process's cache too."""
    tensors = {"mean": torch.randn(4, 8, 6).to(dtype), "std": torch.rand(6, 4, 8).to(dtype).permute(1, 2, 0)}
    TensorCache(tmp_path).put("latents/abc", tensors)
    found = TensorCache(tmp_path).get("latents/abc")
    assert found is not None
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_state_is_safetensors(tmp_path: Path) -> None:
    """R-44: a cache file is a plain safetensors file, readable by others, and nothing else is left."""
    TensorCache(tmp_path).put("latents/abc", {"mean": torch.zeros(2)})
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["mean"]["dtype"] == "F32"
    assert file.suffix == ".safetensors"
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRUSR


def test_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-20: without a folder everything stays in memory."""
    monkeypatch.chdir(tmp_path)
    cache = TensorCache(None)
    assert not cache.contains("text/a")
    assert cache.get("text/a") is None
    cache.put("text/a", {"hidden": torch.ones(3)})
    assert cache.contains("text/a")
    assert torch.equal(cache.get("text/a")["hidden"], torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_stored_tensors_are_copies(tmp_path: Path) -> None:
    """R-20: changing a tensor after it was stored does not change the cache."""
    tensor = torch.ones(3, requires_grad=True)
    cache = TensorCache(tmp_path)
    cache.put("text/a", {"hidden": tensor})
    with torch.no_grad():
        tensor.zero_()
    assert torch.equal(cache.get("text/a")["hidden"], torch.ones(3))
    assert not cache.get("text/a")["hidden"].requires_grad


def test_memory_copy_outlives_the_file(tmp_path: Path) -> None:
    """R-20: a second look does not read the disk again."""
    cache = TensorCache(tmp_path)
    cache.put("text/a", {"hidden": torch.ones(3)})
    clear_cache(tmp_path)
    assert cache.get("text/a") is not None


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-19: what has a file makes room; what could not be written stays."""
    monkeypatch.setattr("sdlora.data.cache.MAX_KEPT", 100)
    cache = TensorCache(tmp_path)
    for number in range(4):
        cache.put(f"text/{number}", {"hidden": torch.full((10,), float(number))})
    assert [cache.get(f"text/{number}")["hidden"][0] for number in range(4)] == [0, 1, 2, 3]
    clear_cache(tmp_path)
    assert [cache.contains(f"text/{number}") for number in range(4)] == [False, False, True, True]
    (tmp_path / "text").write_text("no folder")
    for number in range(4):
        cache.put(f"text/{number}", {"hidden": torch.zeros(10)})
    assert all(cache.contains(f"text/{number}") for number in range(4))


def test_preparing_keeps_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-19: what is written, or only looked for, does not fill the memory; what is used does."""
    monkeypatch.setattr("sdlora.data.cache.MAX_KEPT_AHEAD", 100)
    cache, names = TensorCache(tmp_path), [f"text/{number}" for number in range(4)]
    for name in names:
        cache.put(name, {"hidden": torch.ones(10)})
        assert cache.contains(name)
    fresh = TensorCache(tmp_path)
    assert all(map(fresh.contains, names))
    used = TensorCache(tmp_path)
    assert all(map(used.get, names))
    clear_cache(tmp_path)
    for one in (cache, fresh):
        assert list(map(one.contains, names)) == [True, True, False, False]
    assert all(map(used.contains, names))


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "text", "bit", "no digest"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, damage: str) -> None:
    """R-21: a file cut short, overwritten or with one bit changed is computed again, never an error."""
    TensorCache(tmp_path).put("latents/abc", {"mean": torch.randn(64)})
    (file,) = tmp_path.rglob("*.safetensors")
    data = file.read_bytes()
    broken = {
        "cut": data[:-10],
        "empty": b"",
        "header": b"\xff" * 8 + data[8:],
        "text": b"hello",
        "bit": data[:-1] + bytes([data[-1] ^ 1]),
        "no digest": save({"mean": torch.ones(64)}),
    }
    file.write_bytes(broken[damage])
    cache = TensorCache(tmp_path)
    assert not cache.contains("latents/abc")
    assert cache.get("latents/abc") is None
    assert cache.damaged == {file}
    cache.put("latents/abc", {"mean": torch.ones(64)})
    assert torch.equal(TensorCache(tmp_path).get("latents/abc")["mean"], torch.ones(64))


def test_a_failing_write_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-21, R-23: a disk that fills up while writing costs the file only; the memory copy serves."""
    cache = TensorCache(tmp_path)

    def fail(self: Path, data: bytes) -> int:
        with self.open("wb") as handle:
            handle.write(data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    cache.put("latents/abc", {"mean": torch.ones(4)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "No space left" in cache.problem
    assert torch.equal(cache.get("latents/abc")["mean"], torch.ones(4))


def test_measure_and_clear(tmp_path: Path) -> None:
    """`sdlora cache`: rows of kind, files, bytes; clearing touches the cache's own files only."""
    cache = TensorCache(tmp_path)
    for number in range(3):
        cache.put(f"latents/{number:04d}", {"mean": torch.zeros(number + 1)})
    cache.put("text/0001", {"hidden": torch.zeros(1)})
    drawn = tmp_path / "images" / "ab" / "ab12.png"
    drawn.parent.mkdir(parents=True)
    drawn.write_bytes(b"image")
    precious = tmp_path / "thesis.txt"
    precious.write_text("mine", encoding="utf-8")
    also = tmp_path / "latents" / "notes.safetensors"
    also.write_bytes(b"mine")
    rows = measure_cache(tmp_path)
    counts = [("latents", 3), ("text", 1), ("images", 1), ("looks", 0), ("archives", 0)]
    assert [(kind, files) for kind, files, _ in rows] == counts
    assert clear_cache(tmp_path) == sum(size for _, _, size in rows) > 0
    assert [files for _, files, _ in measure_cache(tmp_path)] == [0, 0, 0, 0, 0]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([precious, also])
    assert clear_cache(tmp_path / "not there") == 0


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """R-20: SDLORA_CACHE decides, else the platform's cache folder."""
    assert cache_folder().is_dir()
    monkeypatch.delenv("SDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    for platform in ("linux", "win32", "darwin"):
        monkeypatch.setattr("sys.platform", platform)
        assert "sdlora" in cache_folder().parts
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "sdlora"


def replace_file(folder: Path, content: bytes) -> None:
    """Puts something else in the place of the one file of a cache."""
    (file,) = folder.rglob("*.safetensors")
    file.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        seal({"mean": torch.ones(2, dtype=torch.int64)}),
        seal({"mean": torch.ones(2, dtype=torch.complex64)}),
        seal({"mean": torch.ones(2, dtype=torch.float64)}),
        seal({"mean": torch.ones(0, 2**40)}),
        seal({}),
        seal({"mean": torch.ones(5)}),
        seal({"mean": torch.ones(4), "more": torch.ones(4)}),
        (2**63).to_bytes(8, "little") + b"{}",
        (10**8).to_bytes(8, "little") + b"{" + bytes(100),
        b"\x80\x04\x95" + bytes(100),
    ],
    ids=range(10),
)
def test_a_file_of_somebody_else_counts_as_missing(tmp_path: Path, content: bytes) -> None:
    """R-21, R-44: a file that no encoder made is computed again, whatever it is."""
    TensorCache(tmp_path).put("latents/abc", {"mean": torch.ones(4)})
    shapes = {"mean": (4,)}
    assert TensorCache(tmp_path).contains("latents/abc", shapes)
    assert TensorCache(tmp_path).get("latents/abc", shapes) is not None
    replace_file(tmp_path, content)
    assert not TensorCache(tmp_path).contains("latents/abc", shapes)
    assert TensorCache(tmp_path).get("latents/abc", shapes) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_count_as_missing(tmp_path: Path, value: float) -> None:
    """R-21, R-22: no encoder's latents are kept that are not finite, so such a file is none of ours."""
    TensorCache(tmp_path).put("latents/abc", {"mean": torch.ones(4)})
    replace_file(tmp_path, seal({"mean": torch.tensor([1.0, value])}))
    assert TensorCache(tmp_path).get("latents/abc") is None


def test_pipes_and_sparse_files_count_as_missing(tmp_path: Path) -> None:
    """R-21: nothing waits for a pipe, or makes room for a terabyte."""
    cache = TensorCache(tmp_path)
    cache.put("latents/abc", {"mean": torch.ones(4)})
    (file,) = tmp_path.rglob("*.safetensors")
    raw = json.dumps({"mean": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with file.open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + 2**40)
    assert TensorCache(tmp_path).get("latents/abc") is None
    file.unlink()
    os.mkfifo(file)
    assert not TensorCache(tmp_path).contains("latents/abc")
    assert TensorCache(tmp_path).get("latents/abc") is None


def test_clearing_leaves_other_folders_alone(tmp_path: Path) -> None:
    """`sdlora cache --clear`: a link in the cache folder does not lead it to somebody's LoRA files."""
    precious = tmp_path / "loras" / "ab" / "mine.safetensors"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"mine")
    cache = tmp_path / "cache"
    (cache / "latents").mkdir(parents=True)
    (cache / "latents" / "ab").symlink_to(precious.parent, target_is_directory=True)
    (cache / "text").symlink_to(tmp_path / "loras", target_is_directory=True)
    (cache / "latents" / "cd").mkdir()
    (cache / "latents" / "cd" / "link.safetensors").symlink_to(precious)
    assert [files for _, files, _ in measure_cache(cache)] == [0, 0, 0, 0, 0]
    assert clear_cache(cache) == 0
    assert precious.read_bytes() == b"mine"
