"""What the benchmark compares: a stack of layers frozen, adapted by this library, and adapted by Hugging Face PEFT."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import methods as _methods  # noqa: F401 - registers them
from ..errors import PeanutError
from ..model.injection import get_peft_model_state_dict
from ..model.peft_model import PeftModel, get_peft_model
from ..protocols import METHODS, Method, PeftConfig, WeightMethod, method_of
from ..protocols.config import check_whole
from .measure import now, peak_bytes, repeated, saved_bytes

__all__ = [
    "By",
    "Settings",
    "Variant",
    "compared",
    "configs_of",
    "frozen_stack",
    "moved",
    "peer_of",
    "peer_version",
    "variants_of",
]

By = Literal["frozen", "peanut", "peft"]


def _on_layers(method: Method[Any]) -> bool:
    """Whether a method can be measured on plain linear layers: it changes them, alike for every sample."""
    return "linear" in method.kinds and isinstance(method, WeightMethod) and not (method.follows_ties or method.mixes)


def _on_models(method: Method[Any]) -> bool:
    """Whether a method has to be measured in a whole model."""
    return not isinstance(method, WeightMethod) or method.mixes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Args:
        stack: what is run: plain linear ``layers``, or a ``transformer``, for methods that change an output or the
            input and for mixtures.
        methods: which methods, by name in any case; all that need the stack if ``None``. LORA is always among them, as
            the yardstick.
        tokens: how many a training step reads.
        rank: r of the methods that have one.
        depth: the depths at which a method that has one is measured.
        dims: the stack's two widths; a block is two linear layers, there and back.
        blocks: how many blocks.
        dtype: of weights and activations; trained parameters are in float32 at least.
        device: as torch names it.
        repeats: how many rounds.
        threads: of the CPU.

    Raises:
        PeanutError: a value is out of range, or the device is not there.
    """

    stack: Literal["layers", "transformer"] = "layers"
    methods: Sequence[str] | None = None
    tokens: int = 2048
    rank: int = 16
    depth: Sequence[int] = (0, 2)
    dims: Sequence[int] = (768, 3072)
    blocks: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 20
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        if self.stack not in ("layers", "transformer"):
            raise PeanutError(f"--stack {self.stack}", "layers or transformer", "choose one")
        fits = _on_layers if self.stack == "layers" else _on_models
        named = [name for name, method in METHODS.items() if fits(method)] if self.methods is None else self.methods
        methods = {method.name: method for method in (method_of(name, "--methods") for name in named)}
        for name, method in methods.items():
            if self.stack == "layers" and not _on_layers(method):
                raise PeanutError(
                    f"{name} does not change linear layers by themselves",
                    "a method that does",
                    "leave it out of --methods, or take --stack transformer",
                )
        ordered = {"methods": sorted({*methods, "LORA"}), "depth": self.depth, "dims": self.dims}
        for name, values in ordered.items():
            object.__setattr__(self, name, tuple(values))
        for name in ("tokens", "rank", "blocks", "repeats", "threads"):
            check_whole(f"--{name}", getattr(self, name), least=1)
        for width in self.dims:
            check_whole("--dims", width, least=1)
        for depth in self.depth:
            check_whole("--depth", depth, least=0)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an assertion is how torch says that it was built without CUDA
            reason = str(error).splitlines()[0]
            raise PeanutError(f"--device {self.device}: {reason}", "a device of this machine", "try cpu") from None

    @property
    def changed(self) -> dict[str, object]:
        """What differs from the default of its stack, by name; the number of threads apart."""
        default = Settings(stack=self.stack, threads=self.threads)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        differs = {name: value for name, value in values.items() if value != getattr(default, name)}
        return ({"stack": self.stack} if self.stack != "layers" else {}) | differs


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


def configs_of(names: Sequence[str], rank: int, depths: Sequence[int]) -> dict[str, PeftConfig]:
    """The configs to measure, by the name that tables give them; a method with a depth comes at each of ``depths``.

    Raises:
        PeanutError: there is no such method, or a value is out of range.
    """
    configs: dict[str, PeftConfig] = {}
    for name in names:
        method = method_of(name, "--methods")
        fields = {field.name for field in dataclasses.fields(method.config_class)}
        options: dict[str, Any] = _NEEDED.get(method.name, {}) | (
            {"r": rank} if "r" in fields and "oft_block_size" not in fields else {}
        )
        if "depth" in fields:
            for depth in depths:
                configs[f"{method.name} depth {depth}"] = method.config_class(**options | {"depth": depth})
        else:
            configs[method.name] = method.config_class(**options)
    return configs


_NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10_000},  # the peer makes no AdaLoRA without
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 32},
}
"""What a default config lacks on a stack of plain layers."""


def peer_version() -> str | None:
    """The version of Hugging Face PEFT, or ``None`` where it is not installed."""
    return str(importlib.import_module("peft").__version__) if importlib.util.find_spec("peft") else None


@dataclass
class Variant:
    """One way to run the stack, ready to be measured.

    Args:
        method: what is trained, as tables name it; empty for the frozen stack.
        by: whose implementation it is.
        model: what is called.
        stack: the frozen stack, or what became of it: a layer or its wrapper at each place.
        difference: of a peer's output from this library's, relative to the largest entry.
    """

    method: str
    by: By
    model: nn.Module
    stack: nn.Sequential
    difference: float | None = None

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
        start = now(x.device)
        y: Tensor = self.model(x)
        after_forward = now(x.device)
        y.backward(grad)
        after_backward = now(x.device)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = now(x.device)
        x.grad = None
        return {"forward": after_forward - start, "backward": after_backward - after_forward, "step": end - start}

    def token_probe(self, x: Tensor) -> Callable[[], dict[str, float]]:
        """A probe of the seconds that one token takes in evaluation; it leaves the model in eval mode."""
        self.model.eval()

        @torch.no_grad()
        def call() -> object:
            return self.model(x)

        call()
        probe = repeated(call, x.device)
        return lambda: {"token": probe()}

    def saved_bytes(self, x: Tensor) -> int:
        """Bytes that a forward keeps for the backward; every module of the stack counts as a layer."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        return saved_bytes(lambda: cast(Tensor, self.model(x)), self.stack, kept)

    def peak_bytes(self, x: Tensor, grad: Tensor) -> int:
        """The most memory that a training step takes beyond weights, optimiser state and input."""
        return peak_bytes(lambda: self.step(x, grad), x.device)


def variants_of(configs: Mapping[str, PeftConfig], build: Callable[[], nn.Sequential], x: Tensor) -> list[Variant]:
    """The frozen stack; then each config by this library and, where it is installed and has the method, by the peer.

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
        variants.append(Variant(name, "peanut", ours, stack))
        peer = _by_peer(name, config, build(), ours, x)
        if peer is not None:
            variants.append(peer)
    return variants


def _by_peer(name: str, config: PeftConfig, stack: nn.Sequential, ours: nn.Module, x: Tensor) -> Variant | None:
    """The peer's implementation with the parameters of ours, if there is one."""
    model = peer_of(name, stack, config.to_dict())
    if model is None:
        return None
    importlib.import_module("peft").set_peft_model_state_dict(model, get_peft_model_state_dict(ours))
    with torch.no_grad():
        difference = compared(name, ours(x), model(x))
    return Variant(name, "peft", model, stack, difference)


def moved(model: PeftModel) -> PeftModel:
    """The model with trained parameters that start at zero moved away from it.

    At zero this library and the peer would agree whatever they compute.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def peer_of(name: str, model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The model adapted by the peer, ``None`` where it is not installed or has no such method.

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


def compared(name: str, y: Tensor, theirs: Tensor) -> float:
    """How far the outputs of the two sides are apart, relative to the largest entry.

    Raises:
        PeanutError: too far for rounding.
    """
    difference = float((theirs.double() - y.double()).abs().max() / y.double().abs().max())
    allowed = max(1e-5, 10 * torch.finfo(y.dtype).eps)
    if not difference <= allowed:
        raise PeanutError(
            f"{name}: the output differs from that of peft {peer_version()} by {difference:.1e} of the largest entry",
            f"at most {allowed:.1e}, rounding in {y.dtype}",
            "the two cannot be compared: report this line",
        )
    return difference
