"""Inspection: what a base is, and every way in which it is not one."""

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

CopyBase = Callable[..., Path]


def inspect(source: Path | str, **settings: Any) -> BaseInfo:
    return inspect_base(BaseSection(source=str(source), **settings))


def refusal(source: Path | str, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        inspect(source, **settings)
    line = str(error.value)
    assert "\n" not in line
    assert error.value.exit_code == 2
    return line


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
    assert info.traits.kohya_version == "sd_v1"


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
    assert "prediction_type = 'flow'" in refusal(folder)


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
        assert "has a scaling_factor of 0.5, the base's own VAE " in found.notices[0]
    assert inspect("builtin", vae=str(copy_base("same"))).notices == ()
    assert "is not a VAE" in refusal("builtin", vae=str(other / "unet"))
    narrow = copy_base("narrow", vae__config={"latent_channels": info.latent_channels + 3})
    line = refusal("builtin", vae=str(narrow))
    assert line.startswith(f"base.vae = {narrow}")
    assert f"{info.latent_channels} latent channels" in line


def test_missing_base() -> None:
    """R-40: a path that is not there."""
    assert "does not exist; give builtin, a diffusers folder, a .safetensors" in refusal("./nowhere/at/all")
    assert "does not exist" in refusal("model.safetensors")


def test_hub_id_offline_is_one_clear_line() -> None:
    """R-40, R-39: HF_HUB_OFFLINE is respected, and said."""
    line = refusal("someone/some-model-that-is-not-cached")
    assert "hub cannot be reached (offline, or HF_HUB_OFFLINE is set)" in line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights(copy_base: CopyBase, part: str) -> None:
    """R-25: half a download of any part stops before anything is loaded."""
    folder = copy_base()
    file = next((folder / part).glob("*.safetensors"))
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[: len(raw) // 2])
    line = refusal(folder)
    assert str(file) in line
    assert "incomplete" in line


def test_every_missing_file_is_named(copy_base: CopyBase) -> None:
    """R-25: an interrupted copy."""
    folder = copy_base()
    (folder / "vae" / "config.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "merges.txt").unlink()
    line = refusal(folder)
    assert "lacks vae/config.json, tokenizer/merges.txt" in line
    next((folder / "unet").glob("*.safetensors")).unlink()
    (folder / "vae" / "config.json").write_bytes((BUILTIN / "vae" / "config.json").read_bytes())
    (folder / "tokenizer" / "merges.txt").write_bytes((BUILTIN / "tokenizer" / "merges.txt").read_bytes())
    assert "diffusion_pytorch_model.safetensors is missing" in refusal(folder)


def test_pickles_are_refused_with_the_reason(copy_base: CopyBase, tmp_path: Path) -> None:
    """R-44: .bin in a folder and .ckpt as a file, even under another name."""
    folder = copy_base()
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert "unet/diffusion_pytorch_model.bin, a pickle, which can run any code" in refusal(folder)
    for name in ("model.ckpt", "model.pt", "disguised.safetensors"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        assert "is a pickle, which can run any code" in refusal(tmp_path / name)


TENSORS = {
    "is a LoRA file, not a base": ["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"],
    "is a VAE alone": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
    "is a UNet alone": ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
    "is a text encoder alone": ["text_model.embeddings.token_embedding.weight"],
    "is a UNet alone; give the whole base": ["input_blocks.0.0.weight", "time_embed.0.weight"],
    "is a transformer of another architecture": ["double_blocks.0.img_attn.qkv.weight"],
    "is a ControlNet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.a"],
    "is not a base (its tensors are emb_params": ["emb_params"],
}


@pytest.mark.parametrize("words", TENSORS)
def test_single_files_are_named_for_what_they_are(tmp_path: Path, words: str) -> None:
    """R-40: by the names of the tensors, and with a remedy."""
    file = tmp_path / "given.safetensors"
    save_file({name: torch.zeros(1) for name in TENSORS[words]}, file)
    line = refusal(file)
    assert line.startswith(f"base.source = {file} {words}")
    assert "; " in line


def test_other_files_are_named(tmp_path: Path) -> None:
    """R-40: text and pictures."""
    (tmp_path / "notes.txt").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    assert "is a .txt file, not a model" in refusal(tmp_path / "notes.txt")
    assert "is an image" in refusal(tmp_path / "cat.png")


def test_wrong_folders_are_named(copy_base: CopyBase, tmp_path: Path) -> None:
    """R-40: parts of a base, a base one level deeper, a LoRA folder, a run, anything else."""
    folder = copy_base("base")
    assert f"is a UNet alone, not a base; give {folder}" in refusal(folder / "unet")
    assert f"is a text encoder alone, not a base; give {folder}" in refusal(folder / "text_encoder")
    shutil.copytree(folder / "vae", tmp_path / "lone-vae")
    line = refusal(tmp_path / "lone-vae")
    assert "is a VAE alone, not a base" in line
    assert "and this as base.vae" in line
    assert f"did you mean {folder}?" in refusal(tmp_path)
    for name, inside in {"lora": "adapter_config.json", "run": "events.jsonl", "pictures": "a.png"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{}")
    assert "is a LoRA folder" in refusal(tmp_path / "lora")
    assert "is a run of sdlora" in refusal(tmp_path / "run")
    assert "no model_index.json (it holds a.png)" in refusal(tmp_path / "pictures")


def test_other_pipelines_are_named(copy_base: CopyBase) -> None:
    """R-40: another kind of pipeline, an inpainting UNet, mixed parts, another kind of training."""
    assert "is a FluxPipeline" in refusal(copy_base("flux", model_index={"_class_name": "FluxPipeline"}))
    assert "is an inpainting or depth base" in refusal(copy_base("inpaint", unet__config={"in_channels": 17}))
    assert "of different bases" in refusal(copy_base("mixed", unet__config={"cross_attention_dim": 768}))
    for name, way in (
        ("EDMEulerScheduler", "the EDM way"),
        ("FlowMatchEulerDiscreteScheduler", "by flow matching"),
    ):
        other = copy_base(name, scheduler__scheduler_config={"_class_name": name})
        assert f"was trained {way} ({name})" in refusal(other)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"vae__config": {"_class_name": "AutoencoderTiny"}}, "AutoencoderTiny, not an AutoencoderKL; give"),
        ({"text_encoder__config": {"model_type": "t5"}}, "is of a t5, not CLIP's text encoder; give"),
        ({"unet__config": {"num_class_embeds": 1000}}, "reads more than text (num_class_embeds = 1000"),
        ({"unet__config": {"addition_embed_type": "image"}}, "(addition_embed_type = 'image'"),
        (
            {"unet__config": {"block_out_channels": "abc"}},
            "unet/config.json: block_out_channels = 'abc' must",
        ),
        ({"vae__config": {"block_out_channels": []}}, "vae/config.json: block_out_channels = [] must"),
        ({"vae__config": {"scaling_factor": None}}, "scaling_factor = None must be a number above 0; "),
        ({"text_encoder__config": {"num_hidden_layers": 0}}, "num_hidden_layers = 0 must be whole numbers"),
    ],
)
def test_configurations_of_something_else(copy_base: CopyBase, edits: Any, words: str) -> None:
    """R-25, R-40: other classes, inputs that nobody gives, and numbers that are none."""
    assert words in refusal(copy_base("odd", **edits))


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
    for folder in (two, sizes):
        line = refusal(folder)
        assert "lacks text_encoder_2/config.json, tokenizer_2/vocab.json, tokenizer_2/merges.txt" in line
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
        assert "is incomplete" in refusal(folder)
    folder = copy_folder(sdxl_folder, "short")
    file = folder / "text_encoder_2" / "model.safetensors"
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[:-1])
    assert f"{file} is incomplete" in refusal(folder)
    mixed = copy_folder(sdxl_folder, "mixed", text_encoder_2__config={"projection_dim": 1280})
    assert "the parts are of different bases" in refusal(mixed)
    mixed = copy_folder(sdxl_folder, "widths", text_encoder__config={"hidden_size": 768})
    assert "reads text of width 40, the text encoders give 792" in refusal(mixed)


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
        assert "is an SDXL refiner" in refusal(folder)


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
    with pytest.raises(ConfigError, match=r"base.quantize = nf4 needs .* 'sdlora\[quant\]'") as error:
        inspect_base(BaseSection(source="nowhere", quantize="nf4"))
    assert "\n" not in str(error.value)
    assert inspect_base(BaseSection(quantize="int8")).quantize == "int8"
