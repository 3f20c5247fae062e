"""Stable Diffusion 1.x, 2.x and XL as a `Base`: a UNet, a VAE, CLIP text encoders and their tokenizers.

B batch, C channels, H W image size, h w latent size, L tokens, D width, P pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.errors import ModelError, first_line
from sdlora.models.attention import use_blocked_attention
from sdlora.models.base import Condition, freed_memory_kept, quiet, release_memory
from sdlora.models.info import BaseInfo
from sdlora.models.kernels import use_cpu_kernels
from sdlora.models.tokenizer import tokenize_chunks

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

META = torch.device("meta")
MOST_COMPILED = 64


@dataclass(eq=False)
class StableDiffusion:
    """The networks of a base, in eval mode and without gradients; the methods are described in `Base`.

    A network on the meta device takes no memory; `load` reads it again where it is needed.

    Args:
        text_encoders: One, or the two of SDXL, each with a tokenizer.
        dtype: Of the UNet; text encoders are fp32, the VAE as in `dtypes.VAE_DTYPES`.
    """

    info: BaseInfo
    denoiser: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    dtype: torch.dtype
    safety_checker: Callable[[Sequence[Image]], Sequence[bool]] | None = None
    load: Callable[[str], Any] | None = None

    def _loaded(self, name: str, part: Any) -> Any:
        return self.load(name) if self.load and part.device == META else part

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.denoiser.parameters()).device)

    @property
    def components(self) -> dict[str, nn.Module]:
        texts = zip(self.info.traits.text_encoders, self.text_encoders, strict=False)
        return {"unet": self.denoiser, **dict(texts)}

    @property
    def dtypes(self) -> dict[str, str]:
        parts = {"unet": self.dtype, "vae": self.vae.dtype}
        parts |= dict.fromkeys(self.info.traits.text_encoders, self.text_dtype)
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in parts.items()}
        if self.info.quantize != "none":
            names["unet"] += f" with {self.info.quantize} layers"
        return names

    @property
    def text_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.text_encoders[0].dtype
        return dtype

    @property
    def attention_kernel(self) -> str:
        # diffusers uses SDPA if torch has it.
        processors = self.denoiser.attn_processors.values()
        if all(isinstance(processor, AttnProcessor2_0) for processor in processors):
            return "SDPA"
        return ", ".join(sorted({type(processor).__name__ for processor in processors}))

    def load_denoiser(self) -> None:
        self.denoiser = self._loaded("unet", self.denoiser)

    def text_encoders_to(self, device: torch.device | str) -> None:
        if torch.device(device) != META:
            self._load_text_encoders()
        for part in self.text_encoders:
            part.to(device)

    def _load_text_encoders(self) -> None:
        self.text_encoders = tuple(map(self._loaded, self.info.traits.text_encoders, self.text_encoders))

    def use_cpu_kernels(self) -> bool:
        is_suited = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return is_suited and use_cpu_kernels(self.denoiser)

    def use_blocked_attention(self) -> bool:
        return use_blocked_attention(self.denoiser)

    def compile_blocks(self) -> str | None:
        try:
            # Where there is no compiler for the device, this fails as well, and within seconds.
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=self.device))
            # Blocks of each width, with and without adapters and gradients, are compiled once each.
            torch._dynamo.config.cache_size_limit = MOST_COMPILED
            self.denoiser.compile_repeated_blocks()
        except (AttributeError, ImportError, OSError, RuntimeError) as error:
            return first_line(error)
        return None

    def enable_gradient_checkpointing(self, *, text: bool) -> None:
        # diffusers and transformers recompute in train mode only, which changes nothing else here.
        self.denoiser.enable_gradient_checkpointing()
        self.denoiser.train()
        for encoder in self.text_encoders if text else ():
            # transformers renamed it.
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
            encoder.train()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # One image at a time: batching gains nothing (the VAE fills the device alone), and an image's latents
        # must not depend on its neighbours.
        self.vae = self._loaded("vae", self.vae)
        moments = [self._encode_image(image[None]) for image in pixels]
        return torch.cat([mean for mean, _ in moments]), torch.cat([std for _, std in moments])

    def _encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._without_overflow(partial(self._posterior, pixels))
        if not _all_finite(mean, std):
            raise ModelError(
                "the VAE makes non-finite latents of this image, in fp32 too; "
                "check the image, or use another base.vae",
                key="base.non-finite-latents",
            )
        return mean, std

    def _without_overflow(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs the VAE, and once more in fp32 if it overflows in a smaller dtype."""
        results, stored = compute(), self.vae.dtype
        if stored == torch.float32 or _all_finite(*results):
            return results
        # diffusers warns of each cast.
        with quiet():
            self.vae.to(torch.float32)
        try:
            return compute()
        finally:
            with quiet():
                self.vae.to(stored)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, ...]:
        shift, scale = self._latent_units()
        with torch.autocast(self.vae.device.type, enabled=False):
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def _latent_units(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.get("shift_factor") or 0.0), float(config.scaling_factor)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        # The VAE is in memory, and on the UNet's device, only meanwhile. Reading it again takes
        # 1 or 2 % of a batch.
        home = self.vae.device
        # What denoising leaves would stay beside it.
        release_memory()
        self.vae = self._loaded("vae", self.vae)
        try:
            self.vae.to(self.device)
            with freed_memory_kept():
                return self._without_overflow(partial(self._decode, latents))[0]
        finally:
            self.vae.to(home)

    def _decode(self, latents: Tensor) -> tuple[Tensor]:
        # One at a time, like encoding; together, small images gain nothing either.
        shift, scale = self._latent_units()
        units = latents.to(self.device, self.vae.dtype) / scale + shift
        return (torch.cat([self._decode_image(image).float().cpu() for image in units.split(1)]),)

    def _decode_image(self, latents: Tensor) -> Tensor:
        """In four overlapping tiles if there is not enough memory for the whole."""
        with suppress(torch.OutOfMemoryError):
            whole: Tensor = self.vae.decode(latents, return_dict=False)[0]
            return whole
        # diffusers overlaps tiles by a quarter: of a multiple of 4, or the image gets another size.
        tile = 4 * math.ceil(max(latents.shape[2:]) / 6)
        self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = tile, tile * self.info.vae_factor
        self.vae.enable_tiling()
        try:
            tiled: Tensor = self.vae.decode(latents, return_dict=False)[0]
            return tiled
        finally:
            self.vae.disable_tiling()

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """As the stock pipeline's `encode_prompt`, without time ids; see `Base`."""
        return Condition.stack([self.encode_batch([caption])[0] for caption in captions])

    def encode_batch(self, captions: Sequence[str]) -> Condition:
        """See `Base`. The empty caption means no text at all.

        For most SDXL bases that is zeros, since Stability trained them so and the stock pipeline samples them
        so (`force_zeros_for_empty_prompt`).
        """
        self._load_text_encoders()
        pairs = zip(self.tokenizers, self.text_encoders, strict=True)
        states = [self._encode_text(list(captions), tokenizer, encoder) for tokenizer, encoder in pairs]
        hidden = torch.cat([hidden.float() for hidden, _ in states], dim=-1)
        pooled = states[-1][1]
        pooled = None if pooled is None else pooled.float()
        if self.info.zeroes_empty_prompt and not all(captions):
            empty = torch.tensor([not caption for caption in captions], device=hidden.device)
            hidden = hidden.masked_fill(empty[:, None, None], 0)
            pooled = None if pooled is None else pooled.masked_fill(empty[:, None], 0)
        return Condition(hidden, pooled)

    def _encode_text(
        self, captions: list[str], tokenizer: CLIPTokenizer, encoder: TextEncoder
    ) -> tuple[Tensor, Tensor | None]:
        """One text encoder's hidden states (B, L, D), and pooled states (B, P) if it has a projection.

        SD 1 and 2 read the last layer, or that of `clip_skip`, after the final norm; SDXL the last but one of
        both encoders, before it. Of several chunks, the states follow each other, and the first is pooled.
        """
        info = self.info
        if info.prompt_chunks == 1 and not info.prompt_weights:
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=info.text_length,
                truncation=True,
                return_tensors="pt",
            )
            return self._read_text(encoder, tokens.input_ids, tokens.attention_mask)
        ids, mask, weights = tokenize_chunks(
            tokenizer, captions, info.text_length, info.prompt_chunks, weighted=info.prompt_weights
        )
        hidden, pooled = self._read_text(encoder, torch.tensor(ids), torch.tensor(mask))
        hidden = hidden * torch.tensor(weights, device=hidden.device)[..., None]
        hidden = hidden.reshape(len(captions), info.num_text_states, -1)
        return hidden, None if pooled is None else pooled[:: info.prompt_chunks]

    def _read_text(self, encoder: TextEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, L, D) of token ids (B, L), and pooled states (B, P) if there is a projection."""
        ids = ids.to(encoder.device)
        with torch.autocast(encoder.device.type, enabled=False):
            if len(self.text_encoders) > 1:
                answer = encoder(ids, output_hidden_states=True)
                return answer.hidden_states[-2], answer.get("text_embeds")
            masked = getattr(encoder.config, "use_attention_mask", None)
            used = mask.to(encoder.device) if masked else None
            if self.info.clip_skip == 1:
                return encoder(ids, attention_mask=used)[0], None
            answer = encoder(ids, attention_mask=used, output_hidden_states=True)
            # newer transformers have no level text_model
            norm = getattr(encoder, "text_model", encoder).final_layer_norm
            return norm(answer.hidden_states[-self.info.clip_skip]), None

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        condition = condition.to(noisy.device, self.dtype)
        added = None
        if condition.time_ids is not None:
            added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        answer: Tensor = self.denoiser(
            noisy.to(self.dtype), timesteps, condition.hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return answer.float()

    def example_inputs(
        self, latents: tuple[int, int] | None = None, batch_size: int = 1
    ) -> tuple[Tensor, Tensor, Condition]:
        info, generator = self.info, torch.Generator().manual_seed(0)
        side = 4 * info.coarsest_px // info.vae_factor
        height, width = latents or (side, side)

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch_size, *shape, generator=generator).to(self.device, self.dtype)

        noisy = draw(info.latent_channels, height, width)
        timesteps = torch.full((batch_size,), info.num_train_timesteps // 2, device=self.device)
        condition = Condition(draw(info.num_text_states, info.text_width))
        if info.has_time_ids:
            size = (height * info.vae_factor, width * info.vae_factor)
            time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
            pooled = draw(info.pooled_width)
            condition = Condition(condition.hidden, pooled, time_ids.expand(batch_size, -1))
        return noisy, timesteps, condition

    def make_pipeline(self, scheduler: Any, *, from_image: bool = False) -> Any:
        kind = "Img2ImgPipeline" if from_image else "Pipeline"
        return pipeline_of(self.info, kind, unet=self.denoiser, scheduler=scheduler)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def wrap_denoiser(info: BaseInfo, denoiser: Any) -> StableDiffusion:
    """A base that can only denoise, around any UNet."""
    dtype = next(denoiser.parameters()).dtype
    vae: Any = None
    return StableDiffusion(info, denoiser, vae, (), (), dtype)


def pipeline_of(info: BaseInfo, kind: str = "Pipeline", /, **components: Any) -> Any:
    """The stock pipeline of a base around some components, by diffusers' names, and without the others.

    `kind` is the end of its name.
    """
    left_out = dict.fromkeys(("vae", *info.traits.text_encoders, *info.traits.tokenizers))
    with quiet():
        stock = getattr(diffusers, info.traits.pipeline.removesuffix("Pipeline") + kind)
        pipeline = stock(**{**left_out, **without_checker(info), **components})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_checker(info: BaseInfo) -> dict[str, Any]:
    """Arguments that leave out the safety checker, which the pipeline of SDXL does not have."""
    if info.family == "sdxl":
        return {}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
