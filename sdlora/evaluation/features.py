"""Features of images: how they are drawn, and what they show; without weights, or by a vision model.

N images, D and E numbers of each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from sdlora.errors import ModelError, first_line
from sdlora.formats.container import read_tensors
from sdlora.reading import UnfitFileError, read_header

Rows = NDArray[np.float64]
DRAWING = "drawing"
SIDE_PX, INK = 128, 0.96
CELLS, ANGLES = 8, 8
THUMBNAIL_PX = 16
BATCH_SIZE = 16
STYLE_HEAD, CONTENT_HEAD = "last_layer_style", "last_layer_content"
HEAD_WIDTH = 64
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Parts of OpenAI's vision transformer, as transformers names them.
CLIP_PARTS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


class Features(Protocol):
    """Numbers that describe images.

    Attributes:
        name: How a user names it.
        content_scale: The cosine of two images' content at which nothing, and at which everything, is kept;
            None if it has not been measured: then the base's own images set it.
    """

    name: str
    content_scale: tuple[float, float] | None

    def style(self, images: Sequence[Image.Image]) -> Rows:
        """How images are drawn, (N, D); the mean over images is that of a set."""

    def content(self, images: Sequence[Image.Image]) -> Rows:
        """What images show and where, (N, E), compared by cosine."""

    def likeness(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Rows | None:
        """The cosine of each image and each text, (N, T); None if the features read no text."""


class DrawingFeatures:
    """Features without weights, for drawings on a plain ground.

    Style: the shares of colors, of lightness and saturation, and of strong and weak edges at three scales, of
    what is not white (square roots of histograms, whose distance is Hellinger's). Content: histograms of
    oriented gradients (HOG, Dalal and Triggs 2005) without the sign of the edge, so that a black glyph and a
    colored drawing of the same shape agree. `sdlora/builtin/README.md` says how well they retrieve, and how
    the scale of content was set.
    """

    name = DRAWING
    content_scale: tuple[float, float] | None = (0.45, 0.85)

    def style(self, images: Sequence[Image.Image]) -> Rows:
        return np.stack([_style(_pixels(image, SIDE_PX)) for image in images])

    def content(self, images: Sequence[Image.Image]) -> Rows:
        return np.stack([_gradients(_pixels(image, SIDE_PX // 2)) for image in images])

    def likeness(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Rows | None:
        return None


class ModelFeatures:
    """A vision model of transformers, such as CLIP or DINOv2, from a local folder or the Hub.

    Style: mean and standard deviation of each channel over the patches of a middle layer (AdaIN's
    statistics, arXiv 1703.06868). Content: the model's embedding of the image. CLIP also reads texts, if its
    tokenizer is there.

    Args:
        source: A folder, or a Hub id. Code that comes with a model is never run.
        device: Where the model runs.

    Raises:
        ModelError: If it cannot be loaded, or is not a vision model.
    """

    content_scale: tuple[float, float] | None = None
    tokenizer: Any = None

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.name, self.device = str(source), device
        is_local = Path(source).is_dir()
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(
                source, trust_remote_code=False, local_files_only=is_local
            )
            model: Any = AutoModel.from_pretrained(
                source,
                trust_remote_code=False,
                local_files_only=is_local,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            remedy = "use a folder or Hub id of a CLIP or DINOv2 model with safetensors weights, or CSD's"
            problem = f"--features {source} cannot be loaded ({first_line(error)}); {remedy}"
            raise ModelError(problem, key="option--features") from None
        model.eval().requires_grad_(False).to(device)
        # Of a model of images and texts, the part for images.
        self.model: Any = getattr(model, "vision_model", model)
        if isinstance(model, CLIPModel):
            self.both = model
            # A folder may hold the part for images alone.
            with suppress(OSError, ValueError):
                tokenizer = AutoTokenizer.from_pretrained(
                    source, trust_remote_code=False, local_files_only=is_local
                )
                # Without its files, transformers makes an empty one.
                if tokenizer.vocab_size == model.config.text_config.vocab_size:
                    self.tokenizer = tokenizer

    def style(self, images: Sequence[Image.Image]) -> Rows:
        return np.concatenate([self._run(part)[0] for part in _batches(images)])

    def content(self, images: Sequence[Image.Image]) -> Rows:
        return np.concatenate([self._run(part)[1] for part in _batches(images)])

    @torch.no_grad()
    def likeness(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Rows | None:
        if self.tokenizer is None:
            return None
        most = self.both.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        pooled = self.both.text_model(**tokens.to(self.device)).pooler_output
        weight = self.both.visual_projection.weight.double().cpu().numpy()
        said = self.both.text_projection(pooled).double().cpu().numpy()
        result: Rows = unit_rows(self.content(images) @ weight.T) @ unit_rows(said).T
        return result

    @torch.no_grad()
    def _run(self, images: Sequence[Image.Image]) -> tuple[Rows, Rows]:
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        answer = self.model(inputs["pixel_values"].to(self.device), output_hidden_states=True)
        layers = answer.hidden_states
        # Without the class token, which does not show a patch.
        patches = layers[len(layers) // 2][:, 1:]
        style = torch.cat([patches.mean(dim=1), patches.std(dim=1)], dim=1)
        return style.double().cpu().numpy(), answer.pooler_output.double().cpu().numpy()


class StyleDescriptor(ModelFeatures):
    """Contrastive style descriptors (CSD, arXiv 2404.01292): CLIP's vision transformer with two heads.

    Style and content: the embedding of each head, of length 1.

    Args:
        file: Safetensors weights by the authors' names, such as `model.safetensors` of the Hub's
            `yuxi-liu-wired/CSD`.
        device: Where the model runs.

    Raises:
        ModelError: If it cannot be loaded.
    """

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        self.name, self.device = str(file), device
        try:
            tensors = {name: tensor.float() for name, tensor in read_tensors(file)[0].items()}
            self.heads = [tensors[name].to(device) for name in (STYLE_HEAD, CONTENT_HEAD)]
            self.model = _clip_of(tensors).eval().requires_grad_(False).to(device)
        except (KeyError, RuntimeError, UnfitFileError) as error:
            problem = f"--features {file} cannot be loaded ({first_line(error)}); use the weights of CSD"
            raise ModelError(problem, key="option--features") from None
        self.side = self.model.config.image_size

    @torch.no_grad()
    def _run(self, images: Sequence[Image.Image]) -> tuple[Rows, Rows]:
        size = (self.side, self.side)
        cropped = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC) for image in images]
        pixels = (np.stack([np.asarray(image) for image in cropped]) / 255 - CLIP_MEAN) / CLIP_STD
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(self.device)
        pooled = self.model(inputs).pooler_output
        style, content = (unit_rows((pooled @ head).double().cpu().numpy()) for head in self.heads)
        return style, content


def _clip_of(tensors: Mapping[str, Tensor]) -> Any:
    """A vision transformer of transformers from the weights of OpenAI's, whose sizes say what it is."""
    own = {
        name.removeprefix("backbone."): one for name, one in tensors.items() if name.startswith("backbone.")
    }
    width, _, patch, _ = own["conv1.weight"].shape
    cells = round((len(own["positional_embedding"]) - 1) ** 0.5)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=sum(name.endswith(".ln_1.weight") for name in own),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=cells * patch,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        for part, known in CLIP_PARTS.items():
            name = name.replace(part, known)
        if "in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            state[name] = tensor
    model = CLIPVisionModel(config)
    getattr(model, "vision_model", model).load_state_dict(state)
    return model


def load_features(source: str | Features | None, device: torch.device | str = "cpu") -> Features:
    """The features that `--features` names, or those that are given; by default the ones without weights."""
    if source is not None and not isinstance(source, str | os.PathLike):
        return source
    if source is None or source == DRAWING:
        return DrawingFeatures()
    path = Path(source).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    with suppress(OSError, UnfitFileError):
        if STYLE_HEAD in read_header(file).shapes:
            return StyleDescriptor(file, device)
    return ModelFeatures(path if path.exists() else source, device)


def unit_rows(rows: Rows) -> Rows:
    """Rows of length 1."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Rows = rows / np.maximum(norms, 1e-12)
    return result


def thumbnails(images: Sequence[Image.Image]) -> Rows:
    """Small copies, (N, 768) in 0 to 1, whose root mean square distance tells copies from other images."""
    return np.stack([_pixels(image, THUMBNAIL_PX).ravel() for image in images])


def copies_of(image: Image.Image) -> list[Image.Image]:
    """An image as it may come back: itself and its middle, each also mirrored."""
    width, height = image.size
    middle = image.crop((width // 10, height // 10, width - width // 10, height - height // 10))
    return [image, middle, ImageOps.mirror(image), ImageOps.mirror(middle)]


def _batches(images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [images[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE)]


def _pixels(image: Image.Image, side: int) -> Rows:
    """(side, side, 3) in 0 to 1."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _shares(values: NDArray[Any], bins: int, low: float, high: float) -> Rows:
    counts = np.histogram(values, bins, (low, high))[0]
    result: Rows = np.sqrt(counts / max(1, counts.sum()))
    return result


def _style(pixels: Rows) -> Rows:
    inked = pixels.min(axis=2) < INK
    codes = np.minimum(pixels * 4, 3).astype(int) @ np.array([16, 4, 1])
    lightness = pixels.max(axis=2)
    saturation = 1 - pixels.min(axis=2) / np.maximum(lightness, 1e-6)
    parts = [_shares(codes[inked], 64, 0, 64), _shares(lightness[inked], 8, 0, 1)]
    parts.append(_shares(saturation[inked], 8, 0, 1))
    for factor in (1, 2, 4):
        side = SIDE_PX // factor
        coarse = pixels.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
        gray, ink = coarse.mean(axis=2), coarse[1:-1, 1:-1].min(axis=2) < INK
        across, down = gray[1:-1, 2:] - gray[1:-1, :-2], gray[2:, 1:-1] - gray[:-2, 1:-1]
        around = gray[1:-1, 2:] + gray[1:-1, :-2] + gray[2:, 1:-1] + gray[:-2, 1:-1]
        parts.append(_shares(np.hypot(across, down)[ink], 8, 0, 1))
        # Dark lines curve up, light ones down.
        parts.append(_shares((around - 4 * gray[1:-1, 1:-1])[ink], 8, -1, 1))
    return np.concatenate(parts)


def _gradients(pixels: Rows) -> Rows:
    """Edges by cell and direction, of the channel where they are strongest."""
    side = len(pixels)
    across, down = np.zeros_like(pixels), np.zeros_like(pixels)
    across[:, 1:-1] = pixels[:, 2:] - pixels[:, :-2]
    down[1:-1] = pixels[2:] - pixels[:-2]
    strength = np.hypot(across, down)
    best = strength.argmax(axis=2)[..., None]
    strength, across, down = (np.take_along_axis(one, best, 2)[..., 0] for one in (strength, across, down))
    angle = np.arctan2(down, across) % np.pi / np.pi * ANGLES
    lower = np.floor(angle).astype(int)
    share = angle - lower
    histogram = np.zeros((side, side, ANGLES))
    rows, columns = np.mgrid[:side, :side]
    np.add.at(histogram, (rows, columns, lower % ANGLES), strength * (1 - share))
    np.add.at(histogram, (rows, columns, (lower + 1) % ANGLES), strength * share)
    width = side // CELLS
    # Cells of twice the width, half over each other: a shape may be a little elsewhere.
    half = histogram.reshape(2 * CELLS, width // 2, 2 * CELLS, width // 2, ANGLES).mean(axis=(1, 3))
    wide = sum(half[y : 2 * CELLS - 3 + y, x : 2 * CELLS - 3 + x] for y in range(4) for x in range(4))
    cells: Rows = np.sqrt(np.asarray(wide) / 16)
    return (cells / max(float(np.linalg.norm(cells)), 1e-9)).ravel()
