"""Config fields that LoRA and AdaLoRA share, among them those of Hugging Face PEFT that have no effect here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import PeanutError, shown
from ..protocols import PeftConfig, WeightMethod
from ..protocols.values import Probability, Scale, Whole
from .trainable_tokens import TokenAdapter, TrainableTokensConfig

__all__ = ["LoraFields"]


@dataclass(kw_only=True)
class LoraFields(PeftConfig):
    """What the configs of LoRA and AdaLoRA have in common.

    Args:
        lora_alpha: α.
        lora_dropout: dropout of the change's input.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: biases trained beside the method: ``"none"``, the adapted layers' (``"lora_only"``), or ``"all"``.
        trainable_token_indices: rows of the input embedding to train beside the method, or rows by embedding.
        ensure_weight_tying: layers that are tied to one that is adapted, or trained whole, get the same tensors.

    The other fields are Hugging Face PEFT's; each is accepted as long as it has no effect.
    """

    only_here = frozenset({"runtime_config"})  # Hugging Face PEFT has it and writes it to no file

    lora_alpha: Scale = 8
    lora_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    trainable_token_indices: list[Whole] | dict[str, list[Whole]] | None = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runtime_config and not any(self.runtime_config.values()):  # {"ephemeral_gpu_offload": False}
            self.runtime_config = None
        for name in _NOT_HERE:
            if getattr(self, name):
                why = "parameters that no layer holds, as fused experts, cannot be adapted yet"
                why = why if name == "target_parameters" else "nothing here does that"
                raise PeanutError(f"{name}={shown(getattr(self, name))}", "that it is not set", f"remove {name}: {why}")

        if isinstance(self.trainable_token_indices, dict) and len(self.trainable_token_indices) > _MOST_EMBEDDINGS:
            raise PeanutError(
                f"trainable_token_indices names {len(self.trainable_token_indices):,} embeddings",
                f"at most {_MOST_EMBEDDINGS}",
                "name the model's",
            )

    def token_adapters(self) -> list[tuple[WeightMethod[Any], PeftConfig]]:
        """What trains the tokens' rows: of the input embedding, or of each embedding named, equal rows together."""
        tokens = self.trainable_token_indices
        if not tokens:
            return []
        places: dict[tuple[int, ...], list[str] | None] = {}
        for name, own in tokens.items() if isinstance(tokens, dict) else ():
            places[tuple(own)] = [*(places.get(tuple(own)) or []), name]
        if not isinstance(tokens, dict):
            places = {tuple(tokens): None}
        return [
            (_TOKENS, TrainableTokensConfig(target_modules=names, token_indices=list(own)))
            for own, names in places.items()
        ]


_MOST_EMBEDDINGS = 1_000
_TOKENS = TokenAdapter()
_NOT_HERE = (
    "megatron_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "runtime_config",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
