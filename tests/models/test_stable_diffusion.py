"""The four calls of a base, against the stock pipeline and the classes themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.data.buckets import Crop
from sdlora.data.records import Size
from sdlora.data.tensors import crop_to_time_ids
from sdlora.errors import ModelError
from sdlora.models.base import Condition
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from tests.checks import raises
from tests.stock import load_stock_pipeline

CAPTIONS = ["a tractor", "", "a cat. " * 40, "größe und 猫, emoji 🐈"]


def test_captions_are_encoded_as_the_pipeline_does(base: StableDiffusion, stock: Any) -> None:
    """R-20: equal to `encode_prompt`, padded and cut to the base's own length, for any text."""
    for caption in CAPTIONS:
        expected, negative = stock.encode_prompt(caption, torch.device("cpu"), 1, True, "")
        condition = base.encode_captions([caption])
        width = base.info.denoiser_config["cross_attention_dim"]
        assert condition.hidden.shape == (1, base.info.text_length, width)
        # Two copies of the weights, read by two loaders: not the same computation.
        torch.testing.assert_close(condition.hidden, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(base.encode_captions([""]).hidden, negative, rtol=1e-5, atol=1e-5)
        assert condition.pooled is None
        assert condition.time_ids is None


def test_captions_of_sdxl_are_encoded_as_the_pipeline_does(sdxl: StableDiffusion, sdxl_stock: Any) -> None:
    """R-31: both encoders' last layer but one, and the second's pooled states; each with its own padding."""
    for caption in ("a tractor", "a cat. " * 40, "größe und 猫, emoji 🐈"):
        hidden, _, pooled, _ = sdxl_stock.encode_prompt(caption)
        condition = sdxl.encode_captions([caption])
        assert condition.hidden.shape == (1, 32, 16 + 24)
        torch.testing.assert_close(condition.hidden, hidden, rtol=1e-5, atol=1e-5)
        assert condition.pooled is not None
        torch.testing.assert_close(condition.pooled, pooled, rtol=1e-5, atol=1e-5)
    one, other = (sdxl.encode_captions([caption]) for caption in ("a tractor", "a cat"))
    assert (one.hidden - other.hidden).abs().max() > 0.1
    tokens = [tokenizer(["a"], padding="max_length", max_length=32) for tokenizer in sdxl.tokenizers]
    assert tokens[0].input_ids != tokens[1].input_ids


@pytest.mark.parametrize("zeroes", [True, False])
def test_empty_caption_is_what_the_pipeline_takes_for_none(
    sdxl_folder: Path, copy_folder: Callable[..., Path], zeroes: bool
) -> None:
    """R-31, R-35: `force_zeros_for_empty_prompt`, when sampling and for a caption that was dropped."""
    folder = copy_folder(sdxl_folder, model_index={"force_zeros_for_empty_prompt": zeroes})
    info = inspect_base(BaseSection(source=str(folder)))
    _, hidden, _, pooled = load_stock_pipeline(info).encode_prompt("a", negative_prompt=None)
    condition = load_base(info, dtype=torch.float32, device="cpu").encode_captions([""])
    assert condition.pooled is not None
    torch.testing.assert_close(condition.hidden, hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(condition.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert bool(condition.hidden.any()) is not zeroes


def test_a_caption_does_not_depend_on_its_neighbours(base: StableDiffusion) -> None:
    """R-10, R-20: cached one by one or encoded together, the states are the same bits."""
    together = base.encode_captions(CAPTIONS)
    for row, caption in zip(together.hidden, CAPTIONS, strict=True):
        assert torch.equal(row, base.encode_captions([caption]).hidden[0])
    assert not together.hidden.requires_grad


def test_conditions_are_stacked_and_moved(sdxl: StableDiffusion) -> None:
    """R-31: a batch is a row for each caption (not six rows of sizes); sizes stay exact in half precision."""
    captions = ["a cat", "a tractor"]
    sizes = torch.tensor([[1023.0, 777.0, 3.0, 5.0, 64.0, 64.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]])
    together = sdxl.encode_captions(captions)
    assert len(together) == 2
    rows = [together[n].with_time_ids(size) for n, size in enumerate(sizes)]
    stacked = Condition.stack(rows)
    assert stacked.time_ids is not None
    assert stacked.time_ids.shape == (2, 6)
    assert torch.equal(stacked.hidden, together.hidden)
    assert torch.equal(stacked.pooled, together.pooled)
    half = stacked.to("cpu", torch.bfloat16)
    assert (half.hidden.dtype, half.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.time_ids, sizes)
    assert torch.equal(half[1].time_ids, sizes[1])


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


def test_an_overflowing_decoder_is_retried_in_fp32(info: BaseInfo) -> None:
    """R-22: a picture that fp16 would make black is the one of fp32; what is not finite itself stays so."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    base.vae.decoder.conv_in.weight.data *= 2e4
    latents = torch.randn(1, base.info.latent_channels, 4, 4)
    base.vae.half()
    with torch.no_grad():
        direct = base.vae.decode(latents.half()).sample
    assert not torch.isfinite(direct).all()
    assert torch.isfinite(base.decode_latents(latents)).all()
    assert base.vae.dtype == torch.float16
    assert not torch.isfinite(base.decode_latents(latents * torch.nan)).any()


def test_latents_that_stay_non_finite_are_an_error(base: StableDiffusion) -> None:
    """R-22: never replaced silently; the caller knows the picture and names it."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, 0, 3, 3] = torch.nan
    with raises(ModelError, "base.non-finite-latents"):
        base.encode_images(pixels)


def test_denoise_is_the_unet(base: StableDiffusion) -> None:
    """R-32: one timestep for each sample, the answer in float32."""
    noisy = torch.randn(2, base.info.latent_channels, 16, 16)
    condition = base.encode_captions(["a", "b"])
    answer = base.denoise(noisy, torch.tensor([10, 900]), condition)
    for row, timestep in enumerate((10, 900)):
        expected = base.denoiser(noisy[row : row + 1], timestep, condition.hidden[row : row + 1]).sample
        assert torch.allclose(answer[row : row + 1], expected, atol=1e-5)


@torch.no_grad()
def test_denoise_is_the_sdxl_pipeline_s_call(sdxl: StableDiffusion, sdxl_stock: Any) -> None:
    """R-31: the answer of the stock pipeline's UNet call for the same prompt, size and crop."""
    original, corner, target = (200, 300), (4, 6), (64, 96)
    seen: dict[str, Any] = {}

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.update(kwargs, noisy=args[0], timestep=args[1], answer=output[0])

    hook = sdxl_stock.unet.register_forward_hook(remember, with_kwargs=True)
    try:
        sdxl_stock(
            "a tractor",
            num_inference_steps=1,
            guidance_scale=1.0,
            height=target[0],
            width=target[1],
            original_size=original,
            crops_coords_top_left=corner,
            target_size=target,
            output_type="latent",
        )
    finally:
        hook.remove()
    crop = Crop(Size(105, 70), left=corner[1], top=corner[0], size=Size(target[1], target[0]))
    sizes = crop_to_time_ids(Size(original[1], original[0]), crop)
    assert torch.equal(sizes[None], seen["added_cond_kwargs"]["time_ids"])
    condition = sdxl.encode_captions(["a tractor"])[0].with_time_ids(sizes)
    answer = sdxl.denoise(seen["noisy"], seen["timestep"], Condition.stack([condition]))
    torch.testing.assert_close(answer, seen["answer"], rtol=1e-5, atol=1e-5)
    other = condition.with_time_ids(sizes + 1)
    moved = sdxl.denoise(seen["noisy"], seen["timestep"], Condition.stack([other]))
    assert float((moved - answer).abs().max()) > 1e-4


def test_components_are_named_as_in_files(base: StableDiffusion, sdxl: StableDiffusion) -> None:
    """R-34: what can carry an adapter, one text encoder or two."""
    assert base.components == {"unet": base.denoiser, "text_encoder": base.text_encoders[0]}
    first, second = sdxl.text_encoders
    assert sdxl.components == {"unet": sdxl.denoiser, "text_encoder": first, "text_encoder_2": second}
    assert set(sdxl.dtypes) == {"unet", "vae", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_in_float32(info: BaseInfo, dtype: torch.dtype) -> None:
    """R-11: a base stored in half precision takes and gives float32."""
    base = load_base(info, dtype=dtype, device="cpu")
    answer = base.denoise(
        torch.randn(1, info.latent_channels, 16, 16), torch.tensor([500]), base.encode_captions(["a"])
    )
    assert answer.dtype == torch.float32
    assert torch.isfinite(answer).all()


def test_tiles_if_memory_runs_out(info: BaseInfo) -> None:
    """R-18: an image that does not fit in memory is decoded in tiles, with hardly a difference."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    latents = base.encode_images(torch.linspace(-1, 1, 128).expand(1, 3, 128, 128))[0]
    whole, decoder = base.decode_latents(latents), base.vae.decoder.forward

    def decode(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[-1] == latents.shape[-1]:
            raise torch.OutOfMemoryError("out of memory")
        return decoder(hidden)

    base.vae.decoder.forward = decode
    tiled = base.decode_latents(latents)
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < 0.05
    assert not base.vae.use_tiling


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
        units = (latents / base.vae.config.scaling_factor).split(1)
        expected = torch.cat([base.vae.decode(one).sample for one in units])
    assert torch.equal(base.decode_latents(latents), expected)
