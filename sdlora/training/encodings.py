"""Latents and text states of images and captions, from the cache or from the encoders (R-20).

C channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from sdlora.config import DataSection
from sdlora.data.buckets import Crop
from sdlora.data.cache import TensorCache, TensorShapes, latent_key, text_key
from sdlora.data.images import crop_image, load_record
from sdlora.data.records import ImageRecord, count_of
from sdlora.data.tensors import crop_to_time_ids, image_to_tensor
from sdlora.errors import DataError, ModelError
from sdlora.models.base import Base, Condition
from sdlora.report.terminal import Terminal
from sdlora.training.distributed import barrier, work_in_rounds

View = tuple[ImageRecord, Crop]


class Encodings:
    """What the denoiser trains on.

    Each image or caption is encoded alone, never in a batch, so that its bits do not depend on its neighbours
    and a cached run equals an uncached one.

    Args:
        base: Its encoders.
        cache: None encodes again at each use.
        settings: Background color, and whether the cache is required.
        text_learns: Text encoders are trained: captions are encoded at each use, with gradients (R-34).
        text_digest: Of the text encoders with the parents' changes; the base's own by default.
    """

    def __init__(
        self,
        base: Base,
        cache: TensorCache | None,
        settings: DataSection,
        *,
        text_learns: bool,
        text_digest: str | None = None,
    ) -> None:
        self.base = base
        self.text_learns = text_learns
        self.text_digest = text_digest or base.info.text_digest
        self.cache = cache
        self.background = settings.background
        self.is_required = settings.cache is True

    def prepare(
        self, views: Iterable[View], captions: Iterable[str], accelerator: Accelerator, terminal: Terminal
    ) -> None:
        """Encodes what is missing in the cache, each process a share.

        Args:
            views: Images with their crops.
            captions: All captions in use.
            accelerator: Its processes.
            terminal: Shows progress.
        """
        if self.cache is None:
            return
        jobs: list[str | View] = [] if self.text_learns else [*dict.fromkeys(captions)]
        jobs += {self._latent_key(*view): view for view in views}.values()
        jobs = [job for job in jobs if not self._is_known(job)]
        # All processes look for missing entries before one of them adds any.
        barrier(accelerator)
        self._encode(jobs[accelerator.process_index :: accelerator.num_processes], accelerator, terminal)
        # Entries of other processes that are missing here: a host with a cache of its own.
        self._encode([job for job in jobs if not self._is_known(job)], accelerator, terminal)

    def check_cache(self, terminal: Terminal) -> None:
        """Warns of damaged cache files, and of a cache that cannot be written.

        Raises:
            DataError: If `data.cache = true` requires it.
        """
        if self.cache is None:
            return
        if damaged := sorted(map(str, self.cache.damaged)):
            terminal.warn(
                f"the cache had {count_of(len(damaged), 'damaged file')}, encoded again: {damaged[0]}"
            )
        if self.cache.problem:
            if self.is_required:
                raise DataError(
                    f"{self.cache.problem}, but data.cache = true requires it; set SDLORA_CACHE to a folder",
                    key="data.cache",
                )
            terminal.warn(self.cache.problem)

    def _encode(self, jobs: Sequence[str | View], accelerator: Accelerator, terminal: Terminal) -> None:
        """Encodes captions and images."""
        with terminal.progress("encoding", len(jobs)) as meter:

            def encode(job: str | View) -> None:
                self.condition(job) if isinstance(job, str) else self.posterior(*job)
                meter.advance()

            work_in_rounds(accelerator, jobs, encode)

    def posterior(self, record: ImageRecord, crop: Crop) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, each (C, H, W) on the CPU.

        Raises:
            DataError: If the image is missing or has changed since it was scanned.
            ModelError: If the latents are not finite, naming the image.
        """
        key = self._latent_key(record, crop)
        known = self.cache.get(key, self._latent_shapes(crop)) if self.cache else None
        if known is None:
            image = crop_image(load_record(record, self.background), crop)
            try:
                mean, std = self.base.encode_images(image_to_tensor(image)[None])
            except ModelError as error:
                raise ModelError(f"{record.name}: {error}") from None
            known = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            if self.cache:
                self.cache.put(key, known)
        return known["mean"], known["std"]

    def condition(self, caption: str) -> Condition:
        """A caption's text states, on the CPU."""
        key = self._text_key(caption)
        known = self.cache.get(key, self._text_shapes()) if self.cache else None
        if known is None:
            with torch.no_grad():
                states = self.base.encode_captions([caption])[0].to("cpu")
            known = {"hidden": states.hidden} | ({} if states.pooled is None else {"pooled": states.pooled})
            if self.cache:
                self.cache.put(key, known)
        return Condition(known["hidden"], known.get("pooled"))

    def conditions(self, captions: Sequence[str], views: Sequence[View]) -> Condition:
        """The condition of a batch: captions and, where the base reads them, sizes of images (R-31)."""
        if self.text_learns:
            together = self.base.encode_batch(captions)
        else:
            together = Condition.stack([self.condition(caption) for caption in captions])
        if not self.base.info.has_time_ids:
            return together
        sizes = [crop_to_time_ids(record.size, crop) for record, crop in views]
        return together.with_time_ids(torch.stack(sizes))

    def _is_known(self, job: str | View) -> bool:
        """Whether the cache has a caption or image."""
        assert self.cache is not None
        if isinstance(job, str):
            return self.cache.contains(self._text_key(job), self._text_shapes())
        return self.cache.contains(self._latent_key(*job), self._latent_shapes(job[1]))

    def _latent_shapes(self, crop: Crop) -> TensorShapes:
        info = self.base.info
        sides = (crop.size.height // info.vae_factor, crop.size.width // info.vae_factor)
        return dict.fromkeys(("mean", "std"), (info.latent_channels, *sides))

    def _text_shapes(self) -> TensorShapes:
        info = self.base.info
        pooled: TensorShapes = {"pooled": (info.pooled_width,)} if info.has_time_ids else {}
        return {"hidden": (info.text_length, info.text_width), **pooled}

    def _latent_key(self, record: ImageRecord, crop: Crop) -> str:
        return latent_key(
            record,
            crop,
            vae_digest=self.base.info.vae_digest,
            background=self.background,
            dtype=str(self.base.vae.dtype),
        )

    def _text_key(self, caption: str) -> str:
        dtype = str(self.base.text_dtype)
        return text_key(caption, encoder_digest=self.text_digest, dtype=dtype)
