"""Ranks and alphas by name pattern."""

from __future__ import annotations

from sdlora.config import LoraSection
from sdlora.errors import ConfigError
from sdlora.lora.attach import count_parameters, match_targets, plan_layout
from tests.checks import raises


def layout_of(model, **settings):
    lora = LoraSection(**settings)
    return plan_layout(lora, match_targets(model, lora.targets))


def test_one_rank_and_alpha(sd15):
    """R-33: alpha is the rank unless given; the plan says the scale."""
    layout = layout_of(sd15, rank=8)
    assert set(layout.ranks.values()) == {8}
    assert layout.describe() == "rank 8, alpha 8, scale 1"
    assert set(layout.scales().values()) == {1.0}
    assert layout_of(sd15, rank=8, alpha=4).describe() == "rank 8, alpha 4, scale 0.5"


def test_patterns_and_named_targets(sd15):
    """A pattern is a target's name or a pattern on module names; the last that matches counts."""
    layout = layout_of(
        sd15, targets=["all"], rank=16, rank_pattern={"convolutions": 4, "up_blocks.*": 8, "*.attn2.to_v": 32}
    )
    assert layout.ranks["down_blocks.0.resnets.0.conv1"] == 4
    assert layout.ranks["up_blocks.0.resnets.0.conv1"] == 8
    assert layout.ranks["up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"] == 32
    assert layout.ranks["down_blocks.0.attentions.0.proj_in"] == 16
    assert set(layout.scales().values()) == {1.0}, "alpha is each module's own rank"
    assert layout.describe() == "rank 8 (150 modules), 16 (87), 4 (25), 32 (16), alpha = rank, scale 1"
    assert count_parameters(sd15, layout.ranks) == sum(
        count_parameters(sd15, {name: 1}) * rank for name, rank in layout.ranks.items()
    )


def test_alphas(sd15):
    """A given alpha is every module's; `lora.alpha_pattern` says others."""
    layout = layout_of(sd15, rank=16, alpha=8, rank_pattern={"*.attn1.*": 4}, alpha_pattern={"*.to_q": 1})
    name = "mid_block.attentions.0.transformer_blocks.0.{}"
    scales = layout.scales()
    assert scales[name.format("attn2.to_k")] == 8 / 16
    assert scales[name.format("attn1.to_k")] == 8 / 4
    assert scales[name.format("attn1.to_q")] == 1 / 4
    assert layout.describe() == "rank 4 (64 modules), 16 (64), alpha 1 to 8, scale 0.0625 to 2"


def test_rank_stabilised(sd15):
    """arXiv 2312.03732: the scale is alpha over the root of the rank."""
    layout = layout_of(sd15, rank=16, alpha=4, rslora=True, rank_pattern={"*.attn1.*": 4})
    assert set(layout.scales().values()) == {1.0, 2.0}
    assert layout.describe().endswith("alpha 4, scale 1 to 2 (alpha / sqrt(rank))")


def test_a_pattern_without_a_match_is_an_error(sd15):
    """R-35: one line for each, with the key and what the modules look like."""
    with raises(ConfigError, "lora.rank_pattern", "lora.alpha_pattern", shows="128 modules") as caught:
        layout_of(sd15, rank_pattern={"convolutions": 4, "*.to_q": 2}, alpha_pattern={"*.ff.*": 1})
    first, second = caught.value.problems
    assert "'convolutions'" in first
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in first
    assert "'*.ff.*'" in second
