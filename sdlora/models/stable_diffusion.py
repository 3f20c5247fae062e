"""A Stable Diffusion in use: frozen parts, and the four things done with them.

B batch, C channels, H W picture size, h w latent size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.errors import ModelError
from sdlora.models.info import BaseInfo
from sdlora.models.tokens import TokenCount, count_tokens

# A decoder needs gigabytes for each megapixel: small pictures are decoded together, large ones one by one.
DECODE_AT_ONCE_PX = 512 * 512


@dataclass(eq=False)
class StableDiffusion:
    """A loaded base: everything in eval mode and without gradients.

    Args:
        dtype: Of the UNet; the text encoder is fp32, the VAE fp32 unless bf16 is known to suit it.
        withhold: A safety checker: for each picture, whether it must not be shown.
    """

    info: BaseInfo
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    dtype: torch.dtype
    withhold: Callable[[Sequence[Image]], Sequence[bool]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return torch.device(next(self.unet.parameters()).device)

    @property
    def dtypes(self) -> dict[str, str]:
        """Effective dtype of each part (R-11)."""
        parts = {"unet": self.dtype, "vae": self.vae.dtype, "text_encoder": self.text_encoder.dtype}
        return {name: str(dtype).removeprefix("torch.") for name, dtype in parts.items()}

    def encoders_to(self, device: torch.device | str) -> None:
        """Moves VAE and text encoder; the UNet stays."""
        self.vae.to(device)
        self.text_encoder.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of pictures, in the units that the UNet works in.

        One picture at a time: batching gains nothing (the VAE fills the device alone), and a picture's
        latents must not depend on its neighbours.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].

        Returns:
            Mean and standard deviation, each (B, C, h, w) in float32.

        Raises:
            ModelError: If the VAE gives non-finite numbers even in fp32 (R-22).
        """
        moments = [self._encode_image(picture[None]) for picture in pixels]
        return torch.cat([mean for mean, _ in moments]), torch.cat([std for _, std in moments])

    def _encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        stored = self.vae.dtype
        mean, std = self._posterior(pixels)
        if not _all_finite(mean, std) and stored != torch.float32:
            self.vae.to(torch.float32)
            mean, std = self._posterior(pixels)
            self.vae.to(stored)
        if not _all_finite(mean, std):
            raise ModelError(
                "the VAE gives non-finite latents for this picture, in fp32 too; "
                "check the picture, or give another base.vae"
            )
        return mean, std

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
        """Pictures from latents, with the VAE on the UNet's device only meanwhile (R-18).

        Args:
            latents: (B, C, h, w) as the UNet works with them.

        Returns:
            (B, 3, H, W) in about [-1, 1], float32, on the CPU.
        """
        home = self.vae.device
        side_px = self.info.vae_factor
        at_once = max(1, DECODE_AT_ONCE_PX // (latents.shape[2] * latents.shape[3] * side_px**2))
        shift, scale = self._latent_units()
        try:
            self.vae.to(self.device)
            pictures = [
                self.vae.decode(part.to(self.device, self.vae.dtype) / scale + shift, return_dict=False)[0]
                for part in latents.split(at_once)
            ]
            return torch.cat([part.float().cpu() for part in pictures])
        finally:
            self.vae.to(home)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Hidden states of captions, padded as the stock pipeline's `encode_prompt` pads them.

        One caption at a time, so that its states do not depend on its neighbours (R-10, R-20).

        Returns:
            (B, L, D) in float32, on the text encoder's device.
        """
        return torch.cat([self._encode_caption(caption) for caption in captions])

    def _encode_caption(self, caption: str) -> Tensor:
        tokens = self.tokenizer(
            [caption],
            padding="max_length",
            max_length=self.info.text_length,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        masked = getattr(self.text_encoder.config, "use_attention_mask", None)
        mask = tokens.attention_mask.to(device) if masked else None
        with torch.autocast(device.type, enabled=False):
            hidden: Tensor = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return hidden.float()

    def denoise(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """The UNet's answer.

        Args:
            noisy: (B, C, h, w).
            timesteps: (B,).
            hidden: (B, L, D).

        Returns:
            (B, C, h, w) in float32.
        """
        noisy, hidden = noisy.to(self.dtype), hidden.to(self.dtype)
        answer: Tensor = self.unet(noisy, timesteps, hidden, return_dict=False)[0]
        return answer.float()

    def count_tokens(self, caption: str) -> TokenCount:
        """The caption as the text encoder sees it."""
        return count_tokens(self.tokenizer, self.info.text_length, caption)


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
