"""Hub ids, without a hub: what would be fetched, and what the cache gives while offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.models.folder import BUILTIN, TEXTS, WEIGHTS, find_base, weight_patterns
from sdlora.models.info import BaseInfo, inspect_base
from tests.checks import raises

STEM = "diffusion_pytorch_model"
# As the SDXL base lies on the hub: three precisions, other frameworks, examples.
LISTING = [
    *("README.md", "model_index.json", "sd_xl_base_1.0.safetensors", "01.png"),
    *(f"unet/{STEM}{kind}.safetensors" for kind in ("", ".fp16", ".bf16")),
    *(f"unet/{STEM}{kind}-0000{n}-of-00002.safetensors" for kind in ("", ".fp16") for n in (1, 2)),
    *(f"unet/{STEM}.safetensors.index{kind}.json" for kind in ("", ".fp16")),
    *("unet/config.json", "unet/model.onnx", f"unet/{STEM}.bin", "unet/openvino_model.bin"),
    *(f"vae/{STEM}.safetensors", f"vae/{STEM}.fp16.safetensors", "vae/config.json", "vae_1_0/config.json"),
    *(f"text_encoder_2/{name}" for name in ("model.safetensors", "model.fp16.safetensors", "config.json")),
    *("text_encoder/flax_model.msgpack", "text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer_config.json"),
    "scheduler/scheduler_config.json",
]


def chosen(patterns: list[str]) -> set[str]:
    return set(filter_repo_objects(LISTING, allow_patterns=patterns))


def test_settings_and_words_first() -> None:
    """R-40: small files alone; of weights, other frameworks and examples nothing."""
    assert chosen(TEXTS) == {
        "model_index.json",
        *("unet/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer_config.json"),
        "scheduler/scheduler_config.json",
    }


def test_one_precision_of_each_part() -> None:
    """R-40: plain files, or those of one variant, with their shards; never both."""
    plain = chosen(weight_patterns(WEIGHTS, None))
    half = chosen(weight_patterns(WEIGHTS, "fp16"))
    assert f"unet/{STEM}-00001-of-00002.safetensors" in plain
    assert f"unet/{STEM}.safetensors.index.fp16.json" in half
    assert all("16" not in name for name in plain)
    assert all("fp16" in name for name in half)
    assert chosen(weight_patterns(["unet/"], "bf16")) == {f"unet/{STEM}.bf16.safetensors"}
    assert not plain & half
    assert {name.split("/")[0] for name in plain | half} == {"unet", "vae", "text_encoder", "text_encoder_2"}


@pytest.fixture
def cached(
    copy_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """A hub id and its snapshot in a cache of its own, laid out as huggingface_hub lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--small-base"
    snapshot = copy_folder(BUILTIN, f"hub/models--someone--small-base/snapshots/{commit}")
    for name, found in {"main": commit, "v1": commit}.items():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(found)
    return "someone/small-base", snapshot


def inspect(source: str, **settings: str) -> BaseInfo:
    return inspect_base(BaseSection(source=source, **settings))


def test_what_is_cached_is_used_offline(cached: tuple[str, Path]) -> None:
    """R-39, R-40: by the hub's own cache, for branches and tags; another revision is not guessed."""
    source, snapshot = cached
    info = inspect(source)
    assert (info.path, info.name) == (snapshot, source)
    assert inspect(source, revision="v1").digest == info.digest == inspect("builtin").digest
    with raises(ModelError, "base.hub", shows=("at revision v2", "HF_HUB_OFFLINE")):
        inspect(source, revision="v2")


def test_a_cache_of_one_variant_is_enough(cached: tuple[str, Path]) -> None:
    """R-40: what diffusers fetched as fp16 is found again, asked for or not."""
    source, snapshot = cached
    for file in list(snapshot.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    for settings in ({}, {"variant": "fp16"}):
        info = inspect(source, **settings)
        assert {part.variant for part in info.components.values()} == {"fp16"}


@pytest.mark.parametrize("source", ["cached", "builtin", "folder"])
def test_a_precision_that_is_not_there_is_refused(
    cached: tuple[str, Path], copy_base: Callable[..., Path], source: str
) -> None:
    """R-35: no base.variant without effect, wherever the base lies."""
    source = {"cached": cached[0], "folder": str(copy_base("folder"))}.get(source, source)
    with raises(ModelError, "base.variant", shows="base.variant = bf16"):
        inspect_base(BaseSection(source=source, variant="bf16"))


@pytest.mark.parametrize("source", ["builtin", "folder"])
def test_a_revision_of_what_is_here_is_refused(copy_base: Callable[..., Path], source: str) -> None:
    """R-35: no base.revision without effect; both settings are named."""
    source = str(copy_base("folder")) if source == "folder" else source
    with raises(ModelError, "base.revision", shows=("base.revision = main", f"base.source = {source}")):
        inspect_base(BaseSection(source=source, revision="main"))


def test_half_a_download_in_the_cache_is_named(cached: tuple[str, Path]) -> None:
    """R-25: a file cut short, and a part that is missing."""
    source, snapshot = cached
    file = next((snapshot / "unet").glob("*.safetensors"))
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[: len(raw) // 3])
    with raises(ModelError, "file.incomplete"):
        inspect(source)
    file.unlink()
    with raises(ModelError, "base.incomplete", shows=(f"base.source = {source}", "/unet/")):
        inspect(source)


def test_separate_vae_by_hub_id(cached: tuple[str, Path]) -> None:
    """R-40: base.vae takes a hub id too."""
    source, snapshot = cached
    assert inspect("builtin", vae=source).components["vae"].folder == snapshot / "vae"


def test_a_name_that_no_system_takes() -> None:
    """R-40: what cannot even be looked for is one line."""
    with raises(ModelError, "base.unreadable", shows=("base.source = x", "File name too long")):
        find_base("a" * 5000, "base.source = x")
