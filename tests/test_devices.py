"""Every method on a GPU gives what it gives on the CPU; where there is none, the tests run on the CPU alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peanut import PeftModel, get_peft_model
from peanut.model.adapters.adapter_set import AdapterSet

from .support import (
    FIRST_CASES,
    Case,
    directed,
    distance,
    frozen_state,
    gradients,
    one_thread,  # noqa: F401
    randomised,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore:Net returned no loss")  # of methods with a penalty
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
one_case_a_kind = pytest.mark.parametrize("case", FIRST_CASES, ids=str)
one_case_a_method = pytest.mark.parametrize("case", [case for case in FIRST_CASES if case.kind == "linear"], ids=str)


def adapted_on(device: str, case: Case, dtype: torch.dtype) -> PeftModel:
    """The case's model, adapted where it lies."""
    return randomised(get_peft_model(case.net(dtype).to(device), case.config())).eval()


def on_the_cpu(case: Case, model: PeftModel) -> PeftModel:
    """The same model and adapter on the CPU, in float64."""
    exact = case.adapted()
    exact.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
    for own, found in zip(exact.buffers(), model.buffers(), strict=True):
        own.copy_(found)  # those that a state dict leaves out too
    return exact


@every_device
@one_case_a_kind
def test_a_step_in_bfloat16(case: Case, device: str) -> None:
    model, x = adapted_on(device, case, torch.bfloat16), case.input(torch.bfloat16)
    exact = on_the_cpu(case, model)
    expected = exact(x.double() if x.is_floating_point() else x)
    directed(expected).backward()
    y = model.train()(x.to(device))
    if case.method not in ("DIFF_PRUNING", "VARIATIONAL_LORA"):  # they draw at random while they train
        assert distance(y.cpu(), expected) < 20 * torch.finfo(torch.bfloat16).eps
    directed(y).backward()
    found = gradients(model)
    assert found.keys() >= gradients(exact).keys()
    assert all(grad.device.type == device and grad.isfinite().all() for grad in found.values())
    with torch.no_grad():  # twice, as the second is answered from what the first computed
        for y in [model.eval()(x.to(device)) for _ in range(2)]:
            assert distance(y.cpu(), expected) < 20 * torch.finfo(torch.bfloat16).eps


@every_device
@one_case_a_method
def test_gradients_are_those_of_the_cpu(case: Case, device: str) -> None:
    model, x = adapted_on(device, case, torch.float64), case.input()
    exact = on_the_cpu(case, model)
    directed(model(x.to(device))).backward()
    directed(exact(x)).backward()
    found, expected = gradients(model), gradients(exact)
    assert found.keys() == expected.keys() > set()
    assert all(distance(grad.cpu(), expected[name]) < 1e-11 for name, grad in found.items())


@every_device
@one_case_a_method
def test_merging_moving_and_files(case: Case, device: str, tmp_path: Path) -> None:
    model, x = adapted_on(device, case, torch.float32), case.input(torch.float32).to(device)
    expected, before = model(x), frozen_state(model)
    assert all(value.device.type == device for _, value in AdapterSet.of(model).parameters("default"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.net(torch.float32).to(device), tmp_path)
    assert same_bits(again(x), expected)
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-5
    model.unmerge_adapter()
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
    assert distance(model.cpu()(x.cpu()), expected.cpu()) < 1e-5
    assert same_bits(model.to(device)(x), expected)


@every_device
@one_case_a_method
def test_autocast_answers_in_its_dtype(case: Case, device: str) -> None:
    model, x = adapted_on(device, case, torch.float32), case.input(torch.float32).to(device)
    expected = model(x)
    with torch.autocast(device, torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert distance(y, expected) < 0.05
