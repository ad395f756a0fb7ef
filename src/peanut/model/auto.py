"""``AutoPeftModel``: loads an adapter together with the base model that its config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn

from ..errors import PeanutError
from ..hub import locate
from ..protocols import PeftConfig, TaskType
from ..protocols.arguments import checked
from .checkpoints.base_weights import plain_path
from .checkpoints.fingerprint import FINGERPRINT, recorded_rows
from .checkpoints.keys import PREFIX
from .checkpoints.stored_adapter import locate_weights
from .checkpoints.tensor_files import open_tensors
from .peft_model import PeftModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "resize_to",
    "rows_for",
]

_ADAPTER = ("subfolder",)
_OWN = ("autocast_adapter_dtype", "check_base", "strict")
_HUB = ("token", "cache_dir", "force_download", "local_files_only")
_BASES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers that makes the base model, by task."""
_PADDING = 1024
"""How many rows more than tokens a file's metadata are believed: embeddings are padded for the sake of speed."""


class AutoPeftModel:
    """``from_pretrained(adapter)``: loads the base that the adapter names, for its task, and the adapter into it."""

    task: ClassVar[str | None] = None
    """The task, if it is not read off the adapter's config."""

    @classmethod
    @checked
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapted model; arguments as for ``PeftModel.from_pretrained``, others go to the base's (``dtype``, …).

        If the folder holds a tokenizer, and the base has fewer embeddings than it had in training or than that has
        tokens, the base is resized first.

        Raises:
            PeanutError: the adapter names no base or no task, was trained for another one, or does not fit.
            TypeError: from transformers, a keyword is unknown.
        """
        hub = {name: kwargs.pop(name) for name in _ADAPTER if name in kwargs}
        hub |= {} if revision is None else {"revision": revision}
        kwargs.pop("import_allowlist", None)  # nothing that a config names is imported
        hub |= {name: kwargs[name] for name in _HUB if name in kwargs}  # these are for the base's files too
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        given = config
        config = given or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if not config.base_model_name_or_path:
            raise PeanutError(
                f"the config of '{pretrained_model_name_or_path}' names no base model",
                "base_model_name_or_path in it",
                "load the base yourself and use PeftModel.from_pretrained",
            )
        task = cls.task or config.task_type
        if config.task_type not in (None, task):
            raise PeanutError(
                f"{cls.__name__} for '{pretrained_model_name_or_path}', "
                f"an adapter for {TaskType(config.task_type).value}",
                f"one for {task}",
                "use AutoPeftModel, which takes the adapter's own task, or load the base yourself",
            )
        base = _base_class(task, config, pretrained_model_name_or_path)
        if config.revision is not None:
            kwargs.setdefault("revision", config.revision)
        model = base.from_pretrained(config.base_model_name_or_path, **kwargs)
        tokenizer = _tokenizer(pretrained_model_name_or_path, kwargs.get("trust_remote_code", False), **hub)
        if tokenizer is not None:
            resize_to(model, rows_for(model, pretrained_model_name_or_path, len(tokenizer), **hub))
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, given, **own, **hub
        )


def _base_class(task: Any, config: PeftConfig, adapter: str | os.PathLike[str]) -> Any:
    """The class of transformers that makes the base: for a task, or else the one that the config names.

    Raises:
        PeanutError: it names neither, or a class of another library, which is not imported for a file's word.
    """
    if task is not None:
        return getattr(transformers, _BASES[task])
    named = config.auto_mapping or {}
    found = getattr(transformers, str(named.get("base_model_class")), None)
    if found is None or not str(named.get("parent_library")).startswith("transformers.") or not _makes_models(found):
        what = f"{named['base_model_class']} as its base's class" if named.get("base_model_class") else "no task"
        raise PeanutError(
            f"the config of '{adapter}' names {what}",
            f"one of {', '.join(_BASES)}, or a class of transformers",
            "use AutoPeftModelForCausalLM or another of its kind, or load the base yourself",
        )
    return found


def _makes_models(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)


def resize_to(model: nn.Module, rows: int) -> None:
    """Gives a base's embeddings so many rows, if they have fewer."""
    if rows > len(model.get_input_embeddings().weight):  # type: ignore[operator]
        model.resize_token_embeddings(rows)  # type: ignore[operator]


def rows_for(model: nn.Module, adapter: str | os.PathLike[str], tokens: int, **hub: Any) -> int:
    """How many rows the embeddings need for so many tokens: those that they had when the adapter was saved."""
    with open_tensors(locate_weights(adapter, **hub)) as file:
        held = {plain_path(key.removeprefix(PREFIX)): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        recorded = recorded_rows((file.metadata() or {}).get(FINGERPRINT))
    padded = {path: rows for path, rows in recorded.items() if rows - tokens <= _PADDING}
    embeddings: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    paths = [f"{path}.weight" for path, module in model.named_modules() if any(module is own for own in embeddings)]
    return max(
        (held[path][0] if held.get(path) else max(tokens, padded.get(path, 0)) for path in paths), default=tokens
    )


def _tokenizer(adapter: str | os.PathLike[str], trust_remote_code: bool, **hub: Any) -> Any:
    """The tokenizer in an adapter's folder, or ``None``."""
    try:
        folder = locate(adapter, "tokenizer_config.json", **hub).parent
    except PeanutError:
        return None
    source, options = (folder, {}) if Path(adapter).exists() else (str(adapter), hub)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # transformers and tokenizers have many for a damaged file
        raise PeanutError(
            f"cannot read the tokenizer in '{adapter}': {error}",
            "the tokenizer that the adapter was trained with, which tells how many tokens there are",
            "save it again, or load the base yourself and use PeftModel.from_pretrained",
        ) from error


def _for(task: str, name: str) -> type[AutoPeftModel]:
    doc = f"``AutoPeftModel`` whose base is made by transformers' ``{_BASES[task]}``."
    return type(name, (AutoPeftModel,), {"task": task, "__doc__": doc, "__module__": __name__})


AutoPeftModelForCausalLM = _for("CAUSAL_LM", "AutoPeftModelForCausalLM")
AutoPeftModelForFeatureExtraction = _for("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction")
AutoPeftModelForQuestionAnswering = _for("QUESTION_ANS", "AutoPeftModelForQuestionAnswering")
AutoPeftModelForSeq2SeqLM = _for("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM")
AutoPeftModelForSequenceClassification = _for("SEQ_CLS", "AutoPeftModelForSequenceClassification")
AutoPeftModelForTokenClassification = _for("TOKEN_CLS", "AutoPeftModelForTokenClassification")
