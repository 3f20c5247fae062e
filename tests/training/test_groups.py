"""Learning rates by module and factor (R-08, R-35)."""

from __future__ import annotations

import pytest
import torch

from sdlora.config import TrainSection
from sdlora.errors import ConfigError
from sdlora.training.optimizer import describe_rates, group_parameters, match_rates

MODULES = (
    "down_blocks.0.attn1.to_q",
    "mid_block.attn2.to_k",
    "up_blocks.1.attn2.to_k",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
)
NAMED = {f"{name}.{factor}": torch.zeros(1) for name in MODULES for factor in ("down", "up")}


def settings(rates: dict[str, float] | None = None, **values) -> TrainSection:
    return TrainSection(learning_rate=0.1, learning_rates=rates or {}, **values)


def names_of(tensors: list[torch.Tensor]) -> list[str]:
    return [name for tensor in tensors for name, own in NAMED.items() if own is tensor]


def test_one_group_if_all_learn_alike():
    """R-03: without these settings there is one group, in the adapter's order."""
    unet = {name: tensor for name, tensor in NAMED.items() if not name.startswith("text_encoder")}
    [group] = group_parameters(unet, settings())
    assert (group.name, group.ratio, names_of(group.parameters)) == ("others", 1.0, list(unet))
    groups = group_parameters(NAMED, settings(text_encoder_learning_rate=0.1))
    assert [group.ratio for group in groups] == [1.0, 1.0]


def test_text_encoders_have_a_rate_of_their_own():
    """R-34: half of the UNet's unless train.text_encoder_learning_rate is set; patterns come first."""
    for given, ratio in ((None, 0.5), (0.03, 0.3)):
        first, second = group_parameters(NAMED, settings(text_encoder_learning_rate=given))
        assert (first.name, second.name) == ("others", "text encoders")
        assert (first.ratio, second.ratio) == (1.0, pytest.approx(ratio))
        assert names_of(second.parameters) == list(NAMED)[6:]
    rates = settings({"text_encoder_2.*": 0.2}, text_encoder_learning_rate=0.03)
    groups = {group.name: group.ratio for group in group_parameters(NAMED, rates)}
    assert groups == pytest.approx({"others": 1.0, "text encoders": 0.3, "text_encoder_2.*": 2.0})
    assert describe_rates(MODULES, rates) == (
        "0.03 on text encoders (1 of 5 modules); 0.2 on text_encoder_2.* (1 of 5 modules)"
    )


def test_patterns_choose_modules():
    """train.learning_rates: by part and by block; the last pattern that matches wins."""
    rates = {"text_encoder*": 0.02, "*.attn2.*": 0.05, "mid_block.*": 0.2}
    groups = {group.name: group for group in group_parameters(NAMED, settings(rates))}
    assert {name: group.ratio for name, group in groups.items()} == pytest.approx(
        {"others": 1.0, "mid_block.*": 2.0, "*.attn2.*": 0.5, "text_encoder*": 0.2}
    )
    assert names_of(groups["*.attn2.*"].parameters) == [f"{MODULES[2]}.down", f"{MODULES[2]}.up"]
    assert names_of(groups["mid_block.*"].parameters) == [f"{MODULES[1]}.down", f"{MODULES[1]}.up"]
    assert len(groups["text_encoder*"].parameters) == 4
    assert sum(len(group.parameters) for group in groups.values()) == len(NAMED)


def test_targets_are_patterns():
    """The names of lora.targets can be used as patterns."""
    chosen = match_rates(MODULES, settings({"attention": 0.05}))
    assert list(chosen.values()) == ["attention"] * 3 + [None] * 2


def test_lora_plus():
    """2402.12354: the rate of every up matrix is λ times that of its down matrix."""
    rates = {"text_encoder.*": 0.02, "text_encoder_2.*": 0.1}
    groups = {g.name: g for g in group_parameters(NAMED, settings(rates, lora_plus_ratio=16))}
    assert {name: group.ratio for name, group in groups.items()} == pytest.approx(
        {
            **{"others down": 1.0, "others up": 16.0, "text_encoder.* down": 0.2, "text_encoder.* up": 3.2},
            **{"text_encoder_2.* down": 1.0, "text_encoder_2.* up": 16.0},
        }
    )
    assert names_of(groups["text_encoder.* up"].parameters) == [f"{MODULES[3]}.up"]


def test_a_pattern_without_effect_is_refused():
    """R-35: one line for each, with the nearest module or the pattern that overrides it."""
    rates = {"mid_block.*": 0.2, "*.attn3.*": 0.1, "*block*": 0.3}
    with pytest.raises(ConfigError) as caught:
        match_rates(MODULES, settings(rates))
    first, second = caught.value.problems
    assert caught.value.keys == ("train.learning_rates",) * 2
    assert all(name in first for name in ("'mid_block.*'", "'*block*'"))
    assert "'*.attn3.*'" in second
    assert any(name in second for name in MODULES)


def test_in_words():
    """The plan shows the rates that differ from the base rate."""
    unet = MODULES[:3]
    assert describe_rates(unet, settings()) == ""
    assert describe_rates(unet, settings({"*.attn2.*": 0.05}, lora_plus_ratio=4)) == (
        "0.05 on *.attn2.* (2 of 3 modules); LoRA+ ratio 4"
    )
