"""A base model and its adapter in one call, the base read off the adapter's config."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers

from ..errors import PeanutError
from ..protocols import PeftConfig
from .peft_model import PeftModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

_ADAPTER = ("subfolder", "revision")
_HUB = ("token", "cache_dir", "force_download", "local_files_only")
_BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """``from_pretrained(adapter)``: loads the base that the adapter names, for its task, and the adapter into it."""

    base: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapted model.

        Args:
            pretrained_model_name_or_path: the adapter's folder.
            adapter_name: the name it gets.
            is_trainable: whether it is trained further.
            config: to be used instead of the folder's.
            kwargs: for the base model's ``from_pretrained`` (``dtype``, ``num_labels``…), and the hub's.

        Raises:
            PeanutError: the adapter names no base or no task, or does not fit.
        """
        hub = {name: kwargs.pop(name) for name in _ADAPTER if name in kwargs}
        hub |= {name: kwargs[name] for name in _HUB if name in kwargs}  # these are for the base's files too
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if not config.base_model_name_or_path:
            raise PeanutError(
                f"the config of '{pretrained_model_name_or_path}' names no base model",
                "base_model_name_or_path in it",
                "load the base yourself and use PeftModel.from_pretrained",
            )
        task = str(getattr(config.task_type, "value", config.task_type))
        auto = cls.base or _BY_TASK.get(task)
        if auto is None:
            raise PeanutError(
                f"the config of '{pretrained_model_name_or_path}' names no task",
                f"one of {', '.join(_BY_TASK)}",
                "use AutoPeftModelForCausalLM or another of its kind",
            )
        if config.revision is not None:
            kwargs.setdefault("revision", config.revision)
        model = getattr(transformers, auto).from_pretrained(config.base_model_name_or_path, **kwargs)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config, **hub
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModelForCausalLM``."""

    base = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModelForSeq2SeqLM``."""

    base = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModelForSequenceClassification``."""

    base = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModelForTokenClassification``."""

    base = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModelForQuestionAnswering``."""

    base = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """``AutoPeftModel`` over ``AutoModel``."""

    base = "AutoModel"
