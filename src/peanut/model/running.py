"""Around a forward of the whole model: virtual tokens come in, masks and labels are made to fit, mixtures get gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ..errors import PeanutError
from .aligning import aligned, arranged, order_of, padding_first, with_loss, without_cache
from .first_pass import gates_of
from .hooks import Hooking, hook, unhook
from .input import AdaptedInput, AdaptedMixture, Front
from .output import AdaptedOutput
from .prefix import PrefixView, check_grows, filled, holds_prefix, length_of
from .replay import put_back, replayed
from .shape import longest, position_padding, reading_stack, virtual_id
from .state import AdapterState, Running

__all__ = ["Runner"]

IGNORED = -100
"""The label of a token that has none."""


class Runner(Hooking):
    """Hooks around a model's forward, so that it works the same however it is called: alone, by Trainers, by generate.

    A virtual token is a token like others: it has an id that means nothing, and where the model looks its embedding
    up, the trained one is put. So whatever a model makes of ids (positions, the place of the last token) stays right.

    Args:
        model: the base model.
        state: which adapters act.
    """

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        self.model = model
        self.state = state
        self._stack: PreTrainedModel | None = None
        self._names: dict[type, tuple[str, ...]] = {}
        self._kept: dict[int, tuple[Running, Any]] = {}
        self._uncached: set[int] = set()
        self._pending: tuple[Tensor, Tensor | None] | None = None
        self._after: tuple[Any, ...] | None = None
        self._virtual = 0
        self._longest: int | None = None
        self._padding: int | None = None

    # Being there

    def watch(self) -> None:
        """Hangs on the model what its adapters need, and takes off what they no longer need."""
        self.leave()
        reads = [
            module.method_of(name)[0].reads_prompt
            for module in self.model.modules()
            if isinstance(module, AdaptedOutput)
            for name in module.adapters
        ]
        inputs, mixtures = self._inputs(), self._mixtures()
        if not any(reads) and inputs is None and mixtures is None:
            return
        try:
            self._stack = reading_stack(self.model)
        except PeanutError:
            if inputs is None and mixtures is None:
                return  # a model that tells nothing of its tokens, or has none
            raise
        self._listen(self._stack, self.before, self.after)
        if inputs is None:
            return
        self._virtual = virtual_id(self._stack)
        self._longest = longest(self._stack)
        self._padding = position_padding(self._stack)
        hook(self._stack.get_input_embeddings(), self.embed)
        kinds = {inputs.method_of(name)[0].prepends for name in inputs.adapters}
        if self._stack is not self.model:
            self._listen(self._decoder(), self.before_decoder, self.after)
        if "keys_values" in kinds:
            for module in holds_prefix(self.model if self._stack is self.model else self._decoder()):
                hook(module, self.see_prefix, before=True)

    def leave(self) -> None:
        """Takes everything off the model."""
        for module in self.model.modules():
            unhook(module, self)
        self._kept.clear()

    def _listen(self, module: nn.Module, before: Any, after: Any) -> None:
        hook(module, before, before=True)
        hook(module, after)

    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[operator]
        return decoder

    def _inputs(self) -> AdaptedInput | None:
        return self.model._modules.get("adapted_input")  # type: ignore[return-value]

    def _mixtures(self) -> AdaptedMixture | None:
        return self.model._modules.get("adapted_mixture")  # type: ignore[return-value]

    # Before and after the stack that reads

    def before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the stack that reads the user's tokens."""
        self._leave(stack)
        self._after = self._pending = None
        arguments = dict(zip(self._known(stack), args, strict=False)) | kwargs
        extra = self._extra(arguments)
        read = arguments.get("input_ids")
        read = arguments.get("inputs_embeds") if read is None else read
        if self.state.disabled or read is None:
            return (), arguments
        if read.dim() != (3 if arguments.get("input_ids") is None else 2):
            raise PeanutError(
                f"{type(self.model).__name__} is given tokens of shape {tuple(read.shape)}",
                "(batch, tokens)",
                "use a method that changes weights or outputs",
            )
        rows, count = read.shape[0], read.shape[1]
        own = stack is self.model  # else keys and values are for the decoder
        tokens, past = self._front("tokens", rows), arguments.get("past_key_values") if own else None
        prefix = self._front("keys_values", rows) if own else None
        begun = length_of(past) > 0
        width = sum(0 if front is None else front.values.shape[-2] for front in (prefix, tokens))
        prompt = self._prompt(arguments, rows, count, begun, read.device)
        if width:
            check_grows(past)
            self._check_length(width, count, past, begun)
            there = self._there(prefix, tokens, rows, read.device)
            self._fit_mask(arguments, there, count + (length_of(past) - width if begun else 0), rows, width)
            self._fit_positions(
                stack, arguments, there, rows, 0 if begun or tokens is None else tokens.values.shape[-2]
            )
            if prefix is not None and not begun:
                self._begin(stack, arguments, prefix, past)
            if tokens is not None and not begun:
                order = self._insert(stack, arguments, tokens, rows)
                prompt = torch.cat([prompt.new_zeros(rows, tokens.values.shape[-2]), prompt], dim=1)
                prompt = arranged(prompt, order)
                self._after = (tokens.values.shape[-2], count, self._objective(arguments, extra), order)
            if prefix is not None and prefix.there is not None and not begun:
                self._skip_prefix(stack, arguments, prefix.there)
        running = Running(prompt, begun, None if prefix is None else PrefixView(prefix.values))
        mixtures = self._mixtures()
        if mixtures is not None and mixtures.acting():
            pending = self._pending
            running = replace(running, gates=gates_of(mixtures, self.state, stack, arguments, running))
            self._pending = pending
        self._enter(stack, running)
        return (), arguments

    def after(self, stack: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook after a stack."""
        self._leave(stack)
        if id(stack) in self._uncached:
            self._uncached.remove(id(stack))
            output = without_cache(output)
        if stack is not self.model:
            return output
        after, self._after = self._after, None
        if after is None:
            return output
        width, count, finish, order = after
        if finish is not None:
            output = with_loss(output, finish(output[0] if isinstance(output, tuple) else output["logits"]))
        return aligned(self.model, output, width, count, order)

    def embed(self, embedding: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Hook after the token embeddings: puts the virtual tokens where their ids stand."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        tokens, order = pending
        if order is not None:
            output = arranged(output, order.argsort(dim=1))
        return arranged(torch.cat([tokens.to(output.dtype), output[:, tokens.shape[1] :]], dim=1), order)

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the decoder of two stacks: the encoder's virtual tokens are there, and a prefix of its own."""
        self._leave(decoder)
        self._pending = None
        arguments = dict(zip(self._known(decoder), args, strict=False)) | kwargs
        inputs = self._inputs()
        if self.state.disabled or inputs is None:
            return (), arguments
        read = arguments.get("input_ids")
        read = arguments["inputs_embeds"] if read is None else read
        rows, count = read.shape[0], read.shape[1]
        width, there = inputs.width("tokens"), inputs.there("tokens", rows)
        states, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        if width and states is not None and (mask is not None or there is not None):
            seen = states.shape[1] - width
            mask = read.new_ones(rows, seen) if mask is None else mask
            if mask.dim() == 2 and mask.shape[1] == seen:
                whole = _with_front(mask, there, width)
                arguments["encoder_attention_mask"] = arranged(whole, padding_first(whole, width))
        prefix = self._front("keys_values", rows)
        if prefix is not None:
            past, wide = arguments.get("past_key_values"), prefix.values.shape[-2]
            begun = length_of(past) > 0
            self._fit_mask(arguments, prefix.there, count + (length_of(past) - wide if begun else 0), rows, wide)
            if not begun:
                if past is None:
                    arguments["past_key_values"] = EncoderDecoderCache(
                        DynamicCache(config=decoder.config), DynamicCache(config=decoder.config)
                    )
                self._begin(decoder, arguments, prefix, past)
            self._enter(decoder, replace(self.state.running, prefix=PrefixView(prefix.values)))
        return (), arguments

    def see_prefix(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before an attention module: gives it the keys and values that gradient checkpointing took away."""
        prefix = self.state.running.prefix
        crosses = kwargs.get("key_value_states") is not None or kwargs.get("encoder_hidden_states") is not None
        if prefix is None or self.state.disabled or crosses or kwargs.get("past_key_values") is not None:
            return None
        if not attention.training:
            return None
        return args, {**kwargs, "past_key_values": prefix}

    # Parts of it

    def _known(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of a module's forward."""
        if type(module) not in self._names:
            self._names[type(module)] = tuple(inspect.signature(type(module).forward).parameters)[1:]
        return self._names[type(module)]

    def _begin(self, stack: nn.Module, arguments: dict[str, Any], prefix: Front, past: Any) -> None:
        """Begins a cache, ``past`` or a new one, with a prefix."""
        assert self._stack is not None  # it is running
        embedding: Any = self._stack.get_input_embeddings()
        cache = arguments.get("past_key_values")
        arguments["past_key_values"] = filled(cache, prefix.values.to(embedding.weight.dtype), stack.config)
        if past is None and arguments.get("use_cache") is False:
            self._uncached.add(id(stack))

    def _enter(self, module: nn.Module, running: Running) -> None:
        self._kept[id(module)] = (self.state.running, [])
        self.state.running = running
        if torch.is_grad_enabled() and module.training:
            self._kept[id(module)][1].extend(replayed(module, self.state))

    def _leave(self, module: nn.Module) -> None:
        """Puts back what held before the module's last forward, also if that was broken off."""
        kept = self._kept.pop(id(module), None)
        if kept is not None:
            self.state.running = kept[0]
            put_back(kept[1])

    def _front(self, kind: str, rows: int) -> Front | None:
        inputs = self._inputs()
        return None if inputs is None else inputs.front(kind, rows)

    def _extra(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Takes out the arguments that are for a method, not for the model."""
        inputs = self._inputs()
        names = {read for name in inputs.adapters for read in inputs.method_of(name)[0].reads} if inputs else set()
        return {name: arguments.pop(name) for name in names if name in arguments}

    def _there(self, prefix: Front | None, tokens: Front | None, rows: int, device: torch.device) -> Tensor | None:
        """(batch, p), which of everything that comes before the user's tokens is there, ``None`` for all."""
        fronts = [front for front in (prefix, tokens) if front is not None]
        if all(front.there is None for front in fronts):
            return None
        parts = [
            torch.ones(rows, front.values.shape[-2], dtype=torch.bool) if front.there is None else front.there
            for front in fronts
        ]
        return torch.cat(parts, dim=1).to(device)

    def _fit_mask(self, arguments: dict[str, Any], there: Tensor | None, seen: int, rows: int, width: int) -> None:
        """The attention mask over what comes before, and the ``seen`` tokens of the user."""
        mask = arguments.get("attention_mask")
        if mask is None and there is None:
            return
        if mask is None:
            assert there is not None  # as just seen
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
        arguments["attention_mask"] = _with_front(mask, there, width)

    def _fit_positions(
        self, stack: nn.Module, arguments: dict[str, Any], there: Tensor | None, rows: int, inserted: int
    ) -> None:
        """Position ids that count what comes before, and no padding."""
        if "position_ids" not in self._known(stack):
            return
        given, mask = arguments.get("position_ids"), arguments.get("attention_mask")
        read = arguments.get("input_ids")
        read = arguments["inputs_embeds"] if read is None else read
        count = read.shape[1] + inserted
        inputs = self._inputs()
        assert inputs is not None  # something comes before
        width = inputs.width("tokens") + inputs.width("keys_values")
        if given is None:
            if mask is not None and self._padding is None and "past_key_values" in self._known(stack):
                arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
            return
        if given.dim() != 2:
            raise PeanutError(f"position_ids of shape {tuple(given.shape)}", "(batch, tokens)", "leave them out")
        given = given.expand(rows, -1)
        front = torch.ones(rows, width, dtype=torch.long, device=given.device) if there is None else there.long()
        before = (front.cumsum(1) - 1).clamp(min=0)[:, width - inserted :]
        before = before + (0 if self._padding is None else self._padding + 1)
        arguments["position_ids"] = torch.cat([before, given + front.sum(1, keepdim=True)], dim=1)

    def _skip_prefix(self, stack: nn.Module, arguments: dict[str, Any], there: Tensor) -> None:
        """Position ids for a model that gives all rows one past, where some rows have less of a prefix than others."""
        if "past_key_values" in self._known(stack) or arguments.get("position_ids") is not None:
            return
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is None and self._padding is not None:
            return  # it counts without the past
        read = embeds if ids is None else ids
        assert read is not None  # else it had not come here
        past = there.to(read.device).sum(1, keepdim=True)
        if self._padding is None:
            arguments["position_ids"] = torch.arange(read.shape[1], device=read.device) + past
        elif ids is not None:
            known = (ids != self._padding).long()
            arguments["position_ids"] = (known.cumsum(1) + past) * known + self._padding

    def _check_length(self, width: int, count: int, past: Any, begun: bool) -> None:
        """Refuses more tokens than the model has positions for."""
        total = count + (length_of(past) if begun else width)
        if self._longest is not None and total > self._longest:
            raise PeanutError(
                f"{width} virtual tokens and {total - width} tokens",
                f"at most {self._longest} together, for which {type(self.model).__name__} has positions",
                "cut the texts to fewer tokens",
            )

    def _insert(self, stack: nn.Module, arguments: dict[str, Any], tokens: Front, rows: int) -> Tensor | None:
        """Puts virtual tokens before the user's, and what is said of each token; returns the order if it is another.

        Where rows have fewer than others, a model that reads in one go (BERT) is given the empty places last: it
        answers from the first one, and counts from there. One that writes (GPT) is given them first.
        """
        width = tokens.values.shape[1]
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        read = ids if ids is not None else embeds
        assert read is not None  # else it had not come here
        assert self._stack is not None
        if ids is not None:
            front = ids.new_full((rows, width), self._virtual)
            padding = getattr(self._stack.config, "pad_token_id", None)
            if tokens.there is not None:
                front[~tokens.there.to(ids.device)] = self._virtual if padding is None else padding
            arguments["input_ids"] = torch.cat([front, ids], dim=1)
        elif embeds is not None:
            arguments["inputs_embeds"] = torch.cat([tokens.values.to(embeds), embeds], dim=1)
        if arguments.get("token_type_ids") is not None:
            types = arguments["token_type_ids"]
            arguments["token_type_ids"] = torch.cat([types.new_zeros(rows, width), types], dim=1)
        labels = arguments.get("labels")
        if labels is not None and self._labels_tokens(labels, read.shape[1]):
            arguments["labels"] = torch.cat([labels.new_full((rows, width), IGNORED), labels], dim=1)
        order = None
        before: Tensor | int = width
        if tokens.there is not None and stack is self.model and "past_key_values" not in self._known(stack):
            order = order_of(tokens.there.to(read.device), read.shape[1])
            before = tokens.there.to(read.device).sum(1)
            places = width + read.shape[1]
            for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "labels"):
                value = arguments.get(name)
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == places:
                    arguments[name] = arranged(value, order)
            mask = arguments["attention_mask"]  # it has a prefix in front
            parts = mask[:, : mask.shape[1] - places], mask[:, mask.shape[1] - places :]
            arguments["attention_mask"] = torch.cat([parts[0], arranged(parts[1], order)], dim=1)
        elif stack is not self.model and arguments.get("attention_mask") is not None:
            order = padding_first(arguments["attention_mask"], width)
            for name in ("input_ids", "inputs_embeds", "attention_mask"):
                if arguments.get(name) is not None:
                    arguments[name] = arranged(arguments[name], order)
        for name in ("start_positions", "end_positions"):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].clamp(min=0) + before
        if ids is not None:
            self._pending = tokens.values.to(ids.device), order
        return order

    def _labels_tokens(self, labels: Tensor, count: int) -> bool:
        """Whether there is a label for each token, not for each sample."""
        per_sample = type(self.model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
        return self._stack is self.model and not per_sample and labels.dim() == 2 and labels.shape[1] == count

    def _prompt(self, arguments: dict[str, Any], rows: int, count: int, begun: bool, device: torch.device) -> Tensor:
        """(batch, tokens), which of the tokens belong to the user's prompt: no padding, and no answer."""
        if begun:
            return torch.zeros(rows, count, dtype=torch.bool, device=device)
        mask, labels = arguments.get("attention_mask"), arguments.get("labels")
        two = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == count
        known = mask.bool() if two else torch.ones(rows, count, dtype=torch.bool, device=device)  # type: ignore[union-attr]
        if labels is None or not self._labels_tokens(labels, count):
            return known
        asked = known & ~((labels != IGNORED).cumsum(1) > 0)
        return torch.where(asked.any(1, keepdim=True), asked, known)  # where all is answer, all is prompt

    def _objective(self, arguments: dict[str, Any], extra: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """The loss of the acting method that has one of its own; the labels are then taken from the model."""
        inputs, labels = self._inputs(), arguments.get("labels")
        if inputs is None or labels is None:
            return None
        acting = inputs.acting("tokens")
        names = [name for name in acting if inputs.method_of(name)[0].own_loss]
        if not names:
            return None
        if self.state.samples is not None or names != acting[-1:]:
            raise PeanutError(
                f"labels while adapter {names[0]!r}, which has a loss of its own, is one of several",
                "it alone, or as the last of the active prompts",
                "activate it last, or leave the labels out",
            )
        del arguments["labels"]
        own, items = labels[:, inputs.width("tokens") :], arguments.get("num_items_in_batch")
        return partial(_loss, *inputs.method_of(names[0]), own, extra, items)


def _loss(method: Any, config: Any, labels: Tensor, extra: dict[str, Any], items: Any, logits: Tensor) -> Tensor:
    """A method's own loss; where gradients of several batches add up to ``items`` labels, this batch's share of it."""
    loss: Tensor = method.loss(config, logits[:, -(config.num_virtual_tokens + labels.shape[1]) :], labels, extra)
    return loss if items is None else loss * (labels[:, 1:] != IGNORED).sum() / items


def _with_front(mask: Tensor, there: Tensor | None, width: int) -> Tensor:
    front = mask.new_ones(mask.shape[0], width) if there is None else there.to(mask.device, mask.dtype)
    return torch.cat([front, mask], dim=1)
