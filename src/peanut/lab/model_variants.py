"""What the benchmark compares where a method needs a whole model: a small Llama, frozen and adapted."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.injection import get_peft_model_state_dict
from ..model.peft_model import PeftModel, get_peft_model
from ..protocols import METHODS, InputMethod, Method, MixtureMethod, PeftConfig, WeightMethod
from .measure import now, saved_bytes
from .variants import Variant, compared, moved, peer_of

__all__ = ["GENERATED", "ModelVariant", "frozen_llama", "model_configs", "model_variants", "needs_model"]

VOCABULARY = 1024
CONTEXT, GENERATED = 32, 16
"""Tokens of the prompt, and how many are generated after it, where one token of generation is timed."""
VIRTUAL, EXPERTS = 16, 2


def needs_model(method: Method[Any]) -> bool:
    """Whether a method can only be measured in a whole model; Poly is measured beside X-LoRA, as the other mixture."""
    return not isinstance(method, WeightMethod) or method.name == "POLY"


def frozen_llama(narrow: int, wide: int, blocks: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen Llama of ``blocks`` blocks, width ``narrow``, feed-forward width ``wide``, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(each for each in (1, 2, 4, 6, 8, 12) if narrow % (2 * each) == 0)  # rotary positions want an even head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=narrow,
            intermediate_size=wide,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            max_position_embeddings=16384,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
        model: nn.Module = LlamaForCausalLM(settings)
    return model.requires_grad_(False).to(device, dtype)


def model_configs(names: Sequence[str], rank: int, blocks: int) -> dict[str, PeftConfig]:
    """The configs to measure in a model, by the name that tables give them."""
    options: dict[str, dict[str, Any]] = {
        "ADAPTION_PROMPT": {"adapter_len": VIRTUAL, "adapter_layers": blocks},
        "CPT": {"cpt_token_ids": list(range(3, 3 + VIRTUAL)), "cpt_tokens_type_mask": [1, 2, 3, 4] * (VIRTUAL // 4)},
        "DIREFT": {"r": rank},
        "LORA": {"r": rank},
        "LOREFT": {"r": rank},
        "POLY": {"r": rank},
        "PREFIX_TUNING": {"num_virtual_tokens": VIRTUAL},
        "PROMPT_TUNING": {"num_virtual_tokens": VIRTUAL},
        "P_TUNING": {"num_virtual_tokens": VIRTUAL},
    }
    configs: dict[str, PeftConfig] = {}
    for name in names:
        make: Any = METHODS[name].config_class
        own = {"task_type": "CAUSAL_LM", **options.get(name, {})}
        if name == "BOTTLENECK":
            configs |= {f"{name} {style}": make(style=style, **own) for style in ("houlsby", "pfeiffer", "parallel")}
        else:
            configs[name] = make(**own)
    return configs


@dataclass
class ModelVariant(Variant):
    """One way to run the model: a step on embeddings and labels, and generation with a cache."""

    labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    more: dict[str, Any] = field(default_factory=dict)

    def loss(self, x: Tensor) -> Tensor:
        """The model's loss on embeddings (1, tokens, narrow)."""
        loss: Tensor = self.model(inputs_embeds=x, labels=self.labels, **self.more).loss
        return loss

    def step(self, x: Tensor, grad: Tensor) -> dict[str, float]:
        self.model.train()
        start = now(x.device)
        loss = self.loss(x)
        after_forward = now(x.device)
        loss.backward()
        after_backward = now(x.device)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = now(x.device)
        x.grad = None
        return {"forward": after_forward - start, "backward": after_backward - after_forward, "step": end - start}

    def token_probe(self, x: Tensor) -> Callable[[], dict[str, float]]:
        self.model.eval()
        generate: Any = self.model.generate
        ids = torch.arange(2, 2 + CONTEXT, device=x.device)[None]
        length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}

        @torch.no_grad()
        def probe() -> dict[str, float]:
            start = now(x.device)
            generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **self.more)
            return {"token": (now(x.device) - start) / GENERATED}

        probe()
        return probe

    def saved_bytes(self, x: Tensor) -> int:
        kept = [*self.model.parameters(), *self.model.buffers()]
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        return saved_bytes(lambda: self.loss(x), linear, kept)


def model_variants(configs: Mapping[str, PeftConfig], build: Callable[[], nn.Module], x: Tensor) -> list[Variant]:
    """The frozen model; then each config by this library and, where it has the method, by the peer.

    Args:
        configs: by name.
        build: makes the frozen model, the same at every call.
        x: embeddings (1, tokens, narrow), on which the two sides of a config must agree.

    Raises:
        PeanutError: they do not.
    """
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, VOCABULARY, x.shape[:2], generator=generator).to(x.device)
    stack = nn.Sequential()
    found: list[Variant] = [ModelVariant("", "frozen", build(), stack, labels=labels)]
    for name, given in configs.items():
        config = given
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(METHODS[config.method.value], MixtureMethod):
                config = dataclasses.replace(given, adapters=_experts(build, Path(folder)))  # type: ignore[call-arg]
            ours = moved(get_peft_model(build(), config))
            more = {"task_ids": torch.zeros(1, dtype=torch.long)} if config.method.value == "POLY" else {}
            found.append(ModelVariant(name, "peanut", ours, stack, labels=labels, more=more))
            peer = _peer(name, config, build(), ours)
        if peer is None:
            continue
        variant = ModelVariant(name, "peft", peer, stack, labels=labels, more=more)
        with torch.no_grad():
            answers = [side.eval()(inputs_embeds=x, **more).logits for side in (ours, peer)]
        variant.difference = compared(name, *answers)
        found.append(variant)
    return found


def _experts(build: Callable[[], nn.Module], folder: Path) -> dict[str, str]:
    """Folders with LoRAs, called as the peer calls a mixture's experts."""
    for number in range(EXPERTS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = moved(get_peft_model(build(), METHODS["LORA"].config_class(task_type="CAUSAL_LM")))
        model.save_pretrained(folder / str(number))
    return {str(number): str(folder / str(number)) for number in range(EXPERTS)}


def _peer(name: str, config: PeftConfig, model: Any, ours: PeftModel) -> Any:
    """The peer's implementation with the parameters of ours, if there is one."""
    method = METHODS[config.method.value]
    values = ours.active_peft_config.to_dict()
    if isinstance(method, MixtureMethod):
        model.config.use_cache = False  # it refuses any other
        values["adapters"] = config.adapters  # type: ignore[attr-defined]
    adapted = peer_of(name, model, values)
    if adapted is None:
        return None
    if isinstance(method, InputMethod):
        tensors = {key.removeprefix("/"): value.detach() for key, value in ours.adapters.parameters("default")}
        if "prompt_embeddings" in tensors:
            tensors["embedding.weight"] = tensors.pop("prompt_embeddings")
        adapted.prompt_encoder["default"].load_state_dict(tensors)
    else:
        importlib.import_module("peft").set_peft_model_state_dict(adapted, get_peft_model_state_dict(ours))
    return adapted
