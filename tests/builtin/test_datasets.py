"""The example datasets: counts, captions, licences, and a held-out part that is truly held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sdlora.builtin.captions import concept_to_words, read_concepts
from sdlora.builtin.icons import ICON_SETS
from sdlora.builtin.make_datasets import DATASETS, make_dataset, size_of, split_concepts
from sdlora.errors import DataError

FOLDER = Path(__file__).parents[2] / "datasets"


@pytest.fixture(params=sorted(DATASETS))
def name(request: pytest.FixtureRequest) -> str:
    """Each dataset in turn."""
    return str(request.param)


def concepts_in(folder: Path) -> list[str]:
    """The concepts that a folder shows, by file name."""
    return sorted(file.stem for file in folder.glob("*.png"))


def test_the_parts_are_whole_and_apart(name: str) -> None:
    """Both parts have the images they should, all of concepts that the base knows, none in both."""
    training, heldout = split_concepts(DATASETS[name], read_concepts())
    assert concepts_in(FOLDER / name) == training
    assert concepts_in(FOLDER / name / "heldout") == heldout
    assert len(training) == DATASETS[name].training >= 100
    assert len(heldout) == DATASETS[name].heldout == 40
    assert not set(training) & set(heldout)
    assert set(training + heldout) <= set(read_concepts())


def test_every_image_is_captioned(name: str) -> None:
    """Each image has a text beside it that says its name and nothing of the style."""
    images = sorted((FOLDER / name).rglob("*.png"))
    assert len(images) == DATASETS[name].training + DATASETS[name].heldout
    for image in images:
        words = concept_to_words(image.stem)
        article = "an" if words[0] in "aeio" or words == "umbrella" else "a"
        assert image.with_suffix(".txt").read_text().strip() == f"{article} {words}"


def test_images_have_several_shapes(name: str) -> None:
    """Some images are wider and some taller than square; none is below 128 px; all stay small on disk."""
    shapes = [Image.open(file).size for file in sorted((FOLDER / name).glob("*.png"))]
    ratios = {round(width / height, 2) for width, height in shapes}
    assert min(min(shape) for shape in shapes) >= 128
    assert min(ratios) < 1 < max(ratios)
    assert len(ratios) >= 5
    assert 8 <= sum(width != height for width, height in shapes) <= 15
    assert sum(file.stat().st_size for file in (FOLDER / name).rglob("*.*")) < 3_000_000


def test_licence_and_attribution_are_there(name: str) -> None:
    """The folder says under which licence it is, where the drawings are from, and what was changed."""
    icon_set = ICON_SETS[DATASETS[name].icon_set]
    readme = (FOLDER / name / "README.md").read_text()
    for fact in (
        icon_set.title,
        icon_set.author,
        icon_set.package,
        icon_set.version,
        icon_set.licence,
        "Changes:",
    ):
        assert fact in readme
    licence = (FOLDER / name / "LICENSE").read_text()
    assert {"openmoji": "CC BY-SA 4.0", "fluent-mono": "MIT License"}[name] in licence


def test_no_python_lies_under_datasets() -> None:
    """A Python file there would make the folder shadow Hugging Face's package of that name."""
    assert FOLDER.is_dir()
    assert not list(FOLDER.rglob("*.py"))


def test_making_twice_gives_the_same_bytes(name: str, tiny_icons: Path, tmp_path: Path) -> None:
    """The script is deterministic."""
    first = make_dataset(name, tmp_path / "first", tiny_icons)
    second = make_dataset(name, tmp_path / "second", tiny_icons)
    files = sorted(file.relative_to(first) for file in first.rglob("*.*"))
    assert len(files) > 2 * DATASETS[name].training
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_too_few_concepts_are_named() -> None:
    """Fewer concepts than a dataset needs is one line with both numbers."""
    with pytest.raises(DataError, match="needs 190 concepts and the base knows 1"):
        split_concepts(DATASETS["openmoji"], ["owl"])


def test_oblong_sizes_come_in_turn() -> None:
    """Every eleventh image is oblong."""
    assert [size_of(index)[0] != size_of(index)[1] for index in range(11)] == [False] * 10 + [True]
