"""The settings of ``peanut bench`` and their command-line options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .. import methods as _methods  # noqa: F401 - registers them
from ..errors import PeanutError, nearest
from ..protocols import METHODS, Method, MixtureMethod, Trial, WeightMethod, method_of
from ..protocols.values import Count, Whole, check_value

__all__ = ["STACKS", "Settings", "Stack", "named", "settings_of"]


def _on_layers(method: Method[Any]) -> bool:
    """Whether a method can be measured on plain linear layers: it changes them, alike for every sample."""
    return "linear" in method.kinds and isinstance(method, WeightMethod) and not (method.follows_ties or method.mixes)


def _on_models(method: Method[Any]) -> bool:
    """Whether a method has to be measured in a whole model."""
    return not isinstance(method, WeightMethod) or method.mixes


@dataclass(frozen=True)
class Stack:
    """Something that can be run.

    Args:
        about: what it is.
        fits: whether a method is measured on it unless others are named.
        inference: the quantity of evaluation: one ``token`` through layers, the tokens that a model writes with a cache
            (``generate``, seconds a token), one row's ``answer``.
        usual: settings whose defaults differ from those of plain layers.
        asset: the packaged model whose weights it has; its sizes are then fixed.
        row: the most tokens in one row.
        targets: the layers that weight methods change, by the end of their names; ``None`` for a config's own default.
        norms, feed_forward: targets of the methods for norms, and where (IA)³ scales the input.
        last: the last block, for partial fine-tuning.
        biases: whether the layers have biases.
    """

    about: str
    fits: Callable[[Method[Any]], bool]
    inference: str
    usual: Mapping[str, Any] = field(default_factory=dict)
    asset: str = ""
    row: int | None = None
    targets: Sequence[str] | None = None
    norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm")
    feed_forward: Sequence[str] = ("down_proj",)
    last: str = ""
    biases: bool = False

    def trial(self, shapes: Sequence[Sequence[int]] = (), blocks: int = 1) -> Trial:
        """What a method has to know of it to be measured."""
        ends = self.feed_forward if self.targets is not None else ()
        kind = {"causal": self.inference == "generate", "head": self.inference == "answer", "biases": self.biases}
        return Trial(shapes=shapes, feed_forward=ends, blocks=blocks, **kind)

    def runs(self, method: Method[Any]) -> bool:
        """Whether a method can be measured on it; a mixture's experts here are those of a language model."""
        mixture = isinstance(method, MixtureMethod) and self.inference != "generate"
        layers = self.inference != "token" or _on_layers(method)
        return layers and not mixture and method.tried(self.trial()) is not None


_LLAMA = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
STACKS = {
    "layers": Stack("plain linear layers", _on_layers, "token", biases=True),
    "transformer": Stack("a small Llama, for what changes outputs or inputs, and mixtures", _on_models, "generate"),
    "minilm": Stack(
        "all-MiniLM-L6 with a head, on reviews",
        lambda method: True,
        "answer",
        {"dims": (384, 1536), "blocks": 6, "repeats": 8},
        asset="minilm",
        row=128,
        targets=["query", "key", "value", "output.dense", "intermediate.dense"],
        norms=["LayerNorm"],
        feed_forward=["intermediate.dense"],
        last="encoder.layer.5",
        biases=True,
    ),
    "smollm2": Stack(
        "SmolLM2-135M, on reviews",
        lambda method: True,
        "generate",
        {"tokens": 512, "dims": (576, 1536), "blocks": 30, "repeats": 5},
        asset="smollm2",
        targets=_LLAMA,
        last="layers.29",
    ),
    "llama-3.2-3b": Stack(
        "blocks of the shape of Llama-3.2-3B's, for a GPU",
        _on_layers,
        "generate",
        {"tokens": 4096, "dims": (3072, 8192), "blocks": 1, "dtype": "bfloat16", "device": "cuda"},
        targets=_LLAMA,
        last="layers.0",
    ),
}


def named(name: str) -> tuple[str, Method[Any], Mapping[str, Any]]:
    """A contestant: its own name, the method that it is, and the options that make it one of the method's styles.

    Raises:
        PeanutError: there is none of that name.
    """
    for method in METHODS.values():
        for style, field_name, value in method.styles:
            if style.casefold() == name.casefold():
                return style, method, {field_name: value}
    method = method_of(name, "--methods")
    return method.name, method, {}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; the defaults are those of plain layers, and ``settings_of`` gives any stack's.

    Args:
        stack: what is run, a key of ``STACKS``.
        methods: which contestants, by name in any case; all that the stack is for if ``None``. LORA is always among
            them, as the yardstick.
        tokens: how many a training step reads.
        rank: r of the methods that have one.
        depth: the depths at which a method that has one is measured.
        dims: the stack's two widths; a block of plain layers is two, there and back.
        blocks: how many blocks.
        dtype: of weights and activations; trained parameters are in float32 at least.
        device: as torch names it.
        repeats: how many rounds.
        threads: of the CPU.

    Raises:
        PeanutError: a value is out of range, or the device is not there.
    """

    stack: str = "layers"
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
        if self.stack not in STACKS:
            raise PeanutError(
                f"--stack {self.stack}", f"one of {', '.join(STACKS)}", f"nearest: {nearest(self.stack, STACKS)}"
            )
        ordered = {"methods": self._contestants(), "depth": self.depth, "dims": self.dims}
        for name, values in ordered.items():
            object.__setattr__(self, name, tuple(values))
        for name in ("tokens", "rank", "blocks", "repeats", "threads"):
            check_value(f"--{name}", Count, getattr(self, name))
        for width in self.dims:
            check_value("--dims", Count, width)
        for depth in self.depth:
            check_value("--depth", Whole, depth)
        self._check_sizes()
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an assertion is how torch says that it was built without CUDA
            reason = str(error).splitlines()[0]
            wanted = f"a GPU for --stack {self.stack}" if self.usual.get("device") else "a device of this machine"
            raise PeanutError(f"--device {self.device}: {reason}", wanted, "try --device cpu") from None

    def _contestants(self) -> list[str]:
        stack = STACKS[self.stack]
        if self.methods is None:
            fitting = [method for method in METHODS.values() if stack.fits(method) and stack.runs(method)]
            chosen = [name for method in fitting for name in (method.name, *(style for style, *_ in method.styles))]
        else:
            chosen = []
            for name, method, _ in map(named, self.methods):
                if not stack.runs(method):
                    others = [key for key, other in STACKS.items() if other.fits(method) and other.runs(method)]
                    raise PeanutError(
                        f"{method.name} does not change linear layers by themselves"
                        if self.stack == "layers"
                        else f"{method.name} cannot run on {stack.about}",
                        "a method that does",
                        f"leave it out of --methods{f', or take --stack {others[0]}' if others else ''}",
                    )
                chosen.append(name)
        return sorted({*chosen, "LORA"})

    def _check_sizes(self) -> None:
        """Packaged weights have their own sizes, and rows of a fixed length are filled."""
        stack = STACKS[self.stack]
        for name in ("dims", "blocks") if stack.asset else ():
            if getattr(self, name) != self.usual[name]:
                raise PeanutError(f"--{name} with --stack {self.stack}", "its own sizes", f"leave --{name} out")
        if stack.row and self.tokens > stack.row and self.tokens % stack.row:
            raise PeanutError(f"--tokens {self.tokens}", f"whole rows of {stack.row}", "take a multiple")

    @property
    def usual(self) -> Mapping[str, Any]:
        """The stack's defaults where they differ from those of plain layers."""
        return STACKS[self.stack].usual

    @property
    def changed(self) -> dict[str, object]:
        """What differs from the default of its stack, by name; the number of threads and the device apart."""
        default = settings_of(self.stack, threads=self.threads, device=self.device)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        differs = {name: value for name, value in values.items() if value != getattr(default, name)}
        return ({"stack": self.stack} if self.stack != "layers" else {}) | differs


def settings_of(stack: str = "layers", **given: Any) -> Settings:
    """A stack's settings: its defaults, and what is given."""
    usual = STACKS[stack].usual if stack in STACKS else {}
    return Settings(stack=stack, **{**usual, **given})
