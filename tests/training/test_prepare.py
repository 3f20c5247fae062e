"""What is found of a base before the first step."""

from __future__ import annotations

import pytest

from sdlora.data.cache import cache_folder, clear_cache
from sdlora.training import prepare


@pytest.mark.parametrize(("found", "passes"), [("own", 1), ("other", 2), (None, 2)])
def test_a_prediction_type_that_fits_is_found_once(
    quick, make_images, make_trainer, tmp_path, monkeypatch, found, passes
):
    """R-32 R-46: it takes as long as a step; a wrong one is looked for every time."""
    trainer = make_trainer(quick(make_images(sizes=((64, 64),) * 2)), tmp_path / "run")
    called, own = [], trainer.prepared.objective.schedule.prediction_type

    def recognise(*_):
        called.append(1)
        return own if found == "own" else found

    monkeypatch.setattr(prepare, "recognise_prediction", recognise)
    warnings = [prepare.warn_if_prediction_differs(trainer.plan, trainer.prepared) for _ in range(2)]
    assert [bool(warning) for warning in warnings] == [found == "other"] * 2
    assert len(called) == passes
    clear_cache(cache_folder())
    prepare.warn_if_prediction_differs(trainer.plan, trainer.prepared)
    assert len(called) == passes + 1
