"""Adaption prompt: gated prompts in the top attention layers (Zhang et al. 2023, arXiv 2303.16199)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..protocols import Architecture, Call, OutputMethod, PeftConfig, PlaceName, Site, Trial, Values, register
from ..protocols.values import Count

__all__ = ["AdaptionPrompt", "AdaptionPromptConfig"]

GATE, PROMPT = "adaption_gate", "adaption_prompt"


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """Config of adaption prompt.

    Args:
        target_modules: the name of the attention modules; the architecture's if ``None``.
        adapter_len: how many vectors each prompt has.
        adapter_layers: how many blocks, counted from the top, get one.

    Raises:
        PeanutError: a number is missing or out of range.
    """

    method = "ADAPTION_PROMPT"
    required = ("adapter_len", "adapter_layers")
    only_here = frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"})

    adapter_len: Count | None = None
    adapter_layers: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None:
            raise PeanutError(
                f"layers_to_transform={self.layers_to_transform} for {self.method}",
                "adapter_layers, which counts blocks from the top",
                "leave it out",
            )


@register
class AdaptionPrompt(OutputMethod[AdaptionPromptConfig]):
    """y' = y + W_o(g · softmax(q k(P)ᵀ c) v(P)), P (1, len, width) trained, g (1) trained and 0 at the start.

    q (batch, heads, tokens, size) are the queries of the attention module, positions and norms of it in them, k(P) and
    v(P) the keys and values that its layers make of P, without positions; c is the scale of its scores. Weight methods
    on these layers act on P as well, so merging them changes nothing. A bias of W_o is not added once more. GPT-2 has
    no W_o here, as in Hugging Face PEFT.
    """

    config_class = AdaptionPromptConfig
    size = "adapter_len * width + 1"

    def tried(self, on: Trial) -> dict[str, Any] | None:
        return {"adapter_len": on.tokens, "adapter_layers": on.blocks} if on.causal else None

    def completed(self, config: AdaptionPromptConfig, architecture: Architecture) -> AdaptionPromptConfig:
        """A single name, as files hold it, is a name here too, not a pattern."""
        named = config.target_modules
        return replace(config, target_modules=[named]) if isinstance(named, str) and named.isidentifier() else config

    def stored(
        self, config: AdaptionPromptConfig, layers: Mapping[str, Values]
    ) -> tuple[AdaptionPromptConfig, dict[str, dict[str, Tensor]]]:
        config, tensors = super().stored(config, layers)
        names = {path.rpartition(".")[2] for path, values in layers.items() if PROMPT in values}
        if len(names) == 1 and config.target_modules in (None, list(names)):
            config = replace(config, target_modules=names.pop())
        return config, tensors

    def places(self, config: AdaptionPromptConfig) -> tuple[PlaceName, ...]:
        return ("attention",)

    def chosen(self, config: AdaptionPromptConfig, block: int, blocks: int) -> bool:
        return block >= blocks - (config.adapter_layers or 0)

    def check(self, config: AdaptionPromptConfig, site: Site) -> None:
        if (config.adapter_layers or 0) > site.block[1]:
            raise PeanutError(
                f"adapter_layers={config.adapter_layers} for a model with {site.block[1]} blocks",
                "at most that many",
                "lower adapter_layers",
            )
        _check_attention(site.module, site.path)

    def start(self, config: AdaptionPromptConfig, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        prompt = torch.randn(1, config.adapter_len or 0, site.width, generator=generator)
        return {GATE: torch.zeros(1), PROMPT: prompt}

    def adapt(self, config: AdaptionPromptConfig, parameters: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        module: Any = call.module
        o_proj: nn.Module | None = None if _fused(module) else module.o_proj
        q, k, v = _states(module, x, parameters[PROMPT][0], call)
        groups = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
        scores: Tensor = q @ k.mT * module.scaling
        cap = getattr(module, "attn_logit_softcapping", None)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        wide = torch.promote_types(torch.float32, q.dtype)
        weights = parameters[GATE].to(q.dtype) * scores.softmax(-1, dtype=wide).to(q.dtype)
        seen = (weights @ v).transpose(1, 2).flatten(2)
        if o_proj is None:
            return y + seen
        nothing = torch.zeros(1, seen.shape[-1], dtype=seen.dtype, device=seen.device)
        projected: Tensor = o_proj.forward(seen) - call.apart(o_proj, nothing)
        return y + projected


def _states(module: Any, x: Tensor, prompt: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (batch, heads, tokens, size), and keys and values (1 or batch, key-value heads, len, size) of P."""
    size = module.head_dim
    if _fused(module):
        q, _, _ = module.c_attn(x).chunk(3, dim=-1)
        _, k, v = call.apart(module.c_attn, prompt).chunk(3, dim=-1)
        return _heads(q, size), _heads(k, size), _heads(v, size)
    q, k = _heads(module.q_proj(x), size), _heads(call.apart(module.k_proj, prompt), size)
    v = _heads(call.apart(module.v_proj, prompt), size)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm.forward(k)
    if getattr(module, "use_rope", True):
        cos, sin = (part.unsqueeze(1).to(q.dtype) for part in call.arguments["position_embeddings"])
        low, high = q.chunk(2, dim=-1)
        q = q * cos + torch.cat([-high, low], dim=-1) * sin
    return q, k, v


def _heads(states: Tensor, size: int) -> Tensor:
    return states.unflatten(-1, (-1, size)).transpose(1, 2)  # type: ignore[no-any-return]


def _fused(module: Any) -> bool:
    """Whether one product makes queries, keys and values, as in GPT-2."""
    return hasattr(module, "c_attn")


def _check_attention(module: Any, path: str) -> None:
    """Refuses what is no attention module of these formulas."""
    parts = ("c_attn",) if _fused(module) else ("q_proj", "k_proj", "v_proj", "o_proj")
    known = all(hasattr(module, part) for part in (*parts, "head_dim", "scaling"))
    norm = getattr(getattr(module, "q_norm", None), "weight", None)
    crosses = getattr(module, "is_cross_attention", False)
    if (
        not known
        or crosses
        or not getattr(module, "is_causal", False)
        or (norm is not None and len(norm) != module.head_dim)
    ):
        raise PeanutError(
            f"'{path}', a {type(module).__name__}, is no attention module that adaption prompts fit into",
            "the causal self-attention of Llama, Mistral, Qwen, Gemma or GPT-2",
            "name attention modules in target_modules",
        )
