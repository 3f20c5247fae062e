"""Configs of other trainers become settings, each value as a table made by hand has it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.translate.translate import to_toml, translate, translate_option
from tests.checks import raises

KOHYA = """
[model]
pretrained_model_name_or_path = "/models/base.safetensors"
vae = "/models/vae.safetensors"
[images]
train_data_dir = "drawings"
resolution = "512,768"
shuffle_caption = true
keep_tokens = 2
caption_tag_dropout_rate = 0.1
random_crop = true
caption_extension = ".txt"
[steps]
output_name = "inkwash"
max_train_epochs = 10
max_train_steps = 1600
save_every_n_epochs = 2
train_batch_size = 2
gradient_accumulation_steps = 2
mixed_precision = "no"
seed = 42
noise_offset = 0.05
min_snr_gamma = 5
loss_type = "huber"
huber_c = 0.2
huber_schedule = "exponential"
min_timestep = 100
max_grad_norm = 0.5
gradient_checkpointing = true
save_precision = "float"
clip_skip = 2
sample_prompts = "prompts.txt"
sample_every_n_steps = 50
sample_sampler = "euler_a"
log_with = "wandb"
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99", "eps=1e-8"]
learning_rate = 2e-4
unet_lr = 1e-4
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 100
max_token_length = 225
weighted_captions = true
network_module = "networks.lora"
network_dim = 32
network_dropout = 0.1
network_args = ["conv_dim=8", "loraplus_lr_ratio=4"]
"""
# By setting: the value, and the key in its comment.
KOHYA_TABLE = {
    "base.source": ("/models/base.safetensors", "pretrained_model_name_or_path"),
    "base.vae": ("/models/vae.safetensors", "vae"),
    "data.resolution": (640, "resolution"),  # sqrt(512 x 768) = 627, in steps of 64
    "data.shuffle_tags": (True, "shuffle_caption"),
    "data.keep_tags": (2, "keep_tokens"),
    "data.tag_dropout": (0.1, "caption_tag_dropout_rate"),
    "data.crop": ("random", "random_crop"),
    "data.caption_dropout": (0.0, "caption_dropout_rate"),  # not given: none
    "data.prompt_chunks": (3, "max_token_length"),
    "data.prompt_weights": (True, "weighted_captions"),
    "lora.targets": (["all"], "convolutions"),
    "lora.rank": (32, "network_dim"),
    "lora.alpha": (1.0, "network_alpha"),  # not given: 1, not the rank
    "lora.rank_pattern": ({"convolutions": 8}, "conv_dim"),
    "lora.alpha_pattern": ({"convolutions": 1.0}, "conv_alpha"),
    "lora.dropout": (0.1, "network_dropout"),
    "lora.text_encoder": (True, "network_train_unet_only"),  # not given: both
    "objective.loss": ("pseudo_huber", "loss_type"),
    "objective.huber_delta": (0.2, "huber_c"),
    "objective.huber_schedule": ("exponential", "huber_schedule"),
    "objective.noise_offset": (0.05, "noise_offset"),
    "objective.min_snr_gamma": (5.0, "min_snr_gamma"),
    "objective.timestep_range": ([100, 1000], "min_timestep"),
    "train.epochs": (10.0, "max_train_epochs"),
    "train.save_every": (6, "save_every_n_epochs"),
    "train.sample_every": (50, "sample_every_n_steps"),
    "train.batch_size": (2, "train_batch_size"),
    "train.accumulate": (2, "gradient_accumulation_steps"),
    "train.precision": ("fp32", "mixed_precision"),
    "train.seed": (42, "seed"),
    "train.grad_clip": (0.5, "max_grad_norm"),
    "train.gradient_checkpointing": (True, "gradient_checkpointing"),
    "train.trackers": (["wandb"], "log_with"),
    "train.optimizer": ("bitsandbytes.optim.AdamW8bit", "optimizer_type"),
    "train.optimizer_args": ({"weight_decay": 0.1, "betas": [0.9, 0.99], "eps": 1e-8}, "optimizer_args"),
    "train.learning_rate": (1e-4, "unet_lr"),
    "train.text_encoder_learning_rate": (2e-4, "text_encoder_lr"),
    "train.lora_plus_ratio": (4.0, "loraplus_lr_ratio"),
    "data.clip_skip": (2, "clip_skip"),
    "train.schedule": ("cosine_with_restarts", "lr_scheduler"),
    "train.schedule_cycles": (3, "lr_scheduler_num_cycles"),
    "train.warmup": (100.0, "lr_warmup_steps"),
    "sample.prompts": (["a house", "a hill"], "sample_prompts"),
    "sample.scheduler": ("EulerAncestralDiscreteScheduler", "sample_sampler"),
    "export.precision": ("fp32", "save_precision"),
}
GUI: dict[str, Any] = {
    "LoRA_type": "Standard",
    "pretrained_model_name_or_path": "org/base",
    "train_data_dir": "",
    "max_resolution": "768,768",
    "epoch": 4,
    "max_train_steps": 0,
    "train_batch_size": 1,
    "network_dim": 8,
    "network_alpha": 4,
    "conv_dim": 0,
    "optimizer": "Prodigy",
    "optimizer_args": "decouple=True weight_decay=0.01",
    "learning_rate": 1.0,
    "text_encoder_lr": 0,
    "unet_lr": 0.5,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "min_snr_gamma": 0,
    "noise_offset_type": "Multires",
    "noise_offset": 0.05,
    "multires_noise_iterations": 6,
    "multires_noise_discount": 0.4,
    "color_aug": True,
    "seed": "",
}
GUI_TABLE = {
    "base.source": ("org/base", "pretrained_model_name_or_path"),
    "data.resolution": (768, "resolution"),
    "data.caption_dropout": (0.0, "caption_dropout_rate"),
    "lora.targets": (["all-linear"], "LoRA_type"),
    "lora.rank": (8, "network_dim"),
    "lora.alpha": (4.0, "network_alpha"),
    "lora.text_encoder": (False, "network_train_unet_only"),  # its rate is 0
    "objective.pyramid_noise": (6, "multires_noise_iterations"),
    "objective.pyramid_discount": (0.4, "multires_noise_discount"),
    "train.batch_size": (1, "train_batch_size"),
    "train.optimizer": ("prodigyopt.Prodigy", "optimizer_type"),
    "train.optimizer_args": ({"decouple": True, "weight_decay": 0.01}, "optimizer_args"),
    "train.learning_rate": (0.5, "unet_lr"),
    "train.schedule": ("cosine", "lr_scheduler"),
    "train.warmup": (0.1, "lr_warmup_steps"),  # a percentage there
    "train.epochs": (4.0, "max_train_epochs"),
}
DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 512
batch_size = 4
[[datasets.subsets]]
image_dir = "drawings"
num_repeats = 3
class_tokens = "inkwash style"
caption_prefix = "drawing of"
[[datasets.subsets]]
image_dir = "reg"
is_reg = true
class_tokens = "drawing"
[[datasets.subsets]]
image_dir = "others"
num_repeats = 2
flip_aug = true
caption_prefix = "sketch of"
shuffle_caption = false
keep_tokens = 0
[training]
prior_loss_weight = 0.5
"""
# Only what differs from the first set, whose settings are those of [data].
OTHERS = {
    "folder": "others",
    "repeats": 2,
    "caption_prefix": "sketch of",
    "shuffle_tags": False,
    "keep_tags": 0,
}
REG = {
    "folder": "reg",
    "class_images": True,
    "default_caption": "drawing",
    "weight": 0.5,
    "caption_prefix": "",
}
DATASET_TABLE = {
    "data.shuffle_tags": (True, "shuffle_caption"),
    "data.keep_tags": (1, "keep_tokens"),
    "data.resolution": (512, "resolution"),
    "data.trigger": ("inkwash style", "class_tokens"),
    "data.caption_prefix": ("drawing of", "caption_prefix"),
    "data.repeats": (3, "num_repeats"),
    "data.sets": ([OTHERS, REG], ""),
    "data.caption_dropout": (0.0, "caption_dropout_rate"),
    "lora.rank": (4, "network_dim"),
    "lora.alpha": (1.0, "network_alpha"),
    "train.batch_size": (4, "train_batch_size"),
    "train.warmup": (0.0, "lr_warmup_steps"),
}
TOOLKIT = """
job: extension
config:
  name: inkwash_v1
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: inkwash style
      network: {type: lora, linear: 16, conv: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: drawings
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: no
          resolution: [512, 768]
          flip_x: true
          num_repeats: 5
        - folder_path: others
          caption_dropout_rate: 0.1
          num_repeats: 2
          trigger_word: second style
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        train_unet: true
        train_text_encoder: false
        noise_scheduler: ddpm
        optimizer: adamw8bit
        optimizer_params: {weight_decay: 1e-2}
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        content_or_style: style
        min_denoising_steps: 200
      model: {name_or_path: org/base, is_xl: true, quantize: true}
      sample:
        sampler: ddpm
        sample_every: 100
        width: 1024
        prompts: ["[trigger], a house"]
        neg: blurry
        seed: 7
        guidance_scale: 6
        sample_steps: 20
"""
TOOLKIT_TABLE = {
    "base.source": ("org/base", "model.name_or_path"),
    "base.quantize": ("int8", "model.quantize"),
    "data.trigger": ("inkwash style", "trigger_word"),
    "data.resolution": (768, "datasets.resolution"),
    "data.repeats": (5, "datasets.num_repeats"),
    "data.caption_dropout": (0.05, "datasets.caption_dropout_rate"),
    "data.shuffle_tags": (False, "datasets.shuffle_tokens"),
    "data.flip": (True, "datasets.flip_x"),
    "data.sets": ([{"folder": "others", "repeats": 2, "trigger": "second style"}], ""),
    "lora.targets": (["all"], "convolutions"),
    "lora.rank": (16, "network.linear"),
    "lora.alpha": (1.0, "network.linear_alpha"),
    "lora.rank_pattern": ({"convolutions": 8}, "network.conv"),
    "lora.alpha_pattern": ({"convolutions": 8.0}, "network.conv_alpha"),
    "lora.text_encoder": (False, "train.train_text_encoder"),
    "objective.timesteps": ("cubic", "train.content_or_style"),
    "objective.timestep_range": ([200, 1000], "train.min_denoising_steps"),
    "train.steps": (2000, "train.steps"),
    "train.batch_size": (1, "train.batch_size"),
    "train.accumulate": (2, "train.gradient_accumulation_steps"),
    "train.optimizer": ("bitsandbytes.optim.AdamW8bit", "train.optimizer"),
    "train.optimizer_args": ({"weight_decay": 0.01}, "train.optimizer_params"),
    "train.learning_rate": (1e-4, "train.lr"),
    "train.warmup": (0.0, "train.lr_warmup_steps"),
    "train.precision": ("bf16", "train.dtype"),
    "train.ema_decay": (0.99, "train.ema_config.ema_decay"),
    "train.save_every": (250, "save.save_every"),
    "train.sample_every": (100, "sample.sample_every"),
    "sample.prompts": (["[trigger], a house"], "sample.prompts"),
    "sample.negative_prompt": ("blurry", "sample.neg"),
    "sample.seeds": ([7], "sample.seed"),
    "sample.steps": (20, "sample.sample_steps"),
    "sample.guidance": (6.0, "sample.guidance_scale"),
    "sample.scheduler": ("DDPMScheduler", "sample.sampler"),
    "export.precision": ("fp16", "save.dtype"),
}
ONETRAINER: dict[str, Any] = {
    "__version": 9,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "org/base",
    "output_model_destination": "models/inkwash.safetensors",
    "output_dtype": "BFLOAT_16",
    "concept_file_name": "concepts.json",
    "learning_rate_scheduler": "LINEAR",
    "learning_rate": 0.0003,
    "epochs": 20,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "resolution": "512",
    "train_dtype": "FLOAT_16",
    "ema": "GPU",
    "ema_decay": 0.998,
    "unet": {"train": True, "learning_rate": 0.0002, "weight_dtype": "NFLOAT_4"},
    "text_encoder": {"train": False, "learning_rate": 0.0001, "dropout_probability": 0.1},
    "optimizer": {
        "optimizer": "ADAMW_8BIT",
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.02,
        "fused": None,
    },
    "layer_filter": "attentions",
    "lora_rank": 24,
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 4.0,
    "mse_strength": 0.0,
    "huber_strength": 1.0,
    "huber_delta": 0.5,
    "offset_noise_weight": 0.03,
    "timestep_distribution": "LOGIT_NORMAL",
    "noising_weight": 0.5,
    "noising_bias": -0.2,
    "max_noising_strength": 0.9,
    "gradient_checkpointing": "ON",
    "clip_grad_norm": 1.0,
    "save_every": 2,
    "save_every_unit": "EPOCH",
    "sample_after": 30,
    "sample_after_unit": "STEP",
    "masked_training": True,
    "unmasked_weight": 0.1,
    "text_encoder_layer_skip": 1,
    "device_count": 2,
    "tensorboard": True,
}
CONCEPTS = [
    {"path": "none", "enabled": False},
    {
        "path": "drawings",
        "balancing": 2.0,
        "image": {"enable_random_flip": True},
        "text": {"enable_tag_shuffling": True},
    },
    {"path": "more", "type": "STANDARD", "balancing": 3.0, "loss_weight": 0.5},
    {"path": "held", "type": "VALIDATION"},
]
ONETRAINER_TABLE = {
    "base.source": ("org/base", "base_model_name"),
    "base.quantize": ("nf4", "unet.weight_dtype"),
    "data.resolution": (512, "resolution"),
    "data.repeats": (2, "concept.balancing"),
    "data.flip": (True, "concept.image.enable_random_flip"),
    "data.shuffle_tags": (True, "concept.text.enable_tag_shuffling"),
    "data.sets": ([{"folder": "more", "repeats": 3, "weight": 0.5, "shuffle_tags": False}], ""),
    "data.caption_dropout": (0.1, "text_encoder.dropout_probability"),
    "data.masks": ("files", "masked_training"),
    "data.clip_skip": (2, "text_encoder_layer_skip"),
    "objective.unmasked_weight": (0.1, "unmasked_weight"),
    "lora.targets": (["all-linear"], "layer_filter"),
    "lora.rank": (24, "lora_rank"),
    "lora.alpha": (1.0, "lora_alpha"),
    "lora.text_encoder": (False, "text_encoder.train"),
    "objective.loss": ("huber", "huber_strength"),
    "objective.huber_delta": (0.5, "huber_delta"),
    "objective.huber_schedule": ("constant", "huber_schedule"),
    "objective.min_snr_gamma": (4.0, "loss_weight_strength"),
    "objective.noise_offset": (0.03, "offset_noise_weight"),
    "objective.timesteps": ("logit_normal", "timestep_distribution"),
    "objective.timestep_mean": (-0.2, "noising_bias"),
    "objective.timestep_std": (1.5, "noising_weight"),
    "objective.timestep_range": ([0, 900], "max_noising_strength"),
    "train.epochs": (20.0, "epochs"),
    "train.batch_size": (4, "batch_size"),
    "train.accumulate": (1, "gradient_accumulation_steps"),
    "train.learning_rate": (0.0002, "unet.learning_rate"),
    "train.schedule": ("linear", "learning_rate_scheduler"),
    "train.warmup": (200, "learning_rate_warmup_steps"),  # not given: 200
    "train.optimizer": ("bitsandbytes.optim.AdamW8bit", "optimizer"),
    "train.optimizer_args": ({"weight_decay": 0.02, "betas": [0.9, 0.99]}, "optimizer_args"),
    "train.precision": ("fp16", "train_dtype"),
    "train.ema_decay": (0.998, "ema_decay"),
    "train.grad_clip": (1.0, "clip_grad_norm"),
    "train.gradient_checkpointing": (True, "gradient_checkpointing"),
    "train.save_every": (14, "save_every"),
    "train.sample_every": (30, "sample_after"),
    "train.trackers": (["tensorboard"], "tensorboard"),
    "export.precision": ("bf16", "output_dtype"),
}
CASES = {
    "kohya.toml": (KOHYA, KOHYA_TABLE, ("caption_extension",)),
    "gui.json": (json.dumps(GUI), GUI_TABLE, ("color_aug",)),
    "dataset.toml": (DATASET, DATASET_TABLE, ("data.flip = true",)),
    "toolkit.yaml": (TOOLKIT, TOOLKIT_TABLE, ("save.max_step_saves_to_keep", "data.caption_dropout = 0.1")),
    "onetrainer.json": (
        json.dumps(ONETRAINER),
        ONETRAINER_TABLE,
        ("device_count", "path of a concept VALIDATION"),
    ),
}


def write_case(folder: Path, name: str) -> Path:
    """A config, with the files that it names beside it: four images, three repeats each, and one more."""
    for number in range(4):
        image = folder / "drawings" / "3_ink" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(b"")
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more" / "a.png").write_bytes(b"")
    (folder / "prompts.txt").write_text("# a comment\na house --n blurry --w 512\na hill\n", encoding="utf-8")
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS), encoding="utf-8")
    (folder / name).write_text(CASES[name][0], encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", CASES)
def test_each_value_is_that_of_the_table(tmp_path: Path, name: str) -> None:
    """R-35: each line has the value made by hand, and the key it comes from; the rest is named; it loads."""
    _, table, left = CASES[name]
    text = translate(write_case(tmp_path, name))
    found = {
        f"{section}.{key}": value
        for section, keys in tomllib.loads(text).items()
        for key, value in keys.items()
    }
    for one in found.get("data.sets", ()):
        one["folder"] = Path(one["folder"]).name
    assert found == {setting: value for setting, (value, _) in table.items()}
    section, comments = "", {}
    for line in text.splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        setting, _, comment = line.partition("  # ")
        comments[f"{section}.{setting.partition(' = ')[0]}"] = comment
    for setting, (_, key) in ((name, row) for name, row in table.items() if name != "data.sets"):
        assert key in comments[setting], setting
    notes = text.partition("# Not translated:")[2]
    for key in left:
        assert f"# {key}" in notes
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    load_config(tmp_path / "my.toml")


def test_repeats_that_are_none_are_not_given(tmp_path: Path) -> None:
    """R-35: once is the default; a number of samples, and a fraction, are named."""
    for strategy, number in (("REPEATS", 1.0), ("SAMPLES", 50.0), ("REPEATS", 0.5)):
        concept = {"path": "drawings", "balancing": number, "balancing_strategy": strategy}
        config = {**ONETRAINER, "concepts": [concept]}
        (tmp_path / "one.json").write_text(json.dumps(config), encoding="utf-8")
        text, _, notes = translate(tmp_path / "one.json").partition("# Not translated:")
        assert "repeats" not in text
        assert ("balancing" in notes) == (number != 1)


def test_repeats_are_not_multiplied_silently(tmp_path: Path) -> None:
    """R-08: a dataset file's own repeats, and those in the name of the folder that it names."""
    subset = '[[datasets.subsets]]\nimage_dir = "10_ink"\nnum_repeats = 3\n'
    (tmp_path / "a.toml").write_text(f"[[datasets]]\nresolution = 512\n{subset}", encoding="utf-8")
    text, _, notes = translate(tmp_path / "a.toml").partition("# Not translated:")
    assert "repeats = 3" in text
    assert "10_ink" in notes
    assert "rename" in notes


# Options of sd-scripts and diffusers' scripts, and what they are here.
OPTIONS = {
    "network_train_unet_only": "lora.text_encoder=false",
    "conv_dim 4": 'lora.targets=["all"] lora.rank_pattern={convolutions = 4}',
    "optimizer_type AdamW8bit": "train.optimizer=bitsandbytes.optim.AdamW8bit",
    "resolution 512,512": "data.resolution=512",
    "loss_type l2": "objective.loss=mse",
    "network_module networks.lora": 'lora.targets=["all-linear"]',
    "optimizer_args weight_decay=0.1": "train.optimizer_args={weight_decay = 0.1}",
    "log_with all": 'train.trackers=["tensorboard"]',
    "center_crop": "data.crop=center",
    "masked_loss": "data.masks=files",
    "gradient_checkpointing": "train.gradient_checkpointing=true",
    "fp8_base": "base.quantize=int8",
    "sample_sampler euler_a": "sample.scheduler=EulerAncestralDiscreteScheduler",
    "max_train_epochs 10": "train.epochs=10",
    "unet_lr 1e-4": "train.learning_rate=1e-4",
    "sample_prompts p.txt": "",
    "loss_type odd": "",
    "network_dim": "",
    "network_dim inf": "",
    "base_weights": "",
    "report_to none": "",
    "flip_aug 0": "data.flip=false",
    "quux": "",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_translated_with_its_value(option: str) -> None:
    """R-35: what is answered can be typed."""
    name, _, value = option.partition(" ")
    answer = translate_option(name, value)
    assert " ".join(answer) == OPTIONS[option]
    load_config(overrides=answer)


def test_text_stays_readable() -> None:
    """TOML knows no surrogate pairs, which are how JSON may write an emoji."""
    value = {"a b": ["ü", "\U0001f98a"]}
    assert tomllib.loads(f"x = {to_toml(value)}")["x"] == value
    assert "ü" in to_toml(value)


def test_no_epochs_are_not_given(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("network_dim = 8\nmax_train_epochs = 0\n", encoding="utf-8")
    assert "epochs" not in translate(tmp_path / "a.toml")


def test_what_is_refused_here_becomes_a_comment(tmp_path: Path) -> None:
    """The result is always valid: kept tags without shuffling, an unknown optimizer, a family of its own."""
    (tmp_path / "a.toml").write_text(
        'network_dim = 8\nkeep_tokens = 1\noptimizer_type = "Came2"\nnetwork_module = "lycoris.kohya"\n'
        'network_args = ["algo=loha"]\nnoise_offset = 7.5\nodd = "x\\u0007y"\n',
        encoding="utf-8",
    )
    text = translate(tmp_path / "a.toml")
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    load_config(tmp_path / "my.toml")
    notes = text.partition("# Not translated:")[2]
    for key in ("keep_tokens", "optimizer_type", "network_module", "noise_offset", "odd"):
        assert f"# {key}" in notes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "[lora]\nrank = 3\n"),
        ("a.toml", "x = \n"),
        ("a.json", "[1, 2]"),
        ("a.json", '{"LoRA_type": "Standard", "datasets": 3}'),
        ("a.yaml", "config: {process: 3}\n"),
        ("a.yaml", "&a [*a, *a"),
        ("a.yaml", "!!python/object/apply:os.system ['true']"),
        ("a.json", '{"training_method": "LORA", "concepts": [1]}'),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    """R-35: a file of no known trainer, damaged or hostile, is one line."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        translate(tmp_path / name)
    assert caught.value.keys[0].startswith("option--from")
    assert "\n" not in str(caught.value)
    with raises(ConfigError, "option--from"):
        translate(tmp_path / "missing.toml")
