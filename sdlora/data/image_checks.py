"""What `sdlora doctor` sees in the images themselves: near-copies, darkness, blur, borders, watermarks.

Each image is measured once, at a small size, and its figures are kept in the cache. N images, K kept pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sdlora.data.images import load_record
from sdlora.data.records import DatasetIndex, ImageRecord, Size
from sdlora.errors import SdloraError
from sdlora.reading import UnfitFileError, read_bytes
from sdlora.writing import write_file

Array = NDArray[np.float32]
Window = tuple[float, float, float, float]
# A change of the measures below changes the version.
VERSION = 2
SIDE = 512
THUMBNAIL, COARSE = 32, 8
CORNER = (48, 16)  # of 3/8 and 1/8 of the longer side
MAX_BYTES = 2**30
BLOCK = 256
FLAT = 4.0
# Distances relative to the contrast of the images: of a pair that may be copies, and of one that is.
NEAR_COARSE, NEAR, NEAR_CROP = 0.5, 0.15, 0.22
WHOLE, CROPS = (0.0, 0.0, 1.0, 1.0), (0.9, 0.8, 0.7, 0.6)
NUDGES = (0.025, 0.025, 0.01, 0.004)
MAX_CANDIDATES = 3
DARK_LEVEL = 90
MAX_BLUR, BLUR_MARGIN = 0.5, 0.15
BORDER_SHARE, BORDER_EDGE, BORDER_LEVELS, MAX_FRAME = 0.03, 0.85, 20, 0.12
GROUND_SHARE = 0.25
# Fine structure beyond a limit is of the drawing, which must not outweigh a mark.
MARK_LIMIT, MARK_LEVELS, MARK_STROKES, MARK_LIKENESS, MARK_IMAGES = 24, 4, 12, 0.5, 3
# On rough grounds, a mark shows in what an image's nearest others have in common with each other.
MARK_NEAREST, MARK_SHARED = 5, 0.3


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of all images, by digest.

    Attributes:
        thumbnails: (N, 32, 32, 3), 8 bits, stretched to a square.
        corners: (N, 4, 16, 48), the fine structure of the corners, from -24 to 24.
        figures: (N, 4): the brightness of the lightest parts (0 to 255), blur (0 to 1), the share that
            borders take, and the level of the ground in all corners, or -1 if they differ.
    """

    digests: NDArray[np.str_]
    thumbnails: NDArray[np.uint8]
    corners: NDArray[np.int8]
    figures: Array


def measure(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.int8], Array]:
    """Thumbnail, corners and figures of one image."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    grey = image.convert("L")
    levels = np.asarray(grey, np.float32)
    ends = levels[[0, 0, -1, -1], [0, -1, 0, -1]]
    ground = float(np.median(ends)) if np.ptp(ends) <= BORDER_LEVELS else -1.0
    border = measure_border(np.asarray(image, np.float32))
    measured = (np.percentile(levels, 98), measure_blur(levels), border, ground)
    figures = np.array(measured, np.float32)
    fine = levels - np.asarray(grey.filter(ImageFilter.BoxBlur(6)), np.float32)
    side = max(grey.size)
    width, height = min(grey.width, side * 3 // 8 or 1), min(grey.height, side // 8 or 1)
    parts = (fine[:height, :width], fine[:height, -width:], fine[-height:, :width], fine[-height:, -width:])
    corners = [np.asarray(Image.fromarray(part).resize(CORNER, Image.Resampling.BOX)) for part in parts]
    return thumbnail, np.clip(np.rint(corners), -MARK_LIMIT, MARK_LIMIT).astype(np.int8), figures


def measure_blur(levels: Array) -> float:
    """The blur effect of Crété et al. 2007, from 0 to 1: how little a further blur changes the edges."""
    found = []
    for grey in (levels, levels.T):
        padded = np.pad(grey, ((4, 5), (0, 0)), mode="edge").cumsum(axis=0, dtype=np.float64)
        blurred = (padded[9:] - padded[:-9])[: len(grey)] / 9
        edges, left = np.abs(np.diff(grey, axis=0)), np.abs(np.diff(blurred, axis=0))
        total = edges.sum()
        found.append(float(1 - np.maximum(0, edges - left).sum() / total) if total > 0 else 0.0)
    return max(found)


def measure_border(pixels: Array) -> float:
    """Share of an image that uniform bars on opposite sides take; 0 for none.

    Bars that span the image are of a letterbox; with others around them, of a frame, which is narrow: wide
    ones are the ground around a thing with straight sides.
    """
    found = [(_bar(side), _bar(side[::-1]), len(side)) for side in (pixels, pixels.swapaxes(0, 1))]
    bars = [min(first[0], last[0]) / length for first, last, length in found]
    if min(bars) >= BORDER_SHARE and max(bars) <= MAX_FRAME:
        return 2 * max(bars)
    spans = (bar for bar, (first, last, _) in zip(bars, found, strict=True) if min(first[1], last[1]) > 0.97)
    return max((2 * bar for bar in spans if bar >= BORDER_SHARE), default=0.0)


def _bar(pixels: Array) -> tuple[int, float]:
    """Rows of a uniform bar at the top, 0 without a straight edge below, and the share of the width."""
    differs = np.abs(pixels - np.median(pixels[0], axis=0)).max(axis=-1) > BORDER_LEVELS
    rows = differs.mean(axis=1) > 0.02
    first = int(rows.argmax())
    if not 0 < first < len(pixels) // 2:
        return 0, 0.0
    # The edge may take a few rows; bars at the sides are no part of it.
    edge = differs[first : first + max(3, len(pixels) // 64)].any(axis=0)
    columns = np.flatnonzero(differs[first:-first].any(axis=0))
    span = int(columns[-1] - columns[0] + 1) if len(columns) else 0
    is_straight = edge.sum() >= BORDER_EDGE * span and span >= 0.5 * len(edge)
    return (first, span / len(edge)) if is_straight else (0, 0.0)


def measure_records(records: Sequence[ImageRecord], background: str, cache: Path | None) -> ImageMeasures:
    """Measures the images that the cache does not have, several at a time, and writes it anew."""
    known = _read_cache(cache) if cache else {}
    missing = {record.digest: record for record in records if record.digest not in known}

    def look(record: ImageRecord) -> tuple[NDArray[np.uint8], NDArray[np.int8], Array] | None:
        with suppress(SdloraError):  # The scan has named it, or it has changed since.
            return measure(load_record(record, background, Size(SIDE, SIDE)))
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = zip(missing, pool.map(look, missing.values()), strict=True)
        known |= {digest: measures for digest, measures in found if measures is not None}
    digests = [digest for digest in dict.fromkeys(record.digest for record in records) if digest in known]
    parts = [known[digest] for digest in digests] or [measure(Image.new("RGB", (8, 8)))]
    columns: list[Any] = [np.stack([part[number] for part in parts])[: len(digests)] for number in range(3)]
    measures = ImageMeasures(np.array(digests), *columns)
    if cache and missing:
        with suppress(OSError):
            write_file(cache, lambda path: path.write_bytes(_pack(measures)))
    return measures


def _pack(measures: ImageMeasures) -> bytes:
    data = io.BytesIO()
    np.savez(data, **vars(measures))
    return data.getvalue()


def _read_cache(file: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int8], Array]]:
    """The measures of an earlier check; none if the file is missing or damaged."""
    with suppress(OSError, UnfitFileError, ValueError, KeyError, EOFError, BadZipFile):
        data = np.load(io.BytesIO(read_bytes(file, MAX_BYTES)), allow_pickle=False)
        rows = zip(data["thumbnails"], data["corners"], data["figures"], strict=True)
        return dict(zip(map(str, data["digests"]), rows, strict=True))
    return {}


def cache_file(folder: Path, root: Path, background: str) -> Path:
    """Where the measures of an image folder are kept."""
    name = hashlib.sha256(f"{VERSION}:{root.resolve()}:{background}".encode()).hexdigest()
    return folder / "looks" / name[:2] / f"{name}.npz"


def examine_images(index: DatasetIndex, measures: ImageMeasures) -> None:
    """Adds what the images show to the findings of an index."""
    known: dict[str, ImageRecord] = {}
    for record in (*index.records, *index.heldout):
        known.setdefault(record.digest, record)
    shown = [known[digest].name for digest in measures.digests]
    areas = [known[digest].size.area for digest in measures.digests]
    noticed = index.noticed
    light, blur, border, ground = measures.figures.T
    usual = float(np.median(blur)) if len(blur) else 0.0
    grounds = ground[border == 0]
    for number, name in enumerate(shown):
        if light[number] < DARK_LEVEL:
            noticed["data.image-dark"][name] = f"{light[number] / 255:.0%}"
        # A soft style is blurred throughout.
        if blur[number] > max(MAX_BLUR, usual + BLUR_MARGIN):
            noticed["data.image-soft"][name] = ""
        # The ground that other images share is not a border.
        alike = np.count_nonzero((np.abs(ground[number] - grounds) <= BORDER_LEVELS) & (grounds >= 0))
        if border[number] and alike < GROUND_SHARE * max(1, len(grounds)):
            noticed["data.image-bordered"][name] = f"{border[number]:.0%}"
    for one, other, how in find_near_copies(measures.thumbnails):
        # The smaller one goes; of equal ones, the later.
        worse, better = (one, other) if areas[one] < areas[other] else (other, one)
        noticed["data.near-copies"][shown[worse]] = f"= {shown[better]}{how}"
    for number in find_marks(measures.corners):
        if border[number]:
            continue  # Frames are alike in their corners.
        noticed["data.image-marked"][shown[number]] = ""


def find_marks(corners: NDArray[np.int8]) -> list[int]:
    """Images with strokes in a corner, as letters have them, that are those of others too.

    In all four corners they are a pattern, such as a halftone ground, which belongs to the style.
    """
    places = Counter[int]()
    for place in range(4):
        corner = corners[:, place]
        strokes = np.where((corner > MARK_LEVELS) | (corner < -MARK_LEVELS), np.sign(corner), 0)
        changes = (np.diff(strokes, axis=-1) != 0).sum(axis=-1).max(axis=-1)
        active = np.flatnonzero(changes >= MARK_STROKES)
        vectors = corner[active].reshape(len(active), corner[0].size).astype(np.float32)
        vectors -= vectors.mean(axis=1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        for start in range(0, len(active), BLOCK):
            alike = vectors[start : start + BLOCK] @ vectors.T
            is_marked = (alike > MARK_LIKENESS).sum(axis=1) >= MARK_IMAGES
            if len(active) > MARK_NEAREST:
                alike[np.arange(len(alike)), start + np.arange(len(alike))] = -1
                nearest = np.argpartition(-alike, MARK_NEAREST, axis=1)[:, :MARK_NEAREST]
                others = vectors[nearest]
                shared = (others @ others.swapaxes(1, 2)).sum(axis=(1, 2)) - MARK_NEAREST
                shared /= MARK_NEAREST * (MARK_NEAREST - 1)
                own = np.take_along_axis(alike, nearest, axis=1).mean(axis=1)
                is_marked |= np.minimum(shared, own) > MARK_SHARED
            places.update(active[start : start + BLOCK][is_marked].tolist())
    return sorted(number for number, count in places.items() if count < len(corners[0]))


def find_near_copies(thumbnails: NDArray[np.uint8]) -> Iterator[tuple[int, int, str]]:
    """Pairs of images that show the same, once each, and how: resized, mirrored or a crop of the other."""
    contrast = np.concatenate([part.std(axis=(1, 2)).mean(axis=1) for part in _blocks(thumbnails)])
    usable = np.flatnonzero(contrast > FLAT)
    if len(usable) < 2:
        return
    pixels, contrast, done = thumbnails[usable], contrast[usable], set[tuple[int, int]]()
    whole = _shrink(pixels, WHOLE)
    candidates: list[tuple[float, int, int, Window]] = []
    for flipped in (False, True):
        parts = _shrink(pixels[:, :, ::-1], WHOLE) if flipped else whole
        for distance, one, other in _near_pairs(whole, parts, contrast):
            if distance < NEAR and (pair := (min(one, other), max(one, other))) not in done:
                done.add(pair)
                yield int(usable[pair[0]]), int(usable[pair[1]]), " mirrored" if flipped else ""
    for window in _windows():
        pairs = _near_pairs(whole, _shrink(pixels, window), contrast)
        candidates += [(distance, one, other, window) for distance, one, other in pairs]
    tried = Counter[int]()
    for _, one, other, window in sorted(candidates):
        if (one, other) in done or (other, one) in done or tried[one] >= MAX_CANDIDATES:
            continue
        tried[one] += 1
        done.add((one, other))
        first, second = (pixels[number].astype(np.float32) for number in (one, other))
        if _refine(first, second, window, NEAR_CROP * contrast[one]):
            yield int(usable[other]), int(usable[one]), " cropped"


def _windows() -> list[Window]:
    """Likely crops."""
    windows = []
    for share in CROPS:
        spans = [(place, place + share) for place in ((1 - share) * step / 2 for step in range(3))]
        windows += [(left, top, right, bottom) for left, right in spans for top, bottom in spans]
        windows += [(0.0, top, 1.0, bottom) for top, bottom in spans]
        windows += [(left, 0.0, right, 1.0) for left, right in spans]
    return windows


def _blocks(thumbnails: NDArray[np.uint8]) -> Iterator[Array]:
    """A few thumbnails at a time in float32: all together would take four times the memory."""
    for start in range(0, max(1, len(thumbnails)), BLOCK):
        yield thumbnails[start : start + BLOCK].astype(np.float32)


def _shrink(pixels: NDArray[np.uint8], window: Window) -> Array:
    """A window of thumbnails (N, 32, 32, 3) at 8 px, as vectors (N, 192)."""
    left, top, right, bottom = window
    rows, columns = _weights(top, bottom, COARSE), _weights(left, right, COARSE)
    parts = [np.einsum("ay,nyxc,bx->nabc", rows, part, columns, optimize=True) for part in _blocks(pixels)]
    shrunk: Array = np.concatenate(parts)
    return shrunk.reshape(len(pixels), -1)


def _weights(start: float, end: float, count: int) -> Array:
    """The share of each pixel of a thumbnail in `count` equal parts of a span: (count, 32)."""
    edges = np.linspace(start, end, count + 1, dtype=np.float32) * THUMBNAIL
    pixels = np.arange(THUMBNAIL, dtype=np.float32)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights: Array = np.clip(covered, 0, None) / (edges[1] - edges[0])
    return weights


def _near_pairs(whole: Array, parts: Array, contrast: Array) -> Iterator[tuple[float, int, int]]:
    """For each coarse image, the nearest part of another if it is near; distances relative to contrast."""
    norms = (parts**2).mean(axis=1)
    for start in range(0, len(whole), BLOCK):
        block = whole[start : start + BLOCK]
        squares = (block**2).mean(axis=1)[:, None] + norms - 2 / whole.shape[1] * block @ parts.T
        rows = np.arange(len(block))
        squares[rows, start + rows] = np.inf
        nearest = squares.argmin(axis=1)
        distances = np.sqrt(np.maximum(squares[rows, nearest], 0)) / contrast[start : start + BLOCK]
        for row in np.flatnonzero(distances < NEAR_COARSE):
            yield float(distances[row]), start + int(row), int(nearest[row])


def _refine(one: Array, other: Array, window: Window, limit: float) -> bool:
    """Whether an image differs by less than some levels from a window of another near the given one."""
    half = THUMBNAIL // 2
    whole = _weights(0, 1, half)
    small = _resample(one, whole, whole)
    left, top, right, bottom = window
    spans, distance = [(top, bottom), (left, right)], np.inf
    for nudge in NUDGES:
        for axis in (0, 1):
            low, high = spans[axis]
            steps = [nudge * step for step in range(-3, 4)]
            ends = [(max(0.0, low + first), min(1.0, high + last)) for first in steps for last in steps]
            options = np.stack([_weights(*pair, half) for pair in ends])
            pixels, aim = (other, small) if axis == 0 else (other.swapaxes(0, 1), small.swapaxes(0, 1))
            fixed = np.tensordot(pixels, _weights(*spans[1 - axis], half), (1, 1))
            parts = np.tensordot(options, fixed, (2, 0)).swapaxes(2, 3)
            errors = np.sqrt(((parts - aim) ** 2).mean(axis=(1, 2, 3)))
            spans[axis], distance = ends[int(errors.argmin())], min(distance, float(errors.min()))
        if distance < limit or distance > 2 * limit:
            break
    return distance < limit


def _resample(pixels: Array, rows: Array, columns: Array) -> Array:
    """(H, W, 3) to (rows, columns, 3) by weights."""
    return np.tensordot(np.tensordot(rows, pixels, (1, 0)), columns, (1, 1)).swapaxes(1, 2)
