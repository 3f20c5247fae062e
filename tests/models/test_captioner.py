"""`sdlora caption` writes what a model says, and never over what a person wrote (R-05)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
)

from sdlora.config import DataSection
from sdlora.data.captioning import find_uncaptioned, write_captions
from sdlora.errors import ModelError
from sdlora.models.captioner import Captioner
from tests.checks import raises

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "house", "hill", "boat", "red", "of"]


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP that says words of a small vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        "vocab_size": len(WORDS),
        "bos_token_id": 2,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"image_size": 32, "patch_size": 16, **shape}
    config = BlipConfig(text_config={**text, **shape, "encoder_hidden_size": 16}, vision_config=vision)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_a_model_describes(tiny_blip: Path, sdlora, make_images, tmp_path: Path) -> None:
    """A line for each image without a caption, and where it is; once more, it writes none."""
    root = make_images()
    for name in ("00", "01"):
        (root / f"{name}.txt").unlink()
    (root / "02.txt").write_text(" \n", encoding="utf-8")
    code, printed, _ = sdlora("caption", str(root), "--model", str(tiny_blip), "--trigger", "inkwash")
    assert code == 0
    assert "3/3" in printed
    assert (root / "03.txt").read_text(encoding="utf-8") == "a circle number 3"
    for name in ("00", "01", "02"):
        words = (root / f"{name}.txt").read_text(encoding="utf-8").removeprefix("inkwash, ").split()
        assert words
        assert set(words) <= set(WORDS)
    before = {file.name: file.stat().st_mtime_ns for file in root.iterdir()}
    assert sdlora("caption", str(root), "--model", str(tmp_path / "not read"))[0] == 0
    assert {file.name: file.stat().st_mtime_ns for file in root.iterdir()} == before


def test_skeletons_are_not_captions(sdlora, make_images) -> None:
    """Empty files to fill in; training and the doctor say that they are empty."""
    root = make_images()
    for file in root.glob("0[012].txt"):
        file.unlink()
    assert sdlora("caption", str(root), "--skeleton")[0] == 0
    assert (root / "00.txt").read_bytes() == b""
    assert find_uncaptioned(root, DataSection())[0] == ["00.png", "01.png", "02.png"]
    code, printed, _ = sdlora("doctor", str(root), "data.trigger=ink")
    assert code == 1
    assert "3 caption files empty" in printed


def test_a_person_is_not_overwritten(make_images) -> None:
    """A caption that appears while the model works stays; style words go; a bad image is passed over."""
    root = make_images()
    for file in root.glob("*.txt"):
        file.unlink()
    (root / "01.png").write_bytes(b"not an image")

    def describe(image: Image.Image) -> str:
        (root / "00.txt").write_text("mine", encoding="utf-8")
        return "a watercolor painting of a boat"

    names, total = find_uncaptioned(root, DataSection())
    done = dict(write_captions(root, names, describe, DataSection()))
    assert total == 4
    assert done == {"00.png": "", "01.png": "", "02.png": "a boat", "03.png": "a boat"}
    assert (root / "00.txt").read_text(encoding="utf-8") == "mine"


def test_other_models_are_refused(tmp_path: Path) -> None:
    """A folder that is no model, or one of another kind, is one line."""
    with raises(ModelError, "option--model", shows=str(tmp_path)):
        Captioner(str(tmp_path))
    CLIPTextConfig().save_pretrained(tmp_path)
    with raises(ModelError, "option--model", shows="clip_text_model"):
        Captioner(str(tmp_path))


def test_the_builtin_base_takes_no_prompt(sdlora, make_images):
    root = make_images()
    next(root.glob("*.txt")).unlink()
    code, _, errors = sdlora("caption", str(root), "--model", "builtin", "--prompt", "what is it?")
    assert code == 2
    (line,) = errors
    assert "--prompt" in line
    assert "--model builtin" in line
