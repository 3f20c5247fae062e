"""Mistakes that people make: each answered in one line with what to type, exit code 2."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# What is typed, and what the answer contains for the next try.
VERBS = {
    "trian drawings": "`sdlora train`",
    "fit drawings": "`sdlora train`",
    "generate run --prompt x": "`sdlora sample`",
    "eval run": "`sdlora evaluate`",
    "convert run": "`sdlora export`",
    "advise_rank run": "`sdlora advise-rank`",
    "presets": "`sdlora settings --presets`",
    "help train": "--help`",
    "drawings": "`sdlora train drawings`",
    "run": "`sdlora info run`",
    "tree run": "`sdlora tree show run`",
    "tree shwo run": "`sdlora tree show`",
    "quux": "train, resume, doctor,",
}
OPTIONS = {
    "train": "`sdlora train IMAGES`",
    "train drawings --prset sd15": "--preset sd15",
    "train drawings --triger ink": "--trigger ink",
    "train drawings --dryrun": "--dry-run",
    "train drawings --rank 8": "lora.rank=8",
    "train drawings --steps=100": "train.steps=100",
    "train drawings --lr 1e-3": "train.learning_rate=1e-3",
    "train drawings --lerning_rate 1e-3": "train.learning_rate=1e-3",
    "train drawings --output_dir here": "--out here",
    "train drawings --model builtin": "--base builtin",
    "train drawings --train_text_encoder": "lora.text_encoder=true",
    "train --train_data_dir drawings": "write drawings alone",
    "train drawings --gpu 0": "CUDA_VISIBLE_DEVICES=0",
    "train drawings --resume latest": "`sdlora resume RUN`",
    "train drawings --clip_skip 2": "write data.clip_skip=2",
    "resume run --steps 400": "train.steps=400",
    "sample run --prompt x --seed -1": "--seeds -1",
    "sample run --prompt x --strength 0.5": "--strengths 0.5",
    "sample run --prompt x --num_inference_steps 20": "--steps 20",
    "sample run --prompt x --cfg 7": "--guidance 7",
    "sample run --prompt x --width 512": "--size WIDTHxHEIGHT",
    "sample run --prompt x --negative_prompt blurry": "--negative-prompt blurry",
    "sample run --prompt x --steps 10,20": "--steps 10,20 must be an integer",
    "evaluate run --steps 20": "--step is a saved step",
    "tree sample run --step 5": "--steps are sampling steps",
    "export run x.safetensors": "--out x.safetensors",
    "export run --dtype bf16 --out x.safetensors": "--precision bf16",
    "export run --format a1111 --out x.safetensors": "kohya",
    "resize run --network_dim 4 --out x.safetensors": "--rank 4",
    "resize run --out x.safetensors": "--rank 8",
    "merge run run": "`sdlora merge --out",
    "cache --clera": "--clear",
}
SETTINGS = {
    "train drawings lora.rnak=8": "lora.rank",
    "train drawings rank=8": "lora.rank",
    "train drawings train.lerning_rate=3": "train.learning_rate",
    "train drawings train.steps 8": "train.steps=VALUE",
    "train drawings lora.rank=eight": "4 to 32",
    "train drawings train.precision=int4": "'bf16'",
    "train drawings --preset sd-15": "sd15",
    "train drawings --config kohya.toml": "lora.rank",
    "train drawings --config kohya.json": "`sdlora settings --from kohya.json`",
    "settings ntwork_dim": "lora.rank",
    "settings lora.rnak": "lora.rank",
}
FILES = {
    "train set.toml": "--config set.toml",
    "train pics.zip": "pass the folder",
    "train lora.safetensors": "`sdlora info lora.safetensors`",
    "train run": "`sdlora resume run`",
    "train base": "--base base",
    "train drawings/00.png": "drawings",
    "train drawings --base run": "the base of that run",
    "train drawings --base lora.safetensors": "the base it was made for",
    "resume run/adapters/final.safetensors": "use run",
    "evaluate .": "use run",
    "sample drawings --prompt x": "a LoRA file, a run folder or a tree node",
    "sample 'a cat'": '--prompt "a cat"',
    "sample base --prompt x": "--base",
    "resize lora.safetensors:0.6 --rank 2 --out x.safetensors": "0.6 in --strengths or --weights",
    "info model.ckpt": ".safetensors",
}


@pytest.fixture(scope="module")
def desk(draw_images, tmp_path_factory) -> Path:
    """A folder with images, something like a run and a base, and files of several kinds."""
    folder = tmp_path_factory.mktemp("desk")
    draw_images(folder / "drawings")
    for name in ("run", "run/adapters", "base"):
        (folder / name).mkdir()
    for name in ("run/config.json", "run/environment.json", "base/model_index.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "kohya.toml").write_text("network_dim = 32\n", encoding="utf-8")
    (folder / "kohya.json").write_text('{"network_dim": 32}', encoding="utf-8")
    (folder / "set.toml").write_text("[lora]\nrank = 4\n", encoding="utf-8")
    for name in ("pics.zip", "model.ckpt"):
        (folder / name).write_bytes(b"PK\x03\x04")
    weights = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1, 4)}
    save_file(weights, folder / "lora.safetensors")
    shutil.copy(folder / "lora.safetensors", folder / "run" / "adapters" / "final.safetensors")
    return folder


@pytest.mark.parametrize("typed", [*VERBS, *OPTIONS, *SETTINGS, *FILES])
def test_the_answer_is_what_to_type(sdlora, desk, monkeypatch, typed):
    """R-35: one line, which contains what to type; nothing is written."""
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    code, _, errors = sdlora(*shlex.split(typed))
    assert (code, len(errors)) == (2, 1), errors
    assert (VERBS | OPTIONS | SETTINGS | FILES)[typed] in errors[0]
    assert sorted(desk.rglob("*")) == before


def test_all_unknown_options_at_once(sdlora, desk, monkeypatch):
    """R-35: a command of another trainer is answered as a whole."""
    monkeypatch.chdir(desk)
    code, _, errors = sdlora(
        "train", "--pretrained_model_name_or_path", "builtin", "--train_data_dir", "drawings",
        "--network_dim=32", "--learning_rate", "1e-4", "--cache_latents", "--quux", 5,
    )  # fmt: skip
    assert (code, len(errors)) == (2, 1)
    shown = errors[0]
    for part in (
        "--base builtin",
        "drawings alone",
        "lora.rank=32",
        "train.learning_rate=1e-4",
        "data.cache",
    ):
        assert part in shown
    assert "--quux" in shown
