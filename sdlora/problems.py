"""Messages about wrong settings."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel

from sdlora.aliases import ELSEWHERE, REMOVED
from sdlora.errors import shorten


def describe_error(item: dict[str, Any], model: type[BaseModel]) -> str:
    """The message for a pydantic error: key, value, what is wrong, what to do."""
    path = [str(part) for part in item["loc"]]
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    key, shown = ".".join(path[:2]), shorten(repr(item["input"]))
    if not path:
        return f"the configuration is {shown}; it must consist of sections with keys"
    if key in REMOVED:
        return f"{key} = {shown} {REMOVED[key][1]}"
    if item["type"] == "extra_forbidden":
        return f"{shorten('.'.join(path))} is not a setting; {_nearest(path, model)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{key} = {shown} must be a section; write [{key}], with its keys below"
    field = _sections(model)[path[0]].model_fields[path[1]] if len(path) > 1 else None
    extra = field.json_schema_extra if field and isinstance(field.json_schema_extra, dict) else {}
    remedy = f"; {extra['remedy']}" if extra.get("remedy") else ""
    return f"{key} = {shown} {_reason(item)}{remedy}"


def drop_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Drops removed settings that have their old default from the content of a configuration file.

    Other values stay, and `describe_error` explains them.
    """
    for setting, (default, _) in REMOVED.items():
        section, name = setting.split(".")
        table = values.get(section) if isinstance(values, dict) else None
        if isinstance(table, dict) and table.get(name) == default:
            del table[name]
    return values


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a configuration by name."""
    fields = {name: field.annotation for name, field in model.model_fields.items()}
    sections = {name: kind for name, kind in fields.items() if isinstance(kind, type)}
    return {name: kind for name, kind in sections.items() if issubclass(kind, BaseModel)}


def settings_of(model: type[BaseModel]) -> list[str]:
    """All settings, as `section.key`."""
    return [f"{section}.{name}" for section, kind in _sections(model).items() for name in kind.model_fields]


def _reason(item: dict[str, Any]) -> str:
    context = {
        key: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for key, limit in item.get("ctx", {}).items()
    }
    reasons = {
        "greater_than_equal": "must be at least {ge}",
        "greater_than": "must be above {gt}",
        "less_than_equal": "must be at most {le}",
        "less_than": "must be below {lt}",
        "literal_error": "must be one of {expected}",
        "too_short": "must not be empty",
        "string_too_short": "must not be empty",
        "string_too_long": "must have at most {max_length} characters",
        "int_parsing": "must be an integer",
        "int_type": "must be an integer",
        "int_from_float": "must be an integer",
        "finite_number": "must be a finite number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
        "dict_type": "must be a table",
    }
    text = reasons.get(item["type"])
    return text.format(**context) if text else f"is not valid ({item['msg'].lower()})"


def guess_key(name: str, model: type[BaseModel]) -> str:
    """A hint for a name without section, or of another trainer; empty if unknown."""
    key = name.lstrip("-").replace("-", "_")
    if known := ELSEWHERE.get(key):
        return f"in sdlora: {known}"
    same = [f"{section}.{key}" for section, kind in _sections(model).items() if key in kind.model_fields]
    return f"did you mean {' or '.join(same)}?" if same else ""


def _inner_model(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of a setting that is a list of tables."""
    kinds = get_args(section.model_fields[key].annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _nearest(path: list[str], model: type[BaseModel]) -> str:
    """A hint for a misspelled setting."""
    sections = _sections(model)
    if len(path) > 3 and (inner := _inner_model(sections[path[0]], path[1])):
        return f"each table of [[{path[0]}.{path[1]}]] has {', '.join(inner.model_fields)}"
    if known := guess_key(path[-1], model):
        return known
    if len(path) == 1:
        if guess := difflib.get_close_matches(path[0], list(sections), 1, 0.5):
            return f"did you mean the section [{guess[0]}]?"
        return f"the sections are {', '.join(sections)}"
    keys = sorted(settings_of(model))
    own = [key for key in keys if key.startswith(f"{path[0]}.")]
    for choices in (own, keys):
        if guess := difflib.get_close_matches(".".join(path), choices, 1, 0.5):
            return f"did you mean {guess[0]}?"
    return f"[{path[0]}] has {', '.join(key.split('.')[1] for key in own)}"
