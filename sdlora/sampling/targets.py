"""What a grid aims at: the images whose captions the prompts are, else a few of the image folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.config import RunConfig
from sdlora.data.images import load_image
from sdlora.data.scan import read_captions
from sdlora.errors import DataError

NUM_EXAMPLES = 12


@dataclass(frozen=True)
class Targets:
    """Images of the image folder for a grid.

    Args:
        images: By prompt, for prompts that are captions.
        examples: Evenly spaced; empty if every prompt has its image.
        heading: Of the column of images.
    """

    images: Mapping[str, Image.Image]
    examples: Sequence[Image.Image]
    heading: str = "target"


def find_targets(
    captions: Iterable[tuple[Path, str]], prompts: Sequence[str], background: str = "white"
) -> Targets:
    """Loads the first image of each prompt; those that cannot be read are left out.

    Args:
        captions: Images with their captions, the held-out ones first.
        prompts: Prompts of the grid.
        background: Color behind transparency.
    """
    files: dict[str, Path] = {}
    paths: list[Path] = []
    for path, caption in captions:
        files.setdefault(caption, path)
        paths.append(path)
    images = {prompt: image for prompt in prompts if (image := _load(files.get(prompt), background))}
    if len(images) == len(set(prompts)):
        return Targets(images, ())
    chosen = (paths[i * len(paths) // NUM_EXAMPLES] for i in range(NUM_EXAMPLES) if paths)
    loaded = (_load(path, background) for path in dict.fromkeys(chosen))
    return Targets(images, [image for image in loaded if image])


def find_run_targets(config: RunConfig, prompts: Sequence[str]) -> Targets | None:
    """The targets of a finished run; None if its image folder is gone or has changed beyond use."""
    try:
        return find_targets(read_captions(config.images, config.data), prompts, config.data.background)
    except DataError:
        return None


def _load(path: Path | None, background: str) -> Image.Image | None:
    try:
        return load_image(path, background) if path else None
    except DataError:
        return None
