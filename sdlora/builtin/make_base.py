"""Trains the built-in base: a tokenizer, then the text encoder alone, then text encoder and UNet together.

torchrun divides each batch over processes: two of one thread each are faster on two cores than two threads.
With `--from-base`, training starts from the weights of another base: tokenizer, text encoder and UNet.

B batch, C latent channels, H latent size, L tokens, D text width.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.builtin.bank import Bank, load_vae
from sdlora.builtin.captions import TEXT_LENGTH, draw_caption, known_words, make_tokenizer, name_thing
from sdlora.builtin.measure import SHEET_PROMPTS, make_sheet, sample
from sdlora.builtin.script import BASE, Script
from sdlora.builtin.state import (
    TrainingState,
    is_main_process,
    learning_rate,
    save_folder,
    step_generators,
    step_seed,
)
from sdlora.errors import ModelError
from sdlora.writing import append_lines, write_json, write_text

BETAS = (0.9, 0.99)
TEXT_SEED_OFFSET = 500_000  # the two phases draw from different streams


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; kept beside them, and a run continues only with an equal one.

    The learning rate and its course, `steps` and `decay_share`, may change on the way.
    """

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 6e-4
    warmup: int = 200
    decay_share: float = 0.4
    average_decay: float = 0.999
    text_steps: int = 500
    text_batch_size: int = 128
    text_width: int = 192
    text_layers: int = 3
    widths: tuple[int, ...] = (64, 96, 192)
    seed: int = 0

    def may_continue(self, other: Recipe) -> bool:
        """Whether a run of `other` can go on under this recipe."""
        free = {"steps": 0, "decay_share": 0.0, "learning_rate": 0.0}
        return {**vars(self), **free} == {**vars(other), **free}


@dataclass(frozen=True)
class Place:
    """Where things are, and how the machine is used; only `bank` and `start` decide the weights.

    `out` gets the state, the log, the sheets and the base; `bank` is what `bank.py` wrote, `vae` the VAE it
    is of. Tokenizer, text encoder and UNet start from those of the base `start`, or anew.
    """

    out: Path
    bank: Path
    vae: Path = BASE / "vae"
    start: Path | None = None
    device: str = "cpu"
    compiled: bool = False
    save_every: int = 200
    log_every: int = 25
    sheet_every: int = 1000


@dataclass
class Parts:
    """The parts of the pipeline while they are in training, and the images they are taught."""

    tokenizer: Any
    text_encoder: nn.Module
    unet: nn.Module
    vae: Any
    schedule: Any
    bank: Bank
    scaling_factor: float
    device: torch.device
    denoise: Callable[..., Any] = field(init=False)  # the UNet, or its compiled form

    def __post_init__(self) -> None:
        self.denoise = self.unet

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token numbers, (B, L)."""
        encoded = self.tokenizer(
            list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True
        )
        return torch.tensor(encoded["input_ids"]).to(self.device)


def make_text_encoder(tokenizer: Any, recipe: Recipe) -> Any:
    """A small CLIP text encoder for `tokenizer`."""
    end = tokenizer.eos_token_id
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)


def make_unet(channels: int, size: int, recipe: Recipe) -> Any:
    """A UNet shaped as that of SD 1.x, with attention in every level: adapters reach the finest one too."""
    levels = len(recipe.widths)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.widths,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def make_schedule() -> Any:
    """The noise schedule of SD 1.x, with v-prediction (2202.00512)."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


def prepare(place: Place, recipe: Recipe) -> Parts:
    """Loads, or makes with weights drawn from the recipe's seed, everything that training needs."""
    device = torch.device(place.device)
    bank, vae = Bank(place.bank), load_vae(place.vae).to(device)
    torch.manual_seed(recipe.seed)
    if place.start is None:
        tokenizer = make_tokenizer(place.out / "tokenizer", bank.concepts)
        text_encoder = make_text_encoder(tokenizer, recipe)
        unet = make_unet(bank.latent_shape[0], bank.latent_shape[-1], recipe)
        scaling_factor = 1 / bank.plain_std()
    else:
        tokenizer, text_encoder, unet = load_start(place.start, place.out / "tokenizer")
        scaling_factor = float(vae.config.scaling_factor)
    text_encoder, unet = text_encoder.to(device), unet.to(device)
    if place.compiled:  # it pays only there
        unet.to(memory_format=torch.channels_last)
    if device.type == "cpu":  # plain attention is faster than SDPA's backward at these sizes
        unet.set_attn_processor(AttnProcessor())
    parts = Parts(tokenizer, text_encoder, unet, vae, make_schedule(), bank, scaling_factor, device)
    if place.compiled:
        parts.denoise = torch.compile(unet)
    return parts


def load_start(base: Path, tokenizer_folder: Path) -> tuple[Any, Any, Any]:
    """Tokenizer, text encoder and UNet of a base, with a copy of the tokenizer's files."""
    if not (base / "model_index.json").is_file():
        raise ModelError(f"{base} is not a base; pass the folder with model_index.json")
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(base / "tokenizer" / name, tokenizer_folder / name)
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").float().train()
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float().train()
    return make_tokenizer(tokenizer_folder, []), text_encoder, unet


def draw_concepts(concepts: list[str], step: int, batch_size: int, seed: int) -> list[str]:
    """The concepts of one step: a new order every epoch, so that all are seen equally often."""
    chosen = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(index, len(concepts))
        order = random.Random(step_seed(seed, epoch)).sample(range(len(concepts)), len(concepts))
        chosen.append(concepts[order[position]])
    return chosen


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Half spread evenly over all timesteps, half around 700, where the content of the image is decided."""
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000
    high = 700 + 170 * torch.randn(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, even, high).clamp(0, 999).long()


def draw_batch(parts: Parts, concepts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Scaled latents (B, C, H, H) and tokens (B, L) of one image for each concept."""
    numbers = [parts.bank.draw(rng, concept) for concept in concepts]
    captions = [draw_caption(rng, parts.bank.variants[number]) for number in numbers]
    return parts.bank.latents(numbers).to(parts.device) * parts.scaling_factor, parts.tokens(captions)


class LayoutHead(nn.Module):
    """Guesses a coarse image from the mean text state, and is thrown away.

    Cross-attention that attends evenly passes on exactly this mean, so what the head can read there
    the UNet can read from its first step.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.shape = (channels, 8, 8)
        self.linear = nn.Linear(width, channels * 8 * 8)

    def forward(self, states: Tensor) -> Tensor:
        """Text states (B, L, D) -> coarse latents (B, C, 8, 8)."""
        guess: Tensor = self.linear(states.mean(dim=1))
        return guess.view(-1, *self.shape)


def text_loss(parts: Parts, head: LayoutHead, concepts: list[str], rng: random.Random) -> Tensor:
    """Mean squared error of the coarse latents guessed from the captions."""
    latents, tokens = draw_batch(parts, concepts, rng)
    with torch.autocast(parts.device.type, dtype=torch.bfloat16):
        guess = head(parts.text_encoder(tokens)[0])
    return F.mse_loss(guess.float(), F.adaptive_avg_pool2d(latents, head.shape[-1]))


def own_part() -> slice:
    """The samples of a batch that this process computes."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def unet_loss(parts: Parts, concepts: list[str], rng: random.Random, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity (2202.00512, appendix D)."""
    latents, tokens = draw_batch(parts, concepts, rng)
    noise = torch.randn(latents.shape, generator=generator).to(parts.device)
    timesteps = draw_timesteps(len(latents), generator).to(parts.device)
    noisy = parts.schedule.add_noise(latents, noise, timesteps)
    target = parts.schedule.get_velocity(latents, noise, timesteps)
    part = own_part()
    noisy, timesteps, target, tokens = noisy[part], timesteps[part], target[part], tokens[part]
    if parts.denoise is not parts.unet:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast(parts.device.type, dtype=torch.bfloat16):
        states = parts.text_encoder(tokens)[0]
        predicted = parts.denoise(noisy, timesteps, states, return_dict=False)[0]
    return F.mse_loss(predicted.float(), target)


@dataclass
class Phase:
    """One stretch of training: what it trains, for how long, and on which loss."""

    name: str
    state: TrainingState
    steps: int
    batch_size: int
    peak_rate: float
    loss: Callable[[int, list[str]], Tensor]
    draw_sheet: Callable[[], Image.Image] | None = None


def run_phase(
    phase: Phase, place: Place, recipe: Recipe, concepts: list[str], stop_after: int | None = None
) -> bool:
    """Trains to the phase's last step, continuing from its state file; False where `stop_after` ended it."""
    file, state = place.out / f"{phase.name}.safetensors", phase.state
    if file.is_file():
        state.load(file)
    running, started, done, sheets = 0.0, time.monotonic(), 0, place.out / "sheets"
    while state.step < phase.steps and (stop_after is None or done < stop_after):
        step = state.step
        rate = learning_rate(step, phase.steps, phase.peak_rate, recipe.warmup, recipe.decay_share)
        loss = phase.loss(step, draw_concepts(concepts, step, phase.batch_size, recipe.seed))
        state.update(loss, rate)
        done += 1
        running += (loss.item() - running) / min(done, 100)
        if not is_main_process():
            continue
        if state.step % place.log_every == 0:
            seconds = round((time.monotonic() - started) / done, 3)
            facts = {"phase": phase.name, "step": state.step, "loss": round(running, 4), "rate": rate}
            clock = {"seconds_per_step": seconds, "time": round(time.time())}
            append_lines(place.out / "log.jsonl", [{**facts, **clock}])
        if state.step % place.save_every == 0:
            state.save(file)
        if phase.draw_sheet is not None and state.step % place.sheet_every == 0:
            state.swap_average()
            sheets.mkdir(exist_ok=True)
            phase.draw_sheet().save(sheets / f"{state.step:06}.png")
            state.swap_average()
    if done and is_main_process():
        state.save(file)
    return state.step >= phase.steps


def text_phase(parts: Parts, recipe: Recipe) -> Phase:
    """The text encoder learns alone what each caption looks like, coarsely."""
    head = LayoutHead(recipe.text_width, parts.bank.latent_shape[0]).to(parts.device)
    state = TrainingState({"text_encoder": parts.text_encoder, "head": head}, BETAS, recipe.average_decay)

    def loss(step: int, concepts: list[str]) -> Tensor:
        return text_loss(parts, head, concepts, step_generators(recipe.seed, TEXT_SEED_OFFSET + step)[0])

    return Phase("text", state, recipe.text_steps, recipe.text_batch_size, recipe.learning_rate, loss)


def joint_phase(parts: Parts, recipe: Recipe) -> Phase:
    """Text encoder and UNet learn together to denoise."""
    modules = {"text_encoder": parts.text_encoder, "unet": parts.unet}
    state = TrainingState(modules, BETAS, recipe.average_decay)

    def loss(step: int, concepts: list[str]) -> Tensor:
        return unet_loss(parts, concepts, *step_generators(recipe.seed, step))

    def draw_sheet() -> Image.Image:
        with torch.no_grad(), torch.autocast(parts.device.type, dtype=torch.bfloat16):
            return make_sheet(sample(make_pipeline(parts), SHEET_PROMPTS, 0))

    return Phase("joint", state, recipe.steps, recipe.batch_size, recipe.learning_rate, loss, draw_sheet)


def make_pipeline(parts: Parts) -> Any:
    """The stock pipeline of the parts as they are, quiet."""
    parts.vae.register_to_config(scaling_factor=parts.scaling_factor)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=DDIMScheduler.from_config(parts.schedule.config, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_base(parts: Parts, folder: Path) -> None:
    """Writes an ordinary diffusers folder: UNet and VAE in fp16, the text encoder in fp32.

    transformers loads a file's own dtype and diffusers fp32; an fp16 text encoder would not match its UNet.
    """

    def save(partial: Path) -> None:
        make_pipeline(parts).save_pretrained(partial)
        # vocab.json and merges.txt: transformers 4 reads nothing else
        parts.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))
        (partial / "text_encoder" / "model.safetensors").chmod(0o644)
        write_text(partial / "words.txt", "\n".join(known_words(parts.bank.concepts)) + "\n")
        write_text(partial / "things.txt", "\n".join(map(name_thing, parts.bank.concepts)) + "\n")

    save_folder(folder, save, "unet", "vae")


def remember_recipe(place: Place, recipe: Recipe) -> None:
    """Writes the recipe beside the state; raises a ModelError if the run there has another one."""
    file = place.out / "recipe.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if not recipe.may_continue(Recipe(**{**kept, "widths": tuple(kept["widths"])})):
            raise ModelError(f"{place.out} holds a run of another recipe; choose another --out")
    write_json(file, vars(recipe))


def make_base(place: Place, recipe: Recipe, stop_after: int | None = None) -> Path | None:
    """Trains a base, or continues, and writes it to `place.out / "base"`.

    `stop_after` ends each phase after that many steps; returns None if the text encoder is not ready then.
    """
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group()
    if is_main_process():
        remember_recipe(place, recipe)
    parts = prepare(place, recipe)
    if place.start is None and not run_phase(
        text_phase(parts, recipe), place, recipe, parts.bank.concepts, stop_after
    ):
        return None
    joint = joint_phase(parts, recipe)
    run_phase(joint, place, recipe, parts.bank.concepts, stop_after)
    if not is_main_process():
        return None
    joint.state.swap_average()
    folder = place.out / "base"
    save_base(parts, folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    default = Recipe()
    script = Script("make_base", __doc__, "--vae", "--device", "--threads")
    script.add_argument("--out", type=Path, required=True, help="folder for the state, the log and the base")
    script.add_argument(
        "--bank", type=Path, required=True, help="the latents: see python -m sdlora.builtin.bank"
    )
    script.add_argument("--from-base", dest="start", type=Path, help="a base to start from; by default none")
    script.add_argument("--steps", type=int, default=default.steps)
    script.add_argument(
        "--decay-share", type=float, default=default.decay_share, help="of the steps, the last"
    )
    script.add_argument("--batch-size", type=int, default=default.batch_size)
    script.add_argument("--learning-rate", type=float, default=default.learning_rate)
    script.add_argument("--seed", type=int, default=default.seed)
    script.add_argument("--compile", action="store_true", help="a fifth faster, after minutes of compiling")
    script.add_argument("--save-every", type=int, default=200, help="steps")
    script.add_argument("--export", action="store_true", help="write the base from the state as it is")

    def work(given: Namespace) -> None:
        own = {key: value for key, value in vars(given).items() if key in vars(default)}
        places = {key: value for key, value in vars(given).items() if key in Place.__dataclass_fields__}
        place = Place(**places, compiled=given.compile and not given.export)
        folder = make_base(place, Recipe(**own), stop_after=0 if given.export else None)
        print(f"{folder} is written" if folder else "the text encoder is not ready; run without --export")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
