"""Variants that the benchmark compares in a stack of layers: frozen, adapted here, adapted by Hugging Face PEFT."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..model.injection import get_peft_model_state_dict
from ..model.peft_model import PeftModel, get_peft_model
from ..protocols import Method, PeftConfig, Trial
from .measure import now, peak_bytes, repeated, saved_bytes
from .settings import Settings, named

__all__ = [
    "By",
    "Life",
    "Settings",
    "Variant",
    "compared",
    "configs_of",
    "frozen_stack",
    "lives",
    "moved",
    "peer_of",
    "peer_version",
    "twin",
    "variants_of",
]

By = Literal["frozen", "peanut", "peft"]
Model = TypeVar("Model", bound=nn.Module)


def frozen_stack(narrow: int, wide: int, blocks: int, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """``blocks`` times the linear layers narrow → wide → narrow, frozen, with a GELU between any two.

    The weights are the same at every call.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(blocks):
            layers += [nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, narrow), nn.GELU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).to(device, dtype)


def twin(model: Model) -> Model:
    """A copy of a frozen model with the same memory for its weights."""
    memo: dict[int, Any] = {id(each): nn.Parameter(each.data, requires_grad=False) for each in model.parameters()}
    memo |= {id(each): each for each in model.buffers()}
    return copy.deepcopy(model, memo)


def configs_of(
    names: Sequence[str],
    rank: int,
    depths: Sequence[int],
    on: Trial | None = None,
    options: Callable[[Method[Any]], Mapping[str, Any]] = lambda method: {},
) -> dict[str, PeftConfig]:
    """The configs to measure, by the name that tables give them; a method with a depth comes at each of ``depths``.

    Args:
        names: which contestants.
        rank: r of the methods that have one.
        depths: of the methods that have one.
        on: what they are measured on; blocks and vectors are made to fit its weights.
        options: more of a method's config.

    Raises:
        PeanutError: there is no such method, it cannot be measured there, or a value is out of range.
    """
    configs: dict[str, PeftConfig] = {}
    for name in names:
        label, method, style = named(name)
        fields = {field.name for field in dataclasses.fields(method.config_class)}
        needed = method.tried(on or Trial())
        if needed is None:
            raise PeanutError(f"{label} cannot be measured on this", "a method that can", "leave it out")
        own = ({"r": rank} if "r" in fields else {}) | needed | dict(style) | dict(options(method))
        if "depth" in fields:
            for depth in depths:
                configs[f"{label} depth {depth}"] = method.config_class(**own | {"depth": depth})
        else:
            configs[label] = method.config_class(**own)
    return configs


def peer_version() -> str | None:
    """The version of Hugging Face PEFT, or ``None`` where it is not installed."""
    return str(importlib.import_module("peft").__version__) if importlib.util.find_spec("peft") else None


@dataclass(frozen=True)
class Life:
    """How an adapter comes into a model, and back from a folder.

    Args:
        base: gives a fresh frozen model.
        inject: makes the adapted model of it.
        read: the same with the adapter of a folder.
    """

    base: Callable[[], nn.Module]
    inject: Callable[[nn.Module], nn.Module]
    read: Callable[[nn.Module, Path], nn.Module]


@dataclass
class Variant:
    """One way to run the stack, ready to be measured.

    Args:
        method: what is trained, as tables name it; empty for the frozen stack.
        by: whose implementation it is.
        model: what is called.
        stack: the frozen stack's layers, or what became of them: a layer or its wrapper at each place.
        difference: of Hugging Face PEFT's output from this library's, relative to the largest entry.
        life: how it is made and read; ``None`` for the frozen stack.
        note: why Hugging Face PEFT's same is missing, where it has the method.
    """

    method: str
    by: By
    model: nn.Module
    stack: Iterable[nn.Module]
    difference: float | None = None
    life: Life | None = None
    note: str = ""

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)

    def step(self, x: Tensor, grad: Tensor) -> dict[str, float]:
        """Seconds of one training step.

        Args:
            x: the input, (1, tokens, narrow); its gradient is computed too, as below other layers.
            grad: the gradient of the output.
        """
        self.model.train()
        start = now(x.device)
        output = self.output(x, grad)
        after_forward = now(x.device)
        output.backward(*self.gradient(grad))
        after_backward = now(x.device)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = now(x.device)
        x.grad = None
        return {"forward": after_forward - start, "backward": after_backward - after_forward, "step": end - start}

    def output(self, x: Tensor, grad: Tensor | None = None) -> Tensor:
        """What a forward gives: what is run backward with ``grad``, or in evaluation without."""
        return cast(Tensor, self.model(x))

    def gradient(self, grad: Tensor) -> list[Tensor]:
        """What a backward starts from."""
        return [grad]

    def token_probe(self, x: Tensor) -> Callable[[], dict[str, float]]:
        """A probe of the seconds that one token takes in evaluation; it leaves the model in eval mode."""
        return self.evaluation_probe("token", x)

    def evaluation_probe(self, quantity: str, x: Tensor) -> Callable[[], dict[str, float]]:
        """A probe of the seconds that ``x`` takes in evaluation; it leaves the model in eval mode."""
        self.model.eval()

        @torch.no_grad()
        def call() -> object:
            return self.output(x)

        with self.inference():
            call()
            probe = repeated(call, x.device)

        def measured() -> dict[str, float]:
            with self.inference():
                call()  # fills the cache
                return {quantity: probe()}

        return measured

    def inference(self) -> AbstractContextManager[object]:
        """Within the context evaluation caches what it computes, as on a server; PEFT has no such context."""
        return self.model.inference() if isinstance(self.model, PeftModel) else nullcontext()

    def saved_bytes(self, x: Tensor) -> int:
        """Bytes that a forward keeps for the backward; every module of the stack counts as a layer."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        return saved_bytes(lambda: self.output(x), self.stack, kept)

    def peak_bytes(self, x: Tensor, grad: Tensor) -> int:
        """The most memory that a training step takes beyond weights, optimiser state and input."""
        return peak_bytes(lambda: self.step(x, grad), x.device)

    def evaluation_bytes(self, x: Tensor) -> int:
        """The most memory that the first forward in evaluation takes, with what is computed once for all that follow.

        It leaves the model in eval mode.
        """
        self.model.eval()
        with torch.no_grad(), self.inference():
            return peak_bytes(lambda: self.output(x), x.device)


def variants_of(configs: Mapping[str, PeftConfig], build: Callable[[], nn.Sequential], x: Tensor) -> list[Variant]:
    """The frozen stack; then each config by this library and, where it is installed and has the method, by PEFT.

    Args:
        configs: by name.
        build: makes the frozen stack, the same at every call.
        x: an input, on which the two sides of a config must agree.

    Raises:
        PeanutError: they do not.
    """
    stack = build()
    variants = [Variant("", "frozen", stack, stack)]
    targets = [name for name, module in stack.named_children() if isinstance(module, nn.Linear)]
    for name, untargeted in configs.items():
        config = dataclasses.replace(untargeted, target_modules=targets)
        stack = build()
        ours = moved(get_peft_model(stack, config))
        life, their_life = lives(build, config, config.to_dict(), x.device)
        own = Variant(name, "peanut", ours, stack, life=life)
        variants.append(own)
        stack = build()
        try:
            theirs = peer_of(name, stack, config.to_dict())
        except PeanutError as error:
            own.note = str(error)
            continue
        if theirs is not None:
            importlib.import_module("peft").set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
            with torch.no_grad():
                difference = compared(name, ours(x), theirs(x))
            variants.append(Variant(name, "peft", theirs, stack, difference, their_life))
    return variants


def lives(
    build: Callable[[], nn.Module], config: PeftConfig, theirs: Mapping[str, Any], device: torch.device
) -> tuple[Life, Life]:
    """How an adapter is made and read by this library, and by Hugging Face PEFT from the values ``theirs``."""

    def their_injection(base: nn.Module) -> nn.Module:
        peft: Any = importlib.import_module("peft")
        model: nn.Module = peft.get_peft_model(base, peft.get_peft_config(dict(theirs)))
        return model

    def their_reading(base: nn.Module, folder: Path) -> nn.Module:
        peft: Any = importlib.import_module("peft")
        model: nn.Module = peft.PeftModel.from_pretrained(base, folder, torch_device=str(device))
        return model

    ours = Life(build, lambda base: get_peft_model(base, config), PeftModel.from_pretrained)
    return ours, Life(build, their_injection, their_reading)


def moved(model: PeftModel) -> PeftModel:
    """The model with trained parameters that start at zero moved away from it.

    At zero this library and Hugging Face PEFT would agree whatever they compute.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def peer_of(name: str, model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The model adapted by Hugging Face PEFT, ``None`` where it is not installed or has no such method.

    Raises:
        PeanutError: it refuses the config.
    """
    if peer_version() is None:
        return None
    peft: Any = importlib.import_module("peft")
    if config["peft_type"] not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        return None
    try:
        return peft.get_peft_model(model, peft.get_peft_config(dict(config)))
    except (ValueError, TypeError) as error:
        raise PeanutError(f"{name}: peft {peer_version()} refuses this config: {error}") from None


def compared(name: str, y: Tensor, theirs: Tensor, rounding: float = 1e-5) -> float:
    """How far the outputs of the two sides are apart, relative to the largest entry.

    Args:
        name: the method's, for the error.
        y, theirs: the two outputs.
        rounding: how far they may be apart in float32; in shorter dtypes ten times their precision is allowed.

    Raises:
        PeanutError: too far for rounding.
    """
    difference = float((theirs.double() - y.double()).abs().max() / y.double().abs().max())
    allowed = max(rounding, 10 * torch.finfo(y.dtype).eps)
    if not difference <= allowed:
        raise PeanutError(
            f"{name}: the output differs from that of peft {peer_version()} by {difference:.1e} of the largest entry",
            f"at most {allowed:.1e}, rounding in {y.dtype}",
            "the two cannot be compared: report this line",
        )
    return difference
