"""Fits a batch's arguments to virtual tokens and prefixes: attention masks, positions, token ids, labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ..layers.hooks import names_of
from ..layers.input import Front
from ..targets.shape import longest, position_padding, virtual_id
from .aligning import arranged, order_of, padding_first
from .cache import cache_name
from .prefix import length_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["IGNORED", "Reader", "with_front"]

IGNORED = -100
"""The label of a token that has none."""


@dataclass(frozen=True)
class Reader:
    """The stack that reads the user's tokens, and how it counts their positions.

    Args:
        stack: the model itself, or the encoder of two stacks.
        names: of the parameters of its forward.
        inner: of those of its backbone's, the model without a head.
        cache: what the backbone calls its cache of earlier tokens, ``None`` if it has none.
        virtual: the id that stands in for virtual tokens.
        longest: how many tokens it has positions for, ``None`` for any number.
        padding: the id that it leaves out where it counts positions from the ids, if it does (RoBERTa).
    """

    model: nn.Module
    stack: PreTrainedModel
    names: tuple[str, ...]
    inner: tuple[str, ...]
    cache: str | None
    virtual: int
    longest: int | None
    padding: int | None

    @classmethod
    def of(cls, model: nn.Module, stack: PreTrainedModel) -> Reader:
        """What is known of a model's reading stack."""
        return cls(
            model,
            stack,
            names_of(stack),
            names_of(stack.base_model),
            cache_name(stack.base_model),
            virtual_id(stack),
            longest(stack),
            position_padding(stack),
        )

    @property
    def reads_alone(self) -> bool:
        """Whether there is only one stack."""
        return self.stack is self.model

    @property
    def remembers(self) -> bool:
        """Whether the stack itself, not only its backbone, takes a cache of earlier tokens."""
        return self.cache in self.names

    def fit_mask(self, arguments: dict[str, Any], there: Tensor | None, seen: int, rows: int, width: int) -> None:
        """The attention mask over what comes before, and the ``seen`` tokens of the user."""
        mask = arguments.get("attention_mask")
        if mask is None:
            if there is None:
                return
            mask = torch.ones(rows, seen, dtype=torch.long, device=there.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PeanutError(
                f"an attention_mask of shape {shape} beside virtual tokens",
                "one of shape (batch, tokens)",
                "give the mask of the padding; in generate, leave cache_implementation open",
            )
        if mask.shape[1] != seen:
            raise PeanutError(
                f"an attention_mask for {mask.shape[1]} tokens",
                f"one for the {seen} tokens that the user gave, those in the cache among them",
                "leave the virtual tokens out of it, and begin the cache with the adapter active",
            )
        arguments["attention_mask"] = with_front(mask, there, width)

    def fit_positions(
        self, arguments: dict[str, Any], there: Tensor | None, rows: int, width: int, inserted: int
    ) -> None:
        """Position ids that count what comes before, and no padding."""
        if "position_ids" not in self.names:
            return
        given, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        count = _given(arguments).shape[1] + inserted
        if given is None:
            if mask is not None and self.padding is None and self.remembers:
                arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
            return
        if given.dim() != 2:
            raise PeanutError(f"position_ids of shape {tuple(given.shape)}", "(batch, tokens)", "leave them out")
        given = given.expand(rows, -1)
        front = torch.ones(rows, width, dtype=torch.long, device=given.device) if there is None else there.long()
        before = (front.cumsum(1) - 1).clamp(min=0)[:, width - inserted :]
        before = before + (0 if self.padding is None else self.padding + 1)
        arguments["position_ids"] = torch.cat([before, given + front.sum(1, keepdim=True)], dim=1)

    def skip_prefix(self, arguments: dict[str, Any], there: Tensor) -> None:
        """Position ids where rows have prefixes of different lengths, for models that assume one length for all."""
        if self.remembers or arguments.get("position_ids") is not None:
            return
        read = _given(arguments)
        past = there.to(read.device).sum(1, keepdim=True)
        if self.padding is None:
            arguments["position_ids"] = torch.arange(read.shape[1], device=read.device) + past
        elif arguments.get("input_ids") is not None:  # given embeddings, the model ignores the past
            known = (read != self.padding).long()
            arguments["position_ids"] = (known.cumsum(1) + past) * known + self.padding

    def check_length(self, width: int, count: int, past: Any, begun: bool) -> None:
        """Refuses more tokens than the model has positions for."""
        total = count + (length_of(past) if begun else width)
        if self.longest is not None and total > self.longest:
            raise PeanutError(
                f"{width} virtual tokens and {total - width} tokens",
                f"at most {self.longest} together, for which {type(self.model).__name__} has positions",
                "cut the texts to fewer tokens",
            )

    def insert(self, arguments: dict[str, Any], tokens: Front, rows: int) -> Tensor | None:
        """Puts virtual tokens before the user's, in labels and masks too; returns the new order if tokens are moved.

        Where rows have fewer virtual tokens than others, an encoder (BERT) gets the padding last: it classifies by
        the first token, and counts positions from it. A model with a cache (GPT) gets the padding first.
        """
        width, read = tokens.values.shape[1], _given(arguments)
        if arguments.get("input_ids") is None:
            arguments["inputs_embeds"] = torch.cat([tokens.values.to(read), read], dim=1)
        else:
            front = read.new_full((rows, width), self.virtual)
            padding = getattr(self.stack.config, "pad_token_id", None)
            if tokens.there is not None:
                front[~tokens.there.to(read.device)] = self.virtual if padding is None else padding
            arguments["input_ids"] = torch.cat([front, read], dim=1)
        if arguments.get("token_type_ids") is not None:
            types = arguments["token_type_ids"]
            arguments["token_type_ids"] = torch.cat([types.new_zeros(rows, width), types], dim=1)
        labels = arguments.get("labels")
        if labels is not None and self.labels_tokens(labels, read.shape[1]):
            arguments["labels"] = torch.cat([labels.new_full((rows, width), IGNORED), labels], dim=1)
        order = None
        before: Tensor | int = width
        if tokens.there is not None and self.reads_alone and not self.remembers:
            there = tokens.there.to(read.device)
            order, before = order_of(there, read.shape[1]), there.sum(1)
            places = width + read.shape[1]
            for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "labels"):
                value = arguments.get(name)
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == places:
                    arguments[name] = arranged(value, order)
            mask = arguments["attention_mask"]  # it has a prefix in front
            arguments["attention_mask"] = torch.cat([mask[:, :-places], arranged(mask[:, -places:], order)], dim=1)
        elif not self.reads_alone and arguments.get("attention_mask") is not None:
            order = padding_first(arguments["attention_mask"], width)
            for name in ("input_ids", "inputs_embeds", "attention_mask"):
                if arguments.get(name) is not None:
                    arguments[name] = arranged(arguments[name], order)
        for name in ("start_positions", "end_positions"):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].clamp(min=0) + before
        return order

    def labels_tokens(self, labels: Tensor, count: int) -> bool:
        """Whether there is a label for each token, not for each sample."""
        per_sample = type(self.model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
        return self.reads_alone and not per_sample and labels.dim() == 2 and labels.shape[1] == count

    def prompt(self, arguments: dict[str, Any], rows: int, count: int, begun: bool, device: torch.device) -> Tensor:
        """(batch, tokens), which of the tokens belong to the user's prompt: no padding, and no answer."""
        if begun:
            return torch.zeros(rows, count, dtype=torch.bool, device=device)
        mask, labels = arguments.get("attention_mask"), arguments.get("labels")
        two = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == count
        known = mask.bool() if two else torch.ones(rows, count, dtype=torch.bool, device=device)  # type: ignore[union-attr]
        if labels is None or not self.labels_tokens(labels, count):
            return known
        asked = known & ~((labels != IGNORED).cumsum(1) > 0)
        return torch.where(asked.any(1, keepdim=True), asked, known)  # where all is answer, all is prompt


def _given(arguments: dict[str, Any]) -> Tensor:
    """The user's tokens: ids (batch, tokens), or embeddings (batch, tokens, width)."""
    ids: Tensor | None = arguments.get("input_ids")
    return arguments["inputs_embeds"] if ids is None else ids


def with_front(mask: Tensor, there: Tensor | None, width: int) -> Tensor:
    """A mask (batch, tokens) with that of the ``width`` places before, ``there`` or all, in front."""
    front = mask.new_ones(mask.shape[0], width) if there is None else there.to(mask.device, mask.dtype)
    return torch.cat([front, mask], dim=1)
