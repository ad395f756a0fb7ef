"""What torch makes of a computation with adapters: torch.func, forward-mode derivatives, several gradients, graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from peanut import PeanutError, PeftModel, PolyConfig, get_peft_model, inject_adapter_in_model
from peanut.protocols import METHODS, InputMethod, OutputMethod

from .dense import layer_of, written_out
from .support import FIRST_CASES, Case, Net, distance, one_thread, randomised, same_bits, scattered  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap by a loop
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # a trace asks for every attribute
    pytest.mark.filterwarnings("ignore:Net returned no loss"),  # of methods with a penalty
]
TIGHT = 1e-8
"""In traces too, which keep numbers in fewer digits."""
one_case_a_kind = pytest.mark.parametrize("case", FIRST_CASES, ids=str)
LINEAR = [case for case in FIRST_CASES if case.kind == "linear"]
RANDOM = ("DIFF_PRUNING", "POLY", "VARIATIONAL_LORA")
"""Methods that draw random numbers in training."""


def own(model: nn.Module) -> dict[str, Tensor]:
    """What is trained."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def flat(values: Any) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def gradient(model: PeftModel, x: Tensor, direction: Tensor) -> Tensor:
    """That of ⟨model(x), direction⟩ with respect to what is trained, by autograd."""
    trained = [value for value in model.parameters() if value.requires_grad]
    return flat(torch.autograd.grad(model(x), trained, direction, allow_unused=True, materialize_grads=True))


@one_case_a_kind
def test_torch_func(case: Case) -> None:
    model, x = case.adapted(), case.input()
    values, direction = own(model), torch.randn_like(model(x))
    expected = gradient(model, x, direction)

    def called(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,))  # type: ignore[no-any-return]

    def loss(values: dict[str, Tensor], x: Tensor, direction: Tensor) -> Tensor:
        return (called(values, x) * direction).sum()

    assert distance(flat(grad(loss)(values, x, direction).values()), expected) < TIGHT
    each = vmap(grad(loss), in_dims=(None, 0, 0))(values, x[:, None], direction[:, None])
    assert distance(flat(value.sum(0) for value in each.values()), expected) < TIGHT
    with torch.no_grad():
        assert distance(vmap(model)(torch.stack([x, x.flip(0)])), torch.stack([model(x), model(x.flip(0))])) < TIGHT
        others = {name: value * 1.5 for name, value in values.items()}
        both = {name: torch.stack([value, others[name]]) for name, value in values.items()}
        several = vmap(called, in_dims=(0, None))(both, x)
    assert distance(several, torch.stack([model(x), called(others, x)])) < TIGHT
    # ⟨J t, d⟩ = ⟨t, Jᵀ d⟩
    tangents = {name: torch.randn_like(value) for name, value in values.items()}
    through = (flat(tangents.values()) * expected).sum()
    forward = jvp(lambda values: called(values, x), (values,), (tangents,))[1]
    assert distance((forward * direction).sum(), through) < TIGHT
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, tangents[name]) for name, value in values.items()}
        found = forward_ad.unpack_dual(called(dual, x)).tangent
    assert distance((found * direction).sum(), through) < TIGHT


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_derivatives_by_the_input(case: Case) -> None:
    model, x = case.adapted(), case.input()[:1, :2]
    layer = layer_of(model)

    def dense(x: Tensor) -> Tensor:
        return written_out(case, layer, ["default"], x)

    expected = torch.autograd.functional.jacobian(dense, x)
    for found in (
        jacrev(model)(x),
        jacfwd(model)(x),
        torch.autograd.functional.jacobian(model, x, vectorize=True),
        torch.autograd.functional.jacobian(model, x, vectorize=True, strategy="forward-mode"),
    ):
        assert distance(found, expected) < TIGHT
    curved = hessian(lambda x: model(x).pow(3).sum())(x[:, :1])
    assert distance(curved, torch.autograd.functional.hessian(lambda x: dense(x).pow(3).sum(), x[:, :1])) < TIGHT


@one_case_a_kind
def test_several_gradients_at_once(case: Case) -> None:
    model, x = case.adapted(), case.input()
    trained = [value for value in model.parameters() if value.requires_grad]
    directions = torch.randn(2, *model(x).shape, dtype=torch.float64)
    found = torch.autograd.grad(model(x), trained, directions, is_grads_batched=True, allow_unused=True)
    expected = [torch.autograd.grad(model(x), trained, each, allow_unused=True) for each in directions]
    assert any(value is not None for value in found)
    for value, *others in zip(found, *expected, strict=True):
        assert value is None or distance(value, torch.stack(others)) < TIGHT


def traced(model: PeftModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, (x,))  # type: ignore[no-any-return]


def traced_in_inference(model: PeftModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    with torch.no_grad(), model.inference():
        model(x)
        return traced(model, x)


def traced_in_training(model: PeftModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    graph: Any = traced(model.train(), x)
    model.eval()
    return graph  # type: ignore[no-any-return]


def exported(model: PeftModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    made = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return made.module()


GRAPHS: list[tuple[Case, Any]] = [(case, traced) for case in LINEAR]
GRAPHS += [(case, traced_in_inference) for case in LINEAR]
GRAPHS += [(case, traced_in_training) for case in LINEAR if case.method not in RANDOM]
GRAPHS += [(case, exported) for case in LINEAR]


@pytest.mark.parametrize(("case", "make"), GRAPHS, ids=[f"{case}-{make.__name__}" for case, make in GRAPHS])
def test_a_graph_serves_other_inputs(case: Case, make: Callable[..., Any]) -> None:
    """Of any number of samples, and after a step where it shares the weights."""
    model, x = case.adapted(), case.input()
    twin, many = copy.deepcopy(model), torch.cat([x.flip(0)] * 20)
    graph = make(model, x)
    assert same_bits(model(x), twin(x))  # the model itself is as it was
    assert distance(graph(x), twin(x)) < TIGHT
    assert distance(graph(many), twin(many)) < TIGHT
    scattered((value for value in model.parameters() if value.requires_grad), scale=0.1)
    assert distance(model(x), twin(x)) > 1e-3
    assert distance(graph(many), model(many)) < TIGHT


BEYOND = [method for method in METHODS.values() if isinstance(method, (OutputMethod, InputMethod))]


@pytest.mark.parametrize("method", BEYOND, ids=lambda method: method.name)
def test_a_trace_of_what_changes_no_weight_serves_other_batches(method: Any, tiny_llama: Callable[..., Any]) -> None:
    """Of other lengths and padding, although what such a method does depends on where a row's tokens are."""
    options = {
        "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
        "BOTTLENECK": {"init_weights": "bert"},
        "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
        "DIREFT": {"init_weights": False, "positions": 3},
        "LOREFT": {"init_weights": False, "positions": 3},
    }.get(method.name, {"num_virtual_tokens": 3})
    config = method.config_class(task_type="CAUSAL_LM", **options)
    model = randomised(get_peft_model(tiny_llama(), config), scale=0.2).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # type: ignore[no-any-return]

    def batch(rows: int, tokens: int, padding: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, :padding] = 0
        return torch.arange(3, 3 + rows * tokens).reshape(rows, tokens), mask

    called = Logits()
    with torch.no_grad():
        plain = tiny_llama()(*batch(2, 4, 0)).logits
        assert distance(called(*batch(2, 4, 0))[:, -4:], plain) > 1e-3
        graph: Any = torch.jit.trace(called, batch(2, 4, 1), check_trace=False)
        for other in (batch(2, 4, 1), batch(2, 4, 0), batch(3, 9, 4), batch(1, 12, 2)):
            assert distance(graph(*other), called(*other)) < 1e-5


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_make_fx(case: Case) -> None:
    model, x = case.adapted(), case.input()
    with torch.no_grad():
        graph = make_fx(model)(x)
    assert distance(graph(x.flip(0)), model(x.flip(0))) < TIGHT


@pytest.mark.parametrize("case", [case for case in LINEAR if case.method in RANDOM], ids=str)
def test_a_graph_of_training_draws_anew(case: Case) -> None:
    model, x = case.adapted(), case.input()
    graph: Any = traced_in_training(model, x)
    assert distance(graph(x), graph(x)) > 1e-3


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace], ids=["script", "symbolic_trace"])
def test_what_reads_the_code_is_refused_in_one_line(make: Callable[..., Any], injected: bool) -> None:
    case = LINEAR[0]
    model: Any = inject_adapter_in_model(case.config(), case.net()) if injected else case.adapted()
    with pytest.raises(PeanutError, match=r"^torch\.(jit\.script|fx\.symbolic_trace)\b.*; use torch"):
        make(model)


def test_a_trace_keeps_no_names_of_one_batch() -> None:
    config = PolyConfig(target_modules=["layer"], n_tasks=3, n_skills=2, n_splits=1, r=2, init_weights=False)
    model, x = randomised(get_peft_model(Net(nn.Linear(6, 5)), config)).eval(), torch.randn(4, 6)

    class Asking(nn.Module):
        def __init__(self, **asked: Any) -> None:
            super().__init__()
            self.model, self.asked = model, asked

        def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
            return self.model(x, **self.asked if tasks is None else {"task_ids": tasks})  # type: ignore[no-any-return]

    for asked in ({"adapter_names": ["default"] * 4}, {"task_ids": [0, 1, 2, 0]}):
        with pytest.raises(PeanutError, match=r"within torch\.jit\.trace"):
            torch.jit.trace(Asking(**asked), (x,))
    tasks = torch.tensor([0, 1, 2, 0])
    graph: Any = torch.jit.trace(Asking(), (x, tasks), check_trace=False)
    for others in (tasks.flip(0), torch.tensor([2, 2, 1])):
        assert distance(graph(x[: len(others)], others), model(x[: len(others)], task_ids=others)) < 1e-5
