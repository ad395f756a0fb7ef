"""CPT, context-aware prompt tuning: trained embeddings of examples (Blau et al. 2024, arXiv 2410.17222)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import PeanutError
from ..protocols import InputMethod, ModelShape, PromptConfig, TaskType, Trial, Values, register
from ..protocols.values import NonNegative, Whole, check_types

__all__ = ["CPT", "CPTConfig"]

WRITTEN = "prompt_embeddings"
CONTEXT = "embedding.weight"
DELTA = "delta_embedding.weight"

IGNORED = -100
LEAST = 1e-10
"""The radius of a token that is not trained."""


@dataclass(kw_only=True)
class CPTConfig(PromptConfig):
    """Config of CPT.

    A token's type t tells its part in an example: t mod 4 is 1 for the format around the input, 2 for the input, 3 for
    the format around the answer, 0 for the answer; each further example counts 4 on, and 0 is padding.

    Args:
        cpt_token_ids: the context, whose embeddings are refined.
        cpt_mask: which of its tokens are seen; all of them must be.
        cpt_tokens_type_mask: the type of each.
        opt_weighted_loss_type: ``"decay"``: the answers of earlier examples count less; ``"none"``: all the same.
        opt_loss_decay_factor: how much less an answer counts than the one after it.
        opt_projection_epsilon: how far an input token may move, in units of √(width / 2048).
        opt_projection_format_epsilon: how far a token of the format may.
        tokenizer_name_or_path: the tokenizer that made the ids, for the record.
        without_delta: train C + δ instead of δ: how an adapter is trained on whose δ is not there.
    """

    method = "CPT"
    only_here = PromptConfig.only_here | {"without_delta"}

    task_type: TaskType | str | None = TaskType.CAUSAL_LM
    cpt_token_ids: list[Whole] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[Whole] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: NonNegative = 1.0
    opt_projection_epsilon: NonNegative = 0.1
    opt_projection_format_epsilon: NonNegative = 0.1
    tokenizer_name_or_path: str | None = None
    without_delta: bool = False

    def __post_init__(self) -> None:
        check_types(self)  # before they are counted
        ids = self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        if self.num_virtual_tokens not in (None, len(ids)):
            raise PeanutError(
                f"num_virtual_tokens={self.num_virtual_tokens} with {len(ids)} cpt_token_ids",
                "one virtual token for each id",
                "leave num_virtual_tokens out",
            )
        self.num_virtual_tokens = len(ids)
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise PeanutError(f"task_type={self.task_type!r} for CPT", "'CAUSAL_LM'", "use another prompt method")
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            values = [1] * len(ids) if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, values)
            if len(values) != len(ids):
                raise PeanutError(f"{name} has {len(values)} entries", f"{len(ids)}, one for each of cpt_token_ids")
        if not self.inference_mode and not all(self.cpt_mask or ()):
            raise PeanutError("cpt_mask has a 0", "1 for every token", "leave what is not to be seen out of the ids")


@register
class CPT(InputMethod[CPTConfig]):
    """[C + δ; E x] in place of E x: C (p, width) the embeddings of a context, δ trained, ‖δᵢ‖ ≤ εᵢ.

    εᵢ is a token's epsilon, by its type, times √(width / 2048); answers in the context do not move. The loss is the
    cross entropy of the answers, those in the context among them, each answer weighed by decay^(answers after it).

    Files hold C + δ. C is read off the model again, so training goes on around the same context.
    """

    config_class = CPTConfig
    size = "p * width"
    reads = ("input_type_mask",)
    own_loss = True

    def tried(self, on: Trial) -> dict[str, Any] | None:
        types = [1 + place % 4 for place in range(on.tokens)]
        return {"cpt_token_ids": list(range(3, 3 + on.tokens)), "cpt_tokens_type_mask": types} if on.causal else None

    def fitted(self, config: CPTConfig, shape: ModelShape) -> CPTConfig:
        if shape.encoder_decoder:
            raise PeanutError(
                "CPT for a model with an encoder and a decoder", "a causal language model", "use prompt tuning"
            )
        highest = max(config.cpt_token_ids or [0])
        if highest >= shape.vocabulary:
            raise PeanutError(
                f"cpt_token_ids has {highest}", f"ids below {shape.vocabulary}", "use the model's own tokenizer"
            )
        return config.fitted(shape)

    def fixed(self, config: CPTConfig) -> frozenset[str]:
        return frozenset({CONTEXT}) if config.inference_mode else frozenset()

    def passing(self, config: CPTConfig) -> frozenset[str]:
        return frozenset() if config.inference_mode else frozenset({CONTEXT})

    def scaffold(self, config: CPTConfig) -> frozenset[str]:
        return frozenset() if config.inference_mode or config.without_delta else frozenset({DELTA})

    def without_scaffold(self, config: CPTConfig) -> CPTConfig:
        return replace(config, without_delta=True)

    def start(self, config: CPTConfig, shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
        if config.inference_mode:
            return {suffix: torch.zeros(config.rows, shape.width) for suffix in (CONTEXT, DELTA)}
        context = shape.embed(torch.tensor(config.cpt_token_ids)).float().clone()
        trained = {WRITTEN: context.clone()} if config.without_delta else {DELTA: torch.zeros_like(context)}
        return {CONTEXT: context, **trained}

    def prepended(self, config: CPTConfig, parameters: Values, training: bool) -> Tensor:
        context = parameters[CONTEXT]
        delta = parameters[DELTA] if DELTA in parameters else parameters[WRITTEN] - context
        # The gradient is that of the delta itself: moving it back into its ball is a step of the optimizer, not of
        # the function. What is subtracted is zero.
        moves = torch.tensor([kind % 4 != 0 for kind in config.cpt_tokens_type_mask or ()], device=delta.device)
        return context + _near(config, delta.detach()) + (delta - delta.detach()) * moves[:, None]

    def after_step(self, config: CPTConfig, layers: Sequence[Values]) -> None:
        for values in layers:
            if DELTA in values:
                values[DELTA].copy_(_near(config, values[DELTA]))
            elif CONTEXT in values:
                values[WRITTEN].copy_(values[CONTEXT] + _near(config, values[WRITTEN] - values[CONTEXT]))

    def stored(self, config: CPTConfig, layers: Mapping[str, Values]) -> tuple[CPTConfig, dict[str, dict[str, Tensor]]]:
        with torch.no_grad():
            return config, {path: {WRITTEN: self.prepended(config, values, False)} for path, values in layers.items()}

    def restored(self, config: CPTConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        found = super().restored(config, layers)
        for values in found.values():
            if config.inference_mode and WRITTEN in values:  # it stands in the place of C, as in Hugging Face PEFT
                values[CONTEXT] = values.pop(WRITTEN)
                values[DELTA] = torch.zeros_like(values[CONTEXT])
        return found

    def loss(self, config: CPTConfig, logits: Tensor, labels: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        own = labels.new_tensor(config.cpt_tokens_type_mask or ())
        given = arguments.get("input_type_mask")
        read = labels.new_full(labels.shape, 4) if given is None else given.to(labels)
        further = -(-int(max(config.cpt_tokens_type_mask or (0,))) // 4) * 4  # whole examples
        kinds = torch.cat([own.expand(len(labels), -1), torch.where(read > 0, read + further, read)], dim=1)
        ids = labels.new_tensor(config.cpt_token_ids or ()).expand(len(labels), -1)
        answers = (kinds > 0) & (kinds % 4 == 0)
        wanted = torch.where(answers, torch.cat([ids, labels], dim=1), IGNORED)[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), wanted, ignore_index=IGNORED, reduction="none")
        if config.opt_weighted_loss_type == "decay":
            later = _later(torch.where(answers, kinds, 0)[:, 1:])
            losses = losses * (config.opt_loss_decay_factor or 0.0) ** later
        return losses.sum() / (wanted != IGNORED).sum()


def _near(config: CPTConfig, delta: Tensor) -> Tensor:
    """Each row moved to the nearest one that is no longer than its epsilon allows."""
    unit = (delta.shape[1] / 2048) ** 0.5
    far = (LEAST, (config.opt_projection_format_epsilon or 0.0) * unit, (config.opt_projection_epsilon or 0.0) * unit)
    kinds = config.cpt_tokens_type_mask or ()
    epsilon = delta.new_tensor([far[(0, 1, 2, 1)[kind % 4]] for kind in kinds])[:, None]
    length = delta.norm(dim=1, keepdim=True)
    return torch.where(length > epsilon, delta * (epsilon / length), delta)


def _later(answers: Tensor) -> Tensor:
    """How many answers follow that of each token, for the types (batch, tokens) of answers, 0 elsewhere."""
    ordered, order = answers.sort(dim=1, descending=True)
    rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).long().cumsum(1), (1, 0))
    return torch.empty_like(rank).scatter(1, order, rank)
