"""Models for tests of what belongs to one call, and threads that call them in every way at once."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import (
    HRAConfig,
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)

from ..support import distance, randomised
from ..writing.llama import ADAPT, IDS, TARGETS, generated, llama
from ..writing.reference import answer_of

__all__ = ["MODELS", "Job", "Mlp", "in_threads", "interleaved", "jobs_of", "judged", "one_line", "run", "wrong_answers"]

Job = Callable[[], Tensor]
"""A call and what it answers with."""


@pytest.fixture(autouse=True, scope="module")
def interleaved() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Mlp(nn.Module):
    """Four layers; ``between`` is called after the first, with what the model was called with."""

    def __init__(self, size: int = 12) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(4))
        self.between: Callable[[Tensor], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number, layer in enumerate(self.layers):
            y = torch.tanh(layer(y)) if number else layer(y)
            if number == 0 and self.between is not None:
                self.between(x)
        return y


X = torch.randn(4, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mlp() -> PeftModel:
    """Adapters of four forms: a Δ, one that reads the weight, and two that turn the input."""
    layers = ["layers.0", "layers.1", "layers.2", "layers.3"]
    model = get_peft_model(Mlp().double(), LoraConfig(r=2, target_modules=layers), "a")
    model.add_adapter("b", PeanutConfig(r=3, depth=1, target_modules=layers))
    model.add_adapter("c", HRAConfig(r=2, target_modules=layers))
    model.add_adapter("d", OFTConfig(oft_block_size=4, target_modules=layers[1:]))
    return randomised(model).eval()  # type: ignore[no-any-return]


def poly() -> PeftModel:
    layers = ["layers.0", "layers.2"]
    model = get_peft_model(
        Mlp().double(), PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=layers), "a"
    )
    model.add_adapter("b", LoraConfig(r=2, target_modules=layers))
    return randomised(model).eval()  # type: ignore[no-any-return]


def prompted() -> PeftModel:
    """Virtual tokens, a prefix and a LoRA."""
    model = get_peft_model(llama(2), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.add_adapter("c", LoraConfig(r=2, target_modules=TARGETS["linear"], task_type="CAUSAL_LM"))
    return randomised(model).eval()  # type: ignore[no-any-return]


def gated() -> PeftModel:
    """X-LoRA over two experts ``a`` and ``b``."""
    return randomised(ADAPT["XLORA"](llama(2)), scale=0.3).eval()  # type: ignore[no-any-return]


def hooked() -> PeftModel:
    """Methods that change outputs."""
    model = randomised(ADAPT["BOTTLENECK"](llama(2)), scale=0.3)
    model.add_adapter("b", ADAPT["LOREFT"](llama(2)).peft_config["default"])
    model.add_adapter("c", LoraConfig(r=2, target_modules=TARGETS["linear"], task_type="CAUSAL_LM"))
    return randomised(model, ["b", "c"], scale=0.3).eval()  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], PeftModel]] = {
    "mlp": mlp,
    "poly": poly,
    "prompted": prompted,
    "gated": gated,
    "hooked": hooked,
}


def run(model: PeftModel, x: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        return answer_of(model(x, **how))


def jobs_of(name: str, model: PeftModel) -> dict[str, Job]:
    """Every way to call one of the ``MODELS``."""
    x = X if isinstance(model.get_base_model(), Mlp) else IDS
    names, rows = list(model.peft_config), len(x)
    tasks: list[dict[str, Any]] = [{}]
    if name == "poly":
        tasks = [{"task_ids": [0] * rows}, {"task_ids": [2, 0, 1, 1]}, {"task_ids": torch.tensor([1, 2, 2, 0])}]
    found: dict[str, Job] = {}
    for number, own in enumerate(tasks):
        found[f"plain {number}"] = lambda own=own: run(model, x, **own)
        for each in [*names, "__base__"]:
            found[f"{each} {number}"] = lambda each=each, own=own: run(model, x, adapter_names=[each] * rows, **own)
        for turn in range(2):
            mixed = [[*names, "__base__"][(row * 2 + turn) % (len(names) + 1)] for row in range(rows)]
            found[f"{mixed} {number}"] = lambda mixed=mixed, own=own: run(model, x, adapter_names=mixed, **own)
            found[f"gradient {mixed} {number}"] = lambda mixed=mixed, own=own: pulled(
                model, x, adapter_names=mixed, **own
            )
        found[f"gradient {number}"] = lambda own=own: pulled(model, x, **own)

        def disabled(own: dict[str, Any] = own) -> Tensor:
            with model.disable_adapter():
                return run(model, x, **own)

        found[f"disabled {number}"] = disabled
    if x is IDS:
        found["generate"] = lambda: generated(model)
        for each in [*names, "__base__"]:
            found[f"generate {each}"] = lambda each=each: generated(model, adapter_names=[each] * rows)

        def generated_disabled() -> Tensor:
            with model.disable_adapter():
                return generated(model)

        found["generate disabled"] = generated_disabled
    return found


def pulled(model: PeftModel, x: Tensor, **how: Any) -> Tensor:
    """The gradients of all that is trained, one after the other; what has none counts as zero."""
    y = answer_of(model(x, **how))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not y.requires_grad:
        return y
    found = torch.autograd.grad(y, trained, torch.ones_like(y).cumsum(-1), allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(trained, found, strict=True)]
    )


def in_threads(works: Sequence[Callable[[], Any]]) -> None:
    """Runs all at once, and raises what any of them raises."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def guarded(work: Callable[[], Any]) -> None:
        try:
            begin.wait(30)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def wrong_answers(jobs: dict[str, Job], count: int, threads: int = 8) -> list[str]:
    """Does ``count`` of the jobs, chosen at random, in some threads at once; names those that answered wrongly."""
    expected = {name: job() for name, job in jobs.items()}
    wrong: list[str] = []

    def work(number: int) -> None:
        chosen = random.Random(number)
        for _ in range(count // threads):
            name = chosen.choice(list(jobs))
            try:
                far = distance(jobs[name](), expected[name])
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}"[:200])
            else:
                if not far < 1e-9:
                    wrong.append(f"{name} by {far:.1e}")

    in_threads([lambda number=number: work(number) for number in range(threads)])
    return wrong


def one_line(error: BaseException) -> bool:
    """Whether it is an error of this library, told in one line."""
    return isinstance(error, PeanutError) and "\n" not in str(error).removesuffix(f"\n{error.detail}")


def judged(work: Callable[[], None], wrong: list[str], answered: list[str], times: Callable[[], bool]) -> None:
    """Does some work as long as it is to go on; names what is neither right (it returns) nor an error of one line."""
    while times():
        try:
            work()
        except Exception as error:  # noqa: PERF203 - judged here
            if not one_line(error):
                wrong.append(f"{type(error).__name__}: {error}"[:200])
        else:
            answered.append("")
