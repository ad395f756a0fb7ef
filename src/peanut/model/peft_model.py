"""``PeftModel`` and ``get_peft_model``, compatible with scripts written for Hugging Face PEFT."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import PeanutError, check_keywords
from ..hub import HUB_OPTIONS
from ..protocols import PeftConfig, method_of
from .adapters.adapter_set import AdapterSet
from .adapters.routing import Inference, called
from .adapters.size_limits import limited_by_file
from .as_base import blank
from .checkpoints.checkpoint import save_adapter
from .checkpoints.embeddings import SaveEmbeddings
from .checkpoints.loading import all_or_none, load_state, same_form
from .checkpoints.mixtures import add, gathered, name_for, ready, save_experts
from .checkpoints.stored_adapter import TRAINING_NAME, StoredAdapter, read_adapter
from .controls import AdapterControls
from .injection import AdaptedModel
from .keywords import LOADING, SAVING
from .models import model_of
from .targets.reach import warn_of_unreached

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
]


class PeftModel(AdapterControls):
    """A base model and its adapters; other attributes are those of the base model.

    Args:
        model: the base model; it is changed in place and frozen.
        peft_config: config of the first adapter.
        autocast_adapter_dtype: store the adapter in float32 on a half-precision base; else in the base's dtype.
        low_cpu_mem_usage: leave the adapter's parameters without storage, to be filled by loading.

    Raises:
        PeanutError: the config does not fit the model, which is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.show(model, peft_config.task_type)
        adapters = AdapterSet.of(model)
        adapter_name = name_for(adapters, peft_config, adapter_name)
        peft_config = add(adapters, adapter_name, peft_config, meta=low_cpu_mem_usage, wide=autocast_adapter_dtype)
        self.base_model = _inner(model, peft_config)
        model.requires_grad_(False)
        adapters.activate(adapter_name, trainable=not peft_config.inference_mode)

    @classmethod
    def around(cls, model: nn.Module) -> PeftModel:
        """A base model that has adapters in it already, wrapped; nothing of it is changed."""
        configs = list(AdapterSet.of(model).configs.values())
        task = next((each.task_type for each in configs if each.task_type), None)
        self: PeftModel = blank(cls.of_task(task), type(model))
        nn.Module.__init__(self)
        self.base_model = _inner(model, *configs)
        return self

    @classmethod
    def of_task(cls, task: object) -> Any:
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(task, "value", task)), cls) if cls is PeftModel else cls

    # Running

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward.

        Args:
            adapter_names: for each sample the adapter that it goes through, ``"__base__"`` for none.
            task_ids: for each sample its task, for mixtures by task.
        """
        return called(self.adapters, self.base_model, args, kwargs, adapter_names, task_ids)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate``; ``adapter_names`` and ``task_ids`` as in ``forward``.

        What is computed from the adapters is cached until it returns, as within ``inference``.
        """
        generate: Any = self.get_base_model().generate
        return called(self.adapters, generate, args, kwargs, adapter_names, task_ids, keep=True)

    def inference(self) -> Inference:
        """A context in which evaluation caches what it computes from the weights, for a server or a loop.

        In ``eval()`` and without gradients, what adapters make of the weights (factors, rotations, spectra) is computed
        once and cached until the context is left. Nothing else may write to the weights meanwhile: only changes made by
        this library (another active adapter, a merge, ``load_adapter``) are seen. It may be entered in several threads,
        which then share the cache; a call in a thread that has not entered it caches nothing.
        """
        return Inference(self.adapters.state)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Puts another adapter, of any method, into the model; ``set_adapter`` makes it active."""
        add(self.adapters, adapter_name, peft_config, meta=low_cpu_mem_usage, wide=autocast_adapter_dtype)
        if not low_cpu_mem_usage:  # else it is read from a file
            warn_of_unreached(self.get_base_model(), peft_config)

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: SaveEmbeddings = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **given: Any,
    ) -> None:
        """Writes adapters and their trained heads: ``default`` into the folder, others into folders of their names.

        Of the base, only embeddings are ever written; loading puts them into the base, and refuses one that differs
        otherwise.

        Args:
            safe_serialization: must be true; only safetensors are written.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: whether to write the base's input and output embeddings too; ``"auto"`` does if the
                config names them (``embed_tokens``, ``lm_head``) as targets, or if the vocabulary was resized.
            path_initial_model_for_weight_conversion: without effect: what starts in the weight is always saved as a
                plain LoRA for the untouched base.
            state_dict: a full state dict, as FSDP and DeepSpeed gather it, to take the values from.
            given: what Hugging Face PEFT also accepts and a folder of safetensors has no use for.

        Raises:
            PeanutError: a keyword is unknown, the folder cannot be written, or a value is not finite. No file is then
                half written.
        """
        check_keywords("save_pretrained", given, _named(self.save_pretrained), SAVING)
        if not safe_serialization:
            raise PeanutError("safe_serialization=False", "safetensors files", "leave it out")
        for name in self.adapters.known(selected_adapters or list(self.peft_config)):
            if is_main_process:
                folder = Path(save_directory) if name == "default" else Path(save_directory) / name
                save_adapter(folder, self.adapters, name, state_dict, save_embedding_layers)
                save_experts(folder, self.adapters, name, state_dict, save_embedding_layers)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        check_base: bool = True,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """A model with an adapter read from a folder (or from the hub, if a hub id is given).

        Args:
            config: to be used instead of the folder's.
            autocast_adapter_dtype: store the adapter in float32 on a half-precision base.
            ephemeral_gpu_offload: accepted for scripts, without effect.
            low_cpu_mem_usage: keep the tensors as they were read, in the file's memory, and make no copy of them.
            key_mapping: regular expressions and what replaces them in the file's keys, without ``base_model.model.``.
            check_base: refuse a base whose weights differ from those that the adapter was trained on.
            ignore_mismatched_sizes: warn of tensors of another shape, and keep new ones in their place.
            hub: ``subfolder``, ``revision``, ``token`` and the like; and what Hugging Face PEFT also accepts and has no
                effect here, where an adapter's tensors follow the base's devices.

        Raises:
            PeanutError: a keyword is unknown, or a file is missing or broken, or does not fit the model, which is then
                unchanged.
        """
        hub = check_keywords("from_pretrained", hub, {*HUB_OPTIONS, *_named(cls.from_pretrained)}, LOADING)
        stored = gathered(read_adapter(model_id, config, key_mapping, **hub))
        stored = replace(stored, config=_config_for_use(stored, is_trainable))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = AdapterSet.of(model)
        try:
            with all_or_none(own), limited_by_file(stored.source, stored.state):
                folder = model_id if config is None else None  # a config that is given says where experts lie
                found = ready(own, stored.config, folder, wide=autocast_adapter_dtype, check_base=check_base)
                meta = not ignore_mismatched_sizes
                adapted = cls(model, found, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=meta)
                name = adapted.active_adapter
                own = adapted.adapters
                load_state(own, name, stored, check=check_base, alias=low_cpu_mem_usage, skip_sizes=not meta)
        except BaseException:
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        return adapted.eval() if not is_trainable else adapted

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        check_base: bool = True,
        ignore_mismatched_sizes: bool = False,
        **hub: Any,
    ) -> _IncompatibleKeys:
        """Reads another adapter into the model, or other values and their config into one that is there.

        ``set_adapter`` makes it active. The answer names the keys that were not loaded, as ``load_state_dict`` does.

        Args and errors: see ``from_pretrained``; ``torch_device`` has no effect, tensors follow the base's devices.
        """
        hub = check_keywords("load_adapter", hub, {*HUB_OPTIONS, *_named(self.load_adapter)}, LOADING)
        stored = gathered(read_adapter(model_id, None, key_mapping, **hub))
        fresh = adapter_name not in self.peft_config
        with all_or_none(self.adapters), limited_by_file(stored.source, stored.state):
            if fresh:
                stored = replace(stored, config=_config_for_use(stored, is_trainable))
                wide = autocast_adapter_dtype
                found = ready(self.adapters, stored.config, model_id, wide=wide, check_base=check_base)
                meta = not ignore_mismatched_sizes
                self.add_adapter(adapter_name, found, low_cpu_mem_usage=meta, autocast_adapter_dtype=wide)
            result = load_state(
                self.adapters,
                adapter_name,
                stored,
                check=check_base,
                alias=low_cpu_mem_usage,
                skip_sizes=ignore_mismatched_sizes,
            )
        if not fresh and not same_form(self.adapters, adapter_name, stored.config):
            mode = self.peft_config[adapter_name].inference_mode
            self.adapters.configure(adapter_name, replace(stored.config, inference_mode=mode))
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):  # how the wrapper itself is copied
                raise
            return getattr(self.base_model, name)


def _inner(model: nn.Module, *configs: PeftConfig) -> AdaptedModel:
    """A base model in the class that the last of its adapters' configs asks for."""
    return model_of(method_of(configs[-1].peft_type))(model, {})


def _config_for_use(stored: StoredAdapter, is_trainable: bool) -> PeftConfig:
    """The config under which a stored adapter is used: what only training needs is left out where it is not there."""
    config = replace(stored.config, inference_mode=not is_trainable)
    method = method_of(config.peft_type)
    needed = method.scaffold(config) if is_trainable else frozenset()
    if needed and not stored.passing:
        warnings.warn(
            f"'{stored.source}' has no {TRAINING_NAME}, so {method.name} is trained on without {sorted(needed)[0]} and "
            "the like: what they compute is trained itself",
            stacklevel=3,
        )
        return method.without_scaffold(config)  # type: ignore[no-any-return]
    return config


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A model with a new adapter in it, changed in place and frozen; arguments and errors as for ``PeftModel``.

    It warns (``OutOfReachWarning``) where "all-linear" leaves out much: fused experts, and other bare parameters.

    Args:
        mixed: name the class ``PeftMixedModel``: adapters of several methods may be active together in any.
        revision: the base model's, for the config.
    """
    peft_config = peft_config if revision is None else replace(peft_config, revision=revision)
    adapted = (PeftMixedModel if mixed else PeftModel)(
        model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )
    warn_of_unreached(adapted.get_base_model(), peft_config)
    return adapted


def _for(ending: str) -> type[PeftModel]:
    parts = {"__module__": __name__, "__doc__": f"A ``PeftModel`` whose base is for {ending}: configs name the task."}
    return type(f"PeftModelFor{ending}", (PeftModel,), parts)


PeftModelForCausalLM = _for("CausalLM")
PeftModelForFeatureExtraction = _for("FeatureExtraction")
PeftModelForQuestionAnswering = _for("QuestionAnswering")
PeftModelForSeq2SeqLM = _for("Seq2SeqLM")
PeftModelForSequenceClassification = _for("SequenceClassification")
PeftModelForTokenClassification = _for("TokenClassification")
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
"""The class of the models of each task."""


class PeftMixedModel(PeftModel):
    """A ``PeftModel`` whose adapters may be of several methods, as those of any may."""


def _named(function: Callable[..., Any]) -> set[str]:
    """The keywords that a function takes by name."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
