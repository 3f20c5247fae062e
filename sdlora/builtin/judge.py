"""A small classifier of concepts, trained on drawings of every icon set: it says what a sample shows.

It is the truth that a base is measured against. It sees no sample of any base, and none of the drawings that
the two example datasets hold out; on those its own accuracy is the ceiling of every measurement.

B batch, H W image size.
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import ICON_SETS, STYLE_SETS, fetch_icons, load_icons
from sdlora.builtin.script import JUDGE_FILE, Script
from sdlora.builtin.state import learning_rate, write_tensors
from sdlora.builtin.variants import RENDERED_PX, Variant, draw_variant, render_variant
from sdlora.errors import DataError, ModelError
from sdlora.reading import read_header
from sdlora.writing import append_lines

IMAGE_SIZE = 64
WIDTHS = (32, 64, 128, 208)
VARIANTS = 4  # of each drawing, besides itself
BATCH = 64
PEAK_RATE = 2e-3
LABEL_SMOOTHING = 0.1
SEED = 0


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> a score for each concept, (B, N)."""

    def __init__(self, concepts: Sequence[str], widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.concepts = list(concepts)
        self.widths = tuple(widths)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for before, after in zip(widths, (*widths[1:], widths[-1]), strict=True):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.drop = nn.Dropout(0.2)
        side = (IMAGE_SIZE // 2) >> len(widths)
        self.head = nn.Linear(widths[-1] * side * side, len(self.concepts))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.drop(self.layers(images).flatten(1)))
        return scores


def open_rgb(file: Path) -> Image.Image:
    """An image file as RGB."""
    with Image.open(file) as image:
        return image.convert("RGB")


def to_input(images: Sequence[Image.Image]) -> Tensor:
    """Square images of any size as the judge sees them, uint8 (B, 3, 64, 64)."""
    small = [image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in small]))


def heldout_concepts(datasets: Path) -> dict[str, set[str]]:
    """The concepts that each style set's dataset holds out; raises a DataError without a dataset."""
    held = {name: {file.stem for file in (datasets / name / "heldout").glob("*.png")} for name in STYLE_SETS}
    for name, concepts in held.items():
        if not concepts:
            raise DataError(f"{datasets / name / 'heldout'} has no images; pass the folder of the datasets")
    return held


def render_training(
    concepts: Sequence[str], icons_folder: Path, held: dict[str, set[str]], variants: int = VARIANTS
) -> tuple[Tensor, Tensor]:
    """Every drawing of every icon set that is not held out, as it is and varied: images and their labels."""
    images: list[Image.Image] = []
    labels: list[int] = []
    for icon_set in ICON_SETS:
        icons = load_icons(icon_set, icons_folder)
        for label, concept in enumerate(concepts):
            if concept not in icons or concept in held.get(icon_set, set()):
                continue
            drawing = icons.render(concept, RENDERED_PX)
            for number in range(1 + variants):
                rng = random.Random(f"judge/{number}/{icon_set}/{concept}")
                variant = draw_variant(rng, icon_set, concept) if number else Variant(icon_set, concept)
                images.append(
                    render_variant(drawing, variant).resize((IMAGE_SIZE,) * 2, Image.Resampling.BOX)
                )
                labels.append(label)
    return to_input(images), torch.tensor(labels)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Images in [-1, 1], turned, sheared, scaled, shifted, recolored, blurred and disturbed a little."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def happens(share: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) < share * strength

    angle, shear = strength * uniform(-0.3, 0.3), strength * uniform(-0.2, 0.2)
    wide, tall = 1 + strength * uniform(-0.15, 0.35), 1 + strength * uniform(-0.15, 0.35)
    flipped = torch.where(happens(0.4), -1.0, 1.0)
    shifts = strength * uniform(-0.15, 0.15, 2)
    rows = torch.stack([angle.cos() * wide * flipped, (shear - angle.sin()) * tall, shifts[:, 0]], dim=1)
    columns = torch.stack([angle.sin() * wide * flipped, angle.cos() * tall, shifts[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([rows, columns], dim=1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # each color channel becomes a mixture of all three: hues turn, some images lose their color
    mixing = torch.eye(3) + strength * uniform(0, 0.35, 1, 1) * torch.randn(count, 3, 3, generator=generator)
    mixing = mixing / mixing.sum(dim=2, keepdim=True).clamp(min=0.5)
    mixing = torch.where(happens(0.2, 1, 1), torch.full((3, 3), 1 / 3), mixing)
    contrast = 1 + strength * uniform(-0.4, 0.3, 1, 1, 1)
    images = torch.einsum("bij,bjhw->bihw", mixing, images) * contrast
    images = torch.where(happens(0.1, 1, 1, 1), -images, images)
    images = torch.where(happens(0.3, 1, 1, 1), F.avg_pool2d(images, 3, 1, 1), images)
    noise = torch.randn(images.shape, generator=generator)
    return (images + strength * uniform(0, 0.12, 1, 1, 1) * noise).clamp(-1, 1)


def draw_labelled(by_label: dict[int, list[int]], rng: random.Random, count: int) -> list[int]:
    """Numbers of training images: every concept equally often."""
    labels = rng.choices(sorted(by_label), k=count)
    return [rng.choice(by_label[label]) for label in labels]


def fit(judge: Judge, images: Tensor, labels: Tensor, steps: int, log: Path) -> None:
    """Trains the judge on images (uint8) and their labels; augmentation grows over the first third."""
    by_label: dict[int, list[int]] = defaultdict(list)
    for number, label in enumerate(labels.tolist()):
        by_label[label].append(number)
    generator, rng = torch.Generator().manual_seed(SEED), random.Random(SEED)
    judge.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_RATE, weight_decay=0.05, fused=True)
    running = 0.0
    for step in range(steps):
        numbers = draw_labelled(by_label, rng, BATCH)
        batch = augment(images[numbers].float() / 127.5 - 1, generator, min(1.0, 0.2 + 3 * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_RATE, 100, 0.8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = judge(batch.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(scores.float(), labels[numbers], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += (loss.item() - running) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            facts = {"step": step + 1, "loss": round(running, 3), "time": round(time.time())}
            append_lines(log, [facts])
    judge.eval()


def train(concepts: Sequence[str], icons_folder: Path, datasets: Path, steps: int, log: Path) -> Judge:
    """Renders the drawings, and trains a judge on them."""
    images, labels = render_training(concepts, icons_folder, heldout_concepts(datasets))
    torch.manual_seed(SEED)
    judge = Judge(concepts)
    fit(judge, images, labels, steps, log)
    return judge


@torch.no_grad()
def _scores(judge: Judge, images: Sequence[Image.Image]) -> Tensor:
    """Logits of all concepts, (N, concepts)."""
    judge.eval()
    return torch.cat([judge(part.float() / 127.5 - 1) for part in to_input(images).split(BATCH)])


def recognise(judge: Judge, images: Sequence[Image.Image], best: int = 5) -> list[list[str]]:
    """The concepts that each image shows most probably, the best first."""
    numbers = _scores(judge, images).topk(min(best, len(judge.concepts)), dim=1).indices.tolist()
    return [[judge.concepts[number] for number in row] for row in numbers]


def probabilities(judge: Judge, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[float]:
    """How probable it is to the judge that each image shows its concept."""
    columns = torch.tensor([judge.concepts.index(concept) for concept in concepts])
    found: list[float] = _scores(judge, images).softmax(dim=1).gather(1, columns[:, None])[:, 0].tolist()
    return found


def ceiling(judge: Judge, dataset: Path) -> tuple[float, list[str]]:
    """The share of a dataset's real held-out drawings that are recognised, and the names of the others."""
    files = sorted((dataset / "heldout").glob("*.png"))
    found = recognise(judge, [open_rgb(file) for file in files])
    missed = [file.stem for file, names in zip(files, found, strict=True) if names[0] != file.stem]
    return 1 - len(missed) / len(files), missed


def save_judge(judge: Judge, file: Path) -> None:
    """Writes the weights in fp16; the concepts and widths are in the file's metadata."""
    facts = {"concepts": json.dumps(judge.concepts), "widths": json.dumps(judge.widths)}
    state = judge.state_dict()
    write_tensors(file, {key: v.half() if v.is_floating_point() else v for key, v in state.items()}, facts)


def load_judge(file: Path = JUDGE_FILE) -> Judge:
    """Reads what `save_judge` wrote; raises a ModelError if the file is missing."""
    if not file.is_file():
        raise ModelError(f"{file} is not there; make it: python -m sdlora.builtin.judge --out {file}")
    facts = read_header(file).metadata
    judge = Judge(json.loads(facts["concepts"]), json.loads(facts["widths"]))
    judge.load_state_dict(load_file(file))
    return judge.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("judge", __doc__, "--icons", "--datasets", "--concepts", "--threads")
    script.add_argument("--out", type=Path, default=JUDGE_FILE, help="file of the weights")
    script.add_argument("--steps", type=int, default=3000)

    def work(given: Namespace) -> None:
        icons = given.icons or fetch_icons(tuple(ICON_SETS), Path(".icons"))
        log = given.out.with_suffix(".log.jsonl")
        judge = train(read_concepts(given.concepts), icons, given.datasets, given.steps, log)
        save_judge(judge, given.out)
        for name in STYLE_SETS:
            share, missed = ceiling(judge, given.datasets / name)
            print(f"{name}: {share:.1%} of the held-out drawings; not {', '.join(missed)}")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
