"""Names of drawings by the base's own (R-30)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from sdlora.builtin.captions import name_thing, read_concepts
from sdlora.config import load_config
from sdlora.data.captioning import find_uncaptioned, write_captions
from sdlora.data.repairs import strip_style
from sdlora.errors import ModelError
from sdlora.evaluation.naming import Namer, center_ink
from sdlora.models.folder import BUILTIN

DRAWINGS = Path(__file__).resolve().parents[2] / "datasets" / "openmoji"
THINGS = ("an accordion", "a broken heart", "a closed book", "a cloud", "a light bulb", "a wine glass")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The built-in base as if it knew six things."""
    folder = tmp_path_factory.mktemp("bases") / "small"
    folder.mkdir()
    for part in BUILTIN.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "things.txt").unlink()
    (folder / "things.txt").write_text("\n".join(THINGS) + "\n")
    return folder


@pytest.fixture(scope="module")
def namer(small) -> Iterator[Namer]:
    # What is made once for a module comes before the cache of each test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(small.parent / "cache"))
        yield Namer(str(small))


def drawing_of(thing: str) -> Image.Image:
    return Image.open(DRAWINGS / f"{thing.split(' ', 1)[1].replace(' ', '-')}.png").convert("RGB")


@pytest.mark.parametrize("thing", THINGS)
def test_a_drawing_is_named(namer, thing):
    """Another hand's drawing has the name of the thing that it shows, wherever and however large it is."""
    image = drawing_of(thing)
    assert namer(image) == thing
    aside = Image.new("RGB", (300, 200), "white")
    aside.paste(ImageOps.contain(image, (90, 90)), (5, 100))
    assert namer(aside) == thing


def test_captions_of_a_folder(namer, tmp_path):
    """R-30: images without a caption get one, and nobody's own is changed."""
    drawing_of("a cloud").save(tmp_path / "IMG 1.png")
    drawing_of("a wine glass").save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("mine\n")
    settings = load_config(None, {}, arguments={"data.trigger": "inkwash style"}).data
    missing, total = find_uncaptioned(tmp_path, settings)
    assert list(write_captions(tmp_path, missing, namer, settings)) == [("IMG 1.png", "a cloud")]
    assert (tmp_path / "IMG 1.txt").read_text() == "inkwash style, a cloud\n"
    assert (tmp_path / "b.txt").read_text() == "mine\n"
    assert total == 2


def test_only_ink_counts():
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (10, 20, 30, 30))
    centered = center_ink(image)
    assert centered.width == centered.height
    assert ImageOps.invert(centered.convert("L")).getbbox() == (2, 7, 22, 17)
    assert center_ink(Image.new("RGB", (8, 8), "white")).getextrema() == ((255, 255),) * 3


def test_no_name_is_taken_for_a_style():
    """The whole name is written: nothing of it is left out as words of a style."""
    things = (BUILTIN / "things.txt").read_text().splitlines()
    assert [strip_style(thing) for thing in things] == things


def test_the_base_says_what_it_draws():
    assert (BUILTIN / "things.txt").read_text().splitlines() == [name_thing(one) for one in read_concepts()]


def test_a_base_without_a_list_is_refused(sd15_folder):
    with pytest.raises(ModelError) as caught:
        Namer(str(sd15_folder))
    assert caught.value.keys == ("option--model",)
