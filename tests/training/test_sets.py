"""Masks, sets with weights and prior prediction in a run: what a step computes, resumed and distributed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from sdlora.diffusion.objective import draw
from sdlora.errors import RunStopped
from sdlora.export.metadata import run_metadata
from sdlora.formats.files import load_adapter
from sdlora.lora.attach import unmounted
from sdlora.runs import RunFolder
from sdlora.training.checkpoint import training_metadata
from sdlora.training.planning import make_plan
from sdlora.training.train import train

SETTINGS = {
    "data__trigger": "ink",
    "data__masks": "files",
    "data__heldout": 0,
    "data__caption_dropout": 0.2,
    "data__flip": True,
    "data__sets": [{"folder": "reg", "weight": 0.5}],
    "objective__unmasked_prior": 0.5,
    "objective__prior_weight": 1.0,
    "lora__dropout": 0.2,
    "train__trace": True,
}


@pytest.fixture
def images(make_images):
    """Six drawings, two of them with a mask and two of them class images."""
    folder = make_images(sizes=((64, 64),) * 6)
    (folder / "reg").mkdir()
    for name in ("00", "01"):
        mask = Image.new("L", (64, 64), 0)
        mask.paste(255, (0, 0, 40, 64))
        mask.save(folder / f"{name}.mask.png")
    for name in ("04", "05"):
        for suffix in (".png", ".txt"):
            (folder / f"{name}{suffix}").rename(folder / "reg" / f"{name}{suffix}")
    return folder


def test_stopped_equals_straight(images, quick, make_trainer, tmp_path, check_same):
    """R-03: with masks, a class set and prior prediction."""
    config = quick(images, **SETTINGS, train__steps=3, train__save_every=2, train__accumulate=2)
    straight = make_trainer(config, tmp_path / "straight")
    straight.train()
    stopped = make_trainer(config, tmp_path / "stopped")
    stopped.stop_at = 1
    with pytest.raises(RunStopped):
        stopped.train()
    resumed = make_trainer(config, tmp_path / "stopped")
    resumed.resume()
    resumed.run.cut_events(resumed.step)
    resumed.train()
    check_same(straight.run, resumed.run)


@pytest.mark.slow
def test_two_processes_are_one(images, quick, tmp_path, fork_processes):
    """R-08, R-17: with masks and weights, equal to the bit.

    Prior prediction adds a gradient to each micro-batch: a sum of four, whose order would differ.
    """
    settings = {**SETTINGS, "objective__prior_weight": 0, "train__steps": 2}
    together = quick(images, **settings)
    config, run = together.replace(train={"accumulate": 2}), RunFolder(tmp_path / "together")
    alone = train(images, config=config, out=tmp_path / "alone", quiet=True)
    children = fork_processes(2, lambda: train(images, config=together, out=run.path))
    assert [child.wait() for child in children] == [0, 0], [child.printed for child in children]
    losses = [[(event["loss"], event["grad_norm"]) for event in one.events("step")] for one in (alone, run)]
    assert losses[0] == losses[1]
    tensors = [load_adapter(one.adapter).named_tensors() for one in (alone, run)]
    assert all(torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())


def test_a_step_by_hand(images, quick, make_trainer, tmp_path):
    """The loss of each sample: its image by weight and mask, and the base without the trigger."""
    keys = {**SETTINGS, "data__caption_dropout": 0.4, "lora__dropout": 0, "train__batch_size": 6}
    trainer = make_trainer(quick(images, **keys), tmp_path / "run")
    runner, objective, encodings = trainer.runner, trainer.prepared.objective, trainer.prepared.encodings
    for parameter in runner.parameters:
        parameter.data.add_(0.02)
    samples = trainer.plan.order.step(0)
    assert any(not sample.caption for sample in samples)
    found, draws = runner.compute_gradients(0, samples)
    expected = 0.0
    for sample, drawn in zip(samples, draws, strict=True):
        view = (sample.record, sample.crop)
        values = draw(objective, [encodings.posterior(*view)], [drawn.noise_seed])
        masks = encodings.masks([view])
        noisy = objective.schedule.add_noise(values.latents, values.noise, values.timesteps)

        def predict(caption, alone=False, noisy=noisy, values=values, view=view):
            condition = encodings.conditions([caption], [view])
            stacks = {name: layer.stack for name, layer in runner.layers.items()}
            if alone:
                for layer in runner.layers.values():
                    layer.stack = ()
            answer = trainer.prepared.base.denoise(noisy, values.timesteps, condition)
            for name, layer in runner.layers.items():
                layer.stack = stacks[name]
            return answer.double()

        with torch.no_grad():
            own, base = predict(sample.caption), predict(sample.caption, alone=True)
            target = objective.schedule.target(values.latents, values.noise, values.timesteps)
            mask = torch.ones(1, 1, 1, 1).double() if masks is None else masks.double()
            weights = mask.clamp(min=0.05) / mask.clamp(min=0.05).mean()
            loss = ((own - target).square() * weights + 0.5 * (1 - mask) * (own - base).square()).mean()
            if sample.record.is_class:
                expected += 0.5 * loss.item()
                continue
            assert not sample.caption or sample.caption.startswith("ink, ")
            plain = sample.caption.removeprefix("ink, ")
            prior = (predict(plain) - predict(plain, alone=True)).square().mean()
            assert prior > 0
            expected += prior.item() + (loss.item() if sample.caption else 0)
    assert found.item() == pytest.approx(expected / len(samples), rel=1e-4)


def test_the_first_update_has_a_caption_with_a_prior(images, quick, tmp_path):
    """R-09: a dropped caption weighs 0 then, and the prior of a fresh adapter is met: no module moves."""
    keys = {**SETTINGS, "data__caption_dropout": 0.9, "train__batch_size": 1, "train__steps": 40}
    plan = make_plan(quick(images, **keys))
    captioned = [any(one.caption for one in plan.order.step(step)) for step in range(40)]
    assert not all(captioned[:5]), "some step would move nothing"
    assert plan.first_update_step() == captioned.index(True)
    plan = make_plan(quick(images, **{**keys, "objective__prior_weight": 0}))
    assert plan.first_update_step() == 0


def test_before_the_first_step_the_prior_is_met(images, quick, make_trainer, tmp_path):
    """An adapter that changes nothing has no prior loss, and only masked images have masks."""
    keys = {**SETTINGS, "data__caption_dropout": 0, "objective__prior_weight": 0}
    plain = make_trainer(quick(images, **keys), tmp_path / "plain")
    prior = make_trainer(quick(images, **{**keys, "objective__prior_weight": 1.0}), tmp_path / "prior")
    samples = plain.plan.order.step(0)
    losses = [trainer.runner.compute_gradients(0, samples)[0] for trainer in (plain, prior)]
    assert losses[0] == losses[1]
    encodings = plain.prepared.encodings
    crops = plain.plan.buckets.crops
    views = {record.name: (record, crops[record.name][0]) for record in plain.plan.index.records}
    assert encodings.masks([views["02.png"]]) is None
    masks = encodings.masks([views["00.png"], views["02.png"]])
    assert masks is not None
    assert masks[1].min() == 1
    assert (masks[0].min(), masks[0].max()) == (0, 1)
    encodings.cache = None
    assert torch.equal(encodings.masks([views["00.png"], views["02.png"]]), masks)


def test_class_images_are_not_counted_as_the_style(images, quick, make_trainer, tmp_path):
    """R-42: in the metadata of a file, as kohya counts; and their captions are not published."""
    trainer = make_trainer(quick(images, **SETTINGS, export__include_captions=True), tmp_path / "run")
    facts = training_metadata(trainer.run, trainer.plan, trainer.counters)
    assert len(facts.captions) == 4
    texts = run_metadata(facts)
    assert (texts["ss_num_train_images"], texts["ss_num_reg_images"]) == ("4", "2")


def test_layout_timesteps_are_the_base_alone(images, quick, make_trainer, tmp_path):
    """The step of the proof has none; a new adapter keeps the layout; later each sample's caption is read."""
    keys = {
        "objective__layout_range": (500, 1000),
        "objective__timestep_range": (0, 1),
        "train__batch_size": 6,
    }
    trainer = make_trainer(quick(images, **keys, data__trigger="ink", train__steps=2), tmp_path / "run")
    runner, objective, encodings = trainer.runner, trainer.prepared.objective, trainer.prepared.encodings
    samples = [sample for step in range(2) for sample in trainer.plan.order.step(step)]
    # It may be later than step 0: in fp16 the first ones can be skipped.
    for step in range(2):
        runner.checks_first_update = True
        _, draws = runner.forward_backward(step, samples, len(samples))
        assert all(one.timestep < 500 for one in draws), "each module must be proven to learn (R-09)"
        runner.optimizer.zero_grad()
    runner.checks_first_update = False
    loss, draws = runner.forward_backward(1, samples, len(samples))
    assert loss == 0
    assert all(one.timestep >= 500 for one in draws)
    runner.optimizer.zero_grad()
    before = runner.prepared.base.denoise
    for parameter in runner.parameters:
        parameter.data.add_(0.02)
    loss, draws = runner.forward_backward(1, samples, len(samples))
    expected = 0.0
    for sample, drawn in zip(samples, draws, strict=True):
        view = (sample.record, sample.crop)
        values = draw(objective, [encodings.posterior(*view)], [drawn.noise_seed])
        noisy = objective.schedule.add_noise(values.latents, values.noise, values.timesteps)
        condition = encodings.conditions([sample.caption], [view])
        with torch.no_grad():
            own = before(noisy, values.timesteps, condition)
            with unmounted(runner.layers, runner.adapter):
                base = before(noisy, values.timesteps, condition)
        expected += 0.01 * (own - base).double().square().mean().item() / len(samples)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
