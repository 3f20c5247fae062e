"""Masks: which part of an image counts in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from PIL import Image

from sdlora.data.buckets import Crop
from sdlora.data.folders import MASK
from sdlora.data.images import crop_image, load_alpha, load_record
from sdlora.data.records import ALPHA, ImageRecord, Mask, Noticed, Size

# Of the color that the contact sheet lays over what does not count.
SHADE, SHADE_ALPHA = "crimson", 0.6


def pair_masks(images: Iterable[str], masks: Iterable[str]) -> Mapping[str, str]:
    """The mask of each image that has one, by names: `a.mask.png` or `a-masklabel.png` for `a.jpg`."""
    owners = {str(PurePosixPath(image).with_suffix("")): image for image in images}
    found: dict[str, str] = {}
    for name in sorted(masks, reverse=True):  # the first in order wins
        match = MASK.fullmatch(str(PurePosixPath(name).with_suffix("")))
        if match and match[2] != "-condlabel" and match[1] in owners:
            found[owners[match[1]]] = name
    return found


Measure = Callable[[Sequence[Path]], Sequence[tuple[str, Size, bool] | str]]


def find_masks(
    root: Path, images: Sequence[str], kind: str, noticed: Noticed, measure: Measure
) -> dict[str, Mask]:
    """The masks of images by name, for a value of `data.masks`; a file that is used is not a notice anymore.

    `measure` returns the digest and the size of each file, or why it cannot be used.
    """
    found: dict[str, Mask] = {}
    if kind in ("alpha", "both"):
        found = {name: Mask(root / name, ALPHA) for name in images}
    if kind in ("files", "both"):
        masks = [name for name in noticed["data.image-mask"] if (root / name).is_file()]
        pairs = pair_masks(images, masks)
        measured = measure([root / mask for mask in pairs.values()])
        for (name, mask), facts in zip(pairs.items(), measured, strict=True):
            del noticed["data.image-mask"][mask]
            if isinstance(facts, str):
                noticed["data.mask-unreadable"][mask] = facts
            else:
                found[name] = Mask(root / mask, *facts[:2])
    return found


def crop_mask(record: ImageRecord, crop: Crop) -> Image.Image:
    """The mask of a record, white where it counts (mode L), scaled, cropped and mirrored as its image."""
    assert record.mask is not None
    if record.mask.is_alpha:
        mask = load_alpha(record.path)
    else:
        mask = load_record(replace(record, path=record.mask.path, digest=record.mask.digest), "black")
    return crop_image(mask.convert("L"), crop, Image.Resampling.BOX)


def shade_outside(image: Image.Image, record: ImageRecord, crop: Crop) -> Image.Image:
    """The crop of an image with a color over what its mask leaves out."""
    inside = crop_mask(record, crop)
    shaded = Image.blend(image, Image.new("RGB", image.size, SHADE), SHADE_ALPHA)
    return Image.composite(image, shaded, inside)
