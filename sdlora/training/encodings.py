"""Latents and text states of images and captions, from the cache or from the encoders.

C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.data.buckets import Crop
from sdlora.data.cache import TensorCache, TensorShapes, cache_folder, latent_key, text_key
from sdlora.data.images import crop_image, load_record, vary_colors
from sdlora.data.masks import crop_mask
from sdlora.data.records import ImageRecord, count_of
from sdlora.data.tensors import crop_to_time_ids, image_to_tensor, mask_to_tensor
from sdlora.errors import DataError, ModelError
from sdlora.models.base import Base, Condition, freed_memory_kept
from sdlora.report.terminal import Terminal
from sdlora.training.adapter import text_digest
from sdlora.training.distributed import barrier, work_in_rounds
from sdlora.training.plan import RunPlan

View = tuple[ImageRecord, Crop]
NUM_AHEAD = 3


class Encodings:
    """Latents and text states of a run, from its cache; without one, encoded again at each use.

    Each image or caption is encoded alone, never in a batch, so that its bits do not depend on its neighbours
    and a cached run equals an uncached one. Text encoders that are trained encode captions at each use, with
    gradients.
    """

    def __init__(self, base: Base, plan: RunPlan) -> None:
        self.base = base
        self.settings = plan.config.data
        self.text_learns = plan.config.lora.text_encoder
        self.text_digest = text_digest(plan.info, plan.parents)
        self.cache = None if self.settings.cache is False else TensorCache(cache_folder())

    def prepare(self, items: Iterable[str | View], accelerator: Accelerator, terminal: Terminal) -> None:
        """Encodes the captions and images that are missing in the cache, each process a share."""
        assert self.cache is not None
        known = self.cache.contains
        items = {self._entry(item)[0]: item for item in items}.values()
        missing = [item for item in items if not known(*self._entry(item))]
        # All processes look for missing entries before one of them adds any.
        barrier(accelerator)
        self._encode(missing[accelerator.process_index :: accelerator.num_processes], accelerator, terminal)
        # Entries of other processes that are missing here: a host with a cache of its own.
        rest = [item for item in missing if not known(*self._entry(item))]
        self._encode(rest, accelerator, terminal)

    def _encode(self, items: Sequence[str | View], accelerator: Accelerator, terminal: Terminal) -> None:
        progress = terminal.progress("encoding", len(items))
        with progress as meter, ThreadPoolExecutor(1) as pool, freed_memory_kept():
            coming: dict[int, Future[Tensor]] = {}

            def encode(number: int) -> None:
                # Images are decoded in another thread while the VAE works: this one and the next two.
                for ahead, item in enumerate(items[number : number + NUM_AHEAD], number):
                    if not isinstance(item, str) and ahead not in coming:
                        coming[ahead] = pool.submit(self._pixels, *item)
                item = items[number]
                if isinstance(item, str):
                    self.condition(item)
                else:
                    self.posterior(*item, coming.pop(number).result)
                meter.advance()

            work_in_rounds(accelerator, range(len(items)), encode)

    def check_cache(self, terminal: Terminal) -> None:
        """Warns of damaged files, and of a cache that cannot be written (required, it is a DataError)."""
        if self.cache is None:
            return
        if damaged := sorted(map(str, self.cache.damaged)):
            count = count_of(len(damaged), "damaged file")
            terminal.warn(f"the cache had {count}, encoded again: {damaged[0]}")
        if problem := self.cache.problem:
            if self.settings.cache is True:
                remedy = "set SDLORA_CACHE to a writable folder"
                raise DataError(f"{problem}, but data.cache = true requires it; {remedy}", key="data.cache")
            terminal.warn(problem)

    def _pixels(self, record: ImageRecord, crop: Crop) -> Tensor:
        """The crop of an image, (3, height, width) in [-1, 1]."""
        # In fp32 latents stay as earlier versions made them.
        target = crop.resized if self.base.vae.dtype == torch.bfloat16 else None
        image = crop_image(load_record(record, self.settings.background, target), crop)
        return image_to_tensor(vary_colors(image, crop))

    def posterior(
        self, record: ImageRecord, crop: Crop, pixels: Callable[[], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, each (C, H, W) on the CPU.

        `pixels` returns the image if it is decoded elsewhere.

        Raises a DataError if the image is missing or has changed since it was scanned, and a ModelError with
        its name if the latents are not finite.
        """
        known = self._image(record, crop, pixels)
        return known["mean"], known["std"]

    def masks(self, views: Sequence[View]) -> Tensor | None:
        """What counts of each image, (B, 1, H, W) in [0, 1] on the CPU; None if all of every image does."""
        if all(record.mask is None for record, _ in views):
            return None
        return torch.stack([self._mask(*view) for view in views])

    def _mask(self, record: ImageRecord, crop: Crop) -> Tensor:
        factor = self.base.info.vae_factor
        if record.mask is None:
            return torch.ones(1, crop.size.height // factor, crop.size.width // factor)
        if self.cache is not None:
            return self._image(record, crop)["mask"]
        return mask_to_tensor(crop_mask(record, crop), factor)

    def _image(
        self, record: ImageRecord, crop: Crop, pixels: Callable[[], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """`mean` and `std` of an image, and `mask` if it has one; with a cache, all of them are in it."""

        def encode() -> dict[str, Tensor]:
            image = pixels() if pixels else self._pixels(record, crop)
            try:
                mean, std = self.base.encode_images(image[None])
            except ModelError as error:
                raise ModelError(f"{record.name}: {error}", key="".join(error.keys)) from None
            found = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            if record.mask is not None and self.cache is not None:
                found["mask"] = mask_to_tensor(crop_mask(record, crop), self.base.info.vae_factor)
            return found

        return self._cached((record, crop), encode)

    def condition(self, caption: str) -> Condition:
        """A caption's text states, on the CPU."""

        @torch.no_grad()
        def encode() -> dict[str, Tensor]:
            states = self.base.encode_captions([caption])[0].to("cpu")
            return {"hidden": states.hidden} | ({} if states.pooled is None else {"pooled": states.pooled})

        known = self._cached(caption, encode)
        return Condition(known["hidden"], known.get("pooled"))

    def _cached(self, item: str | View, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.cache is None:
            return encode()
        key, shapes = self._entry(item)
        known = self.cache.get(key, shapes)
        if known is None:
            known = encode()
            self.cache.put(key, known)
        return known

    def conditions(self, captions: Sequence[str], views: Sequence[View]) -> Condition:
        """The condition of a batch: captions and, where the base reads them, sizes of images."""
        if self.text_learns:
            together = self.base.encode_batch(captions)
        else:
            together = Condition.stack([self.condition(caption) for caption in captions])
        if not self.base.info.has_time_ids:
            return together
        sizes = [crop_to_time_ids(record.size, crop) for record, crop in views]
        return together.with_time_ids(torch.stack(sizes))

    def _entry(self, item: str | View) -> tuple[str, TensorShapes]:
        """Key of a caption or an image in the cache, and the shapes of its tensors."""
        info = self.base.info
        if isinstance(item, str):
            key = text_key(item, encoder_digest=self.text_digest, dtype=str(self.base.text_dtype))
            pooled: TensorShapes = {"pooled": (info.pooled_width,)} if info.has_time_ids else {}
            return key, {"hidden": (info.num_text_states, info.text_width), **pooled}
        size = item[1].size
        shape = (info.latent_channels, size.height // info.vae_factor, size.width // info.vae_factor)
        dtype, background = str(self.base.vae.dtype), self.settings.background
        key = latent_key(*item, vae_digest=info.vae_digest, background=background, dtype=dtype)
        mask: TensorShapes = {} if item[0].mask is None else {"mask": (1, *shape[1:])}
        return key, {"mean": shape, "std": shape, **mask}
