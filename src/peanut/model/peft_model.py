"""``PeftModel`` and ``get_peft_model``, compatible with scripts written for Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..absent import without
from ..protocols import PeftConfig, method_of
from ..protocols.arguments import checked
from .adapters.adapter_set import AdapterSet
from .adapters.routing import Inference, called
from .as_base import blank
from .checkpoints.mixtures import add, name_for
from .injection import AdaptedModel
from .lenient import make_room
from .models import model_of
from .pretrained import Pretrained
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


class PeftModel(Pretrained):
    """A base model and its adapters; other attributes are those of the base model.

    Args:
        model: the base model; it is changed in place and frozen.
        peft_config: config of the first adapter.
        autocast_adapter_dtype: store the adapter in float32 on a half-precision base; else in the base's dtype.
        low_cpu_mem_usage: leave the adapter's parameters without storage, to be filled by loading.

    Raises:
        PeanutError: the config does not fit the model, which is then unchanged.
    """

    @checked
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

    @checked
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):  # how the wrapper itself is copied
                raise
            if (missing := without(self, name)) is not None:
                raise missing from None
            return getattr(self.base_model, name)


def _inner(model: nn.Module, *configs: PeftConfig) -> AdaptedModel:
    """A base model in the class that the last of its adapters' configs asks for."""
    return model_of(method_of(configs[-1].peft_type))(model, {})


@checked
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

    It warns (``OutOfReachWarning``) where "all-linear" leaves out much: fused experts, and other bare parameters; and
    where the model has an adapter of that name, which is then replaced.

    Args:
        mixed: name the class ``PeftMixedModel``: adapters of several methods may be active together in any.
        revision: the base model's, for the config.
    """
    peft_config = peft_config if revision is None else replace(peft_config, revision=revision)
    make_room(AdapterSet.of(model), adapter_name, peft_config)
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
