"""`sdlora spectrum`, `resize`, `merge` and `advise-rank` as people type them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.kinds import LowRank

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def style(tmp_path):
    """A LoRA of rank 4 with two modules, in fp16."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"{BLOCK}.{name}": LowRank(
            torch.randn(4, 8, generator=generator).half(), torch.randn(8, 4, generator=generator).half()
        )
        for name in ("attn1.to_q", "attn2.to_v")
    }
    return save_adapter(tmp_path / "style.safetensors", Adapter(modules, 4, 4.0, "sd1"))


def test_spectrum(sdlora, style, tmp_path):
    """A table by block, and a plot."""
    code, printed, _ = sdlora("spectrum", style, "--plot", tmp_path / "spectrum.png")
    assert code == 0
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("down_blocks.0"))
    assert row[1:3] == ["2", "4"]
    assert row[-1] == "100.0%"
    with Image.open(tmp_path / "spectrum.png") as image:
        assert image.format == "PNG"


def test_resize(sdlora, style, tmp_path):
    """The file has the rank asked for; the error is printed."""
    out = tmp_path / "small.safetensors"
    code, printed, _ = sdlora("resize", style, "--rank", 2, "--out", out, "--format", "kohya")
    assert code == 0
    info = inspect_adapter(out)
    assert (info.rank, info.dialect, info.dtypes) == (2, "kohya", ("float16",))
    for value in ("rank 2", "128", "64", "50%", "error  "):
        assert value in printed


@pytest.mark.parametrize("weights", [("", "", "--weights", "0.5,1"), (":0.5", "")])
def test_merge(sdlora, style, tmp_path, weights):
    """The exact weighted sum, with weights in either place; to a rank with its cost."""
    out = tmp_path / "sum.safetensors"
    call = f"{style}{weights[0]}", f"{style}{weights[1]}", *weights[2:]
    code, _, errors = sdlora("merge", *call, "--out", out, "--precision", "fp32")
    assert code == 0, errors
    one, both = load_adapter(style), load_adapter(out)
    for name, pair in one.modules.items():
        joined = both.modules[name]
        assert joined.rank == 8
        assert torch.allclose(joined.up @ joined.down, 1.5 * pair.up @ pair.down, atol=1e-5)
    code, printed, errors = sdlora("merge", style, style, "--method", "svd", "--rank", 2, "--out", out)
    assert code == 0, errors
    assert [line[:10] for line in printed.splitlines()] == ["error     ", "wrote     "]


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["resize"], "resize.one-rule", "--rank 8"),
        (["resize", "--rank", 2, "--energy", 0.9], "resize.one-rule", "rank = 2 and energy = 0.9"),
        (["resize", "--rank", 2, "--format", "webui"], "export.formats", "'webui'"),
        (["resize", "--rank", 2, "--base", "builtin"], "option--base", "builtin"),
        (["merge", "--weights", "1,2"], "option--weights", "1,2"),
        (["merge", "--method", "mean"], "merge.method", "'mean'"),
        (["merge", "--rank", 2], "merge.no-effect", "rank = 2"),
    ],
)
def test_mistakes(sdlora, style, tmp_path, arguments, key, value):
    """One line, exit code 2, nothing written."""
    out = tmp_path / "out.safetensors"
    code, _, errors = sdlora(arguments[0], style, *arguments[1:], "--out", out)
    assert code == 2
    assert key in sdlora.keys
    assert len(errors) == 1
    assert value in errors[0]
    assert not out.exists()


@pytest.mark.parametrize("verb", [["resize", "--rank", 2], ["merge"], ["extract", "--base", "builtin"]])
def test_a_source_is_never_written_over(sdlora, style, verb):
    """A smaller file, or a sum, cannot be turned back."""
    before = style.read_bytes()
    code, _, errors = sdlora(verb[0], style, *verb[1:], "--out", style)
    assert code == 2
    assert len(errors) == 1
    assert f"--out {style}" in errors[0]
    assert style.read_bytes() == before


def test_advise_rank_wants_a_run(sdlora, style):
    """The arguments are checked before the heavy imports."""
    code, _, errors = sdlora("advise-rank", "nowhere", "--ranks", "2,4")
    assert (code, sdlora.keys) == (2, ("run.missing",))
    assert len(errors) == 1
    assert "nowhere" in errors[0]
    code, _, errors = sdlora("advise-rank", "nowhere", "--ranks", "2-4")
    assert (code, sdlora.keys) == (2, ("option--ranks",))
    assert "2-4" in errors[0]
