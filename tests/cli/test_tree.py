"""`sdlora tree` as people type it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.config import BaseSection
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.lora.attach import match_targets
from sdlora.models.info import inspect_base
from sdlora.models.weights import empty_denoiser
from sdlora.tree.lineage import lineage_to_notes
from sdlora.tree.tree import AdapterTree
from tests.lora_fixtures import child_lineage, create_adapter


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """ink, and ink/portraits on top of it, for the built-in base."""
    folder = tmp_path_factory.mktemp("trees") / "styles"
    unet = empty_denoiser(inspect_base(BaseSection()))
    unet.to_empty(device="cpu")

    def save(name, rank, **notes):
        fresh = create_adapter(unet, match_targets(unet, ["attention"]), rank, rank, seed=rank, family="sd1")
        adapter, _ = round_adapter(fresh)
        for number, pair in enumerate(adapter.modules.values()):
            generator = torch.Generator().manual_seed(number)
            pair.up = (torch.randn(pair.up.shape, generator=generator) * 0.2).half()
        notes = {"sdlora.base_name": "builtin", "sdlora.family": "sd1", "ss_num_train_images": "80", **notes}
        return save_adapter(folder / f"{name}.safetensors", adapter, metadata=notes)

    ink = load_adapter(save("ink", 4, **{"sdlora.heldout_loss": "0.0712"}), dtype=None)
    save("ink/portraits", 2, **lineage_to_notes(child_lineage("ink", ink)))
    return folder


@pytest.fixture
def broken(styles, tmp_path):
    """The same without its root, so deep that no other test's files are near."""
    folder = tmp_path / "far" / "away" / "broken"
    (folder / "ink").mkdir(parents=True)
    (folder / "ink" / "portraits.safetensors").write_bytes(
        (styles / "ink" / "portraits.safetensors").read_bytes()
    )
    return folder


def test_show(sdlora, styles, broken):
    """The tree with rank, images, size, held-out loss; errors stand beside their nodes."""
    code, printed, _ = sdlora("tree", "show", styles)
    assert code == 0
    top, ink, portraits = printed.splitlines()
    size = (styles / "ink.safetensors").stat().st_size / 1e6
    assert top == "builtin"
    assert ink.endswith(f"ink  (rank 4, 80 images, {size:.2f} MB, held-out loss 0.0712)")
    assert portraits.index("ink/portraits") > ink.index("ink")
    code, printed, _ = sdlora("tree", "show", broken)
    assert code == 0
    error = AdapterTree.from_folder(broken).errors["ink/portraits"]
    assert f"{error}\n" in printed, "a narrow console cuts nothing"


def test_verify(sdlora, styles, broken):
    """Exit code 1, a line for each problem."""
    code, printed, _ = sdlora("tree", "verify", styles)
    assert code == 0
    assert printed.startswith("2 nodes")
    code, printed, _ = sdlora("tree", "verify", broken)
    assert code == 1
    assert len(printed.splitlines()) == 1


def test_flatten(sdlora, styles, tmp_path):
    """Exact by default; to a rank with its cost."""
    out = tmp_path / "flat.safetensors"
    code, printed, _ = sdlora(
        "tree", "flatten", styles, "ink/portraits", "--out", out, "--strengths", "ink=0.5"
    )
    assert code == 0
    assert "path      ink > ink/portraits" in printed
    assert inspect_adapter(out).rank == 6
    assert "sdlora.parent" not in load_adapter(out).notes
    code, printed, _ = sdlora("tree", "flatten", styles, "ink/portraits", "--out", out, "--rank", 3)
    assert code == 0
    assert "error     " in printed
    assert inspect_adapter(out).rank == 3


def test_sample(sdlora, styles, tmp_path):
    """The base and each node; a node is drawn on top of its ancestors, as the flattened file draws it."""
    grid = tmp_path / "grid"
    quick = ("--prompt", "a cat", "--steps", 2, "--seeds", 0, "--size", "64x64")
    code, printed, errors = sdlora("tree", "sample", styles, *quick, "--out", grid)
    assert code == 0, errors
    assert f"grid      {grid / 'grid.png'}" in printed
    base, ink, portraits = (np.asarray(Image.open(grid / f"{n:02d}.png"), dtype=int) for n in range(3))
    assert np.abs(base - ink).max() > 2
    assert np.abs(portraits - ink).max() > 2
    flat, one = tmp_path / "flat.safetensors", tmp_path / "one"
    sdlora("tree", "flatten", styles, "ink/portraits", "--out", flat, "--precision", "fp32")
    code, _, errors = sdlora("sample", flat, *quick, "--strengths", 1, "--out", one)
    assert code == 0, errors
    assert np.abs(np.asarray(Image.open(one / "01.png"), dtype=int) - portraits).max() <= 2


@pytest.mark.parametrize(
    ("arguments", "key", "values"),
    [
        ("flatten {styles} sepia --out x.safetensors", "tree.no-node", ["sepia", "ink, ink/portraits"]),
        (
            "flatten {broken} ink/portraits --out x.safetensors",
            "tree.parent-missing",
            ["ink/portraits", "--force"],
        ),
        (
            "flatten {styles} ink --strengths ink --out x.safetensors",
            "option--strengths",
            ["NODE=NUMBER"],
        ),
        (
            "flatten {styles} ink/portraits --out {styles}/ink.safetensors",
            "option--out",
            ["{styles}/ink.safetensors"],
        ),
        ("sample {styles}", "sample.prompts", ["--prompt"]),
        ("sample {styles} ink --prompt x --strengths sea=1", "tree.not-on-path", ["sea", "path ink"]),
        ("sample {styles} ink --prompt {{trigger}},x", "sample.prompts", ["'{{trigger}},x'"]),
        ("show nowhere", "tree.no-folder", ["nowhere"]),
    ],
)
def test_mistakes(sdlora, styles, broken, arguments, key, values):
    """One line, exit code 2."""
    places = {"styles": styles, "broken": broken}
    code, _, errors = sdlora("tree", *(argument.format(**places) for argument in arguments.split()))
    assert code == 2
    assert key in sdlora.keys
    assert len(errors) == 1
    for value in values:
        assert value.format(**places) in errors[0]


def test_info_names_the_path(sdlora, styles):
    """`sdlora info` lists a file's ancestors."""
    code, printed, _ = sdlora("info", styles / "ink" / "portraits.safetensors")
    assert code == 0
    assert printed.splitlines()[-1].startswith("parents   ink (")
    assert "parents" not in sdlora("info", styles / "ink.safetensors")[1]


def test_a_child_is_planned(sdlora, styles, make_images):
    """`train --parent NODE`: its ancestors, and the rank that follows."""
    images, node = make_images(), styles / "ink" / "portraits"
    code, printed, errors = sdlora("train", images, "--parent", node, "--dry-run", "data.resolution=64")
    assert code == 0, errors
    lines = printed.splitlines()
    parent = next(line for line in lines if line.startswith("parent    "))
    assert "ink (" in parent
    assert parent.index("portraits (") > parent.index("ink (")
    assert any("lora.rank = 4" in line for line in lines)
    code, _, errors = sdlora("train", images, "--parent", "nowhere", "--dry-run")
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith("sdlora: lora.parent = nowhere ")
    code, _, errors = sdlora("train", images, "--force", "--dry-run")
    assert code == 2
    assert "lora.force_parent = true" in errors[0]


def test_force(sdlora, broken, make_images, tmp_path):
    """R-41: every verb refuses a child whose parent is missing; with --force it continues with a warning."""
    quick = ("--prompt", "x", "--steps", 1, "--size", "64x64")
    child = broken / "ink" / "portraits.safetensors"
    commands = {
        "flat.safetensors": ("tree", "flatten", broken, "ink/portraits"),
        "nodes": ("tree", "sample", broken, *quick),
        "grid": ("sample", child, *quick),
        "merged": ("merge-into-base", child),
        "run": ("train", make_images(), "--parent", child, "--dry-run", "data.resolution=64"),
    }
    for out, command in commands.items():
        code, _, errors = sdlora(*command, "--out", tmp_path / out)
        assert (code, len(errors)) == (2, 1)
        assert "portraits" in errors[0]
        assert "ink (" in errors[0]
        assert "--force" in errors[0]
        assert not (tmp_path / out).exists()
        code, printed, errors = sdlora(*command, "--out", tmp_path / out, "--force")
        assert code == 0, errors
        warnings = [line for line in printed.splitlines() if line.startswith("warning: ") and "ink (" in line]
        assert len(warnings) == 1
    assert inspect_adapter(tmp_path / "flat.safetensors").rank == 2
