"""Mistakes in a command, each described in one line with what to type instead."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.errors import shorten

# Commands by other names that people try.
VERBS = {
    "check": "doctor",
    "config": "settings",
    "continue": "resume",
    "convert": "export",
    "describe": "info",
    "draw": "sample",
    "finetune": "train",
    "fit": "train",
    "flatten": "tree flatten",
    "generate": "sample",
    "grid": "sample",
    "help": "COMMAND --help",
    "img2img": "sample RUN --image FILE --prompt TEXT",
    "infer": "sample",
    "inference": "sample",
    "inspect": "info",
    "options": "settings",
    "plan": "train IMAGES --dry-run",
    "presets": "settings --presets",
    "push": "export RUN --push-to-hub REPO",
    "rank": "advise-rank RUN",
    "show": "info",
    "txt2img": "sample",
    "upload": "export RUN --push-to-hub REPO",
    "validate": "evaluate",
    "version": "--version",
}
# Options by what other programs call them, with the value to write if it is another.
OPTIONS = {
    "cfg": "--guidance",
    "cfg_scale": "--guidance",
    "checkpoint": "--base",
    "ckpt": "--base",
    "denoising_strength": "--denoise",
    "dim": "--rank",
    "dtype": "--precision",
    "guidance_scale": "--guidance",
    "h": "--size WIDTHxHEIGHT",
    "height": "--size WIDTHxHEIGHT",
    "init_image": "--image",
    "init_img": "--image",
    "instance_prompt": "--trigger",
    "lora_scale": "--strengths",
    "model": "--base",
    "n": "--negative-prompt",
    "output_name": "--name",
    "network_dim": "--rank",
    "new_rank": "--rank",
    "num_images": "--seeds 0,1,2",
    "num_images_per_prompt": "--seeds 0,1,2",
    "num_inference_steps": "--steps",
    "o": "--out",
    "output": "--out",
    "output_dir": "--out",
    "p": "--prompt",
    "pretrained_model_name_or_path": "--base",
    "sampler": "--scheduler",
    "save_precision": "--precision",
    "save_to": "--out",
    "scale": "--strengths",
    "seed": "--seeds",
    "strength": "--strengths",
    "trigger_word": "--trigger",
    "w": "--size WIDTHxHEIGHT",
    "weight": "--strengths",
    "width": "--size WIDTHxHEIGHT",
}
# By the word in messages of Typer, which depend on its version.
KINDS = {"int": "an integer", "float": "a number", "number": "a number"}
_SETTING = re.compile(r"[a-z_]+\.[a-z_0-9]+")


class _Given(NamedTuple):
    """An option as it was typed; the value may be an argument that follows a flag."""

    name: str
    value: str


def describe_usage(error: Any, arguments: Sequence[str]) -> str:
    """One line for a command that cannot be parsed; empty if the help was printed instead."""
    if error.ctx is None:
        return str(error.format_message())
    context, command = error.ctx, error.ctx.command
    text = " ".join(error.format_message().split()).rstrip(".")
    if found := re.match(r"No such command '(.*)'", text):
        name = found[1].split("'.")[0]
        return f"{shorten(name)} is not a command; {_guess_command(name, context)}"
    if unknown := list(_unknown_options(command, arguments)):
        return _describe_options(unknown, context)
    remedy = f"see `{context.command_path} --help`"
    if param := getattr(error, "param", None):
        name = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name.upper()
        if type(error).__name__ == "MissingParameter":
            value = "" if name != param.opts[0] else f" {param.metavar or 'VALUE'}"
            about = (param.help or "").rstrip(".")
            about = about if about[1:2].isupper() else about[:1].lower() + about[1:]
            return f"{name} is missing ({about}); write `{context.command_path} {name}{value}`, or {remedy}"
        value = next((one.value for one in _given(command, arguments) if one.name in param.opts), "")
        kind = next((kind for word, kind in KINDS.items() if f"valid {word}" in text), "")
        return f"{name} {shorten(value)} must be {kind}; {remedy}" if kind else f"{text}; {remedy}"
    extra = re.search(r"unexpected extra argument.* \((.*)\)", text)
    if extra and any("--out" in param.opts for param in command.params):
        return f"`{context.command_path}` does not take {extra[1]}; write --out {extra[1]}, or {remedy}"
    return f"{text}; {remedy}" if text else ""


def _guess_command(name: str, context: Any) -> str:
    """What to type instead of a command that does not exist."""
    commands, root = sorted(context.command.commands), context.command_path
    plain = name.lower().replace("_", "-")
    is_root = context.parent is None
    path = Path(name)
    if is_root and plain in VERBS:
        return f"write `{root} {VERBS[plain]}`"
    if plain not in commands and path.exists():
        shown = shlex.quote(shorten(name))
        if not is_root:
            return f"write `{root} show {shown}`"
        is_lora = path.is_file() or (path / "config.json").is_file()
        return f"write `{root} {'info' if is_lora else 'train'} {shown}`"
    if guess := difflib.get_close_matches(plain, commands, 1, 0.6):
        return f"did you mean `{root} {guess[0]}`?"
    return f"the commands are {', '.join(context.command.list_commands(context))}"


def _given(command: Any, arguments: Sequence[str]) -> Iterator[_Given]:
    """The options of a command line, known or not."""
    takes_value = {
        name: not getattr(param, "is_flag", False)
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
    }
    left = list(arguments)
    while left and (token := left.pop(0)) != "--":
        if not re.match(r"--?[A-Za-z]", token):
            continue
        name, is_joined, value = token.partition("=")
        following = left[0] if left and not re.match(r"--?[A-Za-z]", left[0]) else ""
        if not is_joined and takes_value.get(name, True):
            value = following
            if name in takes_value and left:
                left.pop(0)
        yield _Given(name, value)


def _unknown_options(command: Any, arguments: Sequence[str]) -> Iterator[_Given]:
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    known |= {"-h", "--help"}
    # Names of options may not be known, but values that begin with a dash are not options either.
    yield from (one for one in _given(command, arguments) if one.name not in known)


def _describe_options(unknown: Sequence[_Given], context: Any) -> str:
    """All unknown options of a command, each with what to type."""
    advice = [_guess_option(one, context.command) for one in unknown]
    if len(unknown) == 1:
        remedy = advice[0] or f"see `{context.command_path} --help`"
        return f"{shorten(unknown[0].name)} is not an option; {remedy}"
    listed = (
        f"{shorten(one.name)} ({remedy})" if remedy else shorten(one.name)
        for one, remedy in zip(unknown, advice, strict=True)
    )
    return f"not options of `{context.command_path}`: {', '.join(listed)}"


def _guess_option(given: _Given, command: Any) -> str:
    """What to type instead of an option, or why there is none; empty if nothing is similar."""
    from sdlora.aliases import ELSEWHERE

    key = given.name.lstrip("-").replace("-", "_")
    options = {name: param for param in command.params for name in param.opts if name.startswith("--")}
    plain = {name.lstrip("-").replace("-", "_"): name for name in options}
    takes_settings = any(param.name == "overrides" for param in command.params)
    name, _, value = OPTIONS.get(key, plain.get(key, "")).partition(" ")
    if name in options:
        return _write_option(name, options[name], value or given.value)
    if takes_settings and (translated := _translate(key, given.value)):
        return f"write {translated}"
    if takes_settings and (setting := _setting_of(key)):
        return _write_setting(setting, given.value)
    if key == "steps" and "step" in plain:
        return "--steps are sampling steps, which this command takes from the run; --step is a saved step"
    if key == "step" and "steps" in plain:
        return "--step is a saved step, which this command cannot choose; --steps are sampling steps"
    if guess := difflib.get_close_matches(key, plain, 1, 0.8):
        return _write_option(plain[guess[0]], options[plain[guess[0]]], given.value)
    if (known := ELSEWHERE.get(key, "")).startswith(("`", "not ", "set ", "IMAGES")):
        return f"write {given.value or 'IMAGES'} alone" if known.startswith("IMAGES") else known
    if known and takes_settings:
        return f"in sdlora: {known}"
    if takes_settings and (setting := nearest_setting(key)):
        return _write_setting(setting, given.value)
    if guess := difflib.get_close_matches(key, plain, 1, 0.6):
        return _write_option(plain[guess[0]], options[plain[guess[0]]], given.value)
    return ""


def _translate(key: str, value: str) -> str:
    """An option of another trainer with its value, as it is written here; empty if nothing is known of it."""
    from sdlora.translate.translate import translate_option

    pairs = (one.partition("=") for one in translate_option(key, value))
    return " ".join(f"{setting}={shlex.quote(shorten(text))}" for setting, _, text in pairs)


def _write_option(name: str, param: Any, value: str) -> str:
    if getattr(param, "is_flag", False):
        return f"write {name}"
    return f"write {name} {shlex.quote(shorten(value)) if value else param.metavar or 'VALUE'}"


def _setting_of(key: str) -> str:
    """The setting that other programs call this, or that has this name in its section."""
    from sdlora.aliases import ELSEWHERE
    from sdlora.config import RunConfig
    from sdlora.problems import settings_of

    if _SETTING.fullmatch(known := ELSEWHERE.get(key, "").partition(",")[0]):
        return known
    same = [setting for setting in settings_of(RunConfig) if setting.endswith(f".{key}")]
    # `steps` and `batch_size` of train come before those of sample.
    return min(same, key=lambda setting: not setting.startswith("train."), default="")


def nearest_setting(name: str) -> str:
    """The setting that is meant by a misspelt name, its own or another program's; else an empty text."""
    from sdlora.aliases import ELSEWHERE
    from sdlora.config import RunConfig
    from sdlora.problems import settings_of

    settings = settings_of(RunConfig)
    keys = [setting.partition(".")[2] for setting in settings]
    guess = difflib.get_close_matches(name, [*settings, *keys, *ELSEWHERE], 1, 0.8)
    return "" if not guess else guess[0] if guess[0] in settings else _setting_of(guess[0])


def _write_setting(setting: str, value: str) -> str:
    from sdlora.config import RunConfig

    section, _, key = setting.partition(".")
    if isinstance(getattr(getattr(RunConfig(), section), key), bool) and value not in ("true", "false"):
        value = "true"
    return f"write {setting}={shlex.quote(shorten(value)) if value else 'VALUE'}"
