"""Seeds depend on their parts alone, and never change: runs are repeated and resumed by them (R-03, R-04)."""

from __future__ import annotations

from sdlora.seeds import derive_seed, keyed_random, name_seed


def test_streams_of_the_first_release():
    """R-03: another value would change every run that is repeated or resumed."""
    assert derive_seed("sample", 0, 7, 31) == 6378533012458180149
    assert name_seed("0/adapter/mid_block.attentions.0.proj_in") == 2848441919046923960
    assert keyed_random(0, "order", 2).random() == 0.692371844976855


def test_seeds_differ_by_purpose_and_counter():
    """R-04: no two keys share a stream."""
    keys = [("a", 1, 23), ("a", 12, 3), ("b", 1, 23), ("a", 1, 24)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert len({keyed_random(*key).random() for key in keys}) == len(keys)
