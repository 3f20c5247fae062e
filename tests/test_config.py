"""Settings: strict, complete, and wrong ones named with the remedy (R-35)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdlora.aliases import ELSEWHERE
from sdlora.config import RunConfig, Section, load_config, parse_override, read_config
from sdlora.errors import ConfigError
from sdlora.runs import RunFolder
from tests.checks import bounded, raises

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("override", "key", "shows"),
    [
        ("lora.rank=0", "lora.rank", "0 1 4 32"),
        ("lora.rank=many", "lora.rank", "'many' 4 32"),
        ("lora.rank=100000", "lora.rank", "100000 4096"),
        ("lora.rank_pattern={x = 0}", "lora.rank_pattern", "0 1"),
        ("lora.alpha_pattern=4", "lora.alpha_pattern", "4 convolutions"),
        ("lora.init=pissa", "lora.init", "'pissa' 'gaussian' 'kaiming' 'orthogonal'"),
        ("lora.alpha=inf", "lora.alpha", "inf"),
        ("lora.rnk=3", "lora.rnk", "lora.rank"),
        ("lroa.rank=3", "", "lroa [lora]"),
        ("train.rank=4", "train.rank", "lora.rank"),
        ("rank=4", "", "lora.rank"),
        ("x=4", "", "section.key=value"),
        ("lora.=3", "", "lora. section.key=value"),
        ("a.b.c.d.e.f.g.h.i.j.k=3", "", "section.key=value"),
        ("network_dim=4", "", "network_dim lora.rank"),
        ("train.network_dim=4", "train.network_dim", "lora.rank"),
        ("train.learning_rate=-1", "train.learning_rate", "-1 0 1e-5 1e-3"),
        ('train.learning_rates={"*.attn2.*"=0}', "train.learning_rates", "0"),
        ("train.learning_rates=1e-4", "train.learning_rates", "0.0001"),
        ("train.precision=fp8", "train.precision", "'fp8' 'bf16'"),
        ("train.steps=10_000_000", "train.steps", "10000000 1000000"),
        ("train.seed=4294967296", "train.seed", "4294967296"),
        ("train.optimizer_args.x={a = 1}", "train.optimizer_args", "{'a':"),
        ("train.optimizer_args.x=2026-01-02", "train.optimizer_args", "datetime.date(2026,"),
        (
            "train.text_encoder_learning_rate=1e-5",
            "train.text_encoder_learning_rate",
            "1e-05 lora.text_encoder",
        ),
        ("base.quantize=fp4", "base.quantize", "'fp4' 'none' 'int8' 'nf4'"),
        ("base.quantize_correction=0", "base.quantize_correction", "removed"),
        ("data.cache=maybe", "data.cache", "'maybe' true false"),
        ("data.crop=top", "data.crop", "'top' 'center' 'random'"),
        ("data.crop_variants=3", "data.crop_variants", "3 data.crop=random"),
        ("data.color_jitter=2", "data.color_jitter", "2 0.1"),
        ("data.heldout=1.5", "data.heldout", "1.5 0.1"),
        ("data.resolution=1000000", "data.resolution", "1000000 8192"),
        ("data.trigger=\udcff", "data.trigger", r"'\udcff'"),
        ("sample.prompts=prompts.txt", "sample.prompts", "prompts.txt --prompts"),
        ("sample.prompts=[' ']", "sample.prompts", "empty"),
        ("sample.prompts=a {trigger}", "sample.prompts", "{trigger} data.trigger"),
        ("sample.seeds=[3, -1]", "sample.seeds", "-1 0"),
        ("sample.seeds=[9223372036854775808]", "sample.seeds", "9223372036854775808"),
        ("sample.strengths=[nan]", "sample.strengths", "nan"),
        ("objective.timestep_range=[9, 3]", "objective.timestep_range", "[9, 3] [0, 1000]"),
        ("objective.layout_range=[800, 1000]", "objective.layout_range", "[800, 1000] [0, 1000] [0, 500]"),
        ("objective.layout_weight=0.3", "objective.layout_weight", "0.3 objective.layout_range"),
        (
            "objective.force_prediction_type=true",
            "objective.force_prediction_type",
            "objective.prediction_type",
        ),
        ("objective.loss=l2", "objective.loss", "'l2' 'mse' 'l1' 'huber'"),
        ("objective.timestep_mean=-4", "objective.timestep_mean", "-4.0 objective.timesteps=logit_normal"),
        ("objective.huber_delta=1", "objective.huber_delta", "1.0 objective.loss=huber"),
        ("objective.pyramid_discount=0.5", "objective.pyramid_discount", "0.5 objective.pyramid_noise=6"),
    ],
)
def test_one_clear_line(override, key, shows):
    """R-35, R-30: the key as the user spells it, the value seen, what to do."""
    with raises(ConfigError, *filter(None, [key]), shows=tuple(shows.split(" "))) as caught:
        load_config(None, [override])
    assert len(caught.value.problems) == 1


def test_each_key_of_another_trainer_is_explained():
    """R-35: a key that has no counterpart says so."""
    [problem] = problems("data.keep_tokens=1")
    assert problem.startswith("data.keep_tokens ")
    assert ELSEWHERE["keep_tokens"] in problem


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.crop=centre", "center"),
        ("train.precision=no", "fp32"),
        ("train.precision=bfloat16", "bf16"),
        ("base.dtype=float16", "fp16"),
        ("export.precision=float", "fp32"),
        ("train.schedule=constant_with_warmup", "constant"),
    ],
)
def test_other_spellings(override, value):
    """R-35: what neighbours call a value is read as ours."""
    section, _, key = override.partition("=")[0].partition(".")
    assert getattr(getattr(load_config(None, [override]), section), key) == value


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("objective.min_snr_gamma=5", "objective.debiased=true"),
        ("objective.noise_offset=0.1", "objective.pyramid_noise=6"),
    ],
)
def test_conflicts_name_both(first, second):
    """R-35: two settings that want the same thing are one line with both and the remedy."""
    [problem] = problems(first, second)
    for override in (first, second):
        assert override.replace("=", " = ") in problem
    assert "keep one of them" in problem


def test_settings_from_python(tmp_path):
    """A path or a run is as good as its text, and one override needs no list."""
    overrides = {"base.source": tmp_path, "lora.parent": RunFolder(tmp_path / "run")}
    config = load_config(None, overrides).replace(lora={"init_from": tmp_path / "a.safetensors"})
    assert config.base.source == str(tmp_path)
    assert config.lora.parent == str(tmp_path / "run")
    assert config.lora.init_from == str(tmp_path / "a.safetensors")
    assert load_config(None, "lora.rank=8").lora.rank == 8


def test_all_mistakes_at_once():
    """R-35: every mistake has its line."""
    found = problems("lora.rank=0", "train.stpes=3", "sample.steps=none", "nonsense")
    assert len(found) == 1
    assert "'nonsense' is not a setting" in found[0]
    found = problems("lora.rank=0", "train.stpes=3", "sample.steps=none", "export.formats=onnx")
    assert [line.split(" ")[0] for line in sorted(found)] == [
        "export.formats",
        "lora.rank",
        "sample.steps",
        "train.stpes",
    ]


def test_overrides_are_toml_else_text():
    """Values keep the types they look like; later ones win."""
    config = load_config(
        None,
        [
            "train.learning_rate=1e-4",
            "lora.targets=*.to_v",
            "sample.seeds=[3, 4]",
            "data.flip=true",
            "lora.rank=4",
            "lora.rank=8",
        ],
    )
    assert config.train.learning_rate == 1e-4
    assert config.lora.targets == ["*.to_v"]
    assert config.sample.seeds == [3, 4]
    assert config.data.flip is True
    assert config.lora.rank == 8
    assert parse_override("data.trigger=a b") == ("data.trigger", "a b")
    assert load_config(None, ["train.optimizer_args.weight_decay=0.5"]).train.optimizer_args == {
        "weight_decay": 0.5
    }


def test_a_file_says_only_what_differs(tmp_path):
    """A TOML file, then overrides."""
    file = tmp_path / "mine.toml"
    file.write_text("[lora]\nrank = 4\n[train]\nsteps = 7\n", encoding="utf-8")
    config = load_config(file, {"train.steps": 9})
    assert (config.lora.rank, config.train.steps) == (4, 9)
    assert config.replace(lora={"alpha": 2}).lora.trained_alpha == 2
    assert config.lora.trained_alpha == 4


def test_overrides_by_section():
    """R-35: mappings of mappings, as configs are written; a mapping that is a value stays one."""
    changes = {"lora": {"rank": 8}, "train.learning_rates": {"*.attn2.*": 5e-5}}
    config = load_config(None, changes)
    assert (config.lora.rank, config.train.learning_rates) == (8, {"*.attn2.*": 5e-5})
    with raises(ConfigError, "lora.rnk", shows="lora.rank"):
        load_config(None, {"lora": {"rnk": 8}})


def test_the_settings_of_a_run(tmp_path):
    """R-35: a run, or its config.json, where a config file is; images are those that are given."""
    run = RunFolder.create(tmp_path / "run", load_config(None, {"lora.rank": 8}, images="old"), {})
    for given in (run.path, run.config_file):
        again = load_config(given, {"train.steps": 5}, images="new")
        assert (again.lora.rank, again.train.steps, again.images) == (8, 5, "new")
    (tmp_path / "config.json").write_text('{"model": "x"}', encoding="utf-8")
    with raises(ConfigError, "file.toml", shows="--from"):
        load_config(tmp_path / "config.json", images="new")


def test_overrides_of_a_whole_configuration():
    """R-35: they count there too; what it left out stays left out, and its folder is kept."""
    whole = load_config(None, {"lora.rank": 4}, images="pictures")
    config = load_config(whole, {"train.steps": 9})
    assert (config.lora.rank, config.train.steps, config.images) == (4, 9, "pictures")
    assert config.lora.model_fields_set == {"rank"}
    assert load_config(whole, images="others").images == "others"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"rank = = 3",
        b"\xff\xfe\x00",
        b"a = " + b"[" * 100_000,
        b"a = " + b"{a=" * 50_000,
        b"a" + b".a" * 100_000 + b" = 1",
        b"[a" + b".a" * 400 + b"]\n" + b"a" + b".a" * 400 + b" = 1",
        b"a = " + b"9" * 100_000,
        b"a = '" + b"x" * 10**7 + b"'",
        b"a = 2026-13-45",
        b"\0" * 1000,
    ],
    ids=lambda content: "none" if content is None else content[:12].decode(errors="replace"),
)
def test_unreadable_files(tmp_path, content):
    """A config that is missing, is not TOML or is made to hurt is one line, at once."""
    file = tmp_path / "bad.toml"
    if content is not None:
        file.write_bytes(content)
    with bounded(), pytest.raises(ConfigError, match=r"config file .*bad\.toml") as caught:
        load_config(file)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_problems_are_short(tmp_path):
    """A value of megabytes, a key of kilobytes and control characters do not flood the terminal."""
    file = tmp_path / "long.toml"
    file.write_text(f"[lora]\nrank = '{'x' * 200_000}'\n{'k' * 50_000} = 1\n[a.b]\nc = 1", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["train.x\x1b[2J\n=1", "train.optimizer_args=3", "train.optimizer_args.a=1"])
    assert len(caught.value.problems) >= 4
    assert all(line.isprintable() and len(line) < 600 for line in caught.value.problems)
    assert "…" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "lines", "key", "shows"),
    [
        ("[train]\n" + "\n".join(f"k{n} = 1" for n in range(20_000)), 41, "train.k0", "more"),
        ("[train]\n" + "\n".join(f"k{n} = 1" for n in range(4000)), 41, "train.k0", "more"),
        (f"[data]\ntrigger = '{'x' * 10**5}'", 1, "data.trigger", "1000"),
        (f"[lora]\ntargets = '{'[' * 10**5}'", 1, "lora.targets", "500"),
        (f"[lora]\nrank_pattern = {{'{'[' * 10**5}' = 4}}", 1, "lora.rank_pattern", "500"),
        (f"[lora]\nalpha_pattern = {{'{'[' * 10**5}' = 4}}", 1, "lora.alpha_pattern", "500"),
        (f"[train]\nlearning_rates = {{'{'[' * 10**5}' = 1}}", 1, "train.learning_rates", "500"),
    ],
    ids=["many keys", "fewer keys", "a long trigger", "target", "rank", "alpha", "rate"],
)
def test_bombs_of_values(tmp_path, content, lines, key, shows):
    """Thousands of settings cost neither minutes nor the terminal's history."""
    file = tmp_path / "bomb.toml"
    file.write_text(content, encoding="utf-8")
    with bounded(), raises(ConfigError, *filter(None, [key]), shows=shows) as caught:
        load_config(file)
    assert len(str(caught.value).splitlines()) == lines


def test_resolved_configuration_survives_json(tmp_path):
    """The run keeps the configuration whole."""
    config = load_config(
        None, ["data.heldout=0.2", "data.trigger=woodcut", "sample.strengths=0.5"], images="x"
    )
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    assert read_config(file) == config


def test_presets_are_valid_and_short():
    """A file in configs/ says what differs from the defaults, and nothing else."""
    presets = sorted(CONFIGS.glob("*.toml"))
    assert {preset.stem for preset in presets} >= {"openmoji", "fluent-mono", "sd15", "sdxl"}
    for preset in presets:
        config, default = load_config(preset), RunConfig()
        text = preset.read_text(encoding="utf-8")
        assert text.count("#") >= 2, f"{preset.name} says why"
        for name in RunConfig.model_fields:
            section = getattr(config, name)
            if isinstance(section, Section):
                for key in section.model_fields_set:
                    assert getattr(section, key) != getattr(getattr(default, name), key), (
                        f"{preset.name}: {name}.{key}"
                    )


def test_a_removed_key_at_its_old_default_is_read(tmp_path: Path):
    """Configurations of earlier versions go on; another value is named, with what to do."""
    for name, text, read in (
        ("old.toml", "[base]\nquantize_correction = {}\n", load_config),
        ("config.json", '{{"base": {{"quantize_correction": {}}}}}', read_config),
    ):
        (tmp_path / name).write_text(text.format(0))
        assert read(tmp_path / name) == RunConfig()
        (tmp_path / name).write_text(text.format(16))
        with raises(ConfigError, "base.quantize_correction", shows=("= 16", "lora.init_from")):
            read(tmp_path / name)


def test_the_keys_are_pinned():
    """One way in: a new setting is a decision, made here too."""
    keys = {
        "base": "dtype quantize revision source vae variant",
        "data": "allow_missing_captions background cache caption_dropout caption_encoding caption_prefix "
        "caption_suffix caption_variants clip_skip color_jitter crop crop_variants flip follow_links heldout "
        "keep_separator keep_tags masks merge_buckets more_resolutions no_upscale on_bad_image "
        "placeholders prompt_chunks prompt_weights repeats resolution rules sets several_captions "
        "shuffle_tags tag_dropout trigger trigger_position wildcards",
        "lora": "alpha alpha_pattern dropout force_parent init init_from kind max_norm parent rank "
        "rank_pattern rslora targets text_encoder",
        "objective": "debiased force_prediction_type huber_delta huber_schedule input_perturbation "
        "layout_range layout_weight loss min_snr_gamma noise_offset prediction_type prior_weight "
        "pyramid_discount pyramid_noise timestep_bias timestep_mean timestep_range timestep_std "
        "timestep_weight timesteps unmasked_prior "
        "unmasked_weight",
        "train": "accumulate batch_size compile ema_decay epochs evaluate_every grad_clip "
        "gradient_checkpointing keep_checkpoints learning_rate learning_rates lora_plus_ratio "
        "max_skipped_steps optimizer optimizer_args precision sample_every save_every schedule "
        "schedule_cycles schedule_power seed steps text_encoder_learning_rate timeout_seconds trace "
        "trackers warmup",
        "sample": "batch_size guidance negative_prompt prompts safety_checker scheduler seeds "
        "steps strengths",
        "export": "formats include_captions name precision",
    }
    found = {
        name: " ".join(sorted(type(getattr(RunConfig(), name)).model_fields))
        for name in RunConfig.model_fields
        if name != "images"
    }
    assert found == keys


def test_checked_before_anything_heavy():
    """R-35: a wrong setting is refused without the imports that take seconds."""
    code = (
        "import sys; sys.argv = ['sdlora', 'train', 'nowhere', 'lora.rnk=3']\n"
        "from sdlora.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 2, stop.code\n"
        "assert not sys.modules.keys() & {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate'}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "sdlora: lora.rnk is not a setting; did you mean lora.rank?\n"


@pytest.mark.parametrize("overrides", [["sample.prompts={trigger}, a cat"], {}])
def test_arguments_are_read_with_the_other_settings(tmp_path, overrides):
    """R-16: a prompt with {trigger} is right whether the trigger is a setting or an argument."""
    file = tmp_path / "x.toml"
    file.write_text("[sample]\nprompts = ['{trigger}, a dog']", encoding="utf-8")
    arguments = {"data.trigger": "zorp", "base.source": None}
    config = load_config(file, overrides, images="x", arguments=arguments)
    assert config.data.trigger == "zorp"
    assert "{trigger}" in config.sample.prompts[0]
    with raises(ConfigError, "sample.prompts"):
        load_config(file, overrides, images="x")


def test_none_switches_a_default_of_the_base_off():
    """R-30: the built-in base keeps its layout by default; a style of color is trained at all timesteps."""
    objective = load_config(None, ["objective.layout_range=none"]).objective
    assert objective.layout_range is None
    assert "layout_range" in objective.model_fields_set


def test_conflicts_are_told_all_at_once():
    """R-35: each in a line of its own, also several of one section."""
    conflicts = {
        "train.steps": 10,
        "train.epochs": 2,
        "train.schedule_power": 2.0,
        "data.keep_tags": 1,
        "data.heldout": -0.1,
        "sample.prompts": ["", "x.txt"],
        "objective.layout_weight": 0.5,
        "objective.min_snr_gamma": 5,
        "objective.debiased": True,
    }
    with pytest.raises(ConfigError) as caught:
        load_config(None, conflicts)
    told = [line.split(" ", 1)[0] for line in caught.value.problems]
    assert sorted(told) == [
        "data.heldout",
        "data.keep_tags",
        "objective.layout_weight",
        "objective.min_snr_gamma",
        "sample.prompts",
        "sample.prompts",
        "train.epochs",
        "train.schedule_power",
    ]
