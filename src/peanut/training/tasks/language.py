"""Causal language modelling on plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import PeanutError
from ...protocols import TaskType
from ..data import check_column
from ..metrics import language_metrics, reduce_language
from .task import TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedConfig

__all__ = ["CausalLM", "LanguageTask"]


class LanguageTask(TextTask):
    """A task that predicts the next token: perplexity and the part of tokens hit."""

    model_class = "AutoModelForCausalLM"
    task_type = TaskType.CAUSAL_LM
    metric_names = ("perplexity", "token_accuracy", "loss")

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:
        # Encoders see what they are to predict, and would look perfect.
        if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
            raise PeanutError(
                f"the model is a {config.model_type}, which is no left-to-right decoder",
                "a decoder such as Llama or GPT-2",
                "choose another model.path",
            )
        super().fit(config, processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorForSeq2Seq

        # The one collator of transformers that pads labels as they are; the model has no part in it.
        return DataCollatorForSeq2Seq(processor)

    def example(self, config: PreTrainedConfig, batch_size: int) -> dict[str, Tensor]:
        tokens = torch.ones(batch_size, self.data.max_length, dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens}

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        return reduce_language(logits[0] if isinstance(logits, tuple) else logits, labels)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return language_metrics(prediction.predictions)


class CausalLM(LanguageTask):
    """Plain text: all rows one after the other, an end token after each, cut into pieces of ``max_length``."""

    name = "causal-lm"
    packs = True

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.data.text,)

    def check(self, rows: Dataset, source: str) -> None:
        check_column(rows, self.data.text, "data.text", source, kind="text")

    def encode(self, rows: Dataset, processor: Any, source: str) -> Dataset:
        import datasets

        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        length = self.data.max_length
        tokens: list[int] = []
        for text in rows[self.data.text]:
            # verbose=False: the tokenizer would warn that the uncut text is longer than the model's limit.
            tokens += processor(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise PeanutError(f"'{source}' has fewer than two tokens", "text to learn from", "check the file")
        return datasets.Dataset.from_dict(
            {"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces], "labels": pieces}
        )
