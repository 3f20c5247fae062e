"""LoRA files: complete or not there, the same bytes for the same content, refused for what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.container import write_tensors
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.lora.attach import mount
from tests.checks import raises
from tests.lora_fixtures import metadata_of


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_same_content_same_bytes(tmp_path, unet, make_adapter, dialect):
    """R-42: saving twice gives the same bytes, whatever the order of modules and metadata."""
    adapter = make_adapter(unet)
    metadata = {f"ss_key_{number}": str(number) for number in range(20)}
    one = save_adapter(tmp_path / "1.safetensors", adapter, dialect=dialect, metadata=metadata)
    adapter.modules = dict(reversed(adapter.modules.items()))
    metadata = dict(reversed(metadata.items()))
    two = save_adapter(tmp_path / "2.safetensors", adapter, dialect=dialect, metadata=metadata)
    assert one.read_bytes() == two.read_bytes()
    assert metadata_of(one)["ss_key_7"] == "7"


def test_other_libraries_read_the_file(tmp_path, unet, make_adapter):
    """R-07: safetensors' own reader accepts our header; alignment and order are those it asks for."""
    adapter, _ = round_adapter(make_adapter(unet, rank=3, alpha=3), "bf16")
    path = save_adapter(tmp_path / "x.safetensors", adapter, dialect="kohya")
    raw = path.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    for state in (load_file(path),):
        assert len(state) == 3 * len(adapter.modules)
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.skipif(os.name == "nt", reason="file modes are a matter of POSIX")
def test_file_mode_is_by_umask(tmp_path, unet, make_adapter):
    """R-07: another user's web interface can read the file (safetensors would write mode 600)."""
    mask = os.umask(0o022)
    try:
        path = save_adapter(tmp_path / "x.safetensors", make_adapter(unet))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_rank_and_alpha_describe_the_tensors(tmp_path, unet, make_adapter, dialect):
    """R-02: ss_network_dim and ss_network_alpha are the rank as written; the trained alpha is kept aside."""
    path = save_adapter(tmp_path / "x.safetensors", make_adapter(unet, rank=4, alpha=2.5), dialect=dialect)
    metadata = metadata_of(path)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "4"
    assert metadata["sdlora.trained_alpha"] == "2.5"
    assert metadata["ss_network_module"] == "networks.lora"
    again = load_adapter(path)
    assert again.alpha == again.rank == 4
    other = save_adapter(tmp_path / "y.safetensors", again, dialect="kohya")
    assert metadata_of(other)["sdlora.trained_alpha"] == "2.5"


def test_mixed_ranks_are_described(tmp_path, mixed_adapter):
    """R-02: kohya says the padded rank; diffusers gets the minimal lora_adapter_metadata, and only then."""
    kohya = metadata_of(save_adapter(tmp_path / "k.safetensors", mixed_adapter, dialect="kohya"))
    diffusers = metadata_of(save_adapter(tmp_path / "d.safetensors", mixed_adapter))
    assert kohya["ss_network_dim"] == kohya["ss_network_alpha"] == "6"
    assert "lora_adapter_metadata" not in kohya
    config = json.loads(diffusers["lora_adapter_metadata"])
    assert set(config) == {
        f"unet.{key}" for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    }
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"]


def test_model_hash(lora_file):
    """R-42: sshs_model_hash is the SHA-256 of the tensor bytes behind the header."""
    raw = lora_file.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata_of(lora_file)["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert "lora_adapter_metadata" not in metadata_of(lora_file)


def test_legacy_hash(tmp_path, lora_file):
    """R-42: as kohya's tools compute it, of the reference writer's file with the `ss_` keys alone."""
    assert metadata_of(lora_file)["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8] == "e3b0c442"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"lora_unet_{n}.lora_up.weight": torch.randn(90_000, generator=generator) for n in range(4)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"ss_output_name": "süß", "modelspec.title": "x"})
    raw = save(tensors, {"ss_output_name": "süß"})
    expected = hashlib.sha256(raw[0x100000:0x110000]).hexdigest()[:8]
    assert metadata_of(tmp_path / "x.safetensors")["sshs_legacy_hash"] == expected != "e3b0c442"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_modelspec(tmp_path, make_family, make_adapter, family):
    """R-42: the hash of the tensors, and whose names they have: kohya's SDXL files the original code's."""
    adapter = make_adapter(make_family(family)["unet"], family=family)
    notes = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "old"}
    for dialect in ("diffusers", "kohya"):
        path = save_adapter(tmp_path / "x.safetensors", adapter, dialect=dialect, metadata=notes)
        metadata = metadata_of(path)
        assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
        is_original = (family, dialect) == ("sdxl", "kohya")
        assert ("generative-models" in metadata["modelspec.implementation"]) == is_original
        assert ("diffusers" in metadata["modelspec.implementation"]) != is_original


def test_metadata_travels_and_stale_keys_do_not(tmp_path, unet, make_adapter):
    """R-42: notes of a file go on into another dialect; what described its tensors is written anew."""
    notes = {
        "ss_network_dim": "99",
        "sshs_model_hash": "old",
        "lora_adapter_metadata": "{}",
        "sdlora.ranks": "{}",
        "ss_output_name": "süß",
        "modelspec.date": "2026-01-02",
    }
    adapter = make_adapter(unet)
    adapter.notes = notes
    first = save_adapter(tmp_path / "1.safetensors", adapter)
    second = save_adapter(tmp_path / "2.safetensors", load_adapter(first), dialect="kohya")
    for path in (first, second):
        metadata = metadata_of(path)
        assert metadata["ss_output_name"] == "süß"
        assert metadata["modelspec.date"] == "2026-01-02"
        assert metadata["ss_network_dim"] == "4"
        assert metadata["sshs_model_hash"] != "old"
        assert not {"lora_adapter_metadata", "sdlora.ranks"} & set(metadata)
        assert metadata["sdlora.family"] == "sd1"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_never_written(tmp_path, unet, make_adapter, value):
    """R-06: refused with the module's name, exit code 1, and an older file stays as it was."""
    path = save_adapter(tmp_path / "x.safetensors", make_adapter(unet))
    before, adapter = path.read_bytes(), make_adapter(unet)
    name = list(adapter.modules)[3]
    adapter.modules[name].down.data[0, 0] = value
    with raises(AdapterError, "lora.non-finite", shows=("1 of 32", name)) as caught:
        save_adapter(path, adapter)
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_adapter_without_effect_is_never_written(tmp_path, unet, make_adapter):
    """R-06: every up-matrix zero is refused; a single one that is not is enough."""
    adapter = make_adapter(unet, size=0)
    for dialect in ("diffusers", "kohya"):
        with raises(AdapterError, "lora.no-effect"):
            save_adapter(tmp_path / "x.safetensors", adapter, dialect=dialect)
    assert not list(tmp_path.iterdir())
    adapter.parameters()[1].data[0, 0] = 1e-3
    save_adapter(tmp_path / "x.safetensors", adapter)


def test_non_finite_files_are_refused(tmp_path, lora_file):
    """R-06: a file from a failed training elsewhere is named, not sampled."""
    state = load_file(lora_file)
    state[next(iter(state))].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with raises(AdapterError, "lora.non-finite", shows="nan.safetensors"):
        load_adapter(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path, lora_file, share):
    """R-25: a file cut anywhere is one clear line, exit code 2, for loading and for info."""
    raw = lora_file.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(raw[: int(len(raw) * share)])
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, shows="cut.safetensors") as caught:
            read(path)
        assert set(caught.value.keys) <= {"file.empty", "file.incomplete", "file.not-safetensors"}
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)


def test_truncation_says_both_sizes(tmp_path, lora_file):
    """R-25: the header's promise against the file's size."""
    raw = lora_file.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(raw[:-100])
    with raises(AdapterError, "file.incomplete", shows=(f"{len(raw)} ", f"{len(raw) - 100} ")):
        load_adapter(path)
    path.write_bytes(raw + b"\0\0")
    with raises(AdapterError, "file.damaged"):
        load_adapter(path)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("x.ckpt", b"", "file.pickle"),
        ("x.bin", b"", "file.pickle"),
        ("x.pt", b"", "file.pickle"),
        ("x.safetensors", b"PK\x03\x04" + bytes(100), "file.pickle"),
        ("x.safetensors", b"\x80\x02}q" + bytes(100), "file.pickle"),
        ("x.safetensors", b"<!DOCTYPE html><html></html>" + bytes(100), "file.html"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "file.git-lfs"),
        ("x.safetensors", b"not at all a file of weights", "file.not-safetensors"),
        ("x.safetensors", (10).to_bytes(8, "little") + b"{nonsense}", "file.damaged"),
        ("x.safetensors", (12).to_bytes(8, "little") + b'{"a":[1,2]} ', "file.damaged"),
    ],
)
def test_other_files_are_refused_for_what_they_are(tmp_path, name, content, key):
    """R-25 R-44: no pickle is ever opened; each kind is named."""
    (tmp_path / name).write_bytes(content)
    with raises(AdapterError, key, shows=name) as caught:
        load_adapter(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    """R-25: what is not there, and a folder without a LoRA."""
    with raises(AdapterError, "lora.missing", shows="nothing.safetensors"):
        load_adapter(tmp_path / "nothing.safetensors")
    with raises(AdapterError, "lora.missing"):
        load_adapter(tmp_path)


def test_a_base_given_for_a_lora(tmp_path, unet):
    """R-25 R-40: a UNet, and a checkpoint, are named."""
    save_file(
        {key: tensor.contiguous() for key, tensor in unet.state_dict().items()}, tmp_path / "u.safetensors"
    )
    with raises(AdapterError, "lora.not-a-lora", shows=("u.safetensors", "UNet")):
        load_adapter(tmp_path / "u.safetensors")
    (tmp_path / "c.safetensors").write_bytes(save({"model.diffusion_model.x": torch.ones(1)}))
    with raises(AdapterError, "lora.not-a-lora", shows=("c.safetensors", "base model")):
        inspect_adapter(tmp_path / "c.safetensors")


def test_a_file_that_no_program_would_read(tmp_path, unet, make_adapter):
    """Another ending, dialect or precision is a mistake, and no file of another kind under that name."""
    adapter = make_adapter(unet)
    with raises(AdapterError, "option--out", shows="x.pt"):
        save_adapter(tmp_path / "x.pt", adapter)
    with raises(ConfigError, "dialect", shows=("a1111", "kohya")):
        save_adapter(tmp_path / "x.safetensors", adapter, dialect="a1111")
    with raises(ConfigError, "precision", shows=("fp8", "bf16")):
        round_adapter(adapter, "fp8")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path, unet, make_adapter):
    """Bad input: a path below a file is one line with exit code 2."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with raises(AdapterError, "write-failed", shows="x.safetensors") as caught:
        save_adapter(tmp_path / "file" / "x.safetensors", make_adapter(unet))
    assert caught.value.exit_code == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path, unet, make_adapter, monkeypatch):
    """R-23: the new file is verified before it takes the place of the old one."""
    path = save_adapter(tmp_path / "x.safetensors", make_adapter(unet))
    before = path.read_bytes()

    def write_half(path, tensors, metadata):
        path.write_bytes(before[: len(before) // 2])

    monkeypatch.setattr("sdlora.formats.files.write_tensors", write_half)
    with raises(AdapterError, "file.incomplete"):
        save_adapter(path, make_adapter(unet, seed=1))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_inspection(tmp_path, unet, make_adapter, dialect):
    """`sdlora info`: dialect, family, rank, alpha, targets, metadata of any file."""
    adapter, _ = round_adapter(make_adapter(unet, rank=4, alpha=2), "fp16")
    path = save_adapter(
        tmp_path / "x.safetensors", adapter, dialect=dialect, metadata={"ss_output_name": "ink"}
    )
    info = inspect_adapter(path)
    assert info.dialect == dialect
    assert info.family == "sd1"
    assert info.ranks == {4: 32}
    assert info.alphas == {4.0: 32}
    assert (info.rank, info.num_modules, info.trained_alpha) == (4, 32, "2")
    assert info.targets["attn2.to_k"] == 4
    assert sum(info.targets.values()) == 32
    assert info.dtypes == ("float16",)
    assert info.num_parameters == adapter.num_parameters
    assert info.size_bytes == path.stat().st_size
    text = "\n".join(info.lines())
    for part in (
        "x.safetensors",
        dialect,
        "sd1",
        "trained with alpha 2",
        "attn2.to_k 4",
        "ss_output_name",
        "ink",
    ):
        assert part in text


def test_inspection_shows_alpha_as_stored(tmp_path, unet, make_adapter):
    """`sdlora info`: another trainer's alpha and text encoder are seen as they are."""
    state = load_file(save_adapter(tmp_path / "x.safetensors", make_adapter(unet), dialect="kohya"))
    state = {key: torch.tensor(1.0) if key.endswith("alpha") else tensor for key, tensor in state.items()}
    state["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 8)
    state["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(8, 4)
    save_file(state, tmp_path / "y.safetensors", {"ss_base_model_version": "sd_v2_v"})
    info = inspect_adapter(tmp_path / "y.safetensors")
    assert info.alphas == {1.0: 32, 4.0: 1}
    assert info.family == "sd2"
    assert info.targets["text encoder mlp.fc1"] == 1


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (24, "")])
def test_family_without_metadata(tmp_path, make_unet, make_adapter, width, family):
    """R-41: the width of the cross-attention tells the family of a file that says nothing."""
    adapter = make_adapter(make_unet(cross_attention_dim=width), alpha=4)
    adapter.family = ""
    assert load_adapter(save_adapter(tmp_path / "x.safetensors", adapter)).family == family


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("mixed", [False, True])
def test_diffusers_loads_every_module_right(
    tmp_path, unet, make_pipeline, make_adapter, mixed_adapter, deltas, peft_deltas, caplog, dialect, mixed
):
    """R-01 R-02: alpha != rank and mixed ranks, both dialects: each module is right, without a warning."""
    adapter = mixed_adapter if mixed else make_adapter(unet, rank=4, alpha=3)
    path = save_adapter(
        tmp_path / "x.safetensors", adapter, dialect=dialect, metadata={"ss_output_name": "x"}
    )
    make_pipeline(unet).load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="check_1f")
    expected, loaded = deltas(adapter), peft_deltas(unet, "check_1f")
    assert set(loaded) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(loaded[name], delta, rtol=1e-5, atol=1e-7, msg=name)
    assert not [record for record in caplog.records if "text_encoder" not in record.getMessage()]


@pytest.mark.parametrize("name", ["style_a", "ink-wash", "My Style", "42"])
def test_beside_another_lora_under_any_name(
    tmp_path, unet, run, make_pipeline, make_adapter, make_unet, name
):
    """R-37: loads under any adapter name beside another; strengths 0, 0.5 and 1 scale the change linearly."""
    adapter, other = make_adapter(unet, rank=4, alpha=2), make_adapter(unet, rank=8, alpha=8, seed=1)
    save_adapter(tmp_path / "ours.safetensors", adapter)
    save_adapter(tmp_path / "other.safetensors", other, dialect="kohya")
    pipeline = make_pipeline(unet)
    pipeline.load_lora_weights(str(tmp_path), weight_name="other.safetensors", adapter_name="beside_77")
    pipeline.load_lora_weights(str(tmp_path), weight_name="ours.safetensors", adapter_name=name)
    unet.eval()
    own = make_unet()
    for strength in (0.0, 0.5, 1.0):
        pipeline.set_adapters(["beside_77", name], [0.7, strength])
        mount(own, [(other, 0.7), (adapter, strength)])
        torch.testing.assert_close(run(unet), run(own), rtol=1e-4, atol=1e-5)
    changes = []
    for strength in (0.0, 0.5, 1.0):
        pipeline.set_adapters(["beside_77", name], [0.0, strength])
        layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
        x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
        changes.append(layer(x) - layer.base_layer(x))
    assert not changes[0].any()
    torch.testing.assert_close(changes[1] * 2, changes[2])
    assert changes[2].abs().max() > 0
