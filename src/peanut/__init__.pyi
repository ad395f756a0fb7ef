"""What type checkers read in place of ``__init__.py``: the public names. Written by ``make generated``."""

from .errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from .errors import OutOfReachWarning as OutOfReachWarning
from .errors import PeanutError as PeanutError
from .errors import PeftError as PeftError
from .errors import PeftWarning as PeftWarning
from .export import convert_to_lora as convert_to_lora
from .export import from_lora as from_lora
from .export import save_as_lora as save_as_lora
from .export import to_lora as to_lora
from .interop.condition_numbers import find_kappa_target_modules as find_kappa_target_modules
from .interop.from_peft import from_peft as from_peft
from .interop.install import install as install
from .interop.install import uninstall as uninstall
from .interop.names import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from .interop.names import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
from .interop.names import PEFT_TYPE_TO_PREFIX_MAPPING as PEFT_TYPE_TO_PREFIX_MAPPING
from .interop.names import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
from .interop.names import PromptLearningConfig as PromptLearningConfig
from .interop.to_peft import to_peft as to_peft
from .interop.utilities import LoraRuntimeConfig as LoraRuntimeConfig
from .interop.utilities import cast_mixed_precision_params as cast_mixed_precision_params
from .interop.utilities import get_base_model_state_dict as get_base_model_state_dict
from .interop.utilities import load_peft_weights as load_peft_weights
from .interop.utilities import set_base_model_state_dict as set_base_model_state_dict
from .interop.utilities import shift_tokens_right as shift_tokens_right
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
from .methods.lokr import LoKrConfig as LoKrConfig
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
from .methods.road import RoadConfig as RoadConfig
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
from .model.injection import AdaptedModel as _AdaptedModel
from .model.injection import get_peft_model_state_dict as get_peft_model_state_dict
from .model.injection import inject_adapter_in_model as inject_adapter_in_model
from .model.injection import penalty as penalty
from .model.injection import set_peft_model_state_dict as set_peft_model_state_dict
from .model.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .model.models import AdaLoraModel as AdaLoraModel
from .model.models import VBLoRAModel as VBLoRAModel
from .model.models import XLoraModel as XLoraModel
from .model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .model.peft_model import PeftMixedModel as PeftMixedModel
from .model.peft_model import PeftModel as PeftModel
from .model.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from .model.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .model.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .model.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .model.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .model.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
from .model.peft_model import get_peft_model as get_peft_model
from .model.predictive import predictive as predictive
from .model.prompts.encoders import CPTEmbedding as CPTEmbedding
from .model.prompts.encoders import PrefixEncoder as PrefixEncoder
from .model.prompts.encoders import PromptEmbedding as PromptEmbedding
from .model.prompts.encoders import PromptEncoder as PromptEncoder
from .model.status import get_layer_status as get_layer_status
from .model.status import get_model_status as get_model_status
from .protocols import PeftConfig as PeftConfig
from .protocols import PeftType as PeftType
from .protocols import TaskType as TaskType
from .protocols import get_peft_config as get_peft_config
from .training.trainer import Trainer as Trainer

__version__: str

class AdaptionPromptModel(_AdaptedModel): ...
class BOFTModel(_AdaptedModel): ...
class BitFitModel(_AdaptedModel): ...
class BoneModel(_AdaptedModel): ...
class BottleneckModel(_AdaptedModel): ...
class C3AModel(_AdaptedModel): ...
class DiffPruningModel(_AdaptedModel): ...
class DireftModel(_AdaptedModel): ...
class FourierFTModel(_AdaptedModel): ...
class FullModel(_AdaptedModel): ...
class HRAModel(_AdaptedModel): ...
class IA3Model(_AdaptedModel): ...
class LNTuningModel(_AdaptedModel): ...
class LinearProbingModel(_AdaptedModel): ...
class LoKrModel(_AdaptedModel): ...
class LoraModel(_AdaptedModel): ...
class LoreftModel(_AdaptedModel): ...
class MissModel(_AdaptedModel): ...
class MultiplicativeLoraModel(_AdaptedModel): ...
class NonlinearLoraModel(_AdaptedModel): ...
class OFTModel(_AdaptedModel): ...
class PartialModel(_AdaptedModel): ...
class PeanutModel(_AdaptedModel): ...
class PolyModel(_AdaptedModel): ...
class REDModel(_AdaptedModel): ...
class RandLoraModel(_AdaptedModel): ...
class RoadModel(_AdaptedModel): ...
class ShiraModel(_AdaptedModel): ...
class TrainableTokensModel(_AdaptedModel): ...
class VariationalLoraModel(_AdaptedModel): ...
class VeraModel(_AdaptedModel): ...
