"""Outputs kept for their own backward: gradients are right whatever becomes of the output, and no memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peanut import BOFTConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model
from peanut.lab.measure import saved_bytes
from peanut.operators.block_factors import BlockFactors
from peanut.operators.delta import shaped
from peanut.operators.householder import Householder
from peanut.operators.magnitude import MagnitudeDirection
from peanut.operators.rows import Rows
from peanut.operators.saved_outputs import SavedOutput, pulled_gain

from ..support import directed, distance, one_thread, same_bits  # noqa: F401

OUT, IN = 12, 8


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dora(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return MagnitudeDirection(weight, up, down, 0.7, gain, whole=True).joined(x, weight, bias)


def dora_written_out(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x @ (torch.diag(gain) @ (weight + 0.7 * up @ down)).T + bias


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "DoRA": (dora, dora_written_out, (drawn(OUT, 2, seed=2), drawn(2, IN, seed=3))),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def values_of(name: str, tokens: int, gain: Tensor) -> list[Tensor]:
    values = [drawn(2, tokens, IN, seed=5), drawn(OUT, IN, seed=6), drawn(OUT, seed=7), gain, *FUNCTIONS[name][2]]
    return [value.clone().requires_grad_(value.shape != (OUT, IN)) for value in values]


def gradients(run: Callable[..., Tensor], values: list[Tensor], after: Callable[[Tensor], Tensor]) -> list[Tensor]:
    directed(after(run(*values))).backward()
    return [value.grad for value in values if value.grad is not None]


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "relu in place": nn.ReLU(inplace=True),
    "times in place": lambda y: y.mul_(3.0),
    "through a view": lambda y: y.view(-1).mul_(2.0),
}
GAINS = {"away from 0": 0.5 + drawn(OUT, seed=8).abs(), "one near 0": torch.linspace(0, 1, OUT, dtype=torch.float64)}


@every_function
@pytest.mark.parametrize("tokens", [1, 2, 9])  # fewer than either width, between them, more
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("after", AFTER)
def test_gradients_are_right_whatever_becomes_of_the_output(name: str, tokens: int, gain: str, after: str) -> None:
    fast, slow, _ = FUNCTIONS[name]
    values = values_of(name, tokens, GAINS[gain])
    found = gradients(fast, values, AFTER[after])
    expected = gradients(slow, values_of(name, tokens, GAINS[gain]), lambda y: AFTER[after](y.clone()))
    assert len(found) == len(values) - 1  # all but the weight's
    assert all(distance(one, other) < 1e-12 for one, other in zip(found, expected, strict=True))


@every_function
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_right_under_checkpointing(name: str, reentrant: bool) -> None:
    fast, slow, _ = FUNCTIONS[name]
    values = values_of(name, 5, GAINS["away from 0"])

    def block(*values: Tensor) -> Tensor:
        return fast(*values).relu_()

    found = gradients(lambda *given: checkpoint(block, *given, use_reentrant=reentrant), values, lambda y: y)
    expected = gradients(slow, values_of(name, 5, GAINS["away from 0"]), torch.relu)
    assert len(found) == len(values) - 1  # all but the weight's
    assert all(distance(one, other) < 1e-12 for one, other in zip(found, expected, strict=True))


@every_function
def test_what_the_next_layer_keeps_anyway_is_all_that_grows_with_the_tokens(name: str) -> None:
    fast, gelu = FUNCTIONS[name][0], nn.GELU()
    values = values_of(name, 500, GAINS["away from 0"])
    size = 1000 * OUT * 8
    assert saved_bytes(lambda: gelu(fast(*values)), [gelu], values) < size / 20
    assert saved_bytes(lambda: fast(*values), [], values) >= size  # where nothing else keeps it


@pytest.mark.parametrize("name", FUNCTIONS)
def test_16_bits_keep_nothing(name: str) -> None:
    fast, size = FUNCTIONS[name][0], 1000 * OUT * 8
    values = values_of(name, 500, GAINS["away from 0"])
    low = [value.detach().bfloat16().requires_grad_(value.requires_grad) for value in values]
    low[3] = values[3].detach().float().requires_grad_()
    assert saved_bytes(lambda: fast(*low), [], low) < size / 20


def test_the_mark_of_an_output_holds_no_memory_and_sees_every_change() -> None:
    y = torch.randn(4, 3)
    mark = SavedOutput(y)
    assert mark.counter.untyped_storage().nbytes() == 0
    assert mark.untouched()
    y.data.numpy()  # looking is allowed
    assert mark.untouched()
    y[1:].view(-1).zero_()
    assert not mark.untouched()
    assert y.shape == (4, 3)


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_pulled_gain_is_the_formula(tokens: int) -> None:
    z, b, grads = drawn(tokens, OUT), drawn(OUT, seed=2), drawn(tokens, OUT, seed=3)
    gain = GAINS["away from 0"]
    for y, bias in ((gain * z + b, b), (gain * z, None)):
        torch.testing.assert_close(pulled_gain(y, bias, gain, grads), (z * grads).sum(0), rtol=1e-12, atol=1e-12)


OPERATORS: dict[str, Callable[[], Any]] = {
    "decomposed": lambda: MagnitudeDirection(
        drawn(OUT, IN), drawn(OUT, 2), drawn(2, IN).requires_grad_(), 1.0, torch.ones(OUT, dtype=torch.float64), True
    ),
    "blocks": lambda: BlockFactors.diagonal(drawn(2, 4, 4).requires_grad_()),
    "butterfly": lambda: BlockFactors.butterfly(drawn(2, 2, 4, 4).requires_grad_()),
    "reflections": lambda: Householder.orthogonal(drawn(IN, 2).requires_grad_()),
    "rows of a head": lambda: Rows(drawn(2, IN).requires_grad_(), torch.tensor([3, 1]), OUT, head=True),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN)], ids=str)
def test_what_an_operator_gives_may_be_changed_in_place(name: str, shape: tuple[int, ...]) -> None:
    operator: Any = OPERATORS[name]()
    x, weight = drawn(*shape).requires_grad_(), drawn(OUT, IN)
    runs = [operator.apply] if name != "rows of a head" else [lambda x: operator.joined(x, weight, None)]
    if name in ("blocks", "butterfly"):
        runs.append(lambda x: operator.turned(x, weight, None))
    if name == "decomposed":
        runs.append(lambda x: operator.joined(x, weight, None))
        runs.append(lambda x: operator.rows(torch.arange(x.numel() // IN).view(x.shape[:-1])) * x.sum())
    assert runs
    for run in runs:
        expected = torch.autograd.grad(directed(run(x).square()), x)[0]
        assert distance(torch.autograd.grad(directed(run(x).pow_(2)), x)[0], expected) < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, r=2, init_lora_weights=False),
        BOFTConfig(boft_block_size=4),
        OFTConfig(oft_block_size=4),
        IA3Config(),
    ],
    ids=lambda config: str(config.method),
)
def test_a_layer_before_an_activation_in_place_trains(config: Any) -> None:
    config.target_modules = ["0"]
    if isinstance(config, IA3Config):
        config.feedforward_modules = []
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace=True)).double(), config)
    found = []
    for inplace in (True, False):
        activation: Any = model.get_submodule("base_model.model.1")
        activation.inplace = inplace
        model.zero_grad()
        directed(model(drawn(2, 5, IN))).backward()
        found.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert found[0]
    assert all(distance(one, other) < 1e-12 for one, other in zip(*found, strict=True))


def test_shaped_is_no_view() -> None:
    y = drawn(6, OUT)
    assert not shaped(y, (2, 3))._is_view()
    assert shaped(y, (2, 3)).shape == (2, 3, OUT)
    assert shaped(y[:1], ()).shape == (OUT,)


def test_outputs_that_nobody_else_may_keep_are_kept_only_where_they_are_small() -> None:
    assert [out for out in (16, 32, 33, 64, 65, 256) if SavedOutput.cheap((out, 64))] == [16, 32, 65, 256]


@every_function
@pytest.mark.parametrize("tokens", [2, 9])
def test_second_derivatives(name: str, tokens: int) -> None:
    fast, _, _ = FUNCTIONS[name]
    values = values_of(name, tokens, GAINS["away from 0"])
    weight, trained = values.pop(1), values
    run = lambda x, *rest: fast(x, weight, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(run, trained)
    assert torch.autograd.gradgradcheck(run, trained)
