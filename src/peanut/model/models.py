"""A class of adapted model for each method, for scripts that name them."""

from __future__ import annotations

from ..protocols import PeftType
from .injection import AdaptedModel
from .xlora_model import XLoraModel

__all__ = [
    "MODELS",
    "AdaLoraModel",
    "AdaptionPromptModel",
    "BOFTModel",
    "BitFitModel",
    "BoneModel",
    "BottleneckModel",
    "C3AModel",
    "DiffPruningModel",
    "DireftModel",
    "FourierFTModel",
    "FullModel",
    "HRAModel",
    "IA3Model",
    "LNTuningModel",
    "LinearProbingModel",
    "LoraModel",
    "LoreftModel",
    "MissModel",
    "MultiplicativeLoraModel",
    "NonlinearLoraModel",
    "OFTModel",
    "PartialModel",
    "PeanutModel",
    "PolyModel",
    "REDModel",
    "RandLoraModel",
    "ShiraModel",
    "TrainableTokensModel",
    "VBLoRAModel",
    "VariationalLoraModel",
    "VeraModel",
    "XLoraModel",
]


class AdaLoraModel(AdaptedModel):
    """A model adapted by AdaLoRA."""

    method = PeftType.ADALORA

    def update_and_allocate(self, global_step: int) -> None:
        """Accepted for scripts of the peer: here the schedule follows the optimizer's steps by itself."""


class BitFitModel(AdaptedModel):
    """A model adapted by BitFit."""

    method = PeftType.BITFIT


class BOFTModel(AdaptedModel):
    """A model adapted by BOFT."""

    method = PeftType.BOFT


class BoneModel(AdaptedModel):
    """A model adapted by Bone."""

    method = PeftType.BONE


class C3AModel(AdaptedModel):
    """A model adapted by C3A."""

    method = PeftType.C3A


class DiffPruningModel(AdaptedModel):
    """A model adapted by diff pruning."""

    method = PeftType.DIFF_PRUNING


class FourierFTModel(AdaptedModel):
    """A model adapted by FourierFT."""

    method = PeftType.FOURIERFT


class FullModel(AdaptedModel):
    """A model adapted by full fine-tuning."""

    method = PeftType.FULL


class HRAModel(AdaptedModel):
    """A model adapted by HRA."""

    method = PeftType.HRA


class IA3Model(AdaptedModel):
    """A model adapted by IA3."""

    method = PeftType.IA3


class LinearProbingModel(AdaptedModel):
    """A model adapted by linear probing."""

    method = PeftType.LINEAR_PROBING


class LNTuningModel(AdaptedModel):
    """A model adapted by LayerNorm tuning."""

    method = PeftType.LN_TUNING


class LoraModel(AdaptedModel):
    """A model adapted by LoRA."""

    method = PeftType.LORA


class MissModel(AdaptedModel):
    """A model adapted by MiSS."""

    method = PeftType.MISS


class MultiplicativeLoraModel(AdaptedModel):
    """A model adapted by multiplicative LoRA."""

    method = PeftType.MULTIPLICATIVE_LORA


class NonlinearLoraModel(AdaptedModel):
    """A model adapted by nonlinear LoRA."""

    method = PeftType.NONLINEAR_LORA


class OFTModel(AdaptedModel):
    """A model adapted by OFT."""

    method = PeftType.OFT


class PartialModel(AdaptedModel):
    """A model adapted by partial fine-tuning."""

    method = PeftType.PARTIAL


class PeanutModel(AdaptedModel):
    """A model adapted by PEANuT."""

    method = PeftType.PEANUT


class RandLoraModel(AdaptedModel):
    """A model adapted by RandLoRA."""

    method = PeftType.RANDLORA


class REDModel(AdaptedModel):
    """A model adapted by RED."""

    method = PeftType.RED


class ShiraModel(AdaptedModel):
    """A model adapted by SHiRA."""

    method = PeftType.SHIRA


class TrainableTokensModel(AdaptedModel):
    """A model adapted by trainable tokens."""

    method = PeftType.TRAINABLE_TOKENS


class VariationalLoraModel(AdaptedModel):
    """A model adapted by variational LoRA."""

    method = PeftType.VARIATIONAL_LORA


class VBLoRAModel(AdaptedModel):
    """A model adapted by VB-LoRA."""

    method = PeftType.VBLORA
    also = PeftType.VARIATIONAL_LORA  # which VBLoRAConfig makes of vb_r, vb_pi, vb_beta


class VeraModel(AdaptedModel):
    """A model adapted by VeRA."""

    method = PeftType.VERA


class AdaptionPromptModel(AdaptedModel):
    """A model adapted by adaption prompts."""

    method = PeftType.ADAPTION_PROMPT


class BottleneckModel(AdaptedModel):
    """A model adapted by bottleneck adapters."""

    method = PeftType.BOTTLENECK


class DireftModel(AdaptedModel):
    """A model adapted by DiReFT."""

    method = PeftType.DIREFT


class LoreftModel(AdaptedModel):
    """A model adapted by LoReFT."""

    method = PeftType.LOREFT


class PolyModel(AdaptedModel):
    """A model adapted by Poly."""

    method = PeftType.POLY


MODELS: dict[PeftType, type[AdaptedModel]] = {
    model.method: model for model in AdaptedModel.__subclasses__() if model.method is not None
}
"""The class of each method."""
