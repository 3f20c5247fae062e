"""Weight files: completeness and fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import ModelError
from sdlora.models.components import (
    WINDOW_BYTES,
    WINDOWS,
    check_dtypes,
    digest_weights,
    find_weights,
    read_header,
    read_json,
    read_values,
    spans_of,
)
from tests.checks import raises


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16)}, file)
    return file


def test_header_holds_shapes_without_reading_weights(weights: Path) -> None:
    """R-25: names and shapes come from the header."""
    assert read_header(weights).shapes["a"] == (3, 4)


@pytest.mark.parametrize("share", [0.0005, 0.05, 0.3, 0.99])
def test_truncated_file_is_named(weights: Path, share: float) -> None:
    """R-25: a download cut anywhere is one clear line with the file's name."""
    raw = weights.read_bytes()
    weights.write_bytes(raw[: int(len(raw) * share)])
    with raises(ModelError, shows="model.safetensors") as error:
        read_header(weights)
    assert set(error.value.keys) <= {"file.empty", "file.incomplete", "file.not-safetensors"}
    assert "\n" not in str(error.value)


def test_truncated_by_one_byte_states_both_sizes(weights: Path) -> None:
    """R-25: header length against file size, to the byte."""
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with raises(ModelError, "file.incomplete", shows=(f"{len(raw)} ", f"{len(raw) - 1} ")):
        read_header(weights)


def test_surplus_bytes_are_damage(weights: Path) -> None:
    """R-25: a file longer than its header says is refused too."""
    weights.write_bytes(weights.read_bytes() + b"\0")
    with raises(ModelError, "file.damaged"):
        read_header(weights)


@pytest.mark.parametrize(
    "content", [b"hello, this is text\n" * 9, b"PK\x03\x04" + b"\0" * 99, b"\x02" + b"\0" * 7 + b"[]"]
)
def test_other_content_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    """R-40: the content counts, not the name."""
    file = tmp_path / "fake.safetensors"
    file.write_bytes(content)
    with raises(ModelError, shows="fake.safetensors") as error:
        read_header(file)
    assert set(error.value.keys) <= {"file.not-safetensors", "file.pickle", "file.damaged"}


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
    """R-25: an index file names its shards; a missing one is named, one elsewhere is not read."""
    folder = tmp_path / "unet"
    folder.mkdir()
    index = '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    (folder / "m.safetensors.index.json").write_text(index)
    (folder / "m-1.safetensors").symlink_to(weights)
    with raises(ModelError, "base.incomplete", shows="m-2.safetensors"):
        find_weights(folder, "m", "base.source = x")
    (folder / "m-2.safetensors").symlink_to(weights)
    files, kind = find_weights(folder, "m", "x")
    assert [file.name for file in files] == ["m-1.safetensors", "m-2.safetensors"]
    assert kind is None
    (folder / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with raises(ModelError, "base.foreign-file", shows="'../model.safetensors'"):
        find_weights(folder, "m", "x")


def test_precision_in_the_name(tmp_path: Path, weights: Path) -> None:
    """R-40: plain files are taken first, then fp16, then bf16; what was asked for before all."""
    for kind in ("bf16", "fp16"):
        (tmp_path / f"m.{kind}.safetensors").symlink_to(weights)
        assert find_weights(tmp_path, "m", "x") == ([tmp_path / f"m.{kind}.safetensors"], kind)
    (tmp_path / "m.safetensors").symlink_to(weights)
    assert find_weights(tmp_path, "m", "x") == ([tmp_path / "m.safetensors"], None)
    assert find_weights(tmp_path, "m", "x", "bf16") == ([tmp_path / "m.bf16.safetensors"], "bf16")
    (tmp_path / "m.bf16.safetensors").unlink()
    assert find_weights(tmp_path, "m", "x", "bf16")[1] is None


def test_spans_join_neighbours(weights: Path) -> None:
    """R-21: the tensors of one part of a single file, as few runs of bytes; together the whole file."""
    header = read_header(weights)
    raw = weights.read_bytes()
    start = min(first for first, _ in header.spans.values())
    assert spans_of(weights, header, "") == [(weights, start, len(raw) - start)]
    [(_, start, size)] = spans_of(weights, header, "b")
    assert raw[start : start + size] == torch.ones(5, dtype=torch.float16).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_of_a_small_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    """R-32: read without torch, exactly."""
    values = torch.randn(7).to(dtype)
    file = tmp_path / "a.safetensors"
    save_file({"a": values, "n": torch.arange(3)}, file)
    assert read_values(file, read_header(file), "a") == values.tolist()
    with raises(ModelError, "base.dtype", shows="n is stored as I64"):
        read_values(file, read_header(file), "n")


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    """R-40: a base that somebody quantised already is named for it."""
    file = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(2)}, file)
    with raises(ModelError, "base.quantized", shows="U8"):
        check_dtypes(read_header(file), "x")
    check_dtypes(read_header(file), "x", "b")


def test_broken_json_is_one_line(tmp_path: Path) -> None:
    """R-25: a configuration cut short is named."""
    file = tmp_path / "config.json"
    file.write_text('{"a": ')
    with raises(ModelError, "file.json", shows="config.json is not JSON"):
        read_json(file)
    file.write_text("[1]")
    with raises(ModelError, "file.json", shows="JSON object"):
        read_json(file)
