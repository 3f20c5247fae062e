"""Training on top of another adapter: it is mounted, frozen and recorded, or refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.builtin.make_twists import make_twist
from sdlora.config import BaseSection
from sdlora.errors import AdapterError, ConfigError, RunError
from sdlora.evaluation.evaluate import evaluate
from sdlora.evaluation.heldout import heldout_loss
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.formats.write import round_adapter
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets, mounted
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.weights import empty_denoiser
from sdlora.rank.resize import resize
from sdlora.runs import RunFolder
from sdlora.sampling.session import sample
from sdlora.training.plan import describe_plan
from sdlora.training.planning import make_plan
from sdlora.training.train import resume, train
from sdlora.tree.lineage import digest_file, lineage_to_notes, load_path, read_lineage
from sdlora.tree.tree import AdapterTree
from tests.checks import assert_same_image, raises
from tests.lora_fixtures import child_lineage, create_adapter


@pytest.fixture(scope="module")
def make_style():
    """Saves an adapter for the built-in base, with or without a parent."""
    unet = empty_denoiser(inspect_base(BaseSection())).to_empty(device="cpu")

    def make(folder, name, rank=6, parent=None, seed=0, **notes):
        adapter = create_adapter(
            unet, match_targets(unet, ["attention"]), rank, rank, seed=seed, family="sd1"
        )
        for number, pair in enumerate(adapter.modules.values()):
            pair.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed * 1000 + number))
        if parent is not None:
            notes |= lineage_to_notes(child_lineage(parent.stem, load_adapter(parent, dtype=None)))
        notes = {"sdlora.family": "sd1", **notes}
        return save_adapter(folder / f"{name}.safetensors", round_adapter(adapter)[0], metadata=notes)

    return make


@pytest.fixture
def save_style(make_style, tmp_path):
    """A deep folder, so that no files of other tests are near."""
    return partial(make_style, tmp_path / "a" / "b" / "styles")


@pytest.fixture
def images(make_images):
    return make_images()


def test_it_starts_where_its_parent_is(save_style, small, make_trainer, images, tmp_path):
    """R-12: the held-out loss at step 0 is the parent's; then it changes, while the parent does not."""
    root = save_style("ink")
    leaf = save_style("portraits", rank=5, parent=root, seed=1)
    trainer = make_trainer(
        small(images, data__heldout=0.5, lora__parent=str(leaf), lora__targets=["*attn2*", "feed_forward"]),
        tmp_path / "run",
    )
    base, schedule = trainer.prepared.base, trainer.prepared.objective.schedule
    items = trainer.prepared.heldout_items("heldout")

    def measured_with(*files):
        with mounted(base.components, [(load_adapter(file), 1.0) for file in files]):
            return heldout_loss(base.denoise, schedule, items, batch_size=4, device=base.device)

    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    parents = [tensor for adapter, _ in trainer.prepared.parents for tensor in adapter.parameters()]
    kept = [tensor.clone() for tensor in parents]
    # The trainer's own pairs are on the stack, and its batch size differs: one rounding apart.
    expected = pytest.approx(measured_with(root, leaf).loss, rel=1e-6)
    assert trainer.evaluate("heldout").loss == expected
    assert measured_with(leaf).loss != expected
    trainer.train()
    assert trainer.evaluate("heldout").loss != expected
    assert all(torch.equal(one, other) for one, other in zip(parents, kept, strict=True))
    assert not any(tensor.requires_grad for tensor in parents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.denoiser.state_dict().items())
    trained = {id(p) for group in trainer.runner.optimizer.param_groups for p in group["params"]}
    assert trained == {id(tensor) for tensor in trainer.runner.adapter.parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"train__gradient_checkpointing": True},
        pytest.param({"base__quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param(
            {"base__quantize": "nf4"},
            marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="no bitsandbytes"),
        ),
        {"train__precision": "bf16"},
    ],
    ids=["checkpointing", "int8", "nf4", "bf16"],
)
def test_in_any_precision(changes, save_style, small, make_trainer, images, tmp_path):
    """R-09 R-11: every module of the child gets a gradient, with any parent."""
    config = small(images, lora__parent=str(save_style("ink")), train__steps=2, **changes)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    assert all(pair.up.any() for pair in trainer.runner.adapter.modules.values())
    assert trainer.runner.adapter.rank == 2


@pytest.fixture(scope="module")
def family(tmp_path_factory, make_style, small, draw_images):
    """ink, a finished run on top of it, and a finished run on top of that; tests do not change them."""
    folder = tmp_path_factory.mktemp("family")
    images, root = draw_images(folder / "images"), make_style(folder / "styles", "ink", rank=12)
    keys = {"train__sample_every": 2, "train__evaluate_every": 2, "train__steps": 2, "data__heldout": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(folder / "cache"))
        config = small(images, **keys)
        child = train(images, parent=root, config=config, out=folder / "runs" / "child", quiet=True)
        out = folder / "runs" / "grandchild"
        return root, child, train(images, parent=child, config=config, out=out, quiet=True)


def test_a_run_says_what_it_stands_on(family, tmp_path):
    """R-42: names, digests and strengths up to the base, in both dialects; the held-out loss; no paths."""
    root, child, grandchild = family
    for file in (grandchild.adapter, grandchild.final_adapter("kohya"), grandchild.step_adapter(2)):
        notes = load_adapter(file).notes
        above = read_lineage(notes)
        assert [one.name for one in above] == ["ink", "child"]
        assert [one.digest for one in above] == [digest_file(root), digest_file(child.adapter)]
        assert notes["sdlora.parent"] == digest_file(child.adapter)
        measured = [event for event in grandchild.events("heldout") if event["split"] == "heldout"]
        assert float(notes["sdlora.heldout_loss"]) == pytest.approx(measured[-1]["loss"], rel=1e-5)
        assert str(root.parent) not in json.dumps(notes)
    assert [step.ancestor.name for step in load_path(grandchild.path)] == ["ink", "child", "grandchild"]
    shutil.copytree(child.path.parent, tmp_path / "runs")
    shutil.copyfile(root, tmp_path / "runs" / "ink.safetensors")
    tree = AdapterTree.from_folder(tmp_path / "runs")
    assert [node.name for node in tree.path("grandchild")] == ["ink", "child", "grandchild"]
    assert tree.verify() == []
    assert tree.node("child").images == "2"


def test_a_child_of_another_file_than_the_final_one(family, make_style, tmp_path):
    """A smaller rank or an earlier step of a run can be a parent, and is found as one."""
    root, child, _ = family
    shutil.copytree(child.path, tmp_path / "runs" / "child")
    shutil.copyfile(root, tmp_path / "runs" / "ink.safetensors")
    run = RunFolder(tmp_path / "runs" / "child")
    small, _ = resize(load_adapter(run.adapter), rank=1)
    parent = save_adapter(run.ranked_adapter(1), round_adapter(small)[0])
    leaf = make_style(tmp_path / "runs" / "leaves", "leaf", parent=parent, seed=9)
    tree = AdapterTree.from_folder(tmp_path / "runs")
    assert list(tree.nodes) == ["child", "child/adapters/rank-1", "ink", "leaves/leaf"]
    assert [node.name for node in tree.path("leaves/leaf")] == ["ink", "child/adapters/rank-1", "leaves/leaf"]
    assert tree.verify() == []
    assert [step.ancestor.name for step in load_path(leaf)] == ["ink", "rank-1", "leaf"]
    assert load_path(parent)[-1].ancestor.name == "child/rank-1"


def test_pictures_show_the_path(family, tmp_path):
    """R-10: base, parent and child side by side; the files give the same pixels afterwards."""
    _, child, grandchild = family
    during = grandchild.sample_folder(2)
    after = sample(grandchild, step=2, out=tmp_path / "after").parent
    names = sorted(file.name for file in during.glob("*.png"))
    assert names == ["00.png", "01.png", "02.png", "grid.png"]
    for name in names:
        one, other = (np.asarray(Image.open(folder / name)) for folder in (during, after))
        assert np.array_equal(one, other), name
    settings = {"prompts": ["a circle"], "seeds": [0], "strengths": [1.0], "steps": 2, "size": (64, 64)}
    loose = sample(grandchild.adapter, out=tmp_path / "loose", **settings)
    parent = sample(child, out=tmp_path / "parent").parent
    # The child in another grid, and a file without its run, give the same images.
    assert_same_image(Image.open(parent / "02.png"), Image.open(during / "01.png"))
    assert_same_image(Image.open(loose.parent / "02.png"), Image.open(during / "02.png"))


def test_evaluation_mounts_the_path(family):
    """The style's held-out loss is that of the end of the run, except for rounding."""
    _, _, grandchild = family
    result = evaluate(grandchild)
    last = [event for event in grandchild.events("heldout") if event["split"] == "heldout"][-1]
    assert result.style_loss.loss == pytest.approx(last["loss"], rel=1e-4)
    assert abs(result.base_loss.loss - last["loss"]) > 1e-3 * last["loss"]


def test_resume_checks_the_parent(save_style, small, images, tmp_path):
    """R-03: a run continues with the parent that it started with."""
    parent = save_style("ink")
    config = small(images, lora__parent=str(parent), train__steps=1)
    run = train(images, config=config, out=tmp_path / "run", quiet=True)
    save_style("ink", seed=5)
    with raises(RunError, "checkpoint-changed", shows=("the parent", "step 1")):
        resume(run.path, {"train.steps": 2}, quiet=True)
    parent.unlink()
    with raises(AdapterError, "lora.parent", shows=f"lora.parent = {parent}"):
        resume(run.path, {"train.steps": 2}, quiet=True)
    moved = save_style("sepia")
    resume(run.path, {"train.steps": 2, "lora.parent": str(moved)}, quiet=True)
    assert run.read_config().lora.parent == str(moved)


@pytest.mark.slow
def test_a_leaf_gains_from_its_root(repository, small, tmp_path):
    """Twelve images of a variation are learned better on the root than on the base, at equal settings."""
    make_twist(repository / "datasets" / "openmoji", "duotone", tmp_path / "duotone")

    def learn(images, name, parent=None, **keys):
        keys = {"train__learning_rate": 3e-3, "train__batch_size": 4, "data__heldout": "auto", **keys}
        config = small(images, train__evaluate_every=keys["train__steps"], **keys)
        run = train(images, config=config, out=tmp_path / name, parent=parent, quiet=True)
        return run, [event["loss"] for event in run.events("heldout") if event["split"] == "heldout"]

    root, _ = learn(repository / "datasets" / "openmoji", "root", train__steps=40, lora__rank=8)
    for seed in range(3):
        leaf = {"train__steps": 10, "train__seed": seed, "lora__rank": 4}
        _, on_root = learn(tmp_path / "duotone", f"on-root-{seed}", root, **leaf)
        _, on_base = learn(tmp_path / "duotone", f"on-base-{seed}", **leaf)
        assert on_root[-1] < on_root[0], seed
        assert on_root[-1] < on_base[-1], seed


@pytest.mark.slow
def test_a_stopped_child_equals_a_straight_one(save_style, small, images, tmp_path):
    """R-03: to the bit."""
    config = small(images, lora__parent=str(save_style("ink")), train__save_every=2)
    whole = train(images, config=config, out=tmp_path / "whole", quiet=True)
    half = train(images, config=config.replace(train={"steps": 2}), out=tmp_path / "half", quiet=True)
    resume(half.path, {"train.steps": 4}, quiet=True)
    assert digest_file(half.adapter) == digest_file(whole.adapter)


def test_the_default_rank_is_half_the_parents(save_style, small, images):
    """The default rank is at least 4 and printed; a rank in a file or an override is kept."""
    for rank, expected in ((12, 6), (6, 4), (1, 4)):
        parent = save_style(f"r{rank}", rank=rank)
        config = small(images, lora__parent=str(parent))
        given = config.model_dump(exclude_unset=True)
        given["lora"].pop("rank")
        plan = make_plan(type(config).model_validate(given))
        assert plan.config.lora.rank == expected
        assert any(f"lora.rank = {expected}" in f.message and f"{rank} " in f.message for f in plan.findings)
        kept = make_plan(config)
        assert kept.config.lora.rank == 2
        assert not any("lora.rank" in finding.message for finding in kept.findings)
    assert any(line.startswith("parent    r1 (") for line in describe_plan(kept))


def test_a_parent_by_node_name(save_style, small, images):
    """A parent may be named without its file extension; the run stores the whole path."""
    file = save_style("ink")
    plan = make_plan(small(images, lora__parent=str(file.with_suffix(""))))
    assert plan.config.lora.parent == str(file)


def test_wrong_parents_are_refused(save_style, small, images):
    """R-41: mismatches are found before any weight is loaded; --force accepts some."""
    root = save_style("ink")
    leaf = save_style("portraits", parent=root, seed=1)
    # One bit changed under the old hash, then another file.
    data = bytearray(root.read_bytes())
    data[-1] ^= 1
    root.write_bytes(data)
    with raises(AdapterError, "tree.parent-changed", shows=("portraits", "ink (", "ink.safetensors")):
        make_plan(small(images, lora__parent=str(leaf)))
    save_style("ink", seed=9)
    with raises(AdapterError, "tree.parent-changed", shows="portraits"):
        make_plan(small(images, lora__parent=str(leaf)))
    plan = make_plan(small(images, lora__parent=str(leaf), lora__force_parent=True))
    assert [step.ancestor.digest for step in plan.parents] == [digest_file(root), digest_file(leaf)]
    root.unlink()
    with raises(AdapterError, "tree.parent-missing", shows=("portraits", "ink (")):
        make_plan(small(images, lora__parent=str(leaf)))
    plan = make_plan(small(images, lora__parent=str(leaf), lora__force_parent=True))
    assert [step.ancestor.digest for step in plan.parents] == [digest_file(leaf)]
    assert any("which is not beside it" in found.message for found in plan.findings)
    other = save_style("other", **{"sdlora.family": "sdxl"})
    with raises(AdapterError, "lora.family", shows="sdxl"):
        make_plan(small(images, lora__parent=str(other)))
    with raises(AdapterError, "lora.parent", shows="nowhere"):
        make_plan(small(images, lora__parent="nowhere"))
    with raises(ConfigError, "lora.force_parent"):
        small(images, lora__force_parent=True)


def test_ancestors_are_found_where_they_lie(save_style, small, images, tmp_path):
    """The parent may be beside, above, in a folder beside, or have another name."""
    root = save_style("ink")
    leaf = save_style("ink/portraits", parent=root, seed=1)
    deep = save_style("ink/portraits/old", parent=leaf, seed=2)
    places = tmp_path / "elsewhere"
    (places / "a" / "b").mkdir(parents=True)
    (places / "c").mkdir()
    shutil.copyfile(root, places / "c" / "renamed.safetensors")
    shutil.copyfile(leaf, places / "faces.safetensors")
    moved = shutil.copyfile(deep, places / "a" / "b" / "old.safetensors")
    for file in (deep, moved):
        plan = make_plan(small(images, lora__parent=str(file)))
        assert len(plan.parents) == 3
    assert [step.file.name for step in plan.parents] == [
        "renamed.safetensors",
        "faces.safetensors",
        "old.safetensors",
    ]


def test_parents_that_change_the_text_encoder(save_style, small, make_trainer, images, tmp_path):
    """R-34: captions are encoded by the text encoder with the parents, under their own keys in the cache."""
    plain = make_trainer(small(images), tmp_path / "plain")
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = plain.prepared.base.text_encoders[0].config.hidden_size
    # A run without adapters on text encoders no longer holds them once the captions are encoded.
    full = load_base(plain.plan.info, dtype=torch.float32, device="cpu")
    pair = create_adapter(full.components, [name], 2, 2, seed=0, family="sd1").to()
    pair.modules[name].up.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    assert isinstance(pair, Adapter)
    assert pair.modules[name].down.shape[1] == width
    file = save_adapter(tmp_path / "words.safetensors", round_adapter(pair)[0])
    child = make_trainer(small(images, lora__parent=str(file)), tmp_path / "child")
    caption = "a circle number 1"
    states = {
        key: trainer.prepared.encodings.condition(caption).hidden
        for key, trainer in (("base", plain), ("child", child))
    }
    assert not torch.allclose(states["base"], states["child"], atol=1e-3)
    with mounted(child.prepared.base.components, [(load_adapter(file), 1.0)]):
        expected = child.prepared.base.encode_captions([caption])[0].hidden
    torch.testing.assert_close(states["child"], expected)
    child.train()
