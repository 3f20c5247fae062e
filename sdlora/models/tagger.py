"""A tagger in ONNX that names what an image shows, for `sdlora caption --tags`.

Its files are those of SmilingWolf's WD taggers: `model.onnx`, and beside it `selected_tags.csv` with the
columns name and category.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdlora.errors import ModelError, first_line
from sdlora.reading import read_bytes

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

MODEL, TABLE = "model.onnx", "selected_tags.csv"
MAX_TABLE_BYTES = 8_000_000
GENERAL, CHARACTER = "0", "4"
THRESHOLD, CHARACTER_THRESHOLD = 0.35, 0.85


class Tagger:
    """Names the tags of an image, the surest first; ratings and artists are never among them.

    Args:
        source: The model's file, or its folder.
        threshold: Least score of a tag, in [0, 1].
        has_characters: Whether known characters are named too, from a score of 0.85.

    Raises:
        ModelError: If a file is missing, is of another kind, or onnxruntime is not installed.
    """

    def __init__(self, source: Path, threshold: float = THRESHOLD, *, has_characters: bool = False) -> None:
        if onnxruntime is None:
            problem = "--tags needs onnxruntime; install it with `pip install 'sdlora[tags]'`"
            raise ModelError(problem, key="option--tags.package")
        file = source.expanduser()
        file = file / MODEL if file.is_dir() else file
        self.least = {GENERAL: threshold} | ({CHARACTER: CHARACTER_THRESHOLD} if has_characters else {})
        try:
            if missing := [one for one in (file, file.with_name(TABLE)) if not one.is_file()]:
                raise ValueError(f"there is no {missing[0]}")
            text = read_bytes(file.with_name(TABLE), MAX_TABLE_BYTES).decode("utf-8-sig")
            self.tags = [(row["name"], row["category"]) for row in csv.DictReader(io.StringIO(text))]
            providers = onnxruntime.get_available_providers()
            self.session = onnxruntime.InferenceSession(str(file), providers=providers)
            (given,), (made, *_) = self.session.get_inputs(), self.session.get_outputs()
            _, height, width, channels = given.shape
            if (height, channels, made.shape[-1]) != (width, 3, len(self.tags)):
                expected = f"(batch, side, side, 3) to (batch, {len(self.tags)})"
                raise ValueError(f"it maps {given.shape} to {made.shape}, not {expected}")
        except Exception as error:  # onnxruntime raises types of its own.
            needed = f"it takes {MODEL} with {TABLE} beside it, as WD taggers have them"
            problem = f"--tags {source} cannot be loaded: {first_line(error)}; {needed}"
            raise ModelError(problem, key="option--tags") from None
        self.side, self.input = int(height), given.name

    def __call__(self, image: Image.Image) -> str:
        """The tags of an RGB image, separated by commas."""
        # As they were trained: padded to a white square; blue, green, red in [0, 255].
        square = ImageOps.pad(image, (self.side, self.side), Image.Resampling.BICUBIC, color="white")
        pixels = np.ascontiguousarray(np.asarray(square, np.float32)[None, :, :, ::-1])
        scores = self.session.run(None, {self.input: pixels})[0][0]
        rated = zip(map(float, scores), self.tags, strict=True)
        chosen = [(score, name) for score, (name, kind) in rated if score >= self.least.get(kind, 2.0)]
        return ", ".join(_spell(name) for _, name in sorted(chosen, key=lambda row: -row[0]))


def _spell(name: str) -> str:
    """With spaces, but for the underscores of a face such as `>_<`."""
    return name.replace("_", " ") if re.search(r"[^\W\d_]{2}", name) else name
