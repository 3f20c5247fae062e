"""Fixtures that every test folder shares: one thread, no network, a cache of its own, small pictures."""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw

from sdlora.cli import main

torch.set_num_threads(1)
# The same examples at every run, none kept on the disk; a slow machine is no failure.
settings.register_profile("sdlora", derandomize=True, database=None, deadline=None)
settings.load_profile("sdlora")

# Adapters on small networks, for lora, formats, rank, tree and export; a browser for pages.
pytest_plugins = ["tests.lora_fixtures", "tests.browser"]

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the latent cache of a test away from the user's."""
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the tests that use a whole dataset, so that each picture is encoded once."""
    root = tmp_path_factory.getbasetemp()
    common = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    monkeypatch.setenv("SDLORA_CACHE", str(common / "shared-cache"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def full_size() -> dict[str, dict[str, Any]]:
    """The configurations of the UNets of SD 1.5 and SDXL, by family."""
    return FULL_SIZE


class WithoutDoubles(torch.Tensor):
    """A tensor as it is on MPS, where float64 is an error; on the CPU it is an ordinary one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        given = (*args, *(kwargs or {}).values())
        if func is torch.Tensor.double or any(value is torch.float64 for value in given):
            raise TypeError("the MPS framework doesn't support float64")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(scope="session")
def without_doubles() -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a tensor one of a device that has no float64."""
    return lambda tensor: tensor.detach().as_subclass(WithoutDoubles)


@pytest.fixture(scope="session")
def draw_images() -> Callable[..., Path]:
    """Fills a new folder with small captioned drawings, one for each size given."""

    def draw(folder: Path, sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 4) -> Path:
        folder.mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            image = Image.new("RGB", (width, height), "white")
            color = ((37 * number) % 256, (91 * number) % 256, (151 * number) % 256)
            ImageDraw.Draw(image).ellipse((8, 8, width - 8, height - 8), fill=color, outline="black", width=3)
            image.save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(f"a circle number {number}", encoding="utf-8")
        return folder

    return draw


@pytest.fixture
def make_images(tmp_path: Path, draw_images: Callable[..., Path]) -> Callable[..., Path]:
    """Makes a captioned folder of small drawings, one for each size given."""

    def make(name: str = "pictures", sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 4) -> Path:
        return draw_images(tmp_path / name, sizes)

    return make


TINY_SD15: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (16, 16, 32, 32),
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}
TINY_SD21 = {**TINY_SD15, "attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
TINY_SDXL: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "norm_num_groups": 8,
}
FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd1": {"in_channels": 4, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        **TINY_SDXL,
        "in_channels": 4,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "norm_num_groups": 32,
    },
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
WORDS = REPOSITORY / "sdlora" / "builtin" / "base" / "tokenizer"


def tiny_text(width: int, padding: int = 2266, **changes: Any) -> Any:
    """The settings of a small CLIP text encoder for the built-in base's words."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=2267,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=20,
        bos_token_id=2265,
        eos_token_id=2266,
        pad_token_id=padding,
        # Random states must differ from word to word.
        initializer_factor=3.0,
        **changes,
    )


def tiny_vae(scaling: float) -> Any:
    """A small VAE of factor 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=scaling,
    )


def save_sd(folder: Path, unet: dict[str, Any], act: str, scheduler: Any) -> Path:
    """Writes a small Stable Diffusion of one text encoder as a diffusers folder."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdlora.models.base import quiet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(0.18215),
            text_encoder=CLIPTextModel(tiny_text(16, hidden_act=act)),
            tokenizer=CLIPTokenizer.from_pretrained(WORDS),
            unet=UNet2DConditionModel(**unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5 in its real classes and layout, random weights, 3 MB; a folder that no test changes."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **BETAS)
    return save_sd(tmp_path_factory.mktemp("bases") / "tiny-sd15", TINY_SD15, "quick_gelu", scheduler)


@pytest.fixture(scope="session")
def sd21_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 2.1 (768-v) likewise: linear projections, v prediction, another activation in the text encoder."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **BETAS
    )
    return save_sd(tmp_path_factory.mktemp("bases") / "tiny-sd21", TINY_SD21, "gelu", scheduler)


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's real classes and layout with random weights, 9 MB, as a diffusers folder; never to be changed.

    As in the real one, the second tokenizer pads with `!`, and the scheduler is Euler.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from sdlora.models.base import quiet

    folder = tmp_path_factory.mktemp("bases") / "tiny-sdxl"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(0.13025),
            text_encoder=CLIPTextModel(tiny_text(16)),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text(24, padding=0)),
            tokenizer=CLIPTokenizer.from_pretrained(WORDS),
            tokenizer_2=CLIPTokenizer.from_pretrained(WORDS, pad_token="!"),
            unet=UNet2DConditionModel(**TINY_SDXL),
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
            add_watermarker=False,
        )
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_folder(tmp_path: Path) -> Callable[..., Path]:
    """Copies a base, weights as links; `copy(base, "name", unet__config={...})` edits JSON files."""

    def copy(source: Path, name: str = "base", **edits: dict[str, Any]) -> Path:
        folder = tmp_path / name
        for file in source.rglob("*"):
            place = folder / file.relative_to(source)
            if file.is_dir():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                place.symlink_to(file)
            else:
                shutil.copyfile(file, place)
        for where, changes in edits.items():
            file = folder / (where.replace("__", "/") + ".json")
            values = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**values, **changes}), encoding="utf-8")
        return folder

    return copy


@pytest.fixture
def sdlora(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs a command in an empty folder: (exit code, what was printed, the lines of the error).

    `sdlora.keys` are the keys of the last error.
    """
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["sdlora", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
            run.keys = getattr(stop.__context__, "keys", ())
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    run.keys = ()
    return run


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()
