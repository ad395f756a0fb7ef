"""Prompt tuning: its starts and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.prompt_tuning import PromptTuningConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..prompts import KINDS, Kind, answer
from ..support import PEER_WARNINGS, distance, one_thread, peer_model, same_bits  # noqa: F401

pytestmark = PEER_WARNINGS
LLAMA, GEMMA, T5 = (
    next(kind for kind in KINDS if str(kind) == name)
    for name in ("LlamaForCausalLM", "GemmaForCausalLM", "T5ForConditionalGeneration")
)


def rows(model: PeftModel) -> Tensor:
    return dict(AdapterSet.of(model).parameters("default"))["/prompt_embeddings"].detach()


def new(kind: Kind, seed: int = 7, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(kind.base(), PromptTuningConfig(**options)).eval()


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A tokenizer that knows three words: 11, 12 and 13."""
    made = Tokenizer(WordLevel({"good": 11, "or": 12, "bad": 13, "?": 0}, unk_token="?"))
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize(("count", "ids"), [(2, [11, 12]), (3, [11, 12, 13]), (7, [11, 12, 13, 11, 12, 13, 11])])
@pytest.mark.parametrize("kind", [LLAMA, GEMMA], ids=str)
def test_starts_from_a_text(kind: Kind, count: int, ids: list[int], tokenizer: str) -> None:
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good or bad"}
    model = new(kind, num_virtual_tokens=count, tokenizer_name_or_path=tokenizer, **options)
    expected = kind.base().get_input_embeddings()(torch.tensor(ids))  # Gemma's are scaled
    assert same_bits(rows(model), expected.detach())
    batch = kind.batch()
    longer = {"input_ids": torch.cat([torch.tensor(ids).expand(3, -1), batch["input_ids"]], dim=1)}
    assert distance(answer(model, batch), answer(kind.base(), longer)) < 1e-6


def test_starts_from_a_text_as_the_peer(tokenizer: str) -> None:
    config = PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="bad or good",
        tokenizer_name_or_path=tokenizer,
    )
    peer = peer_model(T5.base(), config)
    found = rows(get_peft_model(T5.base(), config))
    assert found.shape == (8, 32)
    assert same_bits(found, peer.prompt_encoder["default"].embedding.weight.detach())


def test_starts_from_drawn_tokens() -> None:
    found = rows(new(LLAMA, num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"))
    table = LLAMA.base().get_input_embeddings().weight
    near = torch.cdist(found, table).argmin(dim=1)
    assert same_bits(found, table[near].detach())
    assert len(set(near.tolist())) > 8


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_the_seed_decides(init: str) -> None:
    options = {"num_virtual_tokens": 6, "prompt_tuning_init": init}
    first = rows(new(LLAMA, **options))
    assert same_bits(rows(new(LLAMA, **options)), first)
    assert not same_bits(rows(new(LLAMA, seed=8, **options)), first)
    if init == "RANDOM":
        large = rows(new(LLAMA, num_virtual_tokens=400))
        assert abs(float(large.std()) - 1) < 0.05


def test_what_is_read_off_the_model() -> None:
    config = new(T5, num_virtual_tokens=3).peft_config["default"]
    found = {name: getattr(config, name) for name in ("token_dim", "num_layers", "num_transformer_submodules")}
    assert found == {"token_dim": 32, "num_layers": 2, "num_transformer_submodules": 2}
    with pytest.raises(PeanutError, match="token_dim=16 for a model that has 32"):
        new(LLAMA, num_virtual_tokens=3, token_dim=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "at least 1"),
        ({"num_virtual_tokens": 3, "prompt_tuning_init": "ZEROS"}, "one of TEXT, SAMPLE_VOCAB, RANDOM"),
        ({"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT"}, "without prompt_tuning_init_text"),
        (
            {"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
            "without tokenizer_name_or_path",
        ),
        ({"num_virtual_tokens": 3, "tokenizer_kwargs": {"use_fast": True}}, "leave them out"),
        ({"num_virtual_tokens": 3, "target_modules": ["q_proj"]}, "changes no layer"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        PromptTuningConfig(**options)


def test_no_code_from_files() -> None:
    with pytest.raises(PeanutError, match="run code"):
        PromptTuningConfig(
            num_virtual_tokens=3,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="a",
            tokenizer_name_or_path="b",
            tokenizer_kwargs={"trust_remote_code": True},
        )
