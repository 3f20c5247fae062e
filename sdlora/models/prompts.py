"""Text as token ids in several chunks, and the weights that brackets give its words.

B batch, K chunks, L tokens of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import CLIPTokenizer

# Of (word) and, divided, of [word].
STEP = 1.1
PIECE = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*([+-]?[0-9]*\.?[0-9]+)\s*\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Splits a text at its brackets into words and their weights, as A1111 does.

    `(word)` weighs 1.1, `((word))` 1.21, `[word]` 1 / 1.1, `(word:1.3)` 1.3; `\(` is a bracket. One that is
    not closed counts to the end.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def scale(start: int, factor: float) -> None:
        parts[start:] = [(words, weight * factor) for words, weight in parts[start:]]

    for match in PIECE.finditer(text):
        piece, number = match[0], match[1]
        if piece in ("(", "["):
            opened.append((piece, len(parts)))
        elif number is not None and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(number))
        elif piece in (")", "]") and opened and opened[-1][0] == {")": "(", "]": "["}[piece]:
            scale(opened.pop()[1], STEP if piece == ")" else 1 / STEP)
        else:
            is_escaped = len(piece) == 2 and piece[0] == "\\"
            parts.append((piece[1:] if is_escaped else piece, 1.0))
    for bracket, start in reversed(opened):
        scale(start, STEP if bracket == "(" else 1 / STEP)
    return parts


def without_weights(text: str) -> str:
    """The words that are read, without brackets and weights."""
    return "".join(words for words, _ in parse_weights(text))


def tokenize_chunks(
    tokenizer: CLIPTokenizer, captions: Sequence[str], length: int, chunks: int, *, weighted: bool
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Token ids, their attention mask, and their weights: B * K lists of L numbers.

    Each chunk has a first and a last token of its own, and is padded; A1111 and ComfyUI read long text so.
    """
    rows: list[list[int]] = []
    masks: list[list[int]] = []
    weights: list[list[float]] = []
    size = length - 2
    for caption in captions:
        ids: list[int] = []
        factors: list[float] = []
        for words, weight in parse_weights(caption) if weighted else [(caption, 1.0)]:
            found = tokenizer(words, add_special_tokens=False, truncation=False, verbose=False).input_ids
            ids += found
            factors += [weight] * len(found)
        for start in range(0, size * chunks, size):
            part = [tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id]
            rest = length - len(part)
            rows.append(part + [tokenizer.pad_token_id] * rest)
            masks.append([1] * len(part) + [0] * rest)
            weights.append([1.0, *factors[start : start + size], *[1.0] * (rest + 1)])
    return rows, masks, weights
