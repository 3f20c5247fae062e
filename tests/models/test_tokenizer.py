"""Captions as the tokenizer sees them."""

from __future__ import annotations

import subprocess
import sys

from sdlora.models.info import BaseInfo
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.models.tokenizer import count_tokens, describe_cut_prompts, load_tokenizer


def test_a_short_caption_fits(info: BaseInfo) -> None:
    """R-05: pieces to show, nothing lost."""
    count = count_tokens(load_tokenizer(info), info, "a red tractor")
    assert count.pieces == ("a", "red", "tractor")
    assert (count.used, count.limit, count.lost) == (3, info.text_length - 2, "")


def test_letters_beyond_ascii_are_shown_as_they_are(info: BaseInfo) -> None:
    """R-05: not as the bytes that the tokenizer works with."""
    count = count_tokens(load_tokenizer(info), info, "a café, 水墨, 🐈")
    assert "".join(count.pieces) == "acafé,水墨,🐈"
    assert {"é", "水", "墨", "🐈"} <= {*count.pieces}
    assert count.used > len(count.pieces)


def test_prompts_that_are_cut(info: BaseInfo) -> None:
    """R-28: what the base does not read of a prompt is named, as it is for captions."""
    long = ", ".join(f"red cat {number}" for number in range(40))
    line = describe_cut_prompts(info, ["a cat", long]) or ""
    assert "red cat 3 9" in line or "…" in line
    assert str(info.text_length - 2) in line
    assert str(count_tokens(load_tokenizer(info), info, long).used) in line
    assert describe_cut_prompts(info, ["a cat", ""]) is None


def test_lost_words_are_whole(info: BaseInfo) -> None:
    """R-28: counted with the real tokenizer; a word cut in its middle is lost as a whole."""
    tokenizer = load_tokenizer(info)
    words = ["red"] * (info.text_length - 4) + ["unbelievable", "sky"]
    count = count_tokens(tokenizer, info, " ".join(words))
    assert count.used > count.limit == len(count.pieces)
    assert count.lost == "unbelievable sky"


def test_what_is_counted_is_what_is_encoded(base: StableDiffusion) -> None:
    """R-28: a caption that just fits loses nothing when encoded; one word more changes no state before it."""
    limit = base.info.text_length - 2
    fits, over = " ".join(["red"] * limit), " ".join(["red"] * limit + ["tractor"])
    lost = [count_tokens(base.tokenizers[0], base.info, caption).lost for caption in (fits, over)]
    assert lost == ["", "tractor"]
    states = base.encode_captions([fits, over]).hidden
    assert (states[0] == states[1]).all()


def test_counting_needs_no_torch() -> None:
    """R-35: the preflight reads captions with the tokenizer alone."""
    code = (
        "import sys; from sdlora.config import BaseSection; from sdlora.models.info import inspect_base;"
        "from sdlora.models.tokenizer import load_tokenizer, count_tokens;"
        "info = inspect_base(BaseSection()); count_tokens(load_tokenizer(info), info, 'a cat');"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
