"""Single files: recognised, refused by name, and read to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from sdlora.config import BaseSection, ObjectiveSection
from sdlora.errors import ModelError
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base, load_component
from sdlora.models.single_file import CONFIGS, SD2_BIAS
from sdlora.models.tokenizer import load_tokenizer
from tests.checks import raises
from tests.models.single_file.original import original_vae
from tests.stock import load_stock_pipeline

FAMILIES = ("sd1", "sd2", "sdxl")
UNET = "model.diffusion_model."


def inspect(file: Path, **settings: Any) -> BaseInfo:
    return inspect_base(BaseSection(source=str(file), **settings))


def refused(file: Path, key: str, *shows: str, **settings: Any) -> None:
    """The base is refused in one line, for a reason and with these values."""
    with raises(ModelError, key, shows=shows) as caught:
        inspect(file, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_that_of_the_folder(tiny_bases: Mapping[str, Any], family: str) -> None:
    """R-40: by rules of its own the fixture wrote one file; loaded, it is the folder to the last bit."""
    tiny = tiny_bases[family]
    for source in (tiny.file, tiny.folder):
        base = load_base(inspect(source), dtype=torch.float32, device="cpu")
        loaded = {**base.components, "vae": base.vae}
        for name, part in loaded.items():
            expected = getattr(tiny.pipeline, name).state_dict()
            assert list(part.state_dict()) == list(expected)
            assert all(torch.equal(tensor, expected[key]) for key, tensor in part.state_dict().items()), name
            assert not any(parameter.is_meta for parameter in part.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_what_its_folder_says(tiny_bases: Mapping[str, Any], family: str) -> None:
    """R-40, R-32: family, sizes, betas and prediction type; the name is the file's."""
    tiny = tiny_bases[family]
    file, folder = inspect(tiny.file), inspect(tiny.folder)
    assert file.name == f"tiny-{family}"
    for key in ("family", "prediction_type", "resolution", "vae_factor", "latent_channels", "traits"):
        assert getattr(file, key) == getattr(folder, key), key
    for key in ("text_length", "zeroes_empty_prompt", "num_parameters", "has_time_ids"):
        assert getattr(file, key) == getattr(folder, key), key
    for key in (
        "_class_name",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "num_train_timesteps",
        "steps_offset",
    ):
        assert file.scheduler_config[key] == folder.scheduler_config[key], key
    # diffusers would clip latents as if they were pixels.
    assert file.scheduler_config["clip_sample"] is False
    for name in folder.components:
        ours, theirs = file.components[name].config, folder.components[name].config
        assert {key: ours[key] for key in ours if key in theirs} == {
            key: theirs[key] for key in ours if key in theirs
        }
    assert file.digest != folder.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_the_folder(tiny_bases: Mapping[str, Any], family: str) -> None:
    """R-40: prompts, tokenizers, schedulers and scalings included, a file and its folder draw the same."""
    tiny = tiny_bases[family]
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "pt"}
    pictures = [
        load_stock_pipeline(inspect(source))(
            "a cat, größe 猫", generator=torch.Generator().manual_seed(0), **settings
        ).images
        for source in (tiny.file, tiny.folder)
    ]
    # Two loaders place the weights differently in memory, and kernels round by that.
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-3)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_less_precision_load_in_any_dtype(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path], stored: torch.dtype
) -> None:
    """R-11, R-40: fp16 and bf16 as most files are, fp8 as some; read exactly, then rounded once."""
    tiny = tiny_bases["sd1"]
    info = inspect(save({name: tensor.to(stored) for name, tensor in tiny.tensors.items()}))
    for wanted in (torch.float32, torch.bfloat16):
        unet = load_component(info.components["unet"], wanted).state_dict()
        for name, tensor in tiny.pipeline.unet.state_dict().items():
            assert torch.equal(unet[name], tensor.to(stored).to(wanted))


def test_prediction_type_is_read_where_it_is_said(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path]
) -> None:
    """R-32: by marker tensors, by modelspec metadata; zero terminal SNR by its marker."""
    tensors = tiny_bases["sdxl"].tensors
    marked = inspect(save({**tensors, "v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}))
    assert marked.prediction_type == "v_prediction"
    assert marked.scheduler_config["rescale_betas_zero_snr"] is True
    assert marked.notices == ()
    for said, kind in {"v": "v_prediction", "epsilon": "epsilon"}.items():
        info = inspect(save(tensors, **{"modelspec.prediction_type": said}))
        assert (info.prediction_type, info.notices) == (kind, ())
    plain = inspect(save(tensors))
    assert plain.prediction_type == "epsilon"
    [notice] = plain.notices
    assert "epsilon is assumed" in notice
    assert "objective.force_prediction_type=true" in notice


@pytest.mark.parametrize(("spread", "kind", "side_px"), [(0.05, "epsilon", 128), (0.2, "v_prediction", 192)])
def test_a_silent_sd2_file_is_told_by_a_bias(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path], spread: float, kind: str, side_px: int
) -> None:
    """R-32: 512 and 768-v have the same shapes; the measure is ComfyUI's, and said to be a guess."""
    bias = torch.tensor([spread, -spread] * 16)
    info = inspect(save({**tiny_bases["sd2"].tensors, SD2_BIAS: bias}))
    assert info.prediction_type == kind
    assert info.resolution == side_px
    assert f"{spread:.2f}" in info.notices[0]


def test_a_forced_prediction_type_is_what_is_sampled_too(tiny_bases: Mapping[str, Any]) -> None:
    """R-32: the user knows better; the 512 px row of the family is taken with it."""
    forced = ObjectiveSection(prediction_type="epsilon", force_prediction_type=True)
    for source in (tiny_bases["sd2"].file, tiny_bases["sd2"].folder):
        info = inspect_base(BaseSection(source=str(source)), forced)
        assert info.prediction_type == "epsilon"
        assert info.traits.kohya_version == "sd_v2"
    assert inspect_base(BaseSection(source=str(tiny_bases["sd2"].file)), forced).resolution == 128


def test_digests_follow_their_part(tiny_bases: Mapping[str, Any], save: Callable[..., Path]) -> None:
    """R-21: another VAE in the same file changes the VAE's digest alone, and so on."""
    tensors = dict(tiny_bases["sd1"].tensors)
    before = inspect(save(tensors))
    for prefix, changed in {
        UNET: "digest",
        "first_stage_model.": "vae_digest",
        "cond": "text_digest",
    }.items():
        name = next(name for name in tensors if name.startswith(prefix))
        after = inspect(save({**tensors, name: tensors[name] + 1}))
        for key in ("digest", "vae_digest", "text_digest"):
            assert (getattr(before, key) == getattr(after, key)) == (key != changed), (prefix, key)


def test_names_that_mergers_leave_are_read(tiny_bases: Mapping[str, Any], save: Callable[..., Path]) -> None:
    """R-40: text encoders without `text_model.`, EMA copies, schedules and ids beside the weights."""
    tiny = tiny_bases["sd1"]
    tensors = {
        name.replace("transformer.text_model.", "transformer."): at for name, at in tiny.tensors.items()
    }
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "alphas_cumprod": torch.zeros(1000),
        "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77.0)[None],
    }
    base = load_base(inspect(save({**tensors, **extra})), dtype=torch.float32, device="cpu")
    expected = tiny.pipeline.text_encoder.state_dict()
    found = base.text_encoders[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_file_without_a_vae_takes_one(tiny_bases: Mapping[str, Any], save: Callable[..., Path]) -> None:
    """R-40: said what is missing; with base.vae it is a base."""
    tensors = {name: at for name, at in tiny_bases["sdxl"].tensors.items() if "first_stage" not in name}
    refused(save(tensors), "base.vae", "base.vae")
    info = inspect(save(tensors), vae=str(tiny_bases["sdxl"].file))
    assert info.vae_config["scaling_factor"] == 0.13025


def test_separate_vae_in_one_file(tiny_bases: Mapping[str, Any], save: Callable[..., Path]) -> None:
    """R-40: original names, with and without their prefix, diffusers' names, and its old attention names."""
    other = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    original, states = original_vae(other), other.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(states)
    for new, before in old.items():
        renamed = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): at
            for name, at in renamed.items()
        }
    forms = {
        "original": original,
        "prefixed": {f"first_stage_model.{name}": at for name, at in original.items()},
        "diffusers": states,
        "old": renamed,
    }
    assert len(set(map(frozenset, forms.values()))) == 4
    for name, tensors in forms.items():
        file = save(tensors, f"{name}.safetensors")
        for family in ("sd1", "sdxl"):
            info = inspect(tiny_bases[family].file, vae=str(file))
            assert info.vae_config["scaling_factor"] == (0.13025 if family == "sdxl" else 0.18215)
            vae = load_component(info.components["vae"], torch.float32)
            assert all(torch.equal(vae.state_dict()[key], at) for key, at in states.items()), name
    lora = save({"lora_unet_a.lora_up.weight": torch.zeros(1)})
    refused(tiny_bases["sd1"].file, "base.is-lora", f"base.vae = {lora}", vae=str(lora))


def _change(tensors: Mapping[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {name: at for name, at in {**tensors, **named}.items() if at is not None}


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: at for name, at in tensors.items() if not name.startswith(prefix)}


# By the key of the error and a value that it shows.
OTHERS: dict[tuple[str, str], Callable[[Mapping[str, Any]], dict[str, Tensor]]] = {
    ("base.not-text-to-image", "an inpainting base"): lambda tiny: _change(
        tiny["sd1"].tensors, model__diffusion_model__input_blocks__0__0__weight=torch.zeros(32, 9, 3, 3)
    ),
    ("base.not-text-to-image", "a depth base"): lambda tiny: _change(
        tiny["sd2"].tensors, model__diffusion_model__input_blocks__0__0__weight=torch.zeros(32, 5, 3, 3)
    ),
    ("base.refiner", "SDXL"): lambda tiny: {
        name.replace("embedders.1.", "embedders.0."): at
        for name, at in _without(tiny["sdxl"].tensors, "conditioner.embedders.0.").items()
    },
    ("base.other-inputs", "unCLIP"): lambda tiny: _change(
        tiny["sd2"].tensors, model__diffusion_model__label_emb__0__0__weight=torch.zeros(128, 64)
    ),
    ("base.method", "EDM"): lambda tiny: _change(tiny["sdxl"].tensors, edm_mean=torch.zeros(4)),
    ("base.architecture", "UNet"): lambda tiny: {
        "model.diffusion_model.joint_blocks.0.x": torch.zeros(1),
        "cond_stage_model.transformer.a": torch.zeros(1),
    },
    ("base.no-text-encoder", "found: none"): lambda tiny: _without(tiny["sd1"].tensors, "cond_stage_model."),
    ("base.no-text-encoder", "embedders.1.model."): lambda tiny: _without(
        tiny["sdxl"].tensors, "conditioner.embedders.0."
    ),
    ("base.quantized", "U8"): lambda tiny: _change(
        tiny["sd1"].tensors, model__diffusion_model__a=torch.zeros(2, dtype=torch.uint8)
    ),
    ("base.incomplete", "without out.2.weight"): lambda tiny: _without(
        tiny["sd1"].tensors, f"{UNET}out.2.weight"
    ),
    ("base.text-states", "different bases"): lambda tiny: {
        **_without(tiny["sd1"].tensors, UNET),
        **{name: at for name, at in tiny["sdxl"].tensors.items() if name.startswith(UNET)},
    },
}


@pytest.mark.parametrize(("key", "shown"), OTHERS)
def test_others_are_named(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path], key: str, shown: str
) -> None:
    """R-40: what only looks like a base, in one line with a remedy."""
    file = save(OTHERS[key, shown](tiny_bases))
    refused(file, key, f"base.source = {file}", shown, "; ")


def test_half_a_download_is_named(tiny_bases: Mapping[str, Any], tmp_path: Path) -> None:
    """R-25: before anything is loaded."""
    raw = tiny_bases["sd1"].file.read_bytes()
    file = tmp_path / "half.safetensors"
    file.write_bytes(raw[: len(raw) // 2])
    refused(file, "file.incomplete", str(file))
    refused(tiny_bases["sd1"].file, "file.incomplete", str(file), vae=str(file))


def test_a_missing_tensor_is_named_when_loading(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path]
) -> None:
    """R-25: never left at random, in any part."""
    tensors = tiny_bases["sdxl"].tensors
    gone = {
        "unet": f"{UNET}middle_block.2.out_layers.3.bias",
        "vae": "first_stage_model.decoder.norm_out.bias",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.bias",
        "text_encoder_2": "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj.bias",
    }
    for part, name in gone.items():
        info = inspect(save(_without(tensors, name)))
        with raises(ModelError, "base.incomplete", shows=f"1 weights of its {part} "):
            load_base(info, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path], value: float
) -> None:
    """R-25: one NaN or infinity in the base stops before training, and says where it is."""
    name = f"{UNET}middle_block.0.in_layers.2.weight"
    broken = tiny_bases["sd1"].tensors[name].clone()
    broken[3, 2, 1, 0] = value
    info = inspect(save({**tiny_bases["sd1"].tensors, name: broken}))
    with raises(ModelError, "base.non-finite", shows="mid_block.resnets.0.conv1.weight"):
        load_base(info, dtype=torch.float32, device="cpu")


def test_what_overflows_in_half_precision_is_named(
    tiny_bases: Mapping[str, Any], save: Callable[..., Path]
) -> None:
    """R-11: a weight above 65504 is an infinity in fp16; fp32 and bf16 take it."""
    name = f"{UNET}out.2.bias"
    info = inspect(save({**tiny_bases["sd1"].tensors, name: torch.full((4,), 1e5)}))
    for dtype in (torch.float32, torch.bfloat16):
        load_component(info.components["unet"], dtype)
    with raises(ModelError, "base.non-finite", shows=("float16", "base.dtype=fp32")):
        load_component(info.components["unet"], torch.float16)


def test_the_tokenizer_is_clip_s(tiny_bases: Mapping[str, Any]) -> None:
    """R-28: known ids; OpenCLIP's tokenizer fills up with `!`, which is id 0."""
    words = CLIPTokenizer.from_pretrained(CONFIGS / "clip")
    assert words("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(words) == 49408
    assert words("Hello, WORLD!! 123 größe").input_ids == words("hello , world !! 1 2 3 größe").input_ids
    filled = {}
    for family in FAMILIES:
        info = inspect(tiny_bases[family].file)
        for number in range(len(info.tokenizers)):
            one = load_tokenizer(info, number)
            ids = one("a cat", padding="max_length", max_length=one.model_max_length).input_ids
            assert ids[:4] == [49406, 320, 2368, 49407]
            assert len(ids) == 77
            filled[family, number] = set(ids[4:])
    assert filled == {("sd1", 0): {49407}, ("sd2", 0): {0}, ("sdxl", 0): {49407}, ("sdxl", 1): {0}}


def test_the_vocabulary_follows_from_its_merges() -> None:
    """R-28: 256 bytes, the same at the end of a word, each merge in order, and two marks."""
    words = CLIPTokenizer.from_pretrained(CONFIGS / "clip").get_vocab()
    by_id = sorted(words, key=words.__getitem__)
    lines = (CONFIGS / "clip" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == 49408 - 512 - 2
    assert by_id[512:-2] == [line.replace(" ", "") for line in lines]
    assert by_id[256:512] == [f"{character}</w>" for character in by_id[:256]]
    assert by_id[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_diffusers_reads_the_same(tiny_bases: Mapping[str, Any]) -> None:
    """R-40: the fixture's files are what diffusers itself takes for single files."""
    for family in FAMILIES:
        tiny = tiny_bases[family]
        for model, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
            loaded = model.from_single_file(str(tiny.file), config=str(tiny.folder), subfolder=part)
            for name, tensor in getattr(tiny.pipeline, part).state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor)
