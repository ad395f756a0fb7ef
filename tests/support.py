"""What the tests of the core share: one-layer models of every kind, configs of every method, and ways to compare."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import peanut.methods  # noqa: F401 - fills METHODS
from peanut import PeanutError, PeftModel, get_peft_model
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.layers.layer import AdaptedLayer
from peanut.operators import Diagonal, LowRank
from peanut.protocols import METHODS, Change, PeftConfig, WeightMethod
from peanut.weights import FrozenLayer, kind_of

from .variants import PEER, VARIANTS, Variant

VOCABULARY = 11
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaForCausalLM.forward).parameters)
"""What transformers calls the cache of earlier tokens: since 5.24 by the first name."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For a module that imports it: on tiny layers, threads that wait for each other cost 100 times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_small_llama(folder: Path, smollm2: Path, **options: Any) -> Path:
    """Saves a Llama of two small random layers with SmolLM2's tokenizer and its chat template; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokens() -> Tensor:
    return torch.randn(4, 7, 12)


def images() -> Tensor:
    return torch.randn(4, 4, 9, 7)


class Scale(nn.Module):
    """A module of no known class with a weight of one dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.weight + self.bias


def series() -> Tensor:
    return torch.randn(4, 4, 9)


def volumes() -> Tensor:
    return torch.randn(4, 4, 4, 4, 3)


def ids() -> Tensor:
    return torch.arange(20).reshape(4, 5) % VOCABULARY


INPUTS: dict[str, Callable[[], Tensor]] = {
    "linear": tokens,
    "conv1d": tokens,
    "conv": images,
    "1d": series,
    "3d": volumes,
    "embedding": ids,
    "norm": tokens,
}
"""What a kind of layer is given, or a layer of it that takes something else."""

LAYERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "linear": {"wide": lambda: nn.Linear(12, 20), "narrow, no bias": lambda: nn.Linear(12, 8, bias=False)},
    "conv1d": {"wide": lambda: Conv1D(20, 12), "narrow": lambda: Conv1D(8, 12)},
    "conv": {
        "plain": lambda: nn.Conv2d(4, 10, 3),
        "strided": lambda: nn.Conv2d(4, 10, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
        "dilated": lambda: nn.Conv2d(4, 10, 3, dilation=2, padding="same"),
        "reflecting": lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="reflect"),
        "circular": lambda: nn.Conv2d(4, 10, 3, padding=1, padding_mode="circular"),
        "grouped": lambda: nn.Conv2d(4, 10, 3, groups=2),
        "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
        "1d": lambda: nn.Conv1d(4, 10, 3, stride=2, padding=1),
        "3d": lambda: nn.Conv3d(4, 10, (2, 3, 1), padding=(1, 0, 1)),
    },
    "embedding": {
        "plain": lambda: nn.Embedding(VOCABULARY, 12),
        "padded": lambda: nn.Embedding(VOCABULARY, 12, padding_idx=3),
        "scaled": lambda: Gemma3TextScaledWordEmbedding(VOCABULARY, 12, 0, embed_scale=12**0.5),
    },
    "norm": {
        "layer norm": lambda: nn.LayerNorm(12),
        "rms norm": lambda: nn.RMSNorm(12),
        "llama's": lambda: LlamaRMSNorm(12),
        "gemma's": lambda: Gemma3RMSNorm(12),
        "another": lambda: Scale(12),
    },
}
"""Every kind of layer in its variants; the first one of a kind meets every config of every method."""


class Net(nn.Module):
    """A model with one layer, called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Case:
    """A method with one of its configs on one layer."""

    method: str
    variant: Variant
    kind: str
    layer: str

    def __str__(self) -> str:
        return f"{self.method}-{self.variant.name}-{self.kind}-{self.layer}"

    def net(self, dtype: torch.dtype = torch.float64) -> Net:
        """The model: the same weights at every call, padding rows not zero so that mistakes with them show."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = Net(LAYERS[self.kind][self.layer]())
            for parameter in net.parameters():
                nn.init.normal_(parameter, std=0.5)
        return net.to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            x = INPUTS.get(self.layer, INPUTS[self.kind])()
        return x.to(dtype) if x.is_floating_point() else x

    def config(self, **more: Any) -> PeftConfig:
        return METHODS[self.method].config_class(target_modules=["layer"], **self.variant.options | more)

    def adapted(self, *names: str, dtype: torch.dtype = torch.float64) -> PeftModel:
        """The model in eval mode with random adapters called ``names`` (``default`` if none); the first is active."""
        first, *others = names or ("default",)
        model = get_peft_model(self.net(dtype), self.config(), first)
        for name in others:
            model.add_adapter(name, self.config())
        return randomised(model).eval()

    # What tells for which cases a law says something. It takes a model to answer, so only modules with such laws ask.

    @cached_property
    def _layer(self) -> AdaptedLayer:
        return next(layer for _, layer in AdapterSet.of(get_peft_model(self.net(), self.config())).layers())

    @cached_property
    def _change(self) -> Change:
        return self._layer.change("default")

    @property
    def mergeable(self) -> bool:
        """Whether a bias that the adapter moves has a place in the layer."""
        return self._change.shift is None or self._layer.frozen.bias() is not None

    @property
    def turns(self) -> bool:
        """Whether the adapter turns the input or the output, so that the order of two matters."""
        left = self._change.left
        return self._change.rotation is not None or not (left is None or isinstance(left, Diagonal))

    @property
    def has_operator(self) -> bool:
        """Whether its change is more than gains of the input and shifts."""
        change = self._change
        return change.delta is not None or change.rotation is not None or change.left is not None

    @property
    def low_rank(self) -> bool:
        return isinstance(self._change.delta, LowRank)

    @property
    def multiplies(self) -> bool:
        """Whether the layer multiplies by a matrix; a norm's change is as small as the norm."""
        return self._layer.frozen.kind.multiplies

    @property
    def takes_features(self) -> bool:
        return self._layer.frozen.kind.takes_features


def _cases() -> Iterable[Case]:
    for method in METHODS.values():
        variants = VARIANTS.get(method.name, [Variant()])
        for kind in method.kinds:
            first, *others = LAYERS[kind]
            on_kind = [variant for variant in variants if variant.kinds is None or kind in variant.kinds]
            yield from (Case(method.name, variant, kind, first) for variant in on_kind)
            yield from (
                Case(method.name, on_kind[0], kind, layer) for layer in others if _fits(method, on_kind[0], kind, layer)
            )


def _fits(method: WeightMethod[Any], variant: Variant, kind: str, layer: str) -> bool:
    """Whether the method takes this variant of the kind: BitFit needs a bias, circulant blocks must divide."""
    config = method.config_class(target_modules=["layer"], **variant.options)
    module = LAYERS[kind][layer]()
    found = kind_of(module)
    assert found is not None
    try:
        method.check(config.for_layer("layer"), FrozenLayer(module, found), "layer")
    except PeanutError:
        return False
    return True


CASES = list(_cases())
FIRST_CASES = [next(group) for _, group in itertools.groupby(CASES, lambda case: (case.method, case.kind))]
"""One case of every method on every kind of layer, for what is slow."""


PEER_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "fan_in_fan_out is set to False",  # of every Conv1D
        ".*LoRA tensor.*have invalid shape",  # of its own lora_bias
        "Setting `save_embedding_layers` to `True`",  # of embeddings
        "`is_gradient_checkpointing` is deprecated",  # of what it asks transformers
        "Failed to load the CUDA extension",  # of its BOFT, which has a kernel
        "Setting boft_n_butterfly_factor to 1",  # for want of it
        "Unsupported layer type",  # of norms
        "Specified to not",  # save or load what is rebuilt from a seed
        "Sparse invariant checks",  # of its SHiRA
        "Found missing adapter keys",  # of bases that it keeps once a layer
        "`past_key_values` is deprecated",  # of the name by which it gives transformers 5.24 a cache
    )
]
"""What the peer warns of itself."""


def peer_has(case: Case) -> bool:
    """Whether the peer can do the same: on fewer kinds of layer, and of a convolution it forgets all but the stride."""
    only = {"1d": ("LORA", "LOKR"), "3d": ("LORA", "IA3")}
    if case.method not in only.get(case.layer, (case.method,)):
        return False
    refused = {"dilated", "reflecting", "circular", "grouped", "depthwise"}
    return case.kind in PEER.get(case.method, ()) and case.variant.peer and case.layer not in refused


PEER_CASES = [case for case in CASES if peer_has(case)]


def peer_model(model: nn.Module, config: PeftConfig) -> Any:
    """The peer's model from our config."""
    import peft

    values = {name: value for name, value in config.to_dict().items() if name not in config.only_here}
    return peft.get_peft_model(model, peft.get_peft_config(values)).eval()


def peer_loaded(model: nn.Module, folder: Path, is_trainable: bool = False) -> Any:
    """The peer's model from a folder."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder, is_trainable=is_trainable).eval()


@torch.no_grad()
def scattered(parameters: Iterable[Tensor], seed: int = 4, scale: float = 0.4) -> None:
    """Adds clearly non-zero noise to parameters, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((scale * noise).to(parameter.dtype))


def randomised(model: PeftModel | nn.Module, names: Iterable[str] | None = None, scale: float = 0.4) -> Any:
    """``model`` with clearly non-zero, fixed values in its adapters (all, or those named) and their heads."""
    adapters = AdapterSet.of(model)
    for name in adapters.configs if names is None else names:
        trained = (value for _, value in adapters.parameters(name) if isinstance(value, nn.Parameter))
        scattered(trained, zlib.crc32(name.encode()), scale)
    return model


@torch.no_grad()
def filled(model: PeftModel, values: dict[str, Tensor], name: str = "default") -> PeftModel:
    """``model`` with these values, and no others, as the tensors of an adapter, by the key that files give them."""
    own = dict(model.adapters.parameters(name))
    assert own.keys() == values.keys()
    for key, value in own.items():
        assert value.shape == values[key].shape
        value.copy_(values[key])
    return model


def change_in_output(model: nn.Module, base: nn.Module, x: Tensor) -> float:
    """How far the adapters move the output, relative to it: before comparing, make sure that this is not small."""
    with torch.no_grad():
        return distance(model(x), base(x))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert found.shape == expected.shape
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


def directed(y: Tensor) -> Tensor:
    """A loss, Σ y ⊙ d with d ~ N(0, 1), the same d for every y of this shape.

    It sees every entry of y and where it stands: Σ y² is blind to rotations of y, and Σ y to all but the sum.
    """
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return (y * direction.to(y.device, y.dtype)).sum()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equality bit for bit, dtype and shape included."""
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state, to compare with later."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def look_of(model: nn.Module) -> tuple[dict[str, type], dict[str, bool], dict[str, Tensor]]:
    """A model's modules, what of it is trained, and a copy of its state: all that a refused call must leave alone."""
    modules = {name: type(module) for name, module in model.named_modules()}
    return modules, {name: p.requires_grad for name, p in model.named_parameters()}, frozen_state(model)


def assert_looks(model: nn.Module, before: tuple[dict[str, type], dict[str, bool], dict[str, Tensor]]) -> None:
    """The model is bit for bit as it was when ``before`` was taken."""
    modules, trained, state = look_of(model)
    assert (modules, trained) == before[:2]
    assert state.keys() == before[2].keys()
    assert all(same_bits(value, before[2][key]) for key, value in state.items())


@contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """The block raises a PeanutError of one line that ``message`` matches, and leaves the model as it was."""
    before = look_of(model)
    with pytest.raises(PeanutError, match=message) as error:
        yield
    assert "\n" not in str(error.value).removesuffix(f"\n{error.value.detail}")
    assert_looks(model, before)
