"""A vision-language model that describes what an image shows, for `sdlora caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sdlora.dtypes import has_bf16
from sdlora.errors import ModelError, first_line

DEFAULT = "Salesforce/blip-image-captioning-base"
PROMPT = (
    "Describe what this image shows in one short sentence: the things, people, actions and setting. Do not "
    "mention its style, medium, technique or artist, and do not write that it is an image."
)
# By model type, the prompt that it takes: none, a task, or an instruction.
PROMPTS = {"blip": "", "florence2": "<CAPTION>", "qwen2_vl": PROMPT, "qwen2_5_vl": PROMPT}
MAX_TOKENS = 60
CPU = torch.device("cpu")


class Captioner:
    """Describes images; greedy, so that an image has the same caption again.

    Args:
        source: A folder, or a hub id: BLIP, Florence-2 (`florence-community/...`), or
            Qwen2-VL and Qwen2.5-VL. Only safetensors are loaded, and no code of its repository is run.
        prompt: Instead of the usual one of its kind.
        device: Where it runs.

    Raises:
        ModelError: If it cannot be loaded or is of another kind.
    """

    def __init__(self, source: str, prompt: str | None = None, device: torch.device = CPU) -> None:
        path = Path(source).expanduser()
        is_local = path.is_dir()
        name = str(path) if is_local else source
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=is_local)
            self.kind = str(config.model_type)
            if self.kind not in PROMPTS:
                known = "BLIP, Florence-2, Qwen2-VL or Qwen2.5-VL"
                raise ModelError(f"--model {source} is a {self.kind}; use {known}", key="option--model")
            self.processor: Any = AutoProcessor.from_pretrained(
                name, trust_remote_code=False, local_files_only=is_local
            )
            dtype = torch.bfloat16 if has_bf16(device) else torch.float32
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=is_local
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            problem = (
                f"--model {source} cannot be loaded: {first_line(error)}; use a local folder, a hub id that "
                "can be reached, or --model builtin, which needs no network"
            )
            raise ModelError(problem, key="option--model") from None
        self.model: Any = model.to(device).eval()
        self.prompt = PROMPTS[self.kind] if prompt is None else prompt

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> str:
        """The caption of an RGB image, one line."""
        text = self.prompt
        if self.kind.startswith("qwen"):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts = {"text": text} if text else {}
        inputs = self.processor(images=image, return_tensors="pt", **texts)
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        if self.kind.startswith("qwen"):
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        (caption,) = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return " ".join(str(caption).split())
