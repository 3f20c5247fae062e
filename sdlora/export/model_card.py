"""The README.md of an adapter, for Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from sdlora.export.metadata import TrainingMetadata
from sdlora.report.summary import pipeline_code
from sdlora.writing import write_text

# The pipeline's own argument, which counts from 0, fails where transformers has no `text_model`.
_ENCODE = """

def encode(prompt):  # clip skip {skip}
    tokens = pipe.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    states = pipe.text_encoder(tokens.input_ids.to(pipe.device), output_hidden_states=True).hidden_states
    text_model = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    return text_model.final_layer_norm(states[-{skip}])

"""
TAGS = ("lora", "diffusers", "stable-diffusion", "text-to-image", "sdlora")


def write_model_card(
    path: Path,
    facts: TrainingMetadata,
    *,
    prompts: Sequence[str],
    grid: str | None = None,
    weights: str = "final.safetensors",
) -> Path:
    """Writes the card (front matter, grid, usage, settings); `grid` and `weights` are files beside it."""
    sections = [
        _front_matter(facts, prompts, grid),
        f"# {facts.title}\n\n{_summary(facts)}",
        f"![base beside style]({grid})" if grid else "",
        f"## Use\n\n{_usage(facts, prompts, weights)}",
        f"## Settings\n\n{_settings(facts)}",
    ]
    return write_text(path, "\n\n".join(section for section in sections if section) + "\n")


def _front_matter(facts: TrainingMetadata, prompts: Sequence[str], grid: str | None) -> str:
    widget: list[dict[str, Any]] = [{"text": prompt} for prompt in prompts]
    if widget and grid:
        widget[0]["output"] = {"url": grid}
    results = {}
    if facts.heldout_loss is not None:
        loss = EvalResult(
            task_type="text-to-image",
            dataset_type="imagefolder",
            dataset_name=facts.title,
            metric_type="loss",
            metric_name="loss on held-out images",
            metric_value=round(facts.heldout_loss, 4),
        )
        results = {"model_name": facts.title, "eval_results": [loss]}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # Hugging Face refuses a base_model that is not the id of a model there.
        base_model=facts.base_name if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_name) else None,
        tags=list(TAGS),
        instance_prompt=facts.trigger or None,
        widget=widget or None,
        **results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(facts: TrainingMetadata) -> str:
    trigger = f" Write `{facts.trigger}` in the prompt." if facts.trigger else ""
    path = " and ".join(map(str, facts.ancestors))
    parents = (
        f"\n\nIt was trained on top of {path}, and requires it: load them as named adapters together, or "
        "merge them into one file with `sdlora tree flatten`."
    )
    return (
        f"A style LoRA for {facts.base_name} ({facts.architecture}), trained with sdlora on "
        f"{facts.num_images} images.{trigger}{parents if path else ''}"
    )


def _usage(facts: TrainingMetadata, prompts: Sequence[str], weights: str) -> str:
    prompt = next(iter(prompts), facts.trigger or "a picture")
    skip = facts.options.get("clip_skip", 1)
    call = f"pipe({_quote(prompt)})"
    if skip > 1:
        call = f'pipe(prompt_embeds=encode({_quote(prompt)}), negative_prompt_embeds=encode(""))'
    code = [
        *pipeline_code(facts.base_name, facts.family),
        # Alone, a child would be used without what it was trained on.
        'pipe.load_lora_weights("merged.safetensors")  # by `sdlora tree flatten`'
        if facts.ancestors
        else f'pipe.load_lora_weights(".", weight_name={_quote(weights)})  # or this repository\'s name',
        *(_ENCODE.format(skip=skip).splitlines() if skip > 1 else ()),
        f"image = {call}.images[0]",
    ]
    return "\n".join(["```python", *code, "```"])


def _settings(facts: TrainingMetadata) -> str:
    rate = facts.text_learning_rate
    text = "" if rate is None else f" (text encoders {rate:g})"
    rows = {
        "base": facts.base_name,
        "trigger": facts.trigger or "none",
        "rank, alpha": f"{facts.rank}, {facts.alpha:g}",
        "targets": ", ".join(facts.targets),
        "steps": facts.steps,
        "images, images seen": f"{facts.num_images}, {facts.images_seen}",
        "batch size": facts.batch_size,
        "learning rate": f"{facts.learning_rate:g}{text}, {facts.schedule}",
        "optimizer": facts.optimizer,
        "precision": facts.precision,
        "resolution": f"{facts.resolution} px",
        "clip skip": facts.options.get("clip_skip"),
        "seed": facts.seed,
        "date": facts.date[:10],
    }
    rows = {key: value for key, value in rows.items() if value is not None}
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
