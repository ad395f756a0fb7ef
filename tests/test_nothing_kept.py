"""After a call nothing that was computed from parameters is alive; and what follows from that for training and DoRA."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeftModel, get_peft_model
from peanut.weights import kind_of

from .support import (  # noqa: F401
    CASES,
    FIRST_CASES,
    INPUTS,
    LAYERS,
    PEER_WARNINGS,
    Case,
    Net,
    distance,
    one_thread,
    randomised,
)
from .writing.llama import ADAPT, IDS, adapted_llama, generated
from .writing.reference import answer_of, direction

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:.* returned no loss")]

DORA = [case for case in CASES if case.variant.name == "dora"]


@pytest.fixture(scope="module", autouse=True)
def only_new_objects() -> Iterator[None]:
    """What is there already is not looked at, nor walked over by each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> dict[int, Tensor]:
    """Every floating-point tensor that Python knows of, made since the module began."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return {id(each): each for each in found if each.is_floating_point() or each.is_complex()}


def assert_nothing_stays(model: Any, call: Callable[[Any], Any]) -> None:
    """A call leaves no tensor but its gradients; ``model`` was called before, so that what is made once is there."""
    before = alive()
    call(model)
    gradients = {id(parameter.grad) for parameter in model.parameters()}
    left = [tuple(each.shape) for key, each in alive().items() if key not in before and key not in gradients]
    assert not left, left


@torch.no_grad()
def answered(model: Any, x: Tensor) -> None:
    answer_of(model(x))


def learned(model: Any, x: Tensor) -> None:
    y = answer_of(model(x))
    y.backward(direction(y))


def thrown_away(model: Any, x: Tensor) -> None:
    """A forward whose loss nobody asks for."""
    answer_of(model(x))


CALLS = [answered, learned, thrown_away]


def write(model: Any) -> None:
    """Other values, as torch counts them: what was computed before is of no more use."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", [*FIRST_CASES, *DORA], ids=str)
def test_no_tensor_outlives_a_call(case: Case, training: bool) -> None:
    model, x = case.adapted().train(training), case.input()
    for call in CALLS:
        call(case.adapted().train(training), x)  # what torch and methods make once for all
        assert_nothing_stays(model, lambda own, call=call: call(own, x))
        write(model)
    assert distance(model(x), case.net()(x)) > 0.01


@pytest.mark.parametrize("case", ADAPT)
def test_no_tensor_outlives_a_call_of_a_llama(case: str) -> None:
    model = adapted_llama(case)
    kept_on_purpose = case == "XLORA"  # get_latest_scalings
    generated(adapted_llama(case))
    for call in (answered, learned, generated, learned):
        before = alive()
        call(model, IDS) if call is not generated else generated(model)
        known = {id(parameter.grad) for parameter in model.parameters()}
        if kept_on_purpose:
            known |= {id(model.get_latest_scalings())}
        left = [tuple(each.shape) for key, each in alive().items() if key not in before and key not in known]
        assert not left, left
        write(model)


# Training loops that write through .data


@pytest.mark.parametrize("case", [*[c for c in FIRST_CASES if c.kind in ("linear", "norm")], *DORA], ids=str)
def test_parameters_written_through_data_train_as_with_an_optimizer(case: Case) -> None:
    """p.data -= lr * p.grad.data with gradients zeroed in place, and a look without gradients after each step."""
    x = case.input()
    wanted = torch.randn(case.net()(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def losses(through_data: bool, training: bool) -> Tensor:
        torch.manual_seed(1)
        model = case.adapted().train(training)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = 0.3 / sum(parameter.numel() for parameter in trained) ** 0.5
        found = []
        for step in range(12):
            torch.default_generator.manual_seed(step)  # some methods draw
            loss = (model(x) - wanted).square().mean()
            found.append(loss.item())
            gradients = torch.autograd.grad(loss, trained, allow_unused=True) if not through_data else None
            if gradients is None:
                loss.backward()
            with torch.no_grad():
                torch.default_generator.manual_seed(step)
                seen = (model(x) - wanted).square().mean().item()
                for number, parameter in enumerate(trained):
                    if gradients is not None and gradients[number] is not None:
                        trained[number].sub_(rate * gradients[number])
                    elif gradients is None and parameter.grad is not None:
                        parameter.data -= rate * parameter.grad.data
                        parameter.grad.data.zero_()
                found.append(seen)
        return torch.tensor(found, dtype=torch.float64)

    for training in (True, False):
        expected = losses(False, training)
        assert distance(losses(True, training), expected) < 1e-6
        assert abs(expected[-1] / expected[0] - 1) > 1e-4


@pytest.mark.parametrize("mode", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["PEANUT", "LORA", "HRA", "OFT", "VERA"])
def test_a_fused_optimizer_trains_as_a_plain_one_in_eval(name: str, kind: Any, mode: str) -> None:
    case = next(case for case in FIRST_CASES if case.method == name)
    x = case.input()

    def losses(**options: bool) -> Tensor:
        torch.manual_seed(1)
        model = case.adapted()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = kind(trained, lr=0.02, **options)
        found = []
        for _ in range(6):
            for grad in (False, True, False):
                with torch.set_grad_enabled(grad):
                    loss = model(x).square().mean()
                found.append(loss.item())
                if grad:
                    optimizer.zero_grad(set_to_none=False)
                    loss.backward()
            optimizer.step()
        return torch.tensor(found, dtype=torch.float64)

    found = losses(fused=mode == "fused", foreach=mode == "foreach")
    assert distance(found, losses(fused=False, foreach=False)) < 1e-9
    assert distance(found[0::3], found[1::3]) < 1e-9
    assert distance(found[2::3], found[1::3]) < 1e-9
    assert abs(found[-1] / found[0] - 1) > 0.01


# DoRA's norms are those of the base as it is now


def dora_by_hand(model: PeftModel, x: Tensor, kind: str) -> Tensor:
    """y with W' = m (W + s B A) / ‖W + s B A‖ row by row, W being the base's now."""
    layer: Any = model.get_base_model().layer
    module, values = layer.base_layer, layer.values("default")
    own = kind_of(module)
    assert own is not None
    A, B = (v.flatten(1) for name, v in values.items() if name.split(".")[0][-2:] in ("_A", "_B"))
    W = own.matrix(module, module.weight)
    turned = W + layer.method_of("default")[1].scaling * B @ A
    W = values["lora_magnitude_vector"].reshape(-1, 1) * turned / turned.norm(dim=1, keepdim=True)
    net = Net(LAYERS[kind][next(iter(LAYERS[kind]))]()).double()
    net.load_state_dict({f"layer.{name}": value for name, value in module.state_dict().items()})
    with torch.no_grad():
        net.layer.weight.copy_(own.layout(net.layer, W))
        return net(x)


WRITES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "load_state_dict": lambda module, W: module.load_state_dict({**module.state_dict(), "weight": W}),
    "copy_": lambda module, W: module.weight.data.copy_(W),  # type: ignore[union-attr, operator]
    "setattr": lambda module, W: setattr(module, "weight", nn.Parameter(W.clone(), False)),
}


@pytest.fixture(params=DORA, ids=str)
def dora(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    return case


@pytest.mark.parametrize("way", WRITES)
def test_dora_over_a_base_written_since(dora: Case, way: str, tmp_path: Path) -> None:
    model, x = dora.adapted(), dora.input()
    with torch.no_grad():
        before = model(x)
        assert distance(before, dora_by_hand(model, x, dora.kind)) < 1e-10
    module = model.get_base_model().layer.base_layer
    W = module.weight.detach()
    WRITES[way](module, W + torch.randn(W.shape, dtype=W.dtype, generator=torch.Generator().manual_seed(3)))
    expected = dora_by_hand(model, x, dora.kind)
    assert distance(expected, before) > 0.02
    for training in (False, True):
        model.train(training)
        assert distance(model(x), expected) < 1e-10
        with torch.no_grad():
            assert distance(model(x), expected) < 1e-10
    model.eval().save_pretrained(tmp_path)
    base = dora.net()
    with torch.no_grad():
        base.layer.weight.copy_(module.weight)
    again = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert distance(again(x), expected) < 1e-10
        model.merge_adapter()
        assert distance(model(x), expected) < 1e-10
        model.unmerge_adapter()
        assert distance(model(x), expected) < 1e-10


def test_dora_over_a_written_base_goes_to_hugging_face_peft() -> None:
    from peanut.interop.to_peft import to_peft

    case = DORA[0]
    model, x = case.adapted(), case.input()
    with torch.no_grad():
        before = model(x)
        model.get_base_model().layer.base_layer.weight.data.add_(torch.randn(20, 12, dtype=torch.float64))
        expected = dora_by_hand(model, x, case.kind)
        assert distance(expected, before) > 0.02
        other = to_peft(model).eval()
        assert distance(other(x), expected) < 1e-10


def test_dora_trains_on_a_written_base() -> None:
    """The gradients are those of a model made on that base."""
    case = DORA[0]
    model, x = case.adapted().train(), case.input()
    answered(model, x)
    learned(model, x)
    model.zero_grad()
    W = torch.randn(20, 12, dtype=torch.float64)
    model.get_base_model().layer.base_layer.weight.data.copy_(W)
    base = case.net()
    base.layer.weight.data.copy_(W)
    fresh = get_peft_model(base, LoraConfig(r=3, use_dora=True, target_modules=["layer"])).train()
    values = dict(model.adapters.parameters("default"))
    with torch.no_grad():
        for key, value in fresh.adapters.parameters("default"):
            if isinstance(value, nn.Parameter):
                value.copy_(values[key])
    learned(model, x)
    learned(fresh, x)
    assert sum(isinstance(value, nn.Parameter) for value in values.values()) == 3
    for key, value in fresh.adapters.parameters("default"):
        if isinstance(value, nn.Parameter):
            assert distance(values[key].grad, value.grad) < 1e-9
            assert value.grad.abs().max() > 0
