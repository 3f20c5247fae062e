"""Every dialect into every other, and into the stock loader, for each family and with text encoders."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import AdapterError
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.formats.read import state_to_adapter
from sdlora.formats.write import adapter_to_diffusers, adapter_to_kohya
from tests.checks import raises

EVERYTHING = ["all", "text_attention", "text_mlp"]


def original_name(module):
    """The original code's name of a module of SDXL, spelled out for two layers a block."""
    down = {f"{i}.{j}": 1 + 3 * i + j for i, j in product(range(3), range(2))}
    up = {f"{i}.{j}": 3 * i + j for i, j in product(range(3), range(3))}
    for (side, entries), (kind, part) in product(
        (("down", down), ("up", up)), (("resnets", 0), ("attentions", 1))
    ):
        flat = "input_blocks" if side == "down" else "output_blocks"
        for key, number in entries.items():
            block, layer = key.split(".")
            module = module.replace(f"{side}_blocks.{block}.{kind}.{layer}.", f"{flat}.{number}.{part}.")
    for block in range(2):
        module = module.replace(
            f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{3 * block + 3}.0.op"
        )
        module = module.replace(
            f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{3 * block + 2}.2.conv"
        )
    for ours, theirs in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        module = module.replace(f"mid_block.{ours}.", f"middle_block.{theirs}.")
    if "_blocks" in module.split(".")[0] and "input" not in module and "output" not in module:
        raise AssertionError(module)
    for ours, theirs in (
        ("conv1", "in_layers.2"),
        ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"),
        ("conv_shortcut", "skip_connection"),
    ):
        module = re.sub(rf"(_blocks?\.\d+(?:\.0)?)\.{ours}$", rf"\1.{theirs}", module)
    return module


def spell(dialect, module, family):
    """What a dialect calls a module, written by hand."""
    component, _, path = module.partition(".")
    is_text = component.startswith("text_encoder")
    is_xl = family == "sdxl"
    if dialect in ("kohya", "kohya, diffusers names"):
        if is_text:
            number = "2" if component.endswith("2") else "1" if is_xl else ""
            return f"lora_te{number}_{path.replace('.', '_')}"
        name = original_name(module) if is_xl and dialect == "kohya" else module
        return f"lora_unet_{name.replace('.', '_')}"
    if dialect == "comfyui":
        if is_text:
            clip = "clip_g" if component.endswith("2") else "clip_l"
            return f"text_encoders.{clip}.transformer.{path}"
        return f"diffusion_model.{original_name(module) if is_xl else module}"
    if dialect == "lycoris":
        return module if is_text else f"lycoris_{module.replace('.', '_')}"
    if dialect == "diffusers, old":
        found = re.fullmatch(r"(.+\.attn[12])\.(to_(?:q|k|v|out))(?:\.0)?", module)
        return f"unet.{found[1]}.processor.{found[2]}_lora" if found else f"unet.{module}.lora"
    return module if is_text else f"unet.{module}"


PARTS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "kohya, diffusers names": ("lora_down.weight", "lora_up.weight"),
    "comfyui": ("lora_down.weight", "lora_up.weight"),
    "lycoris": ("lora_down.weight", "lora_up.weight"),
    "diffusers, old": ("down.weight", "up.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "peft": ("lora_A.default.weight", "lora_B.default.weight"),
}
DIALECTS = ["kohya", "kohya, diffusers names", "comfyui", "lycoris", "diffusers, old", "diffusers", "peft"]
WITHOUT_TEXTS = ("lycoris", "diffusers, old")


def write(dialect, adapter, family, alpha=None):
    """A file of a dialect as another program writes it, by hand; its alpha where the dialect has one."""
    state = {}
    for module, pair in adapter.modules.items():
        name, (down, up) = spell(dialect, module, family), PARTS[dialect]
        state[f"{name}.{down}"] = pair.down.detach().clone()
        state[f"{name}.{up}"] = pair.up.detach().clone()
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


@pytest.fixture
def make_file_adapter(make_family, make_adapter):
    """An adapter on everything of a family, alpha == rank as a file has it."""

    def make(family, dialect="kohya", **settings):
        targets = ["all"] if dialect in WITHOUT_TEXTS else EVERYTHING
        return make_adapter(make_family(family), family=family, targets=targets, **{"alpha": 4, **settings})

    return make


def some_slow(*values, default):
    """All combinations, those that are not wanted by default among the slow ones."""
    return [
        pytest.param(*case, marks=() if default(*case) else pytest.mark.slow) for case in product(*values)
    ]


@pytest.mark.parametrize(
    ("family", "dialect"),
    some_slow(
        ["sd1", "sd2", "sdxl"],
        DIALECTS,
        default=lambda family, dialect: family == "sdxl" or (family, dialect) == ("sd1", "kohya"),
    ),
)
def test_every_dialect_into_ours_and_back(make_file_adapter, tmp_path, dialect, family):
    """R-07: a file of any dialect, read, written as diffusers and kohya and read again: equal to the bit."""
    adapter = make_file_adapter(family, dialect)
    save_file(write(dialect, adapter, family), tmp_path / "in.safetensors", {"sdlora.family": family})
    read = load_adapter(tmp_path / "in.safetensors")
    assert read.family == family
    for ours in ("diffusers", "kohya"):
        again = load_adapter(save_adapter(tmp_path / f"{ours}.safetensors", read, dialect=ours))
        assert again.family == family
        for result in (read, again):
            assert set(result.modules) == set(adapter.modules)
            for name, pair in adapter.modules.items():
                assert torch.equal(result.modules[name].down, pair.down), name
                assert torch.equal(result.modules[name].up, pair.up), name
        hand = write(ours, adapter, family, alpha=4 if ours == "kohya" else None)
        written = load_file(tmp_path / f"{ours}.safetensors")
        assert set(written) == set(hand)
        assert all(torch.equal(written[key], hand[key]) for key in hand)


@pytest.mark.parametrize(
    ("family", "dialect"),
    some_slow(
        ["sd1", "sdxl"],
        ["kohya", "kohya, diffusers names", "comfyui", "lycoris"],
        default=lambda family, dialect: family == "sdxl",
    ),
)
def test_alpha_of_every_dialect(make_file_adapter, deltas, dialect, family):
    """R-02 R-07: where alpha is not the rank, every module's change is the same to 1e-6."""
    adapter = make_file_adapter(family, dialect)
    exact = deltas(adapter)
    read = state_to_adapter(write(dialect, adapter, family, alpha=1))
    through = state_to_adapter(adapter_to_kohya(state_to_adapter(adapter_to_diffusers(read))))
    for result in (read, through):
        for name, delta in deltas(result).items():
            torch.testing.assert_close(delta, exact[name] / 4, rtol=0, atol=1e-6 * float(delta.abs().max()))


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_info_of_a_foreign_file(make_file_adapter, tmp_path, dialect):
    """`sdlora info` on SDXL files of other programs, without any metadata."""
    adapter = make_file_adapter("sdxl", dialect)
    save_file(write(dialect, adapter, "sdxl", alpha=2), tmp_path / "x.safetensors")
    info = inspect_adapter(tmp_path / "x.safetensors")
    assert (info.dialect, info.family) == (dialect, "sdxl")
    assert info.alphas == {2.0: len(adapter.modules)}
    assert info.targets["attn2.to_k"] == 22
    assert info.targets["text encoder mlp.fc1"] == 4
    assert info.targets["downsamplers.0.conv"] == info.targets["upsamplers.0.conv"] == 2


@pytest.mark.parametrize(
    ("family", "dialect", "ranks"),
    some_slow(
        ["sd1", "sd2", "sdxl"],
        ["diffusers", "kohya"],
        ["one rank", "a rank for each component", "mixed"],
        default=lambda family, dialect, ranks: (family, ranks) in (("sd1", "one rank"), ("sdxl", "mixed")),
    ),
)
def test_the_stock_loader_agrees(
    make_family,
    make_file_adapter,
    make_pipeline,
    deltas,
    peft_deltas,
    tmp_path,
    caplog,
    family,
    dialect,
    ranks,
):
    """R-01 R-34: each module of UNet and text encoders is right in stock diffusers, without a warning."""
    adapter = make_file_adapter(family, alpha=3).to()
    for number, (name, pair) in enumerate(adapter.modules.items()):
        rank = {"one rank": 4, "mixed": (4, 3, 1)[number % 3]}.get(ranks, 2 if "text" in name else 4)
        pair.down, pair.up = pair.down[:rank].clone(), pair.up[:, :rank].clone()
    expected = deltas(adapter)
    path = save_adapter(tmp_path / "x.safetensors", adapter, dialect=dialect)
    parts = make_family(family)
    make_pipeline(**parts).load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="check_1f")
    loaded = peft_deltas(parts, "check_1f")
    assert set(loaded) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(loaded[name], delta, rtol=1e-5, atol=1e-7, msg=name)
    assert not caplog.records


@pytest.mark.parametrize("dialect", ["kohya", "kohya, diffusers names"])
def test_the_stock_loader_reads_kohya_s_files_as_we_do(
    make_family, make_file_adapter, make_pipeline, deltas, peft_deltas, tmp_path, dialect
):
    """R-07: an SDXL file by the hand-written rule: diffusers and we see the same changes."""
    adapter = make_file_adapter("sdxl")
    save_file(write(dialect, adapter, "sdxl", alpha=2), tmp_path / "x.safetensors")
    parts = make_family("sdxl")
    make_pipeline(**parts).load_lora_weights(
        str(tmp_path), weight_name="x.safetensors", adapter_name="check_1f"
    )
    loaded, ours = peft_deltas(parts, "check_1f"), deltas(load_adapter(tmp_path / "x.safetensors"))
    assert set(loaded) == set(ours)
    for name, delta in ours.items():
        torch.testing.assert_close(loaded[name], delta, rtol=1e-5, atol=1e-7, msg=name)


def test_sdxl_names_in_a_file_for_sd1_are_refused(make_file_adapter, tmp_path):
    """R-41: no tool reads them there, so the file is broken; the reason is said."""
    adapter = make_file_adapter("sdxl")
    save_file(write("kohya", adapter, "sdxl"), tmp_path / "x.safetensors", {"ss_base_model_version": "sd_v1"})
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, "lora.family", shows=("x.safetensors", "sd1", "SDXL")):
            read(tmp_path / "x.safetensors")


def test_a_module_that_is_there_twice_is_refused(make_file_adapter):
    """R-25: two spellings of one module in a file: it is not clear which one is meant."""
    adapter = make_file_adapter("sdxl")
    state = {
        **write("kohya", adapter, "sdxl"),
        **write("kohya, diffusers names", adapter, "sdxl"),
    }
    with raises(AdapterError, "lora.duplicate-module", shows="lora_unet_down_blocks"):
        state_to_adapter(state)


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v0-9"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({}, ""),
    ],
)
def test_family_by_metadata(make_file_adapter, metadata, family):
    """R-41: the keys of kohya's tools and of modelspec tell the family."""
    state = write("diffusers", make_file_adapter("sd1"), "sd1")
    assert state_to_adapter(state, metadata).family == family


@pytest.mark.parametrize(
    ("config", "key", "shows"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "lora.changes-base", "pissa_niter_16"),
        ({"init_lora_weights": "loftq"}, "lora.changes-base", "loftq"),
        ({"use_dora": True}, "lora.incomplete-modules", "DoRA"),
        ({"peft_type": "LOHA"}, "lora.other-kind", "LOHA"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_named(make_file_adapter, tmp_path, config, key, shows):
    """R-40: PEFT's configuration says what the tensors do not."""
    save_file(write("peft", make_file_adapter("sd1"), "sd1"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, **config}), encoding="utf-8")
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, key, shows=shows):
            read(tmp_path)
    if "peft_type" not in config:
        return
    config = {"peft_type": "LORA", "init_lora_weights": "gaussian", "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_adapter(tmp_path).modules
