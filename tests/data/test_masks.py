"""Masks: found beside their image, and scaled, cropped and mirrored like it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.buckets import Crop, plan_buckets
from sdlora.data.cache import latent_key
from sdlora.data.doctor import contact_sheet
from sdlora.data.findings import examine
from sdlora.data.images import crop_image, load_image
from sdlora.data.masks import crop_mask
from sdlora.data.records import Size
from sdlora.data.scan import scan_dataset
from sdlora.data.tensors import mask_to_tensor


def half(size: tuple[int, int]) -> Image.Image:
    """White on the left."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def scan(root: Path, **settings):
    return scan_dataset(root, DataSection(trigger="ink", heldout=0, **settings))


def test_masks_are_found_when_asked_for(tmp_path: Path, write_image) -> None:
    """R-14: by either name; alpha where there is no file; what is not asked for is a notice as before."""
    for name in ("a.png", "b.jpg", "c.png"):
        write_image(name)
    half((48, 32)).save(tmp_path / "a-masklabel.png")
    half((24, 16)).save(tmp_path / "b.mask.png")
    half((48, 32)).save(tmp_path / "gone-masklabel.png")
    index = scan(tmp_path)
    assert [record.mask for record in index.records] == [None] * 3
    assert len(index.noticed["data.image-mask"]) == 3
    assert not index.noticed["data.masks-missing"]
    index = scan(tmp_path, masks="files")
    assert [record.mask and record.mask.path.name for record in index.records] == [
        "a-masklabel.png",
        "b.mask.png",
        None,
    ]
    assert [*index.noticed["data.image-mask"]] == ["gone-masklabel.png"]
    assert not index.noticed["data.masks-missing"]
    kinds = [record.mask.is_alpha for record in scan(tmp_path, masks="both").records]
    assert kinds == [False, False, True]
    assert all(record.mask.is_alpha for record in scan(tmp_path, masks="alpha").records)
    for name in ("a-masklabel.png", "b.mask.png"):
        (tmp_path / name).unlink()
    assert [*scan(tmp_path, masks="files").noticed["data.masks-missing"]] == ["a.mask.png"]


def test_a_mask_must_fit(tmp_path: Path, write_image, found) -> None:
    """R-05: a mask of another shape, or that cannot be read, is an error with its name."""
    write_image("a.png")
    write_image("b.png")
    half((32, 48)).save(tmp_path / "a.mask.png")
    (tmp_path / "b.mask.png").write_bytes(b"no image")
    findings = found(scan(tmp_path, masks="files"))
    assert findings["error data.mask-shape"].names == ("a.png",)
    assert findings["error data.mask-unreadable"].names == ("b.mask.png",)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_mask_is_cropped_as_its_image(tmp_path: Path, flipped: bool) -> None:
    """R-15: the mask of a drawing is the drawing, at half its size too; so are their crops."""
    white = Image.new("RGB", (96, 64), "black")
    white.paste("white", (32, 8, 72, 48))
    white.save(tmp_path / "a.png")
    white.resize((48, 32), Image.Resampling.NEAREST).save(tmp_path / "a.mask.png")
    crop = Crop(Size(96, 64), 16, 0, Size(64, 64), flipped)
    [record] = scan(tmp_path, masks="files").records
    mask = crop_mask(record, crop)
    assert mask.mode == "L"
    image = crop_image(load_image(record.path), crop).convert("L")
    assert np.array_equal(np.asarray(mask), np.asarray(image))
    latent = mask_to_tensor(mask, 16)
    expected = torch.zeros(4, 4)
    # 40 x 40 px from (32, 8): columns 16-56 of the crop, in squares of 16 px
    expected[:, 1:4] = torch.tensor([[0.5, 0.5, 0.25], [1, 1, 0.5], [1, 1, 0.5], [0, 0, 0]])
    assert torch.equal(latent[0], expected.flip(1) if flipped else expected)


def test_alpha(tmp_path: Path) -> None:
    """R-14: transparency is the mask; an image without any counts everywhere."""
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    image.paste((0, 0, 200, 128), (0, 0, 16, 32))
    image.save(tmp_path / "a.png")
    image.convert("RGB").save(tmp_path / "b.png")
    crop = Crop(Size(32, 32), 0, 0, Size(32, 32))
    masks = [crop_mask(record, crop) for record in scan(tmp_path, masks="alpha").records]
    assert [mask.getpixel((3, 3)) for mask in masks] == [128, 255]
    assert [mask.getpixel((20, 3)) for mask in masks] == [0, 255]


def test_what_a_mask_changes(tmp_path: Path, write_image) -> None:
    """R-21: the digest of the data and the key of the latents, and neither without a mask."""
    write_image("a.png")
    [plain] = scan(tmp_path).records
    half((48, 32)).save(tmp_path / "a.mask.png")
    first, alpha = scan(tmp_path, masks="files"), scan(tmp_path, masks="alpha")
    half((48, 32)).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.mask.png")
    assert scan(tmp_path).records == (plain,)
    indices = [scan(tmp_path), scan(tmp_path, masks="files"), first, alpha]
    crop = Crop(Size(48, 32), 0, 0, Size(48, 32))
    keys = [
        latent_key(index.records[0], crop, vae_digest="v", background="white", dtype="float32")
        for index in indices
    ]
    assert len(set(keys)) == len({index.digest for index in indices}) == 4
    unmasked = replace(first.records[0], mask=None)
    assert latent_key(unmasked, crop, vae_digest="v", background="white", dtype="float32") == keys[0]


def test_the_sheet_shows_them(tmp_path: Path, write_image) -> None:
    """R-15: what does not count is tinted, and nothing else."""
    write_image("a.png", (32, 32))
    half((32, 32)).save(tmp_path / "a.mask.png")
    sheets = []
    for masks in ("none", "files"):
        settings = DataSection(trigger="ink", heldout=0, masks=masks)
        index = scan_dataset(tmp_path, settings)
        plan = plan_buckets(index.records, 32, settings)
        assert "error" not in {finding.severity for finding in examine(index, plan, settings, None)}
        sheets.append(np.asarray(contact_sheet(index, plan, settings)).astype(int))
    changed = np.argwhere((sheets[0] != sheets[1]).any(axis=2))
    height, width = np.ptp(changed, axis=0) + 1
    assert (height, width) == (32, 16)
    tinted = sheets[1][tuple(changed.T)]
    assert (tinted[:, 0] >= tinted[:, 2]).all()
    assert (tinted[:, 0] - tinted[:, 2]).max() > 20
