"""The four calls of a base, against the stock pipeline and the classes themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdlora.errors import ModelError
from sdlora.models.info import BaseInfo
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion

CAPTIONS = ["a tractor", "", "a cat. " * 40, "größe und 猫, emoji 🐈"]


def test_captions_are_encoded_as_the_pipeline_does(base: StableDiffusion, stock: Any) -> None:
    """R-20: equal to `encode_prompt`, padded and cut to the base's own length, for any text."""
    for caption in CAPTIONS:
        expected, negative = stock.encode_prompt(caption, torch.device("cpu"), 1, True, "")
        hidden = base.encode_captions([caption])
        assert hidden.shape == (1, base.info.text_length, base.info.unet_config["cross_attention_dim"])
        assert torch.equal(hidden, expected)
        assert torch.equal(base.encode_captions([""]), negative)


def test_a_caption_does_not_depend_on_its_neighbours(base: StableDiffusion) -> None:
    """R-10, R-20: cached one by one or encoded together, the states are the same bits."""
    together = base.encode_captions(CAPTIONS)
    for row, caption in zip(together, CAPTIONS, strict=True):
        assert torch.equal(row, base.encode_captions([caption])[0])
    assert not together.requires_grad


def test_images_are_encoded_as_the_vae_does(base: StableDiffusion) -> None:
    """R-20: mean and standard deviation of the posterior, in scaled units, float32."""
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = base.encode_images(pixels)
    scale = base.vae.config.scaling_factor
    for number in range(2):
        with torch.no_grad():
            posterior = base.vae.encode(pixels[number : number + 1]).latent_dist
        assert torch.equal(mean[number], posterior.mean[0] * scale)
        assert torch.equal(std[number], posterior.std[0] * scale)
    assert mean.shape == (
        2,
        base.info.latent_channels,
        64 // base.info.vae_factor,
        96 // base.info.vae_factor,
    )


def test_shift_is_applied_both_ways(info: BaseInfo) -> None:
    """R-20: a VAE with a shift factor."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    plain, _ = base.encode_images(pixels)
    decoded = base.decode_latents(plain)
    base.vae.register_to_config(shift_factor=0.25)
    shifted, _ = base.encode_images(pixels)
    assert torch.allclose(shifted, plain - 0.25 * base.vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(base.decode_latents(shifted), decoded, atol=1e-5)


def test_overflowing_vae_is_retried_in_fp32(info: BaseInfo) -> None:
    """R-22: fp16 overflows, fp32 does not; the VAE is put back as it was stored."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    base.vae.encoder.conv_in.weight.data *= 2e4
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    base.vae.half()
    with torch.no_grad():
        direct = base.vae.encode(pixels.half()).latent_dist.mean
    assert not torch.isfinite(direct).all()
    mean, std = base.encode_images(pixels)
    assert torch.isfinite(mean).all()
    assert torch.isfinite(std).all()
    assert base.vae.dtype == torch.float16


def test_latents_that_stay_non_finite_are_an_error(base: StableDiffusion) -> None:
    """R-22: never replaced silently; the caller knows the picture and names it."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 0, 3, 3] = torch.nan
    with pytest.raises(ModelError, match="non-finite latents"):
        base.encode_images(pixels)


def test_denoise_is_the_unet(base: StableDiffusion) -> None:
    """R-32: one timestep for each sample, the answer in float32."""
    noisy = torch.randn(2, base.info.latent_channels, 16, 16)
    hidden = base.encode_captions(["a", "b"])
    answer = base.denoise(noisy, torch.tensor([10, 900]), hidden)
    for row, timestep in enumerate((10, 900)):
        expected = base.unet(noisy[row : row + 1], timestep, hidden[row : row + 1]).sample
        assert torch.allclose(answer[row : row + 1], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_in_float32(info: BaseInfo, dtype: torch.dtype) -> None:
    """R-11: a base stored in half precision takes and gives float32."""
    base = load_base(info, dtype=dtype, device="cpu")
    answer = base.denoise(
        torch.randn(1, info.latent_channels, 16, 16), torch.tensor([500]), base.encode_captions(["a"])
    )
    assert answer.dtype == torch.float32
    assert torch.isfinite(answer).all()


@pytest.mark.parametrize("size_px", [(128, 96), (136, 120), (104, 72)])
def test_any_multiple_of_the_step_fits(base: StableDiffusion, size_px: tuple[int, int]) -> None:
    """R-15: `min_step` is the VAE's factor; the UNet takes odd latent sizes at every depth."""
    width, height = size_px
    assert base.info.min_step == base.info.vae_factor
    mean, _ = base.encode_images(torch.zeros(1, 3, height, width))
    answer = base.denoise(mean, torch.tensor([500]), base.encode_captions([""]))
    assert answer.shape == mean.shape
    assert base.decode_latents(answer).shape == (1, 3, height, width)


def test_decoding_is_the_vae_s(base: StableDiffusion) -> None:
    """R-18: pictures come back to the CPU; the VAE stays where it was."""
    latents = torch.randn(3, base.info.latent_channels, 8, 8)
    with torch.no_grad():
        expected = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    assert torch.equal(base.decode_latents(latents), expected)
