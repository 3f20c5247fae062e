"""A tiny set of drawings, so that the scripts run without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import ICON_SETS

COLORS = ("#d33", "#3a3", "#33d", "#dd3", "#3dd", "#d3d")
TINY_CONCEPTS = ("apple", "fire-engine", "moon", "owl")


def drawing(index: int, icon_set: int) -> dict[str, str]:
    """A disc whose place, size and color follow from its number."""
    across, radius = 4 + index % 8, 2 + icon_set / 2
    return {"body": f'<circle cx="{across}" cy="8" r="{radius}" fill="{COLORS[index % len(COLORS)]}"/>'}


@pytest.fixture(scope="session")
def tiny_icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of drawings for each icon set."""
    folder = tmp_path_factory.mktemp("icons")
    names = [*TINY_CONCEPTS, *read_concepts()]
    for number, icon_set in enumerate(ICON_SETS):
        icons = {name: drawing(index, number) for index, name in enumerate(names)}
        (folder / f"{icon_set}.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
    return folder


@pytest.fixture(scope="session")
def tiny_concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept file of four names."""
    file = tmp_path_factory.mktemp("concepts") / "concepts.txt"
    file.write_text("\n".join(TINY_CONCEPTS) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained VAE."""
    from sdlora.builtin.make_vae import Recipe, make_vae, save_vae

    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_vae(make_vae(Recipe(widths=(8, 8, 8, 8), channels=4)), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bank(
    tmp_path_factory: pytest.TempPathFactory, tiny_icons: Path, tiny_concepts: Path, tiny_vae: Path
) -> Path:
    """A bank of two shards: the plain drawings of four concepts, and one variant of each."""
    from sdlora.builtin.bank import make_bank

    folder = tmp_path_factory.mktemp("bank")
    make_bank(folder, tiny_icons, tiny_vae, read_concepts(tiny_concepts), shards=2)
    return folder
