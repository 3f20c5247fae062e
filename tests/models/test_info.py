"""Inspection of bases, and every reason to refuse one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.config import BaseSection
from sdlora.errors import ConfigError, ModelError
from sdlora.models.folder import BUILTIN
from sdlora.models.info import BaseDefaults, BaseInfo, inspect_base
from tests.checks import raises

CopyBase = Callable[..., Path]


def inspect(source: Path | str, **settings: Any) -> BaseInfo:
    return inspect_base(BaseSection(source=str(source), **settings))


def refused(source: Path | str, key: str, *shows: object, **settings: Any) -> None:
    """The base is refused in one line, for a reason and with these values."""
    with raises(ModelError, key, shows=tuple(map(str, shows))) as error:
        inspect(source, **settings)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_builtin_is_read_from_its_own_files(info: BaseInfo, copy_base: CopyBase) -> None:
    """R-40: `builtin` is an ordinary folder; nothing about it is hard-coded but its defaults."""
    same = inspect(copy_base("copy"))
    assert info.name == "builtin"
    assert info.is_builtin
    assert same.name == "copy"
    assert not same.is_builtin
    assert (same.digest, same.vae_digest, same.text_digest) == (
        info.digest,
        info.vae_digest,
        info.text_digest,
    )
    assert same.resolution == info.resolution == info.denoiser_config["sample_size"] * info.vae_factor
    assert same.defaults == BaseDefaults()
    assert info.defaults != same.defaults
    assert info.text_length == 32
    assert info.traits.kohya_version == "sd_v1_v"


def test_inspection_needs_no_torch() -> None:
    """R-35: a dry run or a preflight does not wait for torch or diffusers."""
    code = (
        "import sys; from sdlora.config import BaseSection; from sdlora.models.info import inspect_base;"
        "inspect_base(BaseSection());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_and_schedule_are_the_base_s(copy_base: CopyBase, kind: str) -> None:
    """R-32: read from the scheduler's configuration."""
    edits = {
        "prediction_type": kind,
        "beta_end": 0.02,
        "rescale_betas_zero_snr": True,
        "num_train_timesteps": 500,
    }
    info = inspect(copy_base(scheduler__scheduler_config=edits))
    assert info.prediction_type == kind
    assert info.num_train_timesteps == 500
    assert info.scheduler_config["beta_end"] == 0.02
    assert info.scheduler_config["rescale_betas_zero_snr"] is True


def test_prediction_type_left_out_is_epsilon(copy_base: CopyBase) -> None:
    """R-32: as diffusers has it."""
    assert (
        inspect(copy_base(scheduler__scheduler_config={"prediction_type": None})).prediction_type == "epsilon"
    )


def test_unknown_prediction_type_is_refused(copy_base: CopyBase) -> None:
    """R-32."""
    folder = copy_base(scheduler__scheduler_config={"prediction_type": "flow"})
    refused(folder, "base.prediction-type", "prediction_type = 'flow'")


def test_digests_follow_their_part(copy_base: CopyBase, info: BaseInfo) -> None:
    """R-21: another VAE or text encoder does not change the UNet's digest, and the other way round."""
    other = inspect(copy_base(vae__config={"scaling_factor": 0.5}))
    assert other.vae_digest != info.vae_digest
    assert (other.digest, other.text_digest) == (info.digest, info.text_digest)


def test_separate_vae(copy_base: CopyBase, info: BaseInfo) -> None:
    """R-40: base.vae takes a VAE folder or a base that has one; another thing is named."""
    other = copy_base("other", vae__config={"scaling_factor": 0.5})
    for source in (other, other / "vae"):
        found = inspect("builtin", vae=str(source))
        assert found.components["vae"].folder == other / "vae"
        assert found.vae_config["scaling_factor"] == 0.5
        assert found.vae_digest != info.vae_digest
        assert "scaling_factor of 0.5" in found.notices[0]
    assert inspect("builtin", vae=str(copy_base("same"))).notices == ()
    refused("builtin", "base.vae", vae=str(other / "unet"))
    narrow = copy_base("narrow", vae__config={"latent_channels": info.latent_channels + 3})
    channels = f"{info.latent_channels} latent channels"
    refused("builtin", "base.latents", f"base.vae = {narrow}", channels, vae=str(narrow))


def test_missing_base() -> None:
    """R-40: a path that is not there."""
    refused("./nowhere/at/all", "base.missing", "builtin", "diffusers folder", ".safetensors")
    refused("model.safetensors", "base.missing")


def test_hub_id_offline_is_one_clear_line() -> None:
    """R-40, R-39: HF_HUB_OFFLINE is respected, and said."""
    refused("someone/some-model-that-is-not-cached", "base.hub", "HF_HUB_OFFLINE")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights(copy_base: CopyBase, part: str) -> None:
    """R-25: half a download of any part stops before anything is loaded."""
    folder = copy_base()
    file = next((folder / part).glob("*.safetensors"))
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[: len(raw) // 2])
    refused(folder, "file.incomplete", file)


def test_every_missing_file_is_named(copy_base: CopyBase) -> None:
    """R-25: an interrupted copy."""
    folder = copy_base()
    (folder / "vae" / "config.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()
    refused(folder, "base.incomplete", "vae/config.json, tokenizer/merges.txt")
    next((folder / "unet").glob("*.safetensors")).unlink()
    (folder / "vae" / "config.json").write_bytes((BUILTIN / "vae" / "config.json").read_bytes())
    (folder / "tokenizer" / "merges.txt").write_bytes((BUILTIN / "tokenizer" / "merges.txt").read_bytes())
    refused(folder, "base.incomplete", "diffusion_pytorch_model.safetensors")


def test_pickles_are_refused_with_the_reason(copy_base: CopyBase, tmp_path: Path) -> None:
    """R-44: .bin in a folder and .ckpt as a file, even under another name."""
    folder = copy_base()
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    refused(folder, "base.pickle", "unet/diffusion_pytorch_model.bin")
    for name in ("model.ckpt", "model.pt", "disguised.safetensors"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        refused(tmp_path / name, "base.pickle", name)


TENSORS = [
    ("base.is-lora", ["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"]),
    ("base.is-vae", ["decoder.conv_in.weight", "encoder.conv_in.weight"]),
    ("base.is-unet", ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"]),
    ("base.is-text-encoder", ["text_model.embeddings.token_embedding.weight"]),
    ("base.is-unet", ["input_blocks.0.0.weight", "time_embed.0.weight"]),
    ("base.architecture", ["double_blocks.0.img_attn.qkv.weight"]),
    ("base.is-controlnet", ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.a"]),
    ("base.not-a-base", ["emb_params"]),
]


@pytest.mark.parametrize(("key", "tensors"), TENSORS)
def test_single_files_are_named_for_what_they_are(tmp_path: Path, key: str, tensors: list[str]) -> None:
    """R-40: by the names of the tensors, and with a remedy."""
    file = tmp_path / "given.safetensors"
    save_file({name: torch.zeros(1) for name in tensors}, file)
    refused(file, key, f"base.source = {file}", "; use ")


def test_other_files_are_named(tmp_path: Path) -> None:
    """R-40: text and images."""
    (tmp_path / "notes.txt").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    refused(tmp_path / "notes.txt", "base.not-a-model", ".txt file")
    refused(tmp_path / "cat.png", "base.not-a-model", ".png file")


def test_wrong_folders_are_named(copy_base: CopyBase, tmp_path: Path) -> None:
    """R-40: parts of a base, a base one level deeper, a LoRA folder, a run, anything else."""
    folder = copy_base("base")
    refused(folder / "unet", "base.component", "UNet2DConditionModel", f"use {folder}")
    refused(folder / "text_encoder", "base.component", "CLIPTextModel", f"use {folder}")
    shutil.copytree(folder / "vae", tmp_path / "lone-vae")
    refused(tmp_path / "lone-vae", "base.component", "AutoencoderKL", "base.vae")
    refused(tmp_path, "base.not-a-base", f"use {folder}")
    for name, inside in {"lora": "adapter_config.json", "run": "events.jsonl", "pictures": "a.png"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{}")
    refused(tmp_path / "lora", "base.is-lora")
    refused(tmp_path / "run", "base.is-a-run")
    refused(tmp_path / "pictures", "base.not-a-base", "model_index.json", "a.png")


def test_other_pipelines_are_named(copy_base: CopyBase) -> None:
    """R-40: another pipeline, an inpainting UNet, mixed components, another training method."""
    flux = copy_base("flux", model_index={"_class_name": "FluxPipeline"})
    refused(flux, "base.pipeline", "FluxPipeline")
    refused(copy_base("inpaint", unet__config={"in_channels": 17}), "base.not-text-to-image", "17")
    refused(copy_base("mixed", unet__config={"cross_attention_dim": 768}), "base.text-states", "768")
    for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        refused(copy_base(name, scheduler__scheduler_config={"_class_name": name}), "base.method", name)


@pytest.mark.parametrize(
    ("part", "edits", "key", "shown"),
    [
        ("vae", {"_class_name": "AutoencoderTiny"}, "base.vae", "AutoencoderTiny"),
        ("text_encoder", {"model_type": "t5"}, "base.text_encoder", "t5"),
        ("unet", {"num_class_embeds": 1000}, "base.other-inputs", "num_class_embeds = 1000"),
        ("unet", {"addition_embed_type": "image"}, "base.other-inputs", "addition_embed_type = 'image'"),
        ("unet", {"block_out_channels": "abc"}, "base.config", "block_out_channels = 'abc'"),
        ("vae", {"block_out_channels": []}, "base.config", "block_out_channels = []"),
        ("vae", {"scaling_factor": None}, "base.config", "scaling_factor = None"),
        ("text_encoder", {"num_hidden_layers": 0}, "base.config", "num_hidden_layers = 0"),
    ],
)
def test_configurations_of_something_else(
    copy_base: CopyBase, part: str, edits: Any, key: str, shown: str
) -> None:
    """R-25, R-40: other classes, unsupported inputs, and invalid numbers."""
    folder = copy_base("odd", **{f"{part}__config": edits})
    refused(folder, key, shown, *[folder / part / "config.json"] * (key == "base.config"))


def test_an_own_vae_may_be_of_another_class(copy_base: CopyBase) -> None:
    """R-40: `base.vae` is the way out."""
    folder = copy_base("tiny", vae__config={"_class_name": "AutoencoderTiny"})
    assert inspect(folder, vae="builtin").vae_config["_class_name"] == "AutoencoderKL"


def test_what_an_old_configuration_leaves_out(sd15_folder: Path, copy_folder: CopyBase) -> None:
    """R-40: files of 2022 lack keys that came later; diffusers' defaults are meant."""
    folder = copy_folder(sd15_folder, "old")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "latent_channels"}))
    assert inspect(folder).latent_channels == 4


def test_sdxl_is_read_from_its_own_files(sdxl_info: BaseInfo) -> None:
    """R-40, R-41: two text encoders, sizes, and what other tools call it."""
    assert sdxl_info.family == "sdxl"
    assert sdxl_info.has_time_ids
    assert sdxl_info.zeroes_empty_prompt
    assert sdxl_info.traits.text_encoders == ("text_encoder", "text_encoder_2")
    assert sdxl_info.traits.tokenizers == ("tokenizer", "tokenizer_2")
    assert sdxl_info.traits.kohya_version == "sdxl_base_v1-0"
    assert sdxl_info.traits.architecture == "stable-diffusion-xl-v1-base"
    assert (sdxl_info.text_length, sdxl_info.resolution, sdxl_info.min_step) == (32, 64, 8)


def test_sdxl_is_told_by_its_parts_not_its_widths(copy_base: CopyBase) -> None:
    """R-41: two text encoders, or a UNet that is told sizes; then everything SDXL needs is asked for."""
    two = copy_base("two", model_index={"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]})
    sizes = copy_base("sizes", unet__config={"addition_embed_type": "text_time"})
    lacks = "text_encoder_2/config.json, tokenizer_2/vocab.json, tokenizer_2/merges.txt"
    for folder in (two, sizes):
        refused(folder, "base.incomplete", lacks)
    left_out = copy_base("plain", model_index={"text_encoder_2": [None, None]})
    assert inspect(left_out).family == "sd1"


def test_sdxl_that_is_not_whole(sdxl_folder: Path, copy_folder: CopyBase) -> None:
    """R-25: each part of the second text encoder is asked for, and must fit."""
    for gone in (
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/tokenizer.json",
    ):
        folder = copy_folder(sdxl_folder, gone.replace("/", "-"))
        (folder / gone).unlink()
        refused(folder, "base.incomplete", Path(gone).parent)
    folder = copy_folder(sdxl_folder, "short")
    file = folder / "text_encoder_2" / "model.safetensors"
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[:-1])
    refused(folder, "file.incomplete", file)
    mixed = copy_folder(sdxl_folder, "mixed", text_encoder_2__config={"projection_dim": 1280})
    refused(mixed, "base.text-states", "pooled")
    mixed = copy_folder(sdxl_folder, "widths", text_encoder__config={"hidden_size": 768})
    refused(mixed, "base.text-states", "40", "792")


def test_text_digest_covers_both_encoders(
    sdxl_folder: Path, copy_folder: CopyBase, sdxl_info: BaseInfo
) -> None:
    """R-21: whatever changes the text states changes the key they are cached under."""
    other = inspect(copy_folder(sdxl_folder, "vocabulary", tokenizer_2__tokenizer_config={"pad_token": "a"}))
    legacy = inspect(copy_folder(sdxl_folder, "legacy", model_index={"force_zeros_for_empty_prompt": False}))
    assert len({sdxl_info.text_digest, other.text_digest, legacy.text_digest}) == 3
    assert not legacy.zeroes_empty_prompt


def test_refiners_are_refused_by_name(sdxl_folder: Path, copy_folder: CopyBase) -> None:
    """R-40: in both of their signs."""
    for number, edits in enumerate(
        ({"text_encoder": [None, None]}, {"requires_aesthetics_score": True}),
    ):
        folder = copy_folder(sdxl_folder, f"refiner-{number}", model_index=edits)
        refused(folder, "base.refiner")


def test_sd2_is_told_by_its_projections(copy_base: CopyBase) -> None:
    """R-41: widths never decide; a v-predicting SD 2 has names of its own for other tools."""
    edits = {"use_linear_projection": True}
    v = inspect(copy_base("v", unet__config=edits))
    plain = inspect(
        copy_base("e", unet__config=edits, scheduler__scheduler_config={"prediction_type": "epsilon"})
    )
    assert v.family == plain.family == "sd2"
    assert (v.traits.kohya_version, plain.traits.kohya_version) == ("sd_v2_v", "sd_v2")


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-27: before anything else; names the setting, the extra, and what needs no package."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with raises(ConfigError, "base.quantize", shows="'sdlora[quant]'") as error:
        inspect_base(BaseSection(source="nowhere", quantize="nf4"))
    assert "\n" not in str(error.value)
    assert inspect_base(BaseSection(quantize="int8")).quantize == "int8"
