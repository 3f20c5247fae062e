"""A base's safety checker: the images it withholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from sdlora.errors import ModelError
from sdlora.models.base import quiet
from sdlora.models.components import find_weights, has_weights, read_header
from sdlora.models.info import BaseInfo
from sdlora.models.weights import UNFIT, reason_of

with quiet():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

CHECKER, EXTRACTOR, STEM = "safety_checker", "feature_extractor", "model"
REMEDY = "download or copy the base again, or set sample.safety_checker=false"


class SafetyChecker:
    """The base's safety checker, read from disk on its first use, and on the device only in a call."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self._parts: tuple[StableDiffusionSafetyChecker, CLIPImageProcessor] | None = None

    def __call__(self, images: Sequence[Image]) -> list[bool]:
        """Whether each image is withheld; the images do not change."""
        if self._parts is None:
            self._parts = self._load()
        model, extractor = self._parts
        with quiet(), torch.autocast(self.device.type, enabled=False):
            pixels = extractor(list(images), return_tensors="pt").pixel_values.to(self.device)
            # It blackens images in place, hence the copies.
            copies = [np.array(image) for image in images]
            try:
                flags: list[bool] = model.to(self.device)(clip_input=pixels, images=copies)[1]
            finally:
                model.to("cpu")
        return flags

    def _load(self) -> tuple[StableDiffusionSafetyChecker, CLIPImageProcessor]:
        folder = self.folder / CHECKER
        _, variant = find_weights(folder, STEM, f"the base {self.folder}")
        try:
            with quiet():
                model, report = StableDiffusionSafetyChecker.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    variant=variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
                extractor = CLIPImageProcessor.from_pretrained(self.folder / EXTRACTOR, local_files_only=True)
        except UNFIT as error:
            problem = f"cannot load {folder} ({reason_of(error)}); {REMEDY}"
            raise ModelError(problem, key="sample.safety_checker") from None
        if missing := report["missing_keys"]:
            problem = f"{folder} lacks {len(missing)} weights ({min(missing)} …); {REMEDY}"
            raise ModelError(problem, key="sample.safety_checker")
        return model.requires_grad_(False).eval(), extractor


def find_checker(info: BaseInfo, device: torch.device | str) -> SafetyChecker | None:
    """The safety checker that a base names, if its files are there; it is never downloaded."""
    return SafetyChecker(info.path, device) if _has_files(info) else None


def missing_checker(info: BaseInfo) -> str | None:
    """A warning if the files of a safety checker are missing; raises a ModelError if they are damaged."""
    if not info.names_safety_checker:
        return None
    if _has_files(info):
        for file in find_weights(info.path / CHECKER, STEM, f"the base {info.path}")[0]:
            read_header(file)
        return None
    return (
        f"the base {info.name} names a safety checker, but its files are missing in {info.path}: images are "
        "not checked; add safety_checker/ and feature_extractor/, or set sample.safety_checker=false"
    )


def _has_files(info: BaseInfo) -> bool:
    configs = (info.path / CHECKER / "config.json", info.path / EXTRACTOR / "preprocessor_config.json")
    return all(config.is_file() for config in configs) and has_weights(info.path / CHECKER, STEM)
