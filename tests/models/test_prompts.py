"""How text is read: clip skip, several chunks, weights in brackets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdlora.config import BaseSection, DataSection
from sdlora.errors import ConfigError
from sdlora.models.base import quiet
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.models.tokenizer import (
    count_tokens,
    describe_bracketed_prompts,
    load_tokenizer,
    parse_weights,
    without_weights,
)
from tests.checks import raises


def load(folder: Path, **settings: object) -> StableDiffusion:
    info = inspect_base(BaseSection(source=str(folder)), None, DataSection(**settings))
    return load_base(info, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_clip_skip_is_that_of_diffusers(request: pytest.FixtureRequest, family: str) -> None:
    """Equal to the bit to the stock pipeline's own `clip_skip`, which counts from 0."""
    folder = request.getfixturevalue(f"{family}_folder")
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
    # Its code needs the level that newer transformers do not have.
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder
    found = []
    for skip in (1, 2, 3):
        base = load(folder, clip_skip=skip)
        expected = pipeline.encode_prompt("a red tractor", "cpu", 1, False, clip_skip=skip - 1 or None)[0]
        found.append(base.encode_captions(["a red tractor"]).hidden)
        assert torch.equal(found[-1], expected)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_clip_skip_is_checked(sd15_folder: Path, sdxl_folder: Path) -> None:
    """R-35: SDXL has no choice, and no base more layers than it has; the digest of the text differs."""
    with raises(ConfigError, "data.clip_skip", shows="SDXL"):
        inspect_base(BaseSection(source=str(sdxl_folder)), None, DataSection(clip_skip=2))
    with raises(ConfigError, "data.clip_skip", shows="3"):
        inspect_base(BaseSection(source=str(sd15_folder)), None, DataSection(clip_skip=4))
    given = ({}, {"clip_skip": 1}, {"clip_skip": 2}, {"prompt_chunks": 2}, {"prompt_weights": True})
    infos = [inspect_base(BaseSection(source=str(sd15_folder)), None, DataSection(**one)) for one in given]
    digests = [info.text_digest for info in infos]
    assert digests[0] == digests[1] == inspect_base(BaseSection(source=str(sd15_folder))).text_digest
    assert len(set(digests)) == 4
    assert infos[2].unread_layer == "text_encoder.text_model.encoder.layers.2."


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_chunks(request: pytest.FixtureRequest, family: str) -> None:
    """R-28: each chunk is read as a text of its own; what fits into one is followed by an empty one."""
    folder = request.getfixturevalue(f"{family}_folder")
    plain, base = load(folder), load(folder, prompt_chunks=2)
    length = base.info.text_length
    limit = length - 2
    first, second = " ".join(["red"] * limit), "a blue tractor"
    states = base.encode_captions([f"{first} {second}", second, ""])
    assert states.hidden.shape[1] == base.info.num_text_states == 2 * length
    alone = plain.encode_captions([first, second]).hidden
    torch.testing.assert_close(states.hidden[0, :length], alone[0])
    torch.testing.assert_close(states.hidden[0, length:], alone[1])
    torch.testing.assert_close(states.hidden[1, :length], alone[1])
    count = count_tokens(load_tokenizer(base.info), base.info, f"{first} {second} " + first)
    assert count.limit == 2 * limit
    assert count.lost == "red red red"
    if family == "sdxl":
        assert not states.hidden[2].any()
        torch.testing.assert_close(states.pooled[1], plain.encode_captions([second]).pooled[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red)) [cat]", [("red", 1.21), (" ", 1.0), ("cat", 1 / 1.1)]),
        ("a (red cat:1.3), sun", [("a ", 1.0), ("red cat", 1.3), (", sun", 1.0)]),
        ("(a (red:2) cat: .5)", [("a ", 0.5), ("red", 1.0), (" cat", 0.5)]),
        (r"a \(red\) cat", [("a ", 1.0), ("(", 1.0), ("red", 1.0), (")", 1.0), (" cat", 1.0)]),
        ("(red cat", [("red cat", 1.1)]),
        ("a: b) 1:2", [("a", 1.0), (":", 1.0), (" b", 1.0), (")", 1.0), (" 1", 1.0), (":", 1.0), ("2", 1.0)]),
        ("", []),
    ],
)
def test_weights_in_brackets(text: str, expected: list[tuple[str, float]]) -> None:
    """As A1111's web UI reads them."""
    found = parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_weights_change_the_states(sd15_folder: Path) -> None:
    """The states of the words in brackets are multiplied, and brackets are no tokens."""
    plain, base = load(sd15_folder), load(sd15_folder, prompt_weights=True)
    before = plain.encode_captions(["a red tractor"]).hidden[0].double()
    weighted, same = base.encode_captions(["a (red:1.5) tractor", "a red tractor"]).hidden.double()
    expected = before.clone()
    expected[2] *= 1.5
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, before, rtol=0, atol=1e-6)
    tokenizer = load_tokenizer(base.info)
    assert count_tokens(tokenizer, base.info, "a (red:1.5) tractor").used == 3
    assert without_weights("a (red:1.5) tractor") == "a red tractor"
    line = describe_bracketed_prompts(plain.info, ["a (red:1.5) tractor"])
    assert line is not None
    assert "(red:1.5)" in line
    assert describe_bracketed_prompts(base.info, ["a (red:1.5) tractor"]) is None
    assert describe_bracketed_prompts(plain.info, ["a cat (red)"]) is None
