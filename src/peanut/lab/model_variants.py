"""Variants that the benchmark compares in whole models (a Llama of any size, or a packaged model)."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..methods.lora import LoraConfig
from ..model.injection import get_peft_model_state_dict
from ..model.peft_model import PeftModel, get_peft_model
from ..protocols import METHODS, InputMethod, Method, MixtureMethod, PeftConfig, WeightMethod
from .assets import fetch
from .measure import now
from .settings import STACKS, Settings, Stack
from .variants import Variant, compared, configs_of, lives, moved, peer_of

__all__ = ["GENERATED", "ModelVariant", "batch_of", "frozen_llama", "frozen_model", "model_configs", "model_variants"]

VOCABULARY = 1024
CONTEXT, GENERATED = 32, 16
"""Tokens of the prompt, and how many are generated after it, where generation is timed."""
EXPERTS = 2


def frozen_model(settings: Settings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen model of a stack, in eval mode; the activations that enter its blocks get a gradient."""
    stack = STACKS[settings.stack]
    if stack.asset:
        import transformers

        kind = "AutoModelForCausalLM" if stack.inference == "generate" else "AutoModelForSequenceClassification"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for the head
            model = getattr(transformers, kind).from_pretrained(fetch(stack.asset), dtype=dtype)
    else:
        narrow, wide = settings.dims
        heads = {"num_attention_heads": 24, "num_key_value_heads": 8} if settings.stack == "llama-3.2-3b" else {}
        model = frozen_llama(narrow, wide, settings.blocks, device, dtype, **heads)
    model.get_input_embeddings().register_forward_hook(_follow)
    return cast(nn.Module, model.requires_grad_(False).to(device).eval())


def _follow(module: nn.Module, inputs: object, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def frozen_llama(
    narrow: int, wide: int, blocks: int, device: torch.device, dtype: torch.dtype, **heads: int
) -> nn.Module:
    """A frozen Llama of ``blocks`` blocks, width ``narrow``, feed-forward width ``wide``, the same at every call.

    Args:
        narrow, wide, blocks: its size.
        device, dtype: of its weights.
        heads: how many for queries, keys and values, where it is not as many as make an even head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    even = max(each for each in (1, 2, 4, 6, 8, 12) if narrow % (2 * each) == 0)  # rotary positions want an even head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own: dict[str, Any] = {"num_attention_heads": even} | heads
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=narrow,
            intermediate_size=wide,
            num_hidden_layers=blocks,
            max_position_embeddings=16384,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            **own,
        )
        model: nn.Module = LlamaForCausalLM(config)
    return model.requires_grad_(False).to(device, dtype)


def batch_of(settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length) and their labels: the ids themselves, or one class a row where the model has a head.

    Packaged models read reviews, the others random ids.
    """
    stack = STACKS[settings.stack]
    length = min(settings.tokens, stack.row or settings.tokens)
    rows = settings.tokens // length
    if not stack.asset:
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
        return ids, ids
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(fetch(stack.asset))
    found: list[tuple[list[int], int]] = []
    for text, label in _reviews(fetch("movie-reviews")):
        if 2 * sum(label == other for _, other in found) >= rows + rows % 2:
            continue  # half of the rows are good reviews
        row = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if len(row) == length:  # none is padded
            found.append((row, label))
        if len(found) == rows:
            break
    else:
        raise PeanutError(f"{len(found)} reviews of {length} tokens", f"{rows}", "take fewer --tokens")
    ids = torch.tensor([row for row, _ in found], device=device)
    return ids, ids if stack.inference == "generate" else torch.tensor([label for _, label in found], device=device)


def _reviews(path: Path) -> Iterator[tuple[str, int]]:
    """Long texts and their labels: twelve reviews of one kind that follow each other."""
    with path.open(encoding="utf-8", newline="") as file:
        kinds: dict[int, list[str]] = {}
        for row in csv.DictReader(file):
            texts = kinds.setdefault(int(row["label"]), [])
            texts.append(row["text"])
            if len(texts) == 12:
                yield " ".join(texts), int(row["label"])
                texts.clear()


def model_configs(settings: Settings, model: nn.Module) -> dict[str, PeftConfig]:
    """The configs to measure in a model, by the name that tables give them."""
    stack = STACKS[settings.stack]
    task = "SEQ_CLS" if stack.inference == "answer" else "CAUSAL_LM"

    def options(method: Method[Any]) -> dict[str, Any]:
        targets = _targets(method, stack)
        return {"task_type": task} | ({} if targets is None else {"target_modules": list(targets)})

    ends = tuple(stack.targets or ("q_proj", "v_proj"))
    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends)
    ]
    on = stack.trial(shapes, settings.blocks)
    return configs_of(settings.methods or (), settings.rank, settings.depth, on, options)


def _targets(method: Method[Any], stack: Stack) -> Sequence[str] | None:
    """The layers that a method changes in a stack; ``None`` for what its config takes by itself."""
    if not isinstance(method, WeightMethod):
        return None
    if method.trains == "named":
        return [stack.last]
    if method.targets == "norms":
        return stack.norms
    return stack.targets if "linear" in method.kinds and method.targets != "embedding" else None


@dataclass
class ModelVariant(Variant):
    """One way to run a model: a step on token ids and labels, and generation with a cache where it writes text.

    Args:
        by_task: the model is told each row's task, besides.
    """

    by_task: bool = False

    def output(self, x: Tensor, grad: Tensor | None = None) -> Tensor:
        """The loss on ids ``x`` and the labels ``grad``; the logits without labels."""
        if grad is None:
            return cast(Tensor, self.model(input_ids=x, **self._more(x)).logits)
        return cast(Tensor, self.model(input_ids=x, labels=grad, **self._more(x)).loss)

    def _more(self, x: Tensor) -> dict[str, Tensor]:
        return {"task_ids": x.new_zeros(len(x))} if self.by_task else {}

    def gradient(self, grad: Tensor) -> list[Tensor]:
        return []

    def evaluation_probe(self, quantity: str, x: Tensor) -> Callable[[], dict[str, float]]:
        if quantity != "generate":
            return super().evaluation_probe(quantity, x[:1])
        self.model.eval()
        generate: Any = self.model.generate
        ids = x[:1, :CONTEXT]
        length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}

        @torch.no_grad()
        def probe() -> dict[str, float]:
            start = now(x.device)
            generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **self._more(ids))
            return {quantity: (now(x.device) - start) / GENERATED}

        probe()
        return probe


def model_variants(
    configs: Mapping[str, PeftConfig], build: Callable[[], nn.Module], x: Tensor, folder: Path
) -> list[Variant]:
    """The frozen model; then each config by this library and, where it has the method, by Hugging Face PEFT.

    Args:
        configs: by name.
        build: makes the frozen model, the same at every call.
        x: token ids, on which the two sides of a config must agree.
        folder: where a mixture's experts are written; it has to stay while the variants are measured.

    Raises:
        PeanutError: they do not.
    """
    base = build()
    found: list[Variant] = [ModelVariant("", "frozen", base, list(_linear(base).values()))]
    for name, given in configs.items():
        config, method = given, METHODS[given.method]
        mixture, by_task = isinstance(method, MixtureMethod), isinstance(method, WeightMethod) and method.mixes
        if mixture:
            config = dataclasses.replace(given, adapters=_experts(build, folder))  # type: ignore[call-arg]
        base = build()
        layers = _linear(base)
        ours = moved(get_peft_model(base, config))
        values = ours.active_peft_config.to_dict() | (
            {"adapters": config.adapters} if mixture else {}  # type: ignore[attr-defined]
        )
        their_base = functools.partial(_without_cache, build) if mixture else build
        life = lives(build, config, values, x.device)[0]
        their_life = lives(their_base, config, values, x.device)[1]
        own = ModelVariant(name, "peanut", ours, _wrapped(ours, layers), life=life, by_task=by_task)
        found.append(own)
        base = their_base()
        layers = _linear(base)
        try:
            peer = peer_of(name, base, values)
        except PeanutError as error:
            own.note = str(error)
            continue
        if peer is None:
            continue
        _fill(peer, ours, method)
        variant = ModelVariant(name, "peft", peer, _wrapped(peer, layers), life=their_life, by_task=own.by_task)
        with torch.no_grad():
            own.model.eval(), variant.model.eval()
            # a difference of rounding grows from block to block
            variant.difference = compared(name, own.output(x[:1]), variant.output(x[:1]), rounding=1e-4)
        found.append(variant)
    return found


def _without_cache(build: Callable[[], nn.Module]) -> nn.Module:
    """A fresh base as Hugging Face PEFT's mixtures want it: they refuse any other."""
    model: Any = build()
    model.config.use_cache = False
    return cast(nn.Module, model)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _wrapped(model: Any, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The layers after injection, each represented by its wrapper, if what is at its place is one."""
    there = dict(model.get_base_model().named_modules())
    return [there.get(name, layer) for name, layer in layers.items()]  # PEFT may put a block around a layer's block


def _experts(build: Callable[[], nn.Module], folder: Path) -> dict[str, str]:
    """Folders with LoRAs, called as Hugging Face PEFT calls a mixture's experts."""
    for number in range(EXPERTS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = moved(get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM")))
        model.save_pretrained(folder / str(number))
    return {str(number): str(folder / str(number)) for number in range(EXPERTS)}


def _fill(adapted: Any, ours: PeftModel, method: object) -> None:
    """Gives Hugging Face PEFT's model the parameters of ours."""
    importlib.import_module("peft").set_peft_model_state_dict(adapted, get_peft_model_state_dict(ours))
    if isinstance(method, InputMethod):  # a file has what the prompt's network gives, and not the network
        tensors = {key[1:]: value.detach() for key, value in ours.adapters.parameters("default") if key[0] == "/"}
        if "prompt_embeddings" in tensors:
            tensors["embedding.weight"] = tensors.pop("prompt_embeddings")
        adapted.prompt_encoder["default"].load_state_dict(tensors)
