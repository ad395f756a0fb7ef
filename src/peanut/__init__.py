"""Parameter-efficient fine-tuning: every method a page of mathematics, PEANuT at the cost of LoRA.

>>> from peanut import PeanutConfig, get_peft_model
>>> model = get_peft_model(model, PeanutConfig(r=16, task_type="CAUSAL_LM"))  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "errors": ("PeanutError",),
    "export": ("from_lora", "to_lora"),
    "interop.from_peft": ("from_peft",),
    "interop.to_peft": ("to_peft",),
    "methods.adalora": ("AdaLoraConfig",),
    "methods.adaption_prompt": ("AdaptionPromptConfig",),
    "methods.bitfit": ("BitFitConfig",),
    "methods.boft": ("BOFTConfig",),
    "methods.bone": ("BoneConfig",),
    "methods.bottleneck": ("BottleneckConfig",),
    "methods.c3a": ("C3AConfig",),
    "methods.cpt": ("CPTConfig",),
    "methods.diff_pruning": ("DiffPruningConfig",),
    "methods.direft": ("DireftConfig",),
    "methods.fourierft": ("FourierFTConfig",),
    "methods.full": ("FullConfig",),
    "methods.hra": ("HRAConfig",),
    "methods.ia3": ("IA3Config",),
    "methods.linear_probing": ("LinearProbingConfig",),
    "methods.ln_tuning": ("LNTuningConfig",),
    "methods.lora": ("LoraConfig",),
    "methods.loreft": ("LoreftConfig",),
    "methods.miss": ("MissConfig",),
    "methods.multiplicative_lora": ("MultiplicativeLoraConfig",),
    "methods.nonlinear_lora": ("NonlinearLoraConfig",),
    "methods.oft": ("OFTConfig",),
    "methods.p_tuning": ("PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "methods.partial": ("PartialConfig",),
    "methods.peanut": ("PeanutConfig",),
    "methods.poly": ("PolyConfig",),
    "methods.prefix_tuning": ("PrefixTuningConfig",),
    "methods.prompt_tuning": ("PromptTuningConfig", "PromptTuningInit"),
    "methods.randlora": ("RandLoraConfig",),
    "methods.red": ("REDConfig",),
    "methods.shira": ("ShiraConfig",),
    "methods.trainable_tokens": ("TrainableTokensConfig",),
    "methods.variational_lora": ("VariationalLoraConfig",),
    "methods.vblora": ("VBLoRAConfig",),
    "methods.vera": ("VeraConfig",),
    "methods.xlora": ("XLoraConfig",),
    "model.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "model.injection": (
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "penalty",
        "set_peft_model_state_dict",
    ),
    "model.kbit": ("prepare_model_for_kbit_training",),
    "model.models": (
        "AdaLoraModel",
        "PolyModel",
        "LoreftModel",
        "DireftModel",
        "BottleneckModel",
        "AdaptionPromptModel",
        "BOFTModel",
        "BitFitModel",
        "BoneModel",
        "C3AModel",
        "DiffPruningModel",
        "FourierFTModel",
        "FullModel",
        "HRAModel",
        "IA3Model",
        "LNTuningModel",
        "LinearProbingModel",
        "LoraModel",
        "MissModel",
        "MultiplicativeLoraModel",
        "NonlinearLoraModel",
        "OFTModel",
        "PartialModel",
        "PeanutModel",
        "RandLoraModel",
        "REDModel",
        "ShiraModel",
        "TrainableTokensModel",
        "VBLoRAModel",
        "VariationalLoraModel",
        "VeraModel",
        "XLoraModel",
    ),
    "model.peft_model": ("PeftModel", "get_peft_model"),
    "model.predictive": ("predictive",),
    "protocols": (
        "PeftConfig",
        "PeftType",
        "TaskType",
        "get_peft_config",
    ),
    "training.trainer": ("Trainer",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604 - they are strings

if TYPE_CHECKING:
    from .errors import PeanutError as PeanutError
    from .export import from_lora as from_lora
    from .export import to_lora as to_lora
    from .interop.from_peft import from_peft as from_peft
    from .interop.to_peft import to_peft as to_peft
    from .methods.adalora import AdaLoraConfig as AdaLoraConfig
    from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from .methods.bitfit import BitFitConfig as BitFitConfig
    from .methods.boft import BOFTConfig as BOFTConfig
    from .methods.bone import BoneConfig as BoneConfig
    from .methods.bottleneck import BottleneckConfig as BottleneckConfig
    from .methods.c3a import C3AConfig as C3AConfig
    from .methods.cpt import CPTConfig as CPTConfig
    from .methods.diff_pruning import DiffPruningConfig as DiffPruningConfig
    from .methods.direft import DireftConfig as DireftConfig
    from .methods.fourierft import FourierFTConfig as FourierFTConfig
    from .methods.full import FullConfig as FullConfig
    from .methods.hra import HRAConfig as HRAConfig
    from .methods.ia3 import IA3Config as IA3Config
    from .methods.linear_probing import LinearProbingConfig as LinearProbingConfig
    from .methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from .methods.lora import LoraConfig as LoraConfig
    from .methods.loreft import LoreftConfig as LoreftConfig
    from .methods.miss import MissConfig as MissConfig
    from .methods.multiplicative_lora import MultiplicativeLoraConfig as MultiplicativeLoraConfig
    from .methods.nonlinear_lora import NonlinearLoraConfig as NonlinearLoraConfig
    from .methods.oft import OFTConfig as OFTConfig
    from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .methods.partial import PartialConfig as PartialConfig
    from .methods.peanut import PeanutConfig as PeanutConfig
    from .methods.poly import PolyConfig as PolyConfig
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .methods.randlora import RandLoraConfig as RandLoraConfig
    from .methods.red import REDConfig as REDConfig
    from .methods.shira import ShiraConfig as ShiraConfig
    from .methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from .methods.variational_lora import VariationalLoraConfig as VariationalLoraConfig
    from .methods.vblora import VBLoRAConfig as VBLoRAConfig
    from .methods.vera import VeraConfig as VeraConfig
    from .methods.xlora import XLoraConfig as XLoraConfig
    from .model.auto import AutoPeftModel as AutoPeftModel
    from .model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .model.injection import get_peft_model_state_dict as get_peft_model_state_dict
    from .model.injection import inject_adapter_in_model as inject_adapter_in_model
    from .model.injection import penalty as penalty
    from .model.injection import set_peft_model_state_dict as set_peft_model_state_dict
    from .model.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .model.models import AdaLoraModel as AdaLoraModel
    from .model.models import AdaptionPromptModel as AdaptionPromptModel
    from .model.models import BitFitModel as BitFitModel
    from .model.models import BOFTModel as BOFTModel
    from .model.models import BoneModel as BoneModel
    from .model.models import BottleneckModel as BottleneckModel
    from .model.models import C3AModel as C3AModel
    from .model.models import DiffPruningModel as DiffPruningModel
    from .model.models import DireftModel as DireftModel
    from .model.models import FourierFTModel as FourierFTModel
    from .model.models import FullModel as FullModel
    from .model.models import HRAModel as HRAModel
    from .model.models import IA3Model as IA3Model
    from .model.models import LinearProbingModel as LinearProbingModel
    from .model.models import LNTuningModel as LNTuningModel
    from .model.models import LoraModel as LoraModel
    from .model.models import LoreftModel as LoreftModel
    from .model.models import MissModel as MissModel
    from .model.models import MultiplicativeLoraModel as MultiplicativeLoraModel
    from .model.models import NonlinearLoraModel as NonlinearLoraModel
    from .model.models import OFTModel as OFTModel
    from .model.models import PartialModel as PartialModel
    from .model.models import PeanutModel as PeanutModel
    from .model.models import PolyModel as PolyModel
    from .model.models import RandLoraModel as RandLoraModel
    from .model.models import REDModel as REDModel
    from .model.models import ShiraModel as ShiraModel
    from .model.models import TrainableTokensModel as TrainableTokensModel
    from .model.models import VariationalLoraModel as VariationalLoraModel
    from .model.models import VBLoRAModel as VBLoRAModel
    from .model.models import VeraModel as VeraModel
    from .model.models import XLoraModel as XLoraModel
    from .model.peft_model import PeftModel as PeftModel
    from .model.peft_model import get_peft_model as get_peft_model
    from .model.predictive import predictive as predictive
    from .protocols import PeftConfig as PeftConfig
    from .protocols import PeftType as PeftType
    from .protocols import TaskType as TaskType
    from .protocols import get_peft_config as get_peft_config
    from .training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import peanut`` itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'peanut' has no attribute {name!r}")
    import_module(".methods", __name__)
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
