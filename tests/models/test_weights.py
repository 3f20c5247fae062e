"""Weight files: completeness and fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import ModelError
from sdlora.models.weights import (
    WINDOW_BYTES,
    WINDOWS,
    count_parameters,
    digest_weights,
    find_weights,
    read_header,
    read_json,
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16)}, file)
    return file


def test_header_holds_shapes_without_reading_weights(weights: Path) -> None:
    """R-25: names, shapes and count come from the header."""
    assert read_header(weights)["a"]["shape"] == [3, 4]
    assert count_parameters([weights]) == 17


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.3, 0.99])
def test_truncated_file_is_named(weights: Path, share: float) -> None:
    """R-25: a download cut anywhere is one clear line with the file's name."""
    raw = weights.read_bytes()
    weights.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(
        ModelError, match=r"model\.safetensors is (incomplete|empty|not a safetensors)"
    ) as error:
        read_header(weights)
    assert "\n" not in str(error.value)


def test_truncated_by_one_byte_states_both_sizes(weights: Path) -> None:
    """R-25: header length against file size, to the byte."""
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(ModelError, match=f"{len(raw) - 1} bytes of {len(raw)}"):
        read_header(weights)


def test_surplus_bytes_are_damage(weights: Path) -> None:
    """R-25: a file longer than its header says is refused too."""
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="is damaged"):
        read_header(weights)


@pytest.mark.parametrize(
    "content", [b"hello, this is text\n" * 9, b"PK\x03\x04" + b"\0" * 99, b"\x02" + b"\0" * 7 + b"[]"]
)
def test_other_content_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    """R-40: the content counts, not the name."""
    file = tmp_path / "fake.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"fake\.safetensors is not a safetensors file"):
        read_header(file)


def test_digest_sees_weights_and_settings_but_not_names(weights: Path) -> None:
    """R-21: another weight or another scaling factor is another base; who saved it is not."""
    digest = digest_weights([weights], {"scaling_factor": 1.0, "_name_or_path": "a"})
    assert digest == digest_weights([weights], {"scaling_factor": 1.0, "_name_or_path": "b"})
    assert digest != digest_weights([weights], {"scaling_factor": 2.0})
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert digest != digest_weights([weights], {"scaling_factor": 1.0})


def test_digest_of_a_large_file_reads_windows_to_the_last_byte(tmp_path: Path) -> None:
    """R-21: above 64 MiB 64 windows are read, from the first to the last byte."""
    file = tmp_path / "large.safetensors"
    size = (WINDOWS + 8) * WINDOW_BYTES
    digests = set()
    for place in (None, 0, (size - WINDOW_BYTES) * 32 // (WINDOWS - 1), size - 1):
        with file.open("wb") as handle:
            handle.truncate(size)
            if place is not None:
                handle.seek(place)
                handle.write(b"x")
        digests.add(digest_weights([file]))
    assert len(digests) == 4


def test_shards_are_found_and_missed(tmp_path: Path, weights: Path) -> None:
    """R-25: an index file names its shards; a missing one is named."""
    folder = tmp_path / "unet"
    folder.mkdir()
    index = '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    (folder / "m.safetensors.index.json").write_text(index)
    (folder / "m-1.safetensors").symlink_to(weights)
    with pytest.raises(ModelError, match=r"lacks m-2\.safetensors"):
        find_weights(folder, "m", "base.source = x")
    (folder / "m-2.safetensors").symlink_to(weights)
    assert [file.name for file in find_weights(folder, "m", "x")] == ["m-1.safetensors", "m-2.safetensors"]


def test_broken_json_is_one_line(tmp_path: Path) -> None:
    """R-25: a configuration cut short is named."""
    file = tmp_path / "config.json"
    file.write_text('{"a": ')
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        read_json(file)
