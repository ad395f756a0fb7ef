"""Prompt tuning: trained embeddings before the user's tokens (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..errors import PeanutError
from ..protocols import InputMethod, ModelShape, PromptConfig, Values, register

__all__ = ["PromptTuning", "PromptTuningConfig", "PromptTuningInit"]


class PromptTuningInit(str, Enum):
    """How virtual tokens start: as a text's embeddings, as those of drawn tokens, or at random."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


WEIGHT = "prompt_embeddings"


@dataclass(kw_only=True)
class PromptTuningConfig(PromptConfig):
    """Config of prompt tuning.

    Args:
        prompt_tuning_init: how virtual tokens start: as ``"RANDOM"`` vectors of variance 1, as the embeddings of tokens
            drawn from the vocabulary (``"SAMPLE_VOCAB"``), or as those of a ``"TEXT"``, repeated or cut to length.
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: the tokenizer for the text.
        tokenizer_kwargs: what else its ``from_pretrained`` is given.
    """

    method = "PROMPT_TUNING"

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise PeanutError(f"prompt_tuning_init='TEXT' without {name}", "both the text and its tokenizer")
        elif self.tokenizer_kwargs:
            raise PeanutError(
                f"tokenizer_kwargs with prompt_tuning_init={self.prompt_tuning_init!r}", "'TEXT'", "leave them out"
            )
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise PeanutError("tokenizer_kwargs asks to run code from a file", "a tokenizer of transformers")


@register
class PromptTuning(InputMethod[PromptTuningConfig]):
    """[P; E x] in place of E x, P (p, width) trained.

    With two stacks (encoder and decoder) the file keeps p rows for each, and the encoder's, the first p, are used.
    """

    config_class = PromptTuningConfig
    size = "p * width"

    def fitted(self, config: PromptTuningConfig, shape: ModelShape) -> PromptTuningConfig:
        return config.fitted(shape)

    def start(self, config: PromptTuningConfig, shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
        if config.inference_mode or config.prompt_tuning_init == "RANDOM":
            return {WEIGHT: torch.randn(config.rows, shape.width, generator=generator)}
        if config.prompt_tuning_init == "TEXT":
            ids = _ids_of(config)
        else:
            ids = torch.randint(shape.vocabulary, (config.rows,), generator=generator)
        return {WEIGHT: shape.embed(ids).float().clone()}

    def prepended(self, config: PromptTuningConfig, parameters: Values, training: bool) -> Tensor:
        return parameters[WEIGHT][: config.num_virtual_tokens]


def _ids_of(config: PromptTuningConfig) -> Tensor:
    """The ids of the initial text, repeated or cut so that there is one for each row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **config.tokenizer_kwargs or {})
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise PeanutError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens", "a text")
    return torch.tensor(ids)[torch.arange(config.rows) % len(ids)]
