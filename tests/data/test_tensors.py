"""Images and their sizes as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sdlora.config import DataSection
from sdlora.data.buckets import Crop, plan_buckets
from sdlora.data.images import crop_image, load_image
from sdlora.data.records import Size
from sdlora.data.scan import scan_dataset
from sdlora.data.tensors import crop_to_time_ids, image_to_tensor


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose red and green say where a pixel is."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def test_pixels_lie_between_minus_one_and_one() -> None:
    """R-20: as the VAE takes them, channels first."""
    image = Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))
    assert torch.equal(image_to_tensor(image).flatten(), torch.tensor([0, 255, 51]) / 127.5 - 1)


@pytest.mark.parametrize("flipped", [False, True])
def test_corner_is_where_the_seen_picture_begins(flipped: bool) -> None:
    """R-31: top and left are counted in the scaled image, mirrored first where the sample is."""
    whole = coordinates(80, 60)
    crop = Crop(Size(80, 60), left=7, top=11, size=Size(48, 32), flipped=flipped)
    original_height, original_width, top, left, height, width = map(
        int, crop_to_time_ids(Size(800, 600), crop)
    )
    assert (original_height, original_width) == (600, 800)
    assert (height, width) == (32, 48)
    shown = ImageOps.mirror(whole) if flipped else whole
    expected = shown.crop((left, top, left + width, top + height))
    assert np.array_equal(np.asarray(crop_image(whole, crop)), np.asarray(expected))


def test_sizes_of_a_picture_on_the_disk(tmp_path: Path) -> None:
    """R-31: the original size is that of the file as a viewer shows it, whatever it was scaled to."""
    exif = Image.Exif()
    exif[0x0112] = 6
    coordinates(120, 200).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "turned.txt").write_text("an image")
    settings = DataSection(heldout=0, crop="random")
    index = scan_dataset(tmp_path, settings, 0)
    [record] = index.records
    plan = plan_buckets(index.records, 64, settings)
    assert load_image(record.path).size == (200, 120)
    for crop in plan.crops[record.name]:
        sizes = crop_to_time_ids(record.size, crop).tolist()
        assert sizes[:2] == [120, 200]
        assert sizes[4:] == [crop.size.height, crop.size.width]
        assert 0 <= sizes[2] <= crop.resized.height - crop.size.height
        assert 0 <= sizes[3] <= crop.resized.width - crop.size.width
