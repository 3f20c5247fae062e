"""Features by a style descriptor, whose weights have OpenAI's names."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sdlora.errors import ModelError
from sdlora.evaluation.features import (
    CLIP_MEAN,
    CLIP_STD,
    StyleDescriptor,
    load_features,
)
from tests.checks import raises

WIDTH, PATCH, CELLS, OUT = 128, 8, 4, 24


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A block as in OpenAI's CLIP (2103.00020), by torch's own attention."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        parts = {
            "c_fc": nn.Linear(WIDTH, 2 * WIDTH),
            "gelu": QuickGELU(),
            "c_proj": nn.Linear(2 * WIDTH, WIDTH),
        }
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Descriptor(nn.Module):
    """CSD (2404.01292) at tiny size."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.backbone.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.backbone.positional_embedding = nn.Parameter(torch.randn(CELLS**2 + 1, WIDTH))
        self.backbone.ln_pre, self.backbone.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.backbone.transformer = nn.Module()
        self.backbone.transformer.resblocks = nn.Sequential(Block(), Block(), Block())
        self.last_layer_style = nn.Parameter(torch.randn(WIDTH, OUT))
        self.last_layer_content = nn.Parameter(torch.randn(WIDTH, OUT))

    @torch.no_grad()
    def forward(self, pixels):
        own = self.backbone
        x = own.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([own.class_embedding.expand(len(x), 1, -1), x], 1) + own.positional_embedding
        pooled = own.ln_post(own.transformer.resblocks(own.ln_pre(x))[:, 0])
        heads = (self.last_layer_style, self.last_layer_content)
        return [nn.functional.normalize(pooled @ head, dim=1).double().numpy() for head in heads]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Descriptor()


@pytest.fixture
def file(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_style_descriptor_computes_what_its_authors_do(model, file):
    """R-09: both heads, for a square image and one that is cropped to its middle."""
    side, random = CELLS * PATCH, np.random.default_rng(0)
    square = Image.fromarray(random.integers(256, size=(side, side, 3), dtype=np.uint8))
    wide = Image.new("RGB", (2 * side, side), "red")
    wide.paste(square, (side // 2, 0))
    pixels = (np.asarray(square) / 255 - CLIP_MEAN) / CLIP_STD
    style, content = model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    for source in (file, file.parent):
        features = load_features(str(source))
        assert isinstance(features, StyleDescriptor)
        for image in (square, wide):
            np.testing.assert_allclose(features.style([image]), style, atol=1e-5)
            np.testing.assert_allclose(features.content([image]), content, atol=1e-5)


def test_weights_that_are_no_style_descriptor(model, file):
    """R-16: one line, with the path as it was given."""
    state = model.state_dict()
    del state["backbone.ln_pre.weight"]
    save_file(state, file)
    with raises(ModelError, "option--features", shows=str(file)):
        load_features(str(file))
