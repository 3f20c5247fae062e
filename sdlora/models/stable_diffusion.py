"""A Stable Diffusion in use: frozen parts, and the four things done with them.

B batch, C channels, H W image size, h w latent size, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.errors import ModelError
from sdlora.models.conditioning import Condition
from sdlora.models.info import BaseInfo
from sdlora.models.quiet import quiet
from sdlora.models.tokenizer import TokenCount, count_tokens

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

# A decoder needs gigabytes for each megapixel: small images are decoded together, large ones one by one.
DECODE_AT_ONCE_PX = 512 * 512


@dataclass(eq=False)
class StableDiffusion:
    """A loaded base: everything in eval mode and without gradients.

    Args:
        text_encoders: One, or SDXL's two; `tokenizers` likewise.
        dtype: Of the UNet; text encoders are fp32, the VAE fp32 unless bf16 is known to suit it.
        withhold: A safety checker: for each image, whether it must not be shown.
    """

    info: BaseInfo
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    dtype: torch.dtype
    withhold: Callable[[Sequence[Image]], Sequence[bool]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return torch.device(next(self.unet.parameters()).device)

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts that can carry adapters, by their names in LoRA files."""
        texts = zip(self.info.traits.text_encoders, self.text_encoders, strict=True)
        return {"unet": self.unet, **dict(texts)}

    @property
    def dtypes(self) -> dict[str, str]:
        """Effective dtype of each part, with the layers of fewer bits (R-11)."""
        parts = {"unet": self.dtype, "vae": self.vae.dtype}
        parts |= dict.fromkeys(self.info.traits.text_encoders, self.text_dtype)
        names = {name: str(dtype).removeprefix("torch.") for name, dtype in parts.items()}
        if self.info.quantize != "none":
            names["unet"] += f" with {self.info.quantize} layers"
        return names

    @property
    def text_dtype(self) -> torch.dtype:
        """Of the text encoders."""
        dtype: torch.dtype = self.text_encoders[0].dtype
        return dtype

    def encoders_to(self, device: torch.device | str) -> None:
        """Moves VAE and text encoders; the UNet stays."""
        self.vae.to(device)
        self.text_encoders_to(device)

    def text_encoders_to(self, device: torch.device | str) -> None:
        """Moves the text encoders."""
        for part in self.text_encoders:
            part.to(device)

    def enable_gradient_checkpointing(self, *, text: bool) -> None:
        """Computes activations anew where gradients need them, in the UNet and in text encoders that learn.

        diffusers and transformers do so in train mode alone; it changes nothing else in these networks.
        """
        self.unet.enable_gradient_checkpointing()
        self.unet.train()
        for encoder in self.text_encoders if text else ():
            # transformers renamed it.
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
            encoder.train()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of images, in the units that the UNet works in.

        One image at a time: batching gains nothing (the VAE fills the device alone), and an image's
        latents must not depend on its neighbours.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation, each (B, C, h, w) in float32.

        Raises:
            ModelError: If the VAE gives non-finite numbers even in fp32 (R-22).
        """
        moments = [self._encode_image(image[None]) for image in pixels]
        return torch.cat([mean for mean, _ in moments]), torch.cat([std for _, std in moments])

    def _encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._posterior(pixels)
        if not _all_finite(mean, std) and self.vae.dtype != torch.float32:
            with self._vae_in_fp32():
                mean, std = self._posterior(pixels)
        if not _all_finite(mean, std):
            raise ModelError(
                "the VAE gives non-finite latents for this image, in fp32 too; "
                "check the image, or give another base.vae"
            )
        return mean, std

    @contextmanager
    def _vae_in_fp32(self) -> Iterator[None]:
        stored = self.vae.dtype
        # diffusers warns of each cast.
        with quiet():
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            with quiet():
                self.vae.to(stored)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self._latent_units()
        with torch.autocast(self.vae.device.type, enabled=False):
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def _latent_units(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.get("shift_factor") or 0.0), float(config.scaling_factor)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images from latents, with the VAE on the UNet's device only meanwhile (R-18).

        Args:
            latents: (B, C, h, w) as the UNet works with them.

        Returns:
            (B, 3, H, W) in about [-1, 1], float32, on the CPU. A VAE that overflows is run in fp32 (R-22);
            what is not finite then either comes from the latents.
        """
        home = self.vae.device
        try:
            self.vae.to(self.device)
            images = self._decode(latents)
            if not _all_finite(images) and _all_finite(latents) and self.vae.dtype != torch.float32:
                with self._vae_in_fp32():
                    images = self._decode(latents)
            return images
        finally:
            self.vae.to(home)

    def _decode(self, latents: Tensor) -> Tensor:
        side_px = self.info.vae_factor
        at_once = max(1, DECODE_AT_ONCE_PX // (latents.shape[2] * latents.shape[3] * side_px**2))
        shift, scale = self._latent_units()
        images = [
            self.vae.decode(part.to(self.device, self.vae.dtype) / scale + shift, return_dict=False)[0]
            for part in latents.split(at_once)
        ]
        return torch.cat([part.float().cpu() for part in images])

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """Text states of captions, as the stock pipeline's `encode_prompt` makes them, without time ids.

        One caption at a time, so that its states do not depend on its neighbours (R-10, R-20).

        Returns:
            hidden (B, L, D) and, for SDXL, pooled (B, P) in float32, on the text encoders' device.
        """
        return Condition.stack([self.encode_together([caption])[0] for caption in captions])

    def encode_together(self, captions: Sequence[str]) -> Condition:
        """As `encode_captions`, all in one pass, as text encoders that learn see a batch.

        The empty caption is what the base takes for no text at all: for most SDXL bases zeros, since
        Stability trained them so and the stock pipeline samples them so (`force_zeros_for_empty_prompt`).
        There are gradients only where an adapter that needs them is mounted on a text encoder.
        """
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
        """What one text encoder gives: hidden states (B, L, D), and (B, P) if it has a projection.

        SD 1 and 2 read the last layer; SDXL the last but one of both encoders, before the final norm.
        """
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=self.info.text_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(encoder.device)
        with torch.autocast(encoder.device.type, enabled=False):
            if len(self.text_encoders) > 1:
                answer = encoder(ids, output_hidden_states=True)
                return answer.hidden_states[-2], answer.get("text_embeds")
            masked = getattr(encoder.config, "use_attention_mask", None)
            mask = tokens.attention_mask.to(encoder.device) if masked else None
            return encoder(ids, attention_mask=mask)[0], None

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The UNet's answer.

        Args:
            noisy: (B, C, h, w).
            timesteps: (B,).
            condition: hidden (B, L, D); for SDXL also pooled (B, P) and time ids (B, 6).

        Returns:
            (B, C, h, w) in float32.
        """
        condition = condition.to(noisy.device, self.dtype)
        added = None
        if condition.time_ids is not None:
            added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        answer: Tensor = self.unet(
            noisy.to(self.dtype), timesteps, condition.hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return answer.float()

    def count_tokens(self, caption: str) -> TokenCount:
        """The caption as the text encoders see it; SDXL's two read the same tokens."""
        return count_tokens(self.tokenizers[0], self.info.text_length, caption)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
