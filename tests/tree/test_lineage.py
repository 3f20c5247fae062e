"""The ancestors of an adapter: digests, and the lineage in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import AdapterError
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.tree.lineage import (
    Ancestor,
    digest_file,
    find_ancestors,
    lineage_to_notes,
    parent_error,
    read_lineage,
    recorded_digest,
)
from tests.checks import raises
from tests.lora_fixtures import child_lineage

CHAIN = (Ancestor("ink", "ab" * 32, 0.5), Ancestor("ink/portraits", "cd" * 32))


@pytest.fixture
def rounded(unet, make_adapter):
    """As a run writes it: fp16, modules of one rank."""
    return round_adapter(make_adapter(unet))[0]


def test_digest_is_the_hash_that_other_programs_show(rounded, tmp_path):
    """R-42: of the tensor bytes, as `sshs_model_hash`; so any tool can check it."""
    file = save_adapter(tmp_path / "a.safetensors", rounded)
    assert digest_file(file) == load_adapter(file).notes["sshs_model_hash"] == recorded_digest(file)


def test_digest_is_of_the_content(rounded, tmp_path, make_adapter, unet):
    """Dialect, padding, metadata, the writer and the name change nothing; a value does."""
    digest = digest_file(save_adapter(tmp_path / "a.safetensors", rounded))
    kohya = save_adapter(tmp_path / "b.safetensors", rounded, dialect="kohya", metadata={"x": "y"})
    other_writer = tmp_path / "c.safetensors"
    save_file(load_file(tmp_path / "a.safetensors"), other_writer)
    again = save_adapter(tmp_path / "d.safetensors", load_adapter(kohya, dtype=None))
    assert {digest_file(file) for file in (kohya, other_writer, again)} == {digest}
    assert [recorded_digest(file) for file in (kohya, other_writer, again)] == [None, None, digest]
    next(iter(rounded.modules.values())).up[0, 0] += 0.01
    assert digest_file(save_adapter(tmp_path / "e.safetensors", rounded)) != digest
    mixed = round_adapter(make_adapter(unet, rank=2))[0]
    assert digest_file(save_adapter(tmp_path / "f.safetensors", mixed)) != digest


def test_mixed_ranks_have_one_digest_in_both_dialects(mixed_adapter, tmp_path):
    """kohya's file is padded; the digest is that of the true ranks."""
    digests = {
        digest_file(save_adapter(tmp_path / f"{dialect}.safetensors", mixed_adapter, dialect=dialect))
        for dialect in ("diffusers", "kohya")
    }
    assert len(digests) == 1


def test_chain_round_trip(rounded, tmp_path):
    """Names, digests and strengths survive the file, in both dialects, and a conversion."""
    for dialect in ("diffusers", "kohya"):
        notes = {**rounded.notes, **lineage_to_notes(CHAIN)}
        file = save_adapter(tmp_path / f"{dialect}.safetensors", rounded, dialect=dialect, metadata=notes)
        loaded = load_adapter(file, dtype=None)
        assert read_lineage(loaded.notes) == CHAIN
        assert loaded.parent == CHAIN[-1].digest
        again = load_adapter(save_adapter(tmp_path / "again.safetensors", loaded))
        assert read_lineage(again.notes) == CHAIN
        child = child_lineage("leaf", loaded, 0.7)
        assert child == (*CHAIN, Ancestor("leaf", digest_file(file), 0.7))


def test_a_root_has_none(rounded):
    """No parent, no keys."""
    assert read_lineage(rounded.notes) == ()
    assert lineage_to_notes(()) == {}


def test_a_parent_alone_is_enough():
    """The chain above an unknown parent is unknown."""
    assert read_lineage({"sdlora.parent": "ab"}) == (Ancestor("its parent", "ab"),)


def test_no_lineage_beside_the_parent():
    """The parent alone is enough, whatever the lineage holds."""
    notes = {"sdlora.parent": "ab", "sdlora.lineage": "{}"}
    assert read_lineage(notes) == (Ancestor("its parent", "ab"),)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[", "tree.bad-lineage"),
        ('[{"name": "a"}]', "tree.bad-lineage"),
        ('[{"name": "a", "digest": "cd", "strength": "x"}]', "tree.bad-lineage"),
        (json.dumps([{"name": "a", "digest": "cd", "strength": 1}]), "tree.contradicting-parents"),
    ],
)
def test_damaged_metadata(text, key):
    """R-25: one line, not a trace."""
    with raises(AdapterError, key, shows="sdlora.lineage"):
        read_lineage({"sdlora.parent": "ab", "sdlora.lineage": text})


def test_a_wrong_parent_is_refused_with_both_digests():
    """The errors name the expected parent and the one that was found."""
    assert parent_error("leaf", CHAIN[0], "ink", "ab" * 32) is None
    changed = parent_error("leaf", CHAIN[0], "ink", "ff" * 32)
    missing = parent_error("leaf", CHAIN[0], "in styles", None)
    assert (changed.keys, missing.keys) == (("tree.parent-changed",), ("tree.parent-missing",))
    for value in ("leaf", "ink (abababababab)", "ffffffffffff", "--force"):
        assert value in str(changed)
    for value in ("leaf", "ink (abababababab)", "in styles", "--force"):
        assert value in str(missing)


def test_a_root_searches_nothing(rounded, tmp_path, monkeypatch):
    """A file without a parent does not walk the folders around it."""
    file = save_adapter(tmp_path / "a.safetensors", rounded)
    monkeypatch.setattr(Path, "glob", lambda *rest: pytest.fail("a folder was searched"))
    assert find_ancestors(file, load_adapter(file)) == []


def test_tensors_keep_their_dtype(rounded, tmp_path):
    """A digest is of the file's own bytes, so a file may be read without widening it."""
    file = save_adapter(tmp_path / "a.safetensors", rounded)
    assert load_adapter(file, dtype=None).dtype == torch.float16
    assert load_adapter(file).dtype == torch.float32
