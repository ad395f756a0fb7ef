"""Random sequences of public calls on a small Llama: after each step it answers as a model made anew.

The other model is made from the values as they are now: a fresh base with the base's values, the same adapters added,
the same ones active, nothing merged, and is called once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import LoraConfig, PeanutError, PeftConfig, PeftModel, get_peft_model

from .calls import in_threads, one_line
from .support import distance, one_thread, scattered  # noqa: F401
from .writing import ANY, OPTIMIZERS, Target, slots_of
from .writing.llama import IDS, TARGETS, config_of, generated, llama
from .writing.reference import FROM_BASE, answer_of, base_key, direction, is_of_base
from .writing.trial import noisy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* returned no loss"),
    pytest.mark.filterwarnings("ignore:adapter .* was merged, and is unmerged"),
]

STEPS = 40
METHODS = ["PEANUT", "LORA", "DORA", "HRA", "OFT", "BOFT", "VERA", "VBLORA", "MISS", "C3A", "RED", "IA3", "SHIRA"]
METHODS += ["FOURIERFT", "NONLINEAR_LORA", "MULTIPLICATIVE_LORA", "RANDLORA", "POLY", "ADALORA", "LN_TUNING"]
WAYS = [name for name in ANY if "functional_call" not in name]
DROPOUT = ", dropout"
"""Behind a method's name: with every dropout that its config has."""
SHIFT = {"RED"}
"""Methods that shift the output, also of layers without a bias."""
NEVER, PERHAPS, ALWAYS = "never", "perhaps", "always"


def config(method: str) -> PeftConfig:
    name, dropout, _ = method.partition(DROPOUT)
    if name == "DORA":
        found: PeftConfig = LoraConfig(r=3, use_dora=True, target_modules=TARGETS["linear"], task_type="CAUSAL_LM")
    else:
        found = config_of(name)
    if not dropout:
        return found
    return replace(found, **{each.name: 0.3 for each in fields(found) if each.name.endswith("dropout")})


class Sequence:
    """A model under random calls.

    Args:
        seed: of the choices.
        folder: where it may save.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.count = 0
        self.methods: dict[str, str] = {"a0": self.method()}
        self.model = get_peft_model(llama(), config(self.methods["a0"]), "a0").eval()
        self.fill("a0")
        self.base = self.values_of_base()
        self.inside = ExitStack()
        self.depth = 0
        self.done: list[str] = []
        self.moved = self.traced = self.answered_elsewhere = 0
        self.refusal = NEVER

    def method(self) -> str:
        """One of the methods, with dropout or without."""
        return self.random.choice(METHODS) + self.random.choice([DROPOUT, ""])

    # The other model

    def values_of_base(self) -> dict[str, Tensor]:
        return {base_key(key): v.detach().clone() for key, v in self.model.named_parameters() if is_of_base(key)}

    @torch.no_grad()
    def anew(self) -> PeftModel:
        base = llama()
        for key, value in base.named_parameters():
            value.copy_(self.base[key])
        first, *others = self.methods
        fresh = get_peft_model(base, config(self.methods[first]), first)
        for name in others:
            fresh.add_adapter(name, config(self.methods[name]))
        own = dict(self.model.named_buffers())
        for name in self.methods:
            values = dict(self.model.adapters.parameters(name))
            for key, value in fresh.adapters.parameters(name):
                if not key.endswith(FROM_BASE):
                    value.copy_(values[key])
        for key, value in fresh.named_buffers():
            if not key.endswith(FROM_BASE):
                value.copy_(own[key])
        fresh.set_adapter(self.model.active_adapters)
        return fresh.train(self.model.training)

    def assert_as_anew(self) -> None:
        """The answer is that of the other model, and so are the gradients where nothing is merged."""
        training, merged = self.model.training, self.model.merged_adapters
        if merged and any(self.methods[name].endswith((DROPOUT, "POLY")) for name in self.model.active_adapters):
            self.model.eval()  # what is merged draws nothing
        fresh, found = self.anew(), []
        traced = not merged and self.random.random() < 0.5
        self.traced += traced
        names = self.model.active_adapters
        for model in (self.model, fresh):
            torch.default_generator.manual_seed(3)
            with torch.set_grad_enabled(traced):
                y = answer_of(model(IDS))
            parts = {"answer": y.detach()}
            if traced:
                values = [
                    (f"{name}: {key}", value)
                    for name in names
                    for key, value in model.adapters.parameters(name)
                    if isinstance(value, torch.nn.Parameter)
                ]
                given = torch.autograd.grad(
                    y, [value.requires_grad_() for _, value in values], direction(y), allow_unused=True
                )
                parts |= {key: g for (key, _), g in zip(values, given, strict=True) if g is not None}
            found.append(parts)
        own, expected = found
        assert own.keys() == expected.keys(), self.done
        for key, value in expected.items():
            assert (own[key] - value).abs().max() <= 1e-7 * max(1.0, float(value.abs().max())), (key, self.done)
        with self.model.disable_adapter(), torch.no_grad():
            self.moved += distance(answer_of(self.model(IDS)), expected["answer"]) > 1e-3
        self.model.train(training)

    # What can be done

    def fill(self, name: str) -> None:
        values = (value for _, value in self.model.adapters.parameters(name) if isinstance(value, torch.nn.Parameter))
        scattered(values, self.random.randrange(1000), 0.3)

    def free(self) -> list[str]:
        """Adapters that are not merged."""
        return [name for name in self.methods if name not in self.model.merged_adapters]

    def steps(self) -> dict[str, Callable[[], Any]]:
        """What can be done now, by name."""
        merged, free = self.model.merged_adapters, self.free()
        possible: dict[str, Callable[[], Any]] = {
            "train": self.model.train,
            "eval": self.model.eval,
            "answer": self.answer,
            "learn": self.learn,
            "zero": self.zero,
            "set_adapter": self.activate,
            "disable": self.disable,
            "generate": self.generate,
            "answer elsewhere": self.answer_elsewhere,
            "set_adapter elsewhere": lambda: in_threads([self.activate]),
        }
        if self.depth:
            possible["leave"] = self.leave
        elif hasattr(self.model, "inference"):
            possible["enter"] = self.enter
        if not self.depth and free:
            possible |= {"write": self.write, "write again": self.write, "optimizer": self.step}
        if not merged:
            possible |= {"add": self.add, "save": self.save, "names": self.names, "merge": self.merge}
            possible |= {"load": self.load}
            possible |= {} if self.depth else {"write base": self.write_base, "write base again": self.write_base}
        else:
            possible |= {"unmerge": self.model.unmerge_adapter}
        if len(free) > 1 and len(self.methods) > 1:
            possible["delete"] = self.delete
        return possible

    def run(self) -> None:
        with self.inside:
            for _ in range(STEPS):
                possible = self.steps()
                name = self.random.choice(list(possible))
                self.done.append(name)
                self.refusal, refused = NEVER, None
                try:
                    possible[name]()
                except PeanutError as error:
                    self.done.append("refused")
                    refused = error
                assert refused is None or one_line(refused), self.done
                assert self.refusal in ((PERHAPS, NEVER) if refused is None else (PERHAPS, ALWAYS)), (
                    refused,
                    self.done,
                )
                self.assert_as_anew()

    @torch.no_grad()
    def answer(self) -> None:
        self.model(IDS)

    def learn(self) -> None:
        y = answer_of(self.model(IDS))
        if y.requires_grad:
            y.backward(direction(y))

    def zero(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.data.zero_()

    def activate(self) -> None:
        names = self.random.sample(list(self.methods), self.random.randint(1, min(2, len(self.methods))))
        self.model.set_adapter(names)  # what is merged and may not stay so is unmerged

    def disable(self) -> None:
        base = llama()
        base.load_state_dict(self.base)
        with self.model.disable_adapter(), torch.no_grad():
            assert distance(answer_of(self.model(IDS)), answer_of(base(IDS))) < 1e-9, self.done

    def generate(self) -> None:
        self.model.eval()
        assert distance(generated(self.model), generated(self.anew())) < 1e-7, self.done

    @torch.no_grad()
    def names(self) -> None:
        """Each row is what its adapter alone answers."""
        self.model.eval()
        names = [self.random.choice([*self.methods, "__base__"]) for _ in IDS]
        found, fresh = answer_of(self.model(IDS, adapter_names=names)), self.anew()
        for row, name in enumerate(names):
            if name == "__base__":
                with fresh.disable_adapter():
                    expected = answer_of(fresh(IDS))[row]
            else:
                fresh.set_adapter(name)
                expected = answer_of(fresh(IDS))[row]
            assert distance(found[row], expected) < 1e-7, (name, self.done)

    def answer_elsewhere(self) -> None:
        """Other threads are in no context of this one: neither disabled, nor is anything kept for them."""
        self.model.eval()
        expected, found = self.looked_at(), []
        assert distance(expected, answer_of(self.anew()(IDS))) < 1e-7, self.done
        with self.model.disable_adapter():
            in_threads([lambda: found.extend(self.looked_at() for _ in range(2))] * 2)
        assert len(found) == 4
        assert max(distance(each, expected) for each in found) < 1e-9, self.done
        self.answered_elsewhere += 1

    def enter(self) -> None:
        self.inside.enter_context(self.model.inference())
        self.depth += 1

    def leave(self) -> None:
        self.inside.close()
        self.depth = 0

    def trained_by(self, name: str) -> Callable[[str, Tensor], bool]:
        return lambda key, value: f".{name}." in f"{key}." and isinstance(value, torch.nn.Parameter)

    def write(self) -> None:
        """To one adapter, in a random way."""
        name, way = self.random.choice(self.free()), self.random.choice(WAYS)
        self.put(way, self.trained_by(name))

    def step(self) -> None:
        name, way = self.random.choice(self.free()), self.random.choice(list(OPTIMIZERS))
        self.put(way, self.trained_by(name))

    def write_base(self) -> None:
        way = self.random.choice(WAYS)
        some = self.random.choice(["q_proj.base_layer", "down_proj.base_layer", "lm_head", "input_layernorm"])
        self.put(way, lambda key, value: is_of_base(key) and some in key and isinstance(value, torch.nn.Parameter))
        self.base = self.values_of_base()

    def put(self, way: str, wanted: Callable[[str, Tensor], bool]) -> None:
        slots = slots_of(self.model, wanted)
        if slots:
            self.done.append(way)
            if way == "load_state_dict of the model" and self.model.merged_adapters:
                self.refusal = ALWAYS
            write = ANY[way](Target(self.model, slots, lambda given: self.anew()))
            self.answer()
            write([0.5 * value for value in noisy(slots, self.random.randrange(1000))])

    def add(self) -> None:
        if len(self.methods) < 4:
            self.count += 1
            name, method = f"a{self.count}", self.method()
            self.model.add_adapter(name, config(method))
            self.methods[name] = method
            self.done.append(method)
            self.fill(name)

    def delete(self) -> None:
        name = self.random.choice(self.free())
        self.model.delete_adapter(name)
        del self.methods[name]
        if not self.model.active_adapters:
            self.model.set_adapter(next(iter(self.methods)))

    def merge(self) -> None:
        if any(self.methods[name].removesuffix(DROPOUT) in SHIFT for name in self.model.active_adapters):
            self.refusal = ALWAYS
        self.model.merge_adapter()

    def saved(self) -> Path:
        self.count += 1
        folder = self.folder / str(self.count)
        self.model.save_pretrained(folder)
        return folder

    def save(self) -> None:
        """All adapters, read again onto a fresh base."""
        folder, base = self.saved(), llama()
        base.load_state_dict(self.base)
        first, *others = self.methods
        again = PeftModel.from_pretrained(base, folder / first, first)
        for name in others:
            again.load_adapter(folder / name, name)
        again.set_adapter(self.model.active_adapters)
        self.model.eval()
        with torch.no_grad():
            assert distance(answer_of(again.eval()(IDS)), answer_of(self.model(IDS))) < 1e-7, self.done

    def load(self) -> None:
        """One adapter as it was, into its name, after it was written to."""
        folder, name = self.saved(), self.random.choice(list(self.methods))
        self.model.eval()
        before = self.looked_at()
        if not self.depth:
            self.put("data.copy_", self.trained_by(name))
        self.model.load_adapter(folder / name, name)
        assert distance(self.looked_at(), before) < 1e-9, self.done

    @torch.no_grad()
    def looked_at(self) -> Tensor:
        return answer_of(self.model(IDS))


@pytest.fixture(params=range(16))
def sequence(request: pytest.FixtureRequest, tmp_path: Path) -> Sequence:
    return Sequence(request.param, tmp_path)


def test_random_sequence(sequence: Sequence) -> None:
    sequence.run()
    assert sequence.moved >= 0.8 * STEPS  # a wrong answer would show
    assert sequence.traced >= 1
    assert len(set(sequence.done) & {*sequence.steps(), "leave", "unmerge"}) >= 8
