"""Hooks around a model's forward that insert virtual tokens and prefixes, and compute the gates of mixtures."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ..layers.adapted import walk
from ..layers.calls import CallState, Running
from ..layers.hooks import Hooking, hook, names_of, unhook
from ..layers.input import AdaptedInput, AdaptedMixture, Front
from ..layers.output import AdaptedOutput
from ..layers.state import AdapterState
from ..targets.shape import reading_stack
from .aligning import aligned, arranged, padding_first, with_loss, without_cache
from .cache import cache_in, cache_name, put_cache
from .first_pass import gates_of
from .own_loss import own_loss
from .prefix import PrefixView, check_grows, filled, holds_prefix, length_of
from .reader import Reader, with_front
from .replay import restore_in_checkpoints, restore_no_more

__all__ = ["Runner"]


class _Forward(threading.local):
    """What a thread's forward passes from one hook to the next.

    ``pending`` virtual tokens wait for the embeddings to be looked up; ``after`` is what the stack's last hook does;
    ``entered`` has, by module, the call before its forward and within; ``uncached`` the stacks whose caller asked for
    no cache.
    """

    def __init__(self) -> None:
        self.pending: tuple[Tensor, Tensor | None] | None = None
        self.after: tuple[Any, ...] | None = None
        self.entered: dict[int, tuple[CallState, CallState]] = {}
        self.uncached: set[int] = set()


class Runner(Hooking):
    """Hooks around a model's forward, so that it works the same however it is called: alone, by Trainers, by generate.

    A virtual token has an id without meaning; where the model looks up its embedding, the trained one replaces it. So
    whatever a model derives from ids (positions, the last token) stays right.
    """

    def __init__(self, model: nn.Module, state: AdapterState) -> None:
        self.model = model
        self.state = state
        self._reader: Reader | None = None
        self._written: tuple[str, ...] = ()  # the names of the parameters of the decoder's forward, if there is one
        self._cache: str | None = None  # what the stack that holds prefixes calls its cache
        self._now = _Forward()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": None}  # copies and files begin with no forward

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _now=_Forward())

    # Adding and removing hooks

    def watch(self) -> None:
        """Adds the hooks that the model's adapters need, and removes those that they no longer need."""
        self.leave()
        reads = [
            module.method_of(name)[0].reads_prompt
            for module in walk(self.model)
            if isinstance(module, AdaptedOutput)
            for name in module.adapters
        ]
        inputs, mixtures = self._inputs(), self._mixtures()
        if not any(reads) and inputs is None and mixtures is None:
            return
        try:
            stack = reading_stack(self.model)
        except PeanutError:
            if inputs is None and mixtures is None:
                return  # a model without tokens, or not known to have any
            raise
        self._reader = Reader.of(self.model, stack)
        self._listen(stack, self.before, self.after)
        if inputs is None:
            return
        hook(stack.get_input_embeddings(), self.embed)
        kinds = {inputs.method_of(name)[0].prepends for name in inputs.adapters}
        if stack is not self.model:
            self._listen(self._decoder(), self.before_decoder, self.after)
            self._written = names_of(self._decoder())
        self._cache = self._reader.cache if stack is self.model else cache_name(self._decoder())
        if "keys_values" in kinds:
            for module in holds_prefix(self.model if stack is self.model else self._decoder()):
                hook(module, self.see_prefix, before=True)

    def leave(self) -> None:
        """Removes all hooks."""
        restore_no_more(self.model)
        for module in walk(self.model):
            unhook(module, self)

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
        now = self._now
        now.after = now.pending = None
        reader = self._reader
        assert reader is not None  # it is running
        arguments = dict(zip(reader.names, args, strict=False)) | kwargs
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
        own = reader.reads_alone  # else keys and values are for the decoder
        kinds = ("keys_values", "tokens") if own else ("tokens",)  # in the order in which they stand
        past = cache_in(arguments) if own else None
        begun = length_of(past) > 0  # then all that comes before is in the cache
        prefix = self._front("keys_values", rows) if own and not begun else None
        tokens = self._front("tokens", rows) if not begun else None
        width, there = self._taken(kinds, rows, read.device)
        prompt = reader.prompt(arguments, rows, count, begun, read.device)
        if width:
            check_grows(past)
            inserted = 0 if tokens is None else tokens.values.shape[-2]
            reader.check_length(width, count, past, begun)
            reader.fit_mask(arguments, there, count + (length_of(past) - width if begun else 0), rows, width)
            reader.fit_positions(arguments, there, rows, width, inserted)
            if prefix is not None:
                self._begin(stack, arguments, prefix, past)
            if tokens is not None:
                order = reader.insert(arguments, tokens, rows)
                if arguments.get("input_ids") is not None:
                    now.pending = tokens.values.to(read.device), order
                prompt = arranged(torch.cat([prompt.new_zeros(rows, inserted), prompt], dim=1), order)
                now.after = (inserted, count, own_loss(self._inputs(), self.state, arguments, extra), order)
            if prefix is not None and prefix.there is not None:
                reader.skip_prefix(arguments, prefix.there)
        running = Running(prompt, begun, None if prefix is None else PrefixView(prefix.values))
        mixtures = self._mixtures()
        if mixtures is not None and mixtures.acting():
            pending = now.pending
            running = replace(running, gates=gates_of(mixtures, self.state, reader, arguments, running))
            now.pending = pending
        self._enter(stack, running)
        return (), arguments

    def after(self, stack: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook after a stack."""
        self._leave(stack)
        if id(stack) in self._now.uncached:
            self._now.uncached.remove(id(stack))
            output = without_cache(output)
        if stack is not self.model:
            return output
        after, self._now.after = self._now.after, None
        if after is None:
            return output
        width, count, finish, order = after
        if finish is not None:
            output = with_loss(output, finish(output[0] if isinstance(output, tuple) else output["logits"]))
        return aligned(self.model, output, width, count, order)

    def embed(self, embedding: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Hook after the token embeddings: puts the virtual tokens where their ids stand."""
        pending, self._now.pending = self._now.pending, None
        if pending is None:
            return None
        tokens, order = pending
        if order is not None:
            output = arranged(output, order.argsort(dim=1))
        return arranged(torch.cat([tokens.to(output.dtype), output[:, tokens.shape[1] :]], dim=1), order)

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the decoder of two stacks: the encoder's virtual tokens are there, and a prefix of its own."""
        self._leave(decoder)
        self._now.pending = None
        arguments = dict(zip(self._written, args, strict=False)) | kwargs
        inputs, reader = self._inputs(), self._reader
        if self.state.disabled or inputs is None or reader is None:
            return (), arguments
        read = arguments.get("input_ids")
        read = arguments.get("inputs_embeds") if read is None else read
        if read is None:
            return (), arguments  # the model says so itself
        rows, count = read.shape[0], read.shape[1]
        width, there = self._taken(("tokens",), rows, read.device)
        states, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        if width and states is not None and (mask is not None or there is not None):
            seen = states.shape[1] - width
            mask = read.new_ones(rows, seen) if mask is None else mask
            if mask.dim() == 2 and mask.shape[1] == seen:
                whole = with_front(mask, there, width)
                arguments["encoder_attention_mask"] = arranged(whole, padding_first(whole, width))
        wide, there = self._taken(("keys_values",), rows, read.device)
        if wide:
            past = cache_in(arguments)
            begun = length_of(past) > 0
            reader.fit_mask(arguments, there, count + (length_of(past) - wide if begun else 0), rows, wide)
            prefix = None if begun else self._front("keys_values", rows)
            if prefix is not None:
                if past is None:
                    from transformers import DynamicCache, EncoderDecoderCache

                    own = (DynamicCache(config=decoder.config) for _ in range(2))
                    put_cache(arguments, self._cache, EncoderDecoderCache(*own))
                self._begin(decoder, arguments, prefix, past)
                self._enter(decoder, replace(self.state.call.running, prefix=PrefixView(prefix.values)))
        return (), arguments

    def see_prefix(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before an attention module: gives it the keys and values that gradient checkpointing took away."""
        prefix = self.state.call.running.prefix
        crosses = kwargs.get("key_value_states") is not None or kwargs.get("encoder_hidden_states") is not None
        if prefix is None or self.state.disabled or crosses or cache_in(kwargs) is not None:
            return None
        if not attention.training:
            return None
        given = dict(kwargs)
        put_cache(given, self._cache, prefix)
        return args, given

    # Helpers

    def _begin(self, stack: nn.Module, arguments: dict[str, Any], prefix: Front, past: Any) -> None:
        """Begins a cache, ``past`` or a new one, with a prefix."""
        assert self._reader is not None  # it is running
        embedding: Any = self._reader.stack.get_input_embeddings()
        cache = filled(cache_in(arguments), prefix.values.to(embedding.weight.dtype), stack.config)
        put_cache(arguments, self._cache, cache)
        if past is None and arguments.get("use_cache") is False:
            self._now.uncached.add(id(stack))

    def _enter(self, module: nn.Module, running: Running) -> None:
        before = self.state.call
        entered = replace(before, running=running)
        self._now.entered[id(module)] = (before, entered)
        self.state.call = entered
        if torch.is_grad_enabled() and module.training:
            restore_in_checkpoints(module, self.state)

    def _leave(self, module: nn.Module) -> None:
        """Restores the call from before the module's forward, unless an exception handler has done so."""
        before, entered = self._now.entered.pop(id(module), (None, None))
        call = self.state.call
        if before is not None and entered is not None and call.running is entered.running:
            # A context may have been left meanwhile: then the rest of the call stays as it is.
            self.state.call = before if call is entered else replace(call, running=before.running)

    def _front(self, kind: str, rows: int) -> Front | None:
        inputs = self._inputs()
        return None if inputs is None else inputs.front(kind, rows)

    def _taken(self, kinds: Sequence[str], rows: int, device: torch.device) -> tuple[int, Tensor | None]:
        """p, the positions taken before the user's tokens, and (batch, p) which each row uses, ``None`` for all."""
        inputs = self._inputs()
        if inputs is None:
            return 0, None
        taken = [inputs.taken(kind, rows) for kind in kinds]
        width = sum(own for own, _ in taken)
        if all(there is None for _, there in taken):
            return width, None
        parts = [torch.ones(rows, own, dtype=torch.bool) if there is None else there for own, there in taken]
        return width, torch.cat(parts, dim=1).to(device)

    def _extra(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Takes out the arguments that are for a method, not for the model."""
        inputs = self._inputs()
        names = {read for name in inputs.adapters for read in inputs.method_of(name)[0].reads} if inputs else set()
        return {name: arguments.pop(name) for name in names if name in arguments}
