"""Trees of adapters: structure, refusals, switching, flattening."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch

from sdlora.errors import AdapterError
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.lora.attach import mount
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import lora_layers
from sdlora.tree.lineage import find_ancestors, lineage_to_notes, short_digest
from sdlora.tree.tree import AdapterTree
from tests.checks import counted, raises
from tests.lora_fixtures import child_lineage

SHAPES = (
    {"rank": 6, "alpha": 6, "targets": ["attention", "feed_forward"]},
    {"rank": 4, "alpha": 2, "targets": ["attention"]},
    {"rank": 3, "alpha": 3, "targets": ["*attn2.to_[qv]", "convolutions"]},
    {"rank": 2, "alpha": 4, "targets": ["all"]},
)


@pytest.fixture
def grow(unet, make_adapter, tmp_path):
    """Saves nodes as runs do: fp16, with the lineage of a parent that is a file."""
    folder = tmp_path / "styles"

    def grow(name, parent=None, *, dialect="diffusers", strength=1.0, seed=None, on=unet, **shape):
        adapter, _ = round_adapter(make_adapter(on, seed=len(name) if seed is None else seed, **shape))
        notes = {"sdlora.family": "sd1", "ss_num_train_images": "12"}
        if parent is not None:
            file = folder / f"{parent}.safetensors"
            above = load_adapter(file, dtype=None)
            notes |= lineage_to_notes(child_lineage(parent.rpartition("/")[2], above, strength))
        return save_adapter(folder / f"{name}.safetensors", adapter, dialect=dialect, metadata=notes)

    grow.folder = folder
    return grow


@pytest.fixture
def small(grow):
    """ink > portraits > old, ink > maps, and a second root."""
    grow("ink", **SHAPES[0])
    grow("ink/portraits", "ink", **SHAPES[1])
    grow("ink/portraits/old", "ink/portraits", seed=11, **SHAPES[2])
    grow("ink/maps", "ink", **SHAPES[3])
    grow("water", seed=30)
    return grow.folder


@pytest.fixture
def pipe(unet, make_pipeline):
    return make_pipeline(unet)


def digest_of(unet):
    found = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def test_structure(small):
    """Names, parents, children, paths, switches."""
    tree = AdapterTree.from_folder(small)
    assert list(tree.nodes) == ["ink", "ink/maps", "ink/portraits", "ink/portraits/old", "water"]
    assert [node.name for node in tree.children(None)] == ["ink", "water"]
    assert [node.name for node in tree.children("ink")] == ["ink/maps", "ink/portraits"]
    assert [node.name for node in tree.path("ink/portraits/old")] == [
        "ink",
        "ink/portraits",
        "ink/portraits/old",
    ]
    assert tree.verify() == []
    assert tree.node("ink").images == "12"
    folders = {"3_a": {"n_repeats": 3, "img_count": 2}, "b": {"n_repeats": 1, "img_count": 4}}
    repeated = dataclasses.replace(tree.node("ink"), notes={"ss_dataset_dirs": json.dumps(folders)})
    assert repeated.images == "6"
    with raises(AdapterError, "tree.no-node", shows=("sepia", "ink, ink/maps")):
        tree.node("sepia")


def test_in_a_notebook(small, unet, make_adapter):
    """What stands last in a cell is one line, not all tensors."""
    assert repr(AdapterTree.from_folder(small)).endswith(
        "styles': ink, ink/maps, ink/portraits, ink/portraits/old, water)"
    )
    assert "ss_num_train_images" not in repr(AdapterTree.from_folder(small).path("ink"))
    adapter = make_adapter(unet, rank=3, alpha=1.5)
    count = len(adapter.modules)
    assert repr(adapter) == f"Adapter({count} modules, rank 3, alpha 1.5, family {adapter.family!r})"


def test_moving_and_renaming_break_nothing(small):
    """The parent is found by its tensors."""
    (small / "roots").mkdir()
    shutil.move(small / "ink.safetensors", small / "roots" / "sepia.safetensors")
    shutil.move(small / "ink" / "portraits.safetensors", small / "faces.safetensors")
    tree = AdapterTree.from_folder(small)
    assert [node.name for node in tree.path("ink/portraits/old")] == [
        "roots/sepia",
        "faces",
        "ink/portraits/old",
    ]
    assert tree.verify() == []


def test_kohya_twins_are_no_nodes(grow):
    """A kohya file beside a diffusers file is the same node; one alone is a node, and can be a parent."""
    grow("ink", **SHAPES[0])
    grow("ink.kohya", dialect="kohya", **SHAPES[0], seed=3)
    grow("alone.kohya", dialect="kohya", **SHAPES[2])
    grow("child", "alone.kohya")
    tree = AdapterTree.from_folder(grow.folder)
    assert list(tree.nodes) == ["alone", "child", "ink"]
    assert tree.parents["child"] == "alone"
    assert tree.node("ink").file.name == "ink.safetensors"
    assert tree.verify() == []
    grow("ink.kohya", dialect="kohya", **SHAPES[0], seed=4)
    assert "ink.kohya.safetensors" in tree.verify()[0]


def test_a_changed_parent_is_refused(grow, small, pipe):
    """The error names both digests; --force accepts the parent."""
    before = AdapterTree.from_folder(small).node("ink").digest
    grow("ink", seed=77, **SHAPES[0])
    tree = AdapterTree.from_folder(small)
    assert len(tree.verify()) == 2
    digests = f"ink ({short_digest(before)})", short_digest(tree.node("ink").digest)
    for name in ("ink/portraits", "ink/portraits/old"):
        with raises(AdapterError, "tree.parent-changed", shows=("ink/portraits", *digests, "--force")):
            tree.mount(pipe, name)
    tree.mount(pipe, "ink/portraits", force=True)
    tree.mount(pipe, "ink")


def test_a_missing_parent_is_refused(small, pipe):
    """The error names it; --force continues without it."""
    (small / "ink.safetensors").unlink()
    tree = AdapterTree.from_folder(small)
    with raises(AdapterError, "tree.parent-missing", shows=("ink/maps", "ink (", str(small), "--force")):
        tree.path("ink/maps")
    assert [node.name for node in tree.path("ink/portraits/old", force=True)] == [
        "ink/portraits", "ink/portraits/old",
    ]  # fmt: skip


def test_a_gap_in_the_path(small):
    """A child without its parent is shown, and by force used, on the nearest ancestor that was found."""
    (small / "ink" / "portraits.safetensors").unlink()
    tree = AdapterTree.from_folder(small)
    assert tree.parents["ink/portraits/old"] == "ink"
    assert tree.path_errors("ink/portraits/old") == [tree.errors["ink/portraits/old"]]
    with raises(AdapterError, "tree.parent-missing"):
        tree.path("ink/portraits/old")
    assert [node.name for node in tree.path("ink/portraits/old", force=True)] == ["ink", "ink/portraits/old"]


def test_a_node_that_is_called_as_its_missing_parent(grow):
    """The missing parent is named; the node is not taken for it."""
    grow("ink", **SHAPES[0])
    grow("new/ink", "ink", **SHAPES[1])
    (grow.folder / "ink.safetensors").unlink()
    tree = AdapterTree.from_folder(grow.folder)
    assert tree.errors["new/ink"].keys == ("tree.parent-missing",)


def test_tensors_that_were_changed_under_the_old_hash_are_found(small, pipe):
    """Digests are computed before mounting, whatever the header contains."""
    file = small / "ink" / "maps.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    tree = AdapterTree.from_folder(small)
    assert len(tree.verify()) == 1
    assert "maps.safetensors" in tree.verify()[0]
    with raises(AdapterError, "tree.file-changed", shows="maps.safetensors"):
        tree.mount(pipe, "ink/maps")


def rewrite(file, **notes):
    adapter = load_adapter(file, dtype=None)
    save_adapter(file, adapter, metadata={**adapter.notes, **notes})


def test_problems_are_one_line_each(grow, small):
    """Circles, duplicates, files that are something else, a chain that another one was recorded for."""
    ink, water = (load_adapter(small / f"{name}.safetensors", dtype=None) for name in ("ink", "water"))
    rewrite(small / "ink.safetensors", **lineage_to_notes(child_lineage("water", water)))
    rewrite(small / "water.safetensors", **lineage_to_notes(child_lineage("ink", ink)))
    shutil.copyfile(small / "ink" / "maps.safetensors", small / "copy.safetensors")
    (small / "base.safetensors").write_text("no")
    tree = AdapterTree.from_folder(small)
    lines = tree.verify()
    assert [line for line in lines if "\n" in line] == []
    assert any("ink/maps" in line and "copy" in line for line in tree.problems)
    assert any("base.safetensors" in line for line in tree.problems)
    keys = [error.keys for error in tree.errors.values()]
    assert ("tree.cycle",) in keys
    assert [line for line in lines if line not in tree.problems] == list(map(str, tree.errors.values()))


def test_a_chain_that_changed_above_the_parent(small, grow):
    """The parent is right, but has other ancestors than it had."""
    rewrite(
        small / "ink" / "portraits.safetensors",
        **lineage_to_notes(child_lineage("water", load_adapter(small / "water.safetensors", dtype=None))),
    )
    tree = AdapterTree.from_folder(small)
    error = tree.errors["ink/portraits/old"]
    assert error.keys == ("tree.lineage-changed",)
    assert "ink (" in str(error)
    assert "water > ink/portraits" in str(error)


def test_what_a_file_says_may_be_anything(grow, small):
    """R-25: odd metadata is shown on one line or refused, never a trace."""
    rewrite(small / "ink.safetensors", **{"sdlora.heldout_loss": "x", "ss_num_train_images": "\x1b[2J" * 99})
    names = [{"name": "a\nb\x1b", "digest": "cd", "strength": 1}]
    rewrite(small / "water.safetensors", **{"sdlora.parent": "cd", "sdlora.lineage": json.dumps(names)})
    names = [{"name": "a", "digest": "cd", "strength": "nan"}]
    rewrite(
        small / "ink" / "maps.safetensors", **{"sdlora.parent": "cd", "sdlora.lineage": json.dumps(names)}
    )
    tree = AdapterTree.from_folder(small)
    assert tree.node("ink").heldout_loss is None
    assert "\x1b" not in tree.node("ink").images
    assert "a\\nb\\x1b (cd)" in str(tree.errors["water"])
    assert len(tree.problems) == 1
    assert "maps.safetensors" in tree.problems[0]
    assert "sdlora.lineage" in tree.problems[0]


def test_an_empty_or_missing_folder(tmp_path):
    """One line."""
    with raises(AdapterError, "tree.no-folder", shows="nowhere"):
        AdapterTree.from_folder(tmp_path / "nowhere")
    with raises(AdapterError, "tree.empty", shows=str(tmp_path)):
        AdapterTree.from_folder(tmp_path)


def test_a_path_is_the_sum_of_its_steps(small, pipe, unet, run):
    """R-38: a pipeline is switched in place and given back to the last bit."""
    before, base = digest_of(unet), run(unet)
    tree = AdapterTree.from_folder(small)
    tree.mount(pipe, "ink/portraits/old")
    found = run(unet)
    names = ("ink", "ink/portraits", "ink/portraits/old")
    mount(unet, [(load_adapter(small / f"{name}.safetensors"), 1.0) for name in names])
    assert torch.equal(found, run(unet))
    assert digest_of(unet) == before
    tree.mount(pipe, None)
    assert torch.equal(run(unet), base)
    tree.unmount(pipe)
    assert torch.equal(run(unet), base)
    assert digest_of(unet) == before


def test_a_pipeline_with_loras_of_its_own(small, pipe, unet, run):
    """The error names the problem and the call that solves it."""
    tree = AdapterTree.from_folder(small)
    pipe.load_lora_weights(str(small), weight_name="water.safetensors", adapter_name="water_5d")
    with raises(AdapterError, "lora.loaded-by-diffusers", shows="pipe.unload_lora_weights()"):
        tree.mount(pipe, "ink")
    pipe.unload_lora_weights()
    base = run(unet)
    tree.mount(pipe, "ink")
    assert not torch.equal(run(unet), base)


def test_strengths(grow, small, pipe, unet, run):
    """As trained, unless asked otherwise; only nodes of the path can be named."""
    grow("ink/half", "ink", strength=0.5, seed=5)
    tree = AdapterTree.from_folder(small)
    assert tree.strengths(["ink/half", None, "ink"]) == [{"ink": 0.5, "ink/half": 1.0}, {}, {"ink": 1.0}]
    assert tree.strengths(["ink/half"], {"ink": 0.2}) == [{"ink": 0.2, "ink/half": 1.0}]
    tree.mount(pipe, "ink/half", strengths={"ink/half": 0.3})
    found = run(unet)
    mount(unet, [(tree.load("ink"), 0.5), (tree.load("ink/half"), 0.3)])
    assert torch.equal(found, run(unet))
    with raises(AdapterError, "tree.not-on-path", shows=("water", "ink > ink/half")):
        tree.mount(pipe, "ink/half", strengths={"water": 1.0})


def test_several_leaves_in_one_batch(small, pipe, unet, run):
    """Each sample has its own path; the base is one of them."""
    tree = AdapterTree.from_folder(small)
    alone = {}
    for name in ("ink/maps", "ink/portraits/old", "water"):
        tree.mount(pipe, name, strengths={name: 0.8})
        alone[name] = run(unet)
    tree.unmount(pipe)
    base = run(unet)
    tree.mount(pipe, ["ink/portraits/old", "ink/maps"], strengths={"ink/maps": 0.8, "ink/portraits/old": 0.8})
    both = run(unet)
    torch.testing.assert_close(both[0], alone["ink/portraits/old"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], alone["ink/maps"][1], rtol=1e-4, atol=1e-5)
    tree.mount(pipe, [None, "water"], strengths={"water": 0.8})
    both = run(unet)
    assert torch.equal(both[0], base[0])
    torch.testing.assert_close(both[1], alone["water"][1], rtol=1e-4, atol=1e-5)


def test_several_leaves_under_guidance(small, pipe):
    """The stock pipeline doubles the batch for guidance; each half has the samples in the same order."""
    tree = AdapterTree.from_folder(small)
    generator = torch.Generator().manual_seed(2)
    text, negative = torch.randn(2, 2, 5, 24, generator=generator)
    latents = torch.randn(2, 4, 8, 8, generator=generator)

    def draw(rows):
        return pipe(
            prompt_embeds=text[rows],
            negative_prompt_embeds=negative[rows],
            latents=latents[rows],
            guidance_scale=4.0,
            num_inference_steps=2,
            output_type="latent",
        ).images

    pipe.set_progress_bar_config(disable=True)
    tree.mount(pipe, ["ink/portraits/old", "water"])
    both = draw([0, 1])
    for row, name in enumerate(("ink/portraits/old", "water")):
        tree.mount(pipe, name)
        torch.testing.assert_close(both[row], draw([row])[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(both[0], draw([0])[0], atol=1e-2)


def test_stock_diffusers_alone_gives_the_same(small, make_unet, make_pipeline, unet, run):
    """R-37: the path's files as named adapters with set_adapters, without sdlora."""
    tree = AdapterTree.from_folder(small)
    tree.mount(make_pipeline(unet), "ink/portraits/old")
    stock = make_pipeline(make_unet())
    path = tree.path("ink/portraits/old")
    for number, node in enumerate(path):
        stock.load_lora_weights(
            str(node.file.parent), weight_name=node.file.name, adapter_name=f"node_{number}f3a"
        )
    stock.set_adapters([f"node_{number}f3a" for number in range(len(path))], [1.0] * len(path))
    torch.testing.assert_close(run(stock.unet), run(unet), rtol=1e-4, atol=1e-5)


class NotAdditive(LowRank):
    """Stands for a kind whose change depends on the base's weight."""

    kind = "other"
    is_additive = False


def not_additive(file):
    adapter = load_adapter(file)
    modules = {name: NotAdditive(pair.down, pair.up) for name, pair in adapter.modules.items()}
    return replace(adapter, modules=modules)


def test_kinds_that_do_not_add(small, pipe, monkeypatch):
    """An adapter of such a kind is neither a parent nor a child; the error names the file and the kind."""
    file = small / "ink" / "maps.safetensors"
    with raises(AdapterError, "lora.kind", shows=(str(file), "other")):
        find_ancestors(file, not_additive(file))
    tree = AdapterTree.from_folder(small)
    load = tree.load
    for wrong in ("ink", "ink/maps"):
        own = lambda name, *rest, wrong=wrong: (
            not_additive(tree.node(name).file) if name == wrong else load(name, *rest)
        )
        monkeypatch.setattr(tree, "load", own)
        with raises(AdapterError, "lora.kind", shows=(f"{wrong}.safetensors", "other")):
            tree.mount(pipe, "ink/maps")
        assert lora_layers(pipe.unet) == {}
        with raises(AdapterError, "lora.kind", shows="other"):
            tree.flatten("ink/maps")


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_flattened_file_is_the_sum_of_the_path(
    dialect, small, make_pipeline, unet, deltas, peft_deltas, tmp_path
):
    """R-01 R-02: one ordinary file, each module's change equal to the path's sum to 1e-6, in both loaders."""
    tree = AdapterTree.from_folder(small)
    flat, report = tree.flatten("ink/portraits/old", strengths={"ink": 0.5})
    assert report is None
    assert flat.parent is None
    assert flat.notes["sdlora.flattened"] == "ink > ink/portraits > ink/portraits/old"
    expected: dict[str, torch.Tensor] = {}
    for name, strength in (("ink", 0.5), ("ink/portraits", 1), ("ink/portraits/old", 1)):
        for module, change in deltas(tree.load(name)).items():
            expected[module] = expected.get(module, 0) + strength * change
    file = save_adapter(tmp_path / "flat.safetensors", flat, dialect=dialect)
    pipeline = make_pipeline(unet)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="flat_3f")
    stock, own = peft_deltas(pipeline.unet, "flat_3f"), deltas(load_adapter(file))
    assert set(stock) == set(own) == set(expected)
    for module, change in expected.items():
        assert float((stock[module] - change).abs().max()) < 1e-6
        assert float((own[module] - change).abs().max()) < 1e-6
    assert len({pair.rank for pair in flat.modules.values()}) > 2


def test_flattened_to_a_rank(small):
    """The report has the error."""
    flat, report = AdapterTree.from_folder(small).flatten("ink/portraits/old", rank=4)
    assert flat.rank == 4
    assert 0 < report.error < 1


@pytest.mark.parametrize("every", [30, pytest.param(1, marks=pytest.mark.slow)])
def test_a_thousand_switches(every, grow, pipe, unet, run):
    """R-38: over 15 nodes of depth 4, outputs are those of a fresh mount, and the base is untouched."""
    names = ["/".join(steps) for depth in range(4) for steps in product("a", *["ab"] * depth)]
    for number, name in enumerate(names):
        grow(name, name.rpartition("/")[0] or None, seed=number, **SHAPES[name.count("/")])
    assert len(names) == 15
    tree = AdapterTree.from_folder(grow.folder)
    before = digest_of(unet)
    expected = {}
    for name in names:
        mount(unet, [(load_adapter(node.file), 1.0) for node in tree.path(name)])
        expected[name] = run(unet)
        tree.unmount(pipe)
    order = random.Random(0)
    for number in range(1000):
        name = order.choice(names)
        tree.mount(pipe, name)
        if number % every == 0 or number > 995:
            assert torch.equal(run(unet), expected[name])
    assert digest_of(unet) == before


def test_a_switch_is_quick(grow, make_unet, make_pipeline, tmp_path):
    """A 25th of the calls of loading the flattened file anew, for SD 1.5's 128 modules, and no copies."""
    layout = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
    }
    for name, parent in (("ink", None), ("ink/a", "ink"), ("ink/b", "ink")):
        grow(name, parent, on=make_unet(**layout), rank=8, alpha=8, seed=len(name) + ord(name[-1]))
    tree, pipe, stock = (
        AdapterTree.from_folder(grow.folder),
        *(make_pipeline(make_unet(**layout)) for _ in "ab"),
    )
    files = [
        save_adapter(tmp_path / f"{name[-1]}.safetensors", tree.flatten(name)[0])
        for name in ("ink/a", "ink/b")
    ]

    def switch(name):
        tree.mount(pipe, name)

    def reload(file):
        stock.unload_lora_weights()
        stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"flat_{file.stem}3f")

    def calls(change, ways):
        for way in ways:  # the first time loads
            change(way)
        with counted() as counts:
            change(ways[0])
        return counts.count

    ours, theirs = calls(switch, ["ink/a", "ink/b"]), calls(reload, files)
    assert len(tree.load("ink").modules) == 128
    assert 25 * ours < theirs, f"{ours} calls and {theirs}"
    weights = {tensor.data_ptr() for tensor in pipe.unet.parameters()}
    switch("ink/a")
    switch("ink/b")
    assert {tensor.data_ptr() for tensor in pipe.unet.parameters()} == weights
    entries = [entry for layer in lora_layers(pipe.unet).values() for entry in layer.stack]
    mounted = {tensor.data_ptr() for entry in entries for tensor in entry.module.tensors().values()}
    owned = [tensor for name in ("ink", "ink/b") for tensor in tree.load(name).parameters()]
    assert mounted == {tensor.data_ptr() for tensor in owned}
