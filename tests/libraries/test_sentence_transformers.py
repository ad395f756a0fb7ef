"""sentence-transformers: adapters are added, trained, saved and loaded as with Hugging Face PEFT's configs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

from peanut import LoraConfig, PeanutConfig

from ..support import one_thread  # noqa: F401

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.usefixtures("installed"),
    pytest.mark.filterwarnings("ignore"),
]  # of the library and of what it imports

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "the", "mat"]
TEXTS = ["a cat sat", "the dog ran", "the mat", "a dog sat"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: LoraConfig(r=4, task_type="FEATURE_EXTRACTION", target_modules=["query", "value"]),
    "PEANUT": lambda: PeanutConfig(r=4, task_type="FEATURE_EXTRACTION", target_modules=["query", "value"]),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    hf.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **still)
    hf.BertModel(config).save_pretrained(folder)
    return folder


def fresh(base: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(base), device="cpu")


def adapted(base: Path, name: str) -> Any:
    model = fresh(base)
    torch.manual_seed(1)
    model.add_adapter(CONFIGS[name]())
    return model


def embedded(model: Any) -> Tensor:
    found: Tensor = model.eval().encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return found.clone()


def trained(model: Any, folder: Path) -> list[float]:
    """The losses of some steps."""
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        logging_steps=1,
        save_steps=3,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = datasets.Dataset.from_dict({"anchor": TEXTS, "positive": ["cat sat", "dog ran", "a mat", "dog sat"]})
    from sentence_transformers.sentence_transformer import losses

    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@every_config
def test_an_adapter_is_trained_saved_and_loaded(name: str, base: Path, tmp_path: Path) -> None:
    model, start = adapted(base, name), embedded(fresh(base))
    assert torch.equal(embedded(model), start)
    losses = trained(model, tmp_path / "run")
    assert losses[-1] < losses[0]
    expected = embedded(model)
    assert not torch.allclose(expected, start, atol=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-3"):
        assert {path.name for path in folder.rglob("*.safetensors")} == {"adapter_model.safetensors"}
        again = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        # Of a method that Hugging Face PEFT has too, the library makes that one's layers.
        assert torch.allclose(embedded(again), expected, atol=1e-5)
    onto = fresh(base)
    onto.load_adapter(str(tmp_path / "saved"))
    assert torch.allclose(embedded(onto), expected, atol=1e-5)
    onto.disable_adapters()
    assert torch.equal(embedded(onto), start)
    onto.enable_adapters()
    own = model.get_adapter_state_dict()
    assert own
    loaded = onto.get_adapter_state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in own.items())


def test_a_lora_trains_as_the_peer_s(base: Path, tmp_path: Path) -> None:
    ours, theirs = adapted(base, "LORA"), fresh(base)
    config = peft.LoraConfig(r=4, task_type="FEATURE_EXTRACTION", target_modules=["query", "value"])
    theirs.add_adapter(config)
    own, other = (model.get_adapter_state_dict() for model in (ours, theirs))
    assert own.keys() == other.keys()
    with torch.no_grad():
        for key, value in own.items():
            other[key].copy_(value)
    assert trained(ours, tmp_path / "ours") == pytest.approx(trained(theirs, tmp_path / "theirs"), abs=1e-5)
    assert torch.allclose(embedded(ours), embedded(theirs), atol=1e-5)
