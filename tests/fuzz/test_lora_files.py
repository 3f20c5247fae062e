"""LoRA files of every dialect, whole and damaged, honest and not (R-25, R-44)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sdlora.errors import unfit_letters
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.lora.adapter import check_base
from sdlora.tree.nodes import read_node

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
MODULES = (
    f"unet.{BLOCK}.attn1.to_q",
    f"unet.{BLOCK}.attn2.to_out.0",
    f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    f"base_model.model.{BLOCK}.attn1.to_v",
    "diffusion_model.input_blocks.4.1.proj_in",
    f"lycoris_{BLOCK.replace('.', '_')}_attn1_to_k",
    "../../etc/passwd",
    "unet..",
    "lora_unet_",
)
PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
)
SIZES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
    "C64": 8,
    "F4": 1,
}
KEYS = (
    *("lora_adapter_metadata", "sdlora.ranks", "sdlora.family", "sdlora.parent", "sdlora.layers_per_block"),
    *("ss_base_model_version", "modelspec.architecture", "sdlora.trained_alpha", "sdlora.base_digest", "x"),
    *("sdlora.lineage", "sdlora.heldout_loss", "sshs_model_hash"),
)
HONEST = {
    "lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 8}, "unet.rank_pattern": {}}
    ),
    "sdlora.ranks": json.dumps({f"{BLOCK}.attn2.to_k": 1}),
    "sdlora.family": "sd1",
    "ss_base_model_version": "sdxl_base_v1-0",
    "sdlora.layers_per_block": "2",
    "sdlora.parent": "ab",
}


@st.composite
def metadata(draw: st.DrawFn, json_values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """What a file says of itself: true, nonsense, or JSON of the wrong kind."""
    numbers = st.sampled_from([1, 4, 0.5, 0, -1, 10**400, 1e999, "8", True]) | json_values
    patterns = st.dictionaries(
        st.sampled_from(["to_q", "attn2.to_k", "(a+)+$", "[", ".*", "^x"]), numbers, max_size=2
    )
    peft = st.fixed_dictionaries(
        {"unet.lora_alpha": numbers},
        optional={
            "unet.alpha_pattern": patterns | json_values,
            **{
                f"unet.{key}": json_values
                for key in ("use_rslora", "use_dora", "peft_type", "init_lora_weights")
            },
        },
    )
    ranks = st.dictionaries(st.sampled_from([f"{BLOCK}.attn2.to_k", "x"]), numbers, max_size=2)
    ancestors = st.fixed_dictionaries({"name": json_values, "digest": json_values, "strength": numbers})
    lineage = st.lists(ancestors | json_values, max_size=2)
    by_key = {"lora_adapter_metadata": peft, "sdlora.ranks": ranks, "sdlora.lineage": lineage}
    texts = {key: draw(st.sampled_from([text, None])) for key, text in HONEST.items()}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        value = by_key.get(key, json_values).map(json.dumps)
        texts[key] = draw(st.one_of(value, value, value, st.text(max_size=30), json_values.map(json.dumps)))
    return {key: text for key, text in texts.items() if text is not None}


@st.composite
def containers(draw: st.DrawFn, json_values: st.SearchStrategy[Any]) -> bytes:
    """A safetensors file: pairs of a few modules, their shapes and types mostly right."""
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    end = 0

    def add(name: str, shape: list[int], dtype: str) -> None:
        nonlocal end
        size = SIZES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        chunks.append(draw(st.binary(min_size=1, max_size=8)) * (size // 8 + 1))
        chunks[-1] = chunks[-1][:size] if draw(st.booleans()) else bytes(size)
        chunks[-1] = chunks[-1].ljust(size, b"\x3c")
        end += size

    dtypes = st.sampled_from(["F32", "F16", "BF16", "F64"] * 4 + list(SIZES))
    sides = st.sampled_from([1, 2, 3, 4, 8, 16] * 8 + [0])
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)):
        down, up = draw(st.sampled_from(PAIRS))
        rank, tail = draw(sides), draw(st.sampled_from([[]] * 8 + [[1, 1], [3, 3], [2]]))
        dtype, is_wrong = draw(dtypes), draw(st.sampled_from([False] * 7 + [True]))
        add(f"{module}.{down}", [rank, draw(sides), *tail], dtype)
        add(f"{module}.{up}", [draw(sides), draw(sides) if is_wrong else rank, *([1] * len(tail))], dtype)
        if draw(st.booleans()):
            add(f"{module}.alpha", draw(st.sampled_from([[]] * 8 + [[1], [2], [1, 1], [0]])), draw(dtypes))
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata(json_values))
    if draw(st.sampled_from([False] * 5 + [True])):
        name = draw(st.sampled_from([*header, "new"]))
        header[name] = draw(
            json_values | st.just({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]})
        )
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(chunks)


def test_lora_files(fuzz, damaged, json_values, tmp_path: Path) -> None:
    """R-25, R-44: reading, describing and writing again whatever is in the file."""
    path = tmp_path / "x.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            adapter = load_adapter(path)
        finally:
            load_adapter(path, dtype=None)
            assert not any(unfit_letters(line) for line in inspect_adapter(path).lines())
        assert read_node("x", path).heldout_loss != 0.125
        check_base(adapter, family="sd1", name="base", digest="0", source="x")
        for dialect in ("diffusers", "kohya"):
            save_adapter(tmp_path / "y.safetensors", adapter, dialect=dialect)

    fuzz(damaged(containers(json_values)), read)
    assert {file.name for file in tmp_path.iterdir()} <= {"x.safetensors", "y.safetensors"}


def test_peft_folders(fuzz, json_values, tmp_path: Path) -> None:
    """R-25: the configuration that PEFT keeps beside its file is no more trusted than the file."""
    contents = st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())
    state = {f"base_model.model.{BLOCK}.attn1.to_q.lora_A.weight": [2, 4]}
    state |= {f"base_model.model.{BLOCK}.attn1.to_q.lora_B.weight": [4, 2]}
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [32 * place, 32 * place + 32]}
        for place, (name, shape) in enumerate(state.items())
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\x3c" * 64)

    def read(content: bytes) -> None:
        (tmp_path / "adapter_config.json").write_bytes(content)
        load_adapter(tmp_path)

    fuzz(contents, read)
