"""Tiny models that read tokens, one of each architecture, and a config of each input method: for tests of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peanut.methods  # noqa: F401 - fills METHODS
from peanut import PeftModel, get_peft_model
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS, PeftConfig

from .support import scattered

VOCABULARY = 50
PAD = 1
LABELS = 3

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_WIDE = {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
_HEADS = {"head_dim": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertConfig", _WIDE),
    "Roberta": ("RobertaConfig", {**_WIDE, "max_position_embeddings": 66}),
    "MPNet": ("MPNetConfig", {**_WIDE, "max_position_embeddings": 66}),
    "DistilBert": (
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
        },
    ),
    "GPT2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": PAD,
        },
    ),
    "Llama": ("LlamaConfig", _GROUPED),
    "Mistral": ("MistralConfig", _GROUPED),
    "Qwen2": ("Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3Config", {**_GROUPED, **_HEADS}),
    "Gemma": ("GemmaConfig", {**_GROUPED, **_HEADS}),
    "Gemma2": ("Gemma2Config", {**_GROUPED, **_HEADS, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "T5": (
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
            "pad_token_id": PAD,
            "eos_token_id": 3,
        },
    ),
}

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Kind:
    """An architecture with a head."""

    family: str
    head: str

    def __str__(self) -> str:
        return f"{self.family}{self.head}"

    @property
    def task(self) -> str:
        return TASKS[self.head]

    @property
    def takes_prefix(self) -> bool:
        return self.family not in ("MPNet", "DistilBert")

    @property
    def counts_tokens(self) -> bool:
        """Whether a row that is padded on the left is as the row alone (encoders put the padding at position 0)."""
        return self.family not in ("Bert", "Roberta", "MPNet", "DistilBert", "T5")

    @property
    def generates(self) -> bool:
        return self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")

    def base(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """The model, for evaluation: the same weights at every call, clearly not zero, no dropout."""
        name, values = CONFIGS[self.family]
        config = getattr(transformers, name)(
            **{**values, "num_labels": 2 if self.task == "QUESTION_ANS" else LABELS, **options}
        )
        for field in vars(config):
            if "drop" in field and isinstance(getattr(config, field), float):
                setattr(config, field, 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = getattr(transformers, str(self))(config)
        scattered(model.parameters(), scale=0.15)
        return model.to(dtype).eval()

    def batch(self, rows: int = 3, count: int = 6, labels: bool = False) -> dict[str, Any]:
        """Tokens without padding; with labels if asked."""
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(4, VOCABULARY, (rows, count), generator=generator)
        batch: dict[str, Any] = {"input_ids": ids}
        if self.task == "SEQ_2_SEQ_LM":
            batch["labels" if labels else "decoder_input_ids"] = torch.randint(
                4, VOCABULARY, (rows, 4), generator=generator
            )
        elif labels:
            made: dict[str, Callable[[], dict[str, Tensor]]] = {
                "CAUSAL_LM": lambda: {"labels": ids.clone()},
                "SEQ_CLS": lambda: {"labels": torch.arange(rows) % LABELS},
                "TOKEN_CLS": lambda: {"labels": ids % LABELS},
                "QUESTION_ANS": lambda: {
                    "start_positions": torch.arange(rows) % count,
                    "end_positions": torch.full((rows,), count - 1),
                },
            }
            batch |= made[self.task]()
        return batch


HEADS = {
    "Bert": ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "Roberta": ["ForSequenceClassification"],
    "MPNet": ["ForSequenceClassification"],
    "DistilBert": ["ForSequenceClassification"],
    "GPT2": ["LMHeadModel", "ForSequenceClassification"],
    "Llama": ["ForCausalLM", "ForSequenceClassification"],
    "T5": ["ForConditionalGeneration"],
}
KINDS = [Kind(family, head) for family in CONFIGS for head in HEADS.get(family, ["ForCausalLM"])]


@dataclass(frozen=True)
class Form:
    """An input method with some of its options."""

    method: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.method}-{self.name}" if self.name else self.method

    def fits(self, kind: Kind) -> bool:
        if self.method == "CPT":
            return kind.task == "CAUSAL_LM"
        return kind.takes_prefix or METHODS[self.method].prepends == "tokens"  # type: ignore[attr-defined]

    def config(self, kind: Kind, tokens: int = 3, **more: Any) -> PeftConfig:
        options: dict[str, Any] = {"task_type": kind.task, **dict(self.options)}
        if self.method == "CPT":
            options["cpt_token_ids"] = (options["cpt_token_ids"] * 9)[:tokens]
            options["cpt_tokens_type_mask"] = (options["cpt_tokens_type_mask"] * 9)[:tokens]
        else:
            options["num_virtual_tokens"] = tokens
        config: PeftConfig = METHODS[self.method].config_class(**options | more)
        return config


FORMS = [
    Form("PROMPT_TUNING", ""),
    Form("P_TUNING", "MLP", (("encoder_hidden_size", 12),)),
    Form("P_TUNING", "LSTM", (("encoder_reparameterization_type", "LSTM"), ("encoder_hidden_size", 12))),
    Form("PREFIX_TUNING", ""),
    Form("PREFIX_TUNING", "MLP", (("prefix_projection", True), ("encoder_hidden_size", 12))),
    Form("CPT", "", (("cpt_token_ids", [5, 9, 12, 7, 30]), ("cpt_tokens_type_mask", [1, 2, 4, 5, 6]))),
]


def adapted(kind: Kind, form: Form, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model, for evaluation, with a random adapter ``default``."""
    base = kind.base(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return moved(get_peft_model(base, form.config(kind, **options)))


def moved(model: Any, scale: float = 0.3) -> Any:
    """``model`` with noise in the trained tensors of its adapters: CPT's within what it allows."""
    adapters = AdapterSet.of(model)
    for seed, name in enumerate(adapters.configs):
        trained = [value for _, value in adapters.parameters(name) if isinstance(value, nn.Parameter)]
        scattered(trained, 40 + seed, scale)
    with torch.no_grad():
        for place in adapters.places():
            for name in place.adapters:
                method, config = place.method_of(name)
                method.after_step(config, [place.values(name)])
    return model.eval()


def answer(model: Any, batch: dict[str, Any], **more: Any) -> Tensor:
    """What a model answers for the user's tokens: logits, or starts and ends of spans side by side."""
    with torch.no_grad():
        return answer_of(model(**batch, **more))


def answer_of(output: Any) -> Tensor:
    if "logits" in output:
        return output["logits"]  # type: ignore[no-any-return]
    return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)


def own(found: Tensor, kind: Kind, count: int) -> Tensor:
    """The answers to the user's tokens: a language model answers for virtual tokens too."""
    return found[:, -count:] if kind.task == "CAUSAL_LM" else found


def in_folder(model: Any, folder: Path, kind: Kind, **options: Any) -> PeftModel:
    """The adapter saved and read again onto a fresh base."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(kind.base(), folder, **options)
