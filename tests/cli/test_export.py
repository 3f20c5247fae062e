"""`sdlora extract` and `sdlora merge-into-base` as people type them."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.lora.attach import match_targets
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.weights import empty_denoiser
from sdlora.rank.spectrum import spectrum
from sdlora.tree.lineage import lineage_to_notes
from tests.lora_fixtures import child_lineage, create_adapter


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """A LoRA of rank 2 for the built-in base, and a child of it of rank 1."""
    folder = tmp_path_factory.mktemp("conversion") / "styles"
    folder.mkdir()
    unet = empty_denoiser(inspect_base(BaseSection())).to_empty(device="cpu")
    notes = {"sdlora.base_name": "builtin", "sdlora.family": "sd1"}
    for name, rank in (("ink", 2), ("portraits", 1)):
        adapter = create_adapter(
            unet, match_targets(unet, ["*attn1.to_q"]), rank, rank, seed=rank, family="sd1"
        )
        for pair in adapter.modules.values():
            pair.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(rank))
        save_adapter(folder / f"{name}.safetensors", adapter, metadata=notes)
        parent = load_adapter(folder / "ink.safetensors", dtype=None)
        notes = {**notes, **lineage_to_notes(child_lineage("ink", parent))}
    return folder


def test_there_and_back(sdlora, styles, tmp_path):
    """A child is merged with its parent; what is extracted again has the ranks of both."""
    place, out = tmp_path / "base", tmp_path / "out.safetensors"
    command = ("merge-into-base", styles / "portraits.safetensors", "--out", place, "--dtype", "fp32")
    code, printed, errors = sdlora(*command)
    assert (code, printed) == (0, f"wrote     {place}\n"), errors
    code, printed, errors = sdlora(
        "extract", place, "--base", "builtin", "--out", out, "--rank", 3, "--format", "kohya"
    )
    assert code == 0, errors
    assert "were not changed; error 0.0" in printed
    assert "outside   0.00% of the energy" in printed
    info = inspect_adapter(out)
    assert (info.rank, info.dialect) == (3, "kohya")
    found, parts = (
        load_adapter(out),
        [load_adapter(styles / f"{n}.safetensors") for n in ("ink", "portraits")],
    )
    for name, pair in found.modules.items():
        expected = sum(part.modules[name].up @ part.modules[name].down for part in parts)
        torch.testing.assert_close(pair.up @ pair.down, expected, rtol=1e-2, atol=1e-3)


def test_score_against_the_base(sdlora, styles, tmp_path):
    """`resize --score` keeps the directions that are large beside the base's own weight, module by module."""
    file, out = styles / "ink.safetensors", tmp_path / "small.safetensors"
    values = spectrum(load_adapter(file)).values
    weights = dict(
        load_base(inspect_base(BaseSection()), dtype=torch.float32, device="cpu").denoiser.named_parameters()
    )
    norms = {name: float(weights[f"{name}.weight"].norm()) for name in values}
    # Half of the directions stay; the limit lies between two of them, so that rounding decides nothing.
    shares = sorted(float(value) / norms[name] for name, row in values.items() for value in row)
    score = (shares[len(shares) // 2 - 1] + shares[len(shares) // 2]) / 2

    def ranks(norms):
        found = {name: int((row >= score * norms[name]).sum()) for name, row in values.items()}
        return {name: rank for name, rank in found.items() if rank}

    code, _, errors = sdlora("resize", file, "--score", score, "--base", "builtin", "--out", out)
    assert code == 0, errors
    found = {name: pair.rank for name, pair in load_adapter(out).modules.items()}
    assert found == ranks(norms)
    assert found != ranks(dict.fromkeys(norms, sum(norms.values()) / len(norms))), "the norms decide"


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ("extract builtin --base builtin --out x.safetensors", "extract.no-change", "all-linear"),
        ("extract builtin --base builtin --out x.safetensors --rank 0", "lora.rank", "0"),
        ("merge-into-base {ink} --out {here}", "option--out", "{here}"),
        ("merge-into-base {ink} --out x --dtype fp8", "export.precision", "'fp8'"),
        ("resize {ink} --score 0.1 --out x.safetensors", "resize.score-without-base", "--base"),
    ],
)
def test_mistakes(sdlora, styles, tmp_path, arguments, key, value):
    """One line, exit code 2."""
    places = {"ink": styles / "ink.safetensors", "here": tmp_path}
    code, _, errors = sdlora(*(argument.format(**places) for argument in arguments.split()))
    assert (code, sdlora.keys) == (2, (key,))
    assert len(errors) == 1
    assert value.format(**places) in errors[0]
