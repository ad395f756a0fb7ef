"""Merging into weights that lie where other tensors lie: only the adapted layer changes, and unmerging shares again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, OFTConfig, PeanutConfig, get_peft_model

from ...support import directed, distance, gradients, one_thread, randomised, same_bits  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*returned no loss"),
    pytest.mark.filterwarnings("ignore:.*(holds the weight of|shares its weight with)"),
]

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
METHODS: dict[str, Callable[..., Any]] = {
    "LORA": lambda targets: LoraConfig(r=2, target_modules=targets, bias="lora_only"),
    "PEANUT": lambda targets: PeanutConfig(r=2, target_modules=targets),
    "OFT": lambda targets: OFTConfig(r=0, oft_block_size=4, target_modules=targets),
}


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(x).tanh()).tanh())
        return y @ self.kept if "kept" in self._buffers else y


def by_data(net: Any) -> None:
    net.b.weight.data = net.a.weight.data


def transposed(net: Any) -> None:
    net.b.weight = nn.Parameter(net.a.weight.data.t())


def overlapping(net: Any) -> None:
    whole = torch.randn(12, 8)
    net.b.weight, net.a.weight = nn.Parameter(whole[4:]), nn.Parameter(whole[:8])


def three(net: Any) -> None:
    whole = torch.randn(20, 8)
    net.a.weight, net.b.weight, net.c.weight = (nn.Parameter(whole[4 * i : 4 * i + 8]) for i in range(3))


def expanded(net: Any) -> None:
    net.a.weight, net.b.bias = nn.Parameter(torch.randn(8, 1).expand(8, 8)), nn.Parameter(torch.randn(1).expand(8))


def sliding(net: Any) -> None:
    net.a.weight = nn.Parameter(torch.randn(15).as_strided((8, 8), (1, 1)))


def with_a_buffer(net: Any) -> None:
    net.register_buffer("kept", net.a.weight.data.t())


def biases(net: Any) -> None:
    net.b.bias, net.c.bias.data = net.a.bias, net.a.bias.data


SHARED = (by_data, transposed, overlapping, three, expanded, sliding, with_a_buffer, biases)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)
@torch.no_grad()
def test_a_merge_changes_the_adapted_layers_alone(share: Callable[[Any], None], method: str) -> None:
    for targets in (["a"], ["b"], ["a", "b"]):
        net = Three()
        share(net)
        places = {name: (value, value.data_ptr()) for name, value in net.named_parameters(remove_duplicate=False)}
        before = {name: value.clone() for name, (value, _) in places.items()}
        model = randomised(get_peft_model(net, METHODS[method](targets))).eval()
        y = model(X)
        for _ in range(2):
            model.merge_adapter()
            assert distance(model(X), y) < 1e-5
            model.unmerge_adapter()
            assert same_bits(model(X), y)
        twin = copy.deepcopy(model)
        assert distance(twin.merge_and_unload()(X), y) < 1e-5
        base = model.unload()
        for name, value in base.named_parameters(remove_duplicate=False):
            assert value is places[name][0]
            assert value.data_ptr() == places[name][1]
            assert same_bits(value, before[name])


@torch.no_grad()
def test_what_is_cast_while_merged_stays_so() -> None:
    net = Three()
    by_data(net)
    model = randomised(get_peft_model(net, METHODS["LORA"](["a", "b"]))).eval()
    model.merge_adapter()
    model.double().unmerge_adapter()
    assert {value.dtype for value in model.parameters()} == {torch.float64}
    y = model(X.double())
    assert distance(model.merge_and_unload()(X.double()), y) < 1e-12


@torch.no_grad()
def test_parts_of_one_tensor_that_do_not_overlap_are_written_in_place() -> None:
    net, whole = Three(), torch.randn(24, 8)
    for layer, part in zip((net.a, net.b, net.c), whole.split(8), strict=True):
        layer.weight = nn.Parameter(part)
    model = randomised(get_peft_model(net, METHODS["PEANUT"](["b"]))).eval()
    y = model(X)
    model.merge_adapter()
    assert net.b.weight.data_ptr() == whole[8:].data_ptr()
    assert distance(model(X), y) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_inference_mode_is_trained_and_merged(method: str) -> None:
    with torch.inference_mode():
        net: Any = Three()
        net.c.weight = net.a.weight
        with_a_buffer(net)
    held = [net.a.weight, net.b.bias]
    usual: Any = Three()
    usual.c.weight = usual.a.weight
    with_a_buffer(usual)
    models = []
    for base in (net, usual):
        torch.manual_seed(1)
        models.append(randomised(get_peft_model(base, METHODS[method](["a"]))))
    found, wanted = (model(X) for model in models)
    assert same_bits(found, wanted)
    directed(found).backward()
    directed(wanted).backward()
    grads, others = (gradients(model) for model in models)
    assert grads.keys() == others.keys() != set()
    assert all(same_bits(grads[name], others[name]) for name in grads)
    with torch.no_grad():
        assert distance(models[0].eval().merge_and_unload()(X), found) < 1e-5
    assert not any(value.is_inference() for value in itertools.chain(net.parameters(), net.buffers(), held))


def test_only_what_is_written_is_untied() -> None:
    net = Three()
    net.b.bias = net.a.bias
    net.c.weight = net.a.weight
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    model.merge_and_unload()
    assert net.a.bias is net.b.bias
    assert net.a.weight is not net.c.weight
