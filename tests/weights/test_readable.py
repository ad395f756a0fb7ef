"""Weights that are no plain tensor of numbers: an adapter is right there, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model

from ..support import (  # noqa: F401
    FIRST_CASES,
    Case,
    Net,
    directed,
    distance,
    filled,
    gradients,
    one_thread,
    randomised,
    refused,
)

ON_LINEAR = [case for case in FIRST_CASES if case.kind == "linear"]
SOME = [case for case in ON_LINEAR if case.method in ("LORA", "OFT", "PEANUT", "BITFIT", "ROAD", "TRAINABLE_TOKENS")]


class Logged(Tensor):
    """A user's own class, which does all that a tensor does."""


class Coded(Tensor):
    """A weight as torchao has them: it answers to ``F.linear`` and to little else."""

    known = ("__get__", "__set__", "detach", "dim", "numel", "is_floating_point", "is_complex", "requires_grad_")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, Coded) else arg for arg in args]
        if func is F.linear:
            return func(*plain, **(kwargs or {}))
        if getattr(func, "__name__", "") in cls.known:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(f"Coded has no {func}")


class Scaled(nn.Linear):
    """Numbers of 8 bits and one scale, multiplied in the forward, as in checkpoints of 8-bit floats."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight.to(x.dtype), self.bias)


class Packed(nn.Linear):
    """A linear layer that keeps its weight under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes, self.bias)


class Own(nn.Linear):
    """A forward of its own that computes what a linear layer does."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x @ self.weight.T * scale + self.bias


def plain(numbers: Callable[[Tensor], Tensor] = lambda weight: weight, made: type[nn.Linear] = nn.Linear) -> Any:
    """A linear layer with ``numbers`` of a fixed weight."""
    torch.manual_seed(1)
    module = made(12, 20).double()
    module.weight = nn.Parameter(numbers(module.weight.detach()), requires_grad=False)
    return module


def packed() -> nn.Module:
    module = plain(made=Packed)
    module.register_buffer("codes", module.weight.detach().clone())
    del module.weight
    return module  # type: ignore[no-any-return]


def in_8_bits(weight: Tensor) -> Tensor:
    return weight.to(torch.float8_e4m3fn)


UNREAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "codes": (lambda: plain(lambda weight: weight.as_subclass(Coded)), plain),
    "sparse": (lambda: plain(Tensor.to_sparse_csr), plain),
    "8 bits": (lambda: plain(in_8_bits, Scaled), lambda: plain(lambda weight: 0.5 * in_8_bits(weight).double())),
    "packed": (packed, plain),
    "scaled": (lambda: plain(made=Scaled), lambda: plain(lambda weight: 0.5 * weight)),
}
"""Layers whose weight cannot be read, and for each a plain one that computes the same."""
READ: dict[str, Callable[[], nn.Module]] = {
    "logged": lambda: plain(lambda weight: weight.as_subclass(Logged)),
    "own": lambda: plain(made=Own),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    ("layer", "case"),
    [(layer, case) for layer in UNREAD for case in (ON_LINEAR if layer == "codes" else SOME)],
    ids=str,
)
def test_a_method_works_on_what_it_need_not_read_and_is_refused_elsewhere(case: Case, layer: str) -> None:
    (odd, dense), x = UNREAD[layer], case.input()
    expected = case.adapted()
    values = dict(expected.adapters.parameters("default"))
    expected = filled(get_peft_model(Net(dense()), case.config()).eval(), values)
    net = Net(odd())
    small = 1e-6 if layer == "8 bits" else 1e-11  # beside codes, adapters are stored in float32
    assert distance(net(x), Net(dense())(x)) < 1e-11
    reads = case.method in ("PEANUT", "LN_TUNING", "MULTIPLICATIVE_LORA", "TRAINABLE_TOKENS")
    if reads:
        with pytest.raises(
            PeanutError, match=f"^{case.method}.*expected a weight that can be read as a matrix"
        ) as found:
            get_peft_model(net, case.config())
        assert "\n" not in str(found.value)
        assert net.layer.__class__ is odd().__class__
        return
    model = filled(get_peft_model(net, case.config()).eval(), values)
    assert distance(model(x), expected(x)) < small
    directed(model(x)).backward()
    directed(expected(x)).backward()
    own = gradients(expected)
    assert own
    assert all(distance(gradients(model)[name], own[name]) < small for name in own if own[name].any())
    if layer != "packed":
        with pytest.raises(PeanutError, match=r"^'layer': .* expected a weight that can be read as a matrix"):
            model.merge_adapter()
        assert distance(model(x), expected(x)) < small


@pytest.mark.parametrize("layer", READ)
@pytest.mark.parametrize("case", ON_LINEAR, ids=str)
def test_what_behaves_as_a_plain_weight_does_is_none_the_less_read_and_merged(case: Case, layer: str) -> None:
    x = case.input()
    values = dict(case.adapted().adapters.parameters("default"))
    expected = filled(get_peft_model(Net(plain()), case.config()).eval(), values)
    model = filled(get_peft_model(Net(READ[layer]()), case.config()).eval(), values)
    assert distance(model(x), expected(x)) < 1e-12
    with torch.no_grad():
        model.merge_adapter()
        assert distance(model(x), expected(x)) < 1e-11
        model.unmerge_adapter()
        assert distance(model(x), expected(x)) < 1e-12


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LazyLinear(20), "'layer': a LazyLinear whose weight has no shape yet; .*; call it once$"),
        (
            lambda: nn.Linear(12, 20, dtype=torch.complex64),
            "'layer': a weight of torch.complex64; expected real numbers",
        ),
    ],
    ids=["lazy", "complex"],
)
def test_a_weight_without_real_numbers(module: Callable[[], nn.Module], message: str) -> None:
    net = Net(module())
    with pytest.raises(PeanutError, match=message):
        get_peft_model(net, LoraConfig(target_modules=["layer"]))
    assert type(net.layer) is type(module())


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_real_input_and_a_weight_without_storage(what: str) -> None:
    """torch makes arbitrary numbers of them."""
    net = Net(nn.Linear(12, 20, device="meta" if what == "base" else "cpu"))
    model = get_peft_model(net, LoraConfig(target_modules=["layer"], r=2), low_cpu_mem_usage=what == "adapter")
    if what == "base":
        model.adapters.model.layer.lora_A.to_empty(device="cpu")
    with pytest.raises(PeanutError, match=r"no storage .*on the meta device\); expected weights that are there"):
        model(torch.ones(2, 12))
    meta: Tensor = model.to("meta")(torch.ones(2, 12, device="meta"))
    assert meta.shape == (2, 20)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_base_is_refused(one_process: Any) -> None:
    module = nn.Linear(12, 20)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), one_process, [Replicate()]))
    with pytest.raises(PeanutError, match=r"DTensor over 1 processes; .* add adapters first"):
        get_peft_model(Net(module), LoraConfig(target_modules=["layer"]))


def test_an_adapted_model_can_be_sharded(one_process: Any) -> None:
    case = next(case for case in ON_LINEAR if case.method == "PEANUT")
    x, model = case.input(torch.float32), case.adapted(dtype=torch.float32)
    sharded = filled(case.adapted(dtype=torch.float32), dict(model.adapters.parameters("default")))
    fully_shard(sharded.adapters.model.layer, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    assert distance(sharded(x), model(x)) < 1e-6
    directed(model(x)).backward()
    directed(sharded(x)).backward()
    own = {name: value.full_tensor() for name, value in gradients(sharded).items()}
    assert own
    assert all(distance(own[name], value) < 1e-5 for name, value in gradients(model).items())
    with pytest.raises(PeanutError, match=r"DTensor of torch\.float32, not a plain tensor"):
        sharded.merge_adapter()


def test_peanut_reads_a_quantised_layer_only_if_the_weight_is_what_it_computes_with() -> None:
    with refused(net := Net(plain(made=Scaled)), "PEANUT at 'layer': a Scaled computes something else"):
        get_peft_model(net, PeanutConfig(target_modules=["layer"], r=2))


def test_a_forward_that_changes_what_it_computes_is_tried_again_before_a_merge() -> None:
    class Changing(nn.Linear):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    config = LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False)
    model = get_peft_model(Net(Changing(6, 5)), config).eval()
    model.merge_adapter()
    model.unmerge_adapter()
    layer = model.get_base_model().layer.base_layer
    layer.factor = 3.0
    with pytest.raises(PeanutError, match="computes something else than the product with its weight"):
        model.merge_adapter()
    layer.factor = 1.0
    own = layer.forward
    layer.forward = lambda x: own(x) * 3
    with pytest.raises(PeanutError, match="computes something else than the product with its weight"):
        model.merge_adapter()


def test_a_forward_of_its_own_is_tried_also_while_loading(tmp_path: Path) -> None:
    def base() -> Net:
        torch.manual_seed(0)
        return Net(Own(12, 20))

    model = randomised(get_peft_model(base(), LoraConfig(r=2, use_dora=True, target_modules=["layer"]))).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 12)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))
