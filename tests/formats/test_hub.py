"""LoRA files by their names on the Hub, which is a folder here."""

from __future__ import annotations

import huggingface_hub
import pytest

from sdlora.errors import AdapterError
from sdlora.formats.files import resolve_adapter, split_sum
from tests.checks import raises


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of two repositories; the working folder is another, and empty."""
    for name in (
        "ann/ink/pytorch_lora_weights.safetensors",
        "bob/many/a.safetensors",
        "bob/many/b.safetensors",
    ):
        file = tmp_path / "hub" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "hub/bob/pickle").mkdir()
    (tmp_path / "hub/bob/pickle/a.bin").write_bytes(b"")
    (tmp_path / "work/runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")

    def download(repository, allow_patterns):
        path = tmp_path / "hub" / repository
        if not path.is_dir():
            raise OSError(f"no repository {repository}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(
        huggingface_hub,
        "list_repo_files",
        lambda repository: [file.name for file in (tmp_path / "hub" / repository).iterdir()],
    )
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_a_file(hub):
    """R-45: with or without the file; also as a part of a sum."""
    usual = hub / "ann/ink/pytorch_lora_weights.safetensors"
    assert resolve_adapter("ann/ink").file == usual
    assert resolve_adapter("bob/many/b.safetensors").file == hub / "bob/many/b.safetensors"
    assert split_sum("ann/ink:0.6+bob/many/a.safetensors") == [
        ("ann/ink", 0.6),
        ("bob/many/a.safetensors", 1.0),
    ]


def test_what_the_hub_cannot_give(hub):
    """R-25: one line; pickles are never downloaded, and a mistyped run is not looked for on the Hub."""
    with raises(AdapterError, "lora.missing", shows=("b.safetensors", "bob/many/a.safetensors")):
        resolve_adapter("bob/many")
    with raises(AdapterError, "lora.missing", shows="pickles"):
        resolve_adapter("bob/pickle")
    with raises(AdapterError, "lora.missing", shows="no repository eve/none"):
        resolve_adapter("eve/none")
    with raises(AdapterError, "lora.missing", shows="runs/openmojo does not exist"):
        resolve_adapter("runs/openmojo")
    with raises(AdapterError, "lora.missing", shows="bob/many has no c.safetensors"):
        resolve_adapter("bob/many/c.safetensors")
    for path in ("loras/ink.safetensors", "loras/ink.pt"):
        with raises(AdapterError, "lora.missing", shows=f"{path} does not exist"):
            resolve_adapter(path)


def test_a_name_without_a_network(tmp_path, monkeypatch):
    """R-25: the real client: one line, at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(AdapterError, "lora.missing", shows="ann/ink"):
        resolve_adapter("ann/ink")
