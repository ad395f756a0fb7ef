"""The laws that every method keeps on every kind of layer it names. A method joins by being registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peanut import PeftModel, get_peft_model
from peanut.model.checkpoints.stored_adapter import read_adapter
from peanut.operators import LowRank
from peanut.protocols import Change

from .dense import layer_of, written_out
from .support import (
    CASES,
    FIRST_CASES,
    PEER_CASES,
    PEER_WARNINGS,
    Case,
    change_in_output,
    directed,
    distance,
    frozen_state,
    gradients,
    one_thread,  # noqa: F401
    peer_loaded,
    peer_model,
    randomised,
    refused,
    same_bits,
    scattered,
)

pytestmark = [
    *PEER_WARNINGS,
    # Dynamo makes an instance of the autograd function itself, and warns of it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Net returned no loss"),  # of methods with a penalty
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
one_case_a_kind = pytest.mark.parametrize("case", FIRST_CASES, ids=str)
peer_cases = pytest.mark.parametrize("case", PEER_CASES, ids=str)
TIGHT = 1e-12
"""Largest relative difference in float64 between two orders of the same sums."""


# 1. A new adapter changes nothing, where the method promises it, and a disabled one never does


@every_case
def test_new_adapter_changes_nothing(case: Case) -> None:
    base, x = case.net(), case.input()
    model = get_peft_model(case.net(), case.config()).eval()
    with torch.no_grad():
        moved = distance(model(x), base(x))
        assert (moved == 0) if case.variant.silent else (moved > 1e-3)


@every_case
def test_disabled_adapter_is_the_base_bit_for_bit(case: Case) -> None:
    base, x, model = case.net(), case.input(), case.adapted()
    assert change_in_output(model, base, x) > 0.02
    with model.disable_adapter():
        assert same_bits(model(x), base(x))
    assert change_in_output(model, base, x) > 0.02


# 2. Merged equals unmerged; unmerging restores every bit; merging some leaves the others active


@pytest.mark.parametrize("case", [case for case in CASES if case.mergeable], ids=str)
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(case: Case) -> None:
    model, x = case.adapted(), case.input()
    before, expected = frozen_state(model), model(x)
    model.merge_adapter()
    assert distance(model(x), expected) < TIGHT
    assert layer_of(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    assert same_bits(model(x), expected)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", [case for case in CASES if not case.mergeable], ids=str)
def test_a_shift_is_not_merged_into_a_layer_without_bias(case: Case) -> None:
    model, x = case.adapted(), case.input()
    expected = model(x)
    with refused(model, r"changes the bias of a layer that has none; .*use it unmerged"):
        model.merge_adapter()
    assert same_bits(model(x), expected)


MERGED_FIRST = [(case, "a") for case in CASES if case.mergeable]
MERGED_FIRST += [(case, "b") for case in CASES if case.mergeable and not case.turns]


@pytest.mark.parametrize(("case", "first"), MERGED_FIRST, ids=str)
def test_merging_one_of_two_leaves_the_other_active(case: Case, first: str) -> None:
    model, x, base = case.adapted("a", "b"), case.input(), case.net()
    model.set_adapter(["a", "b"])
    expected = model(x)
    model.merge_adapter([first])
    assert layer_of(model).merged_adapters == [first]
    assert distance(model(x), expected) < TIGHT
    model.merge_adapter(["a", "b"])
    assert set(layer_of(model).merged_adapters) == {"a", "b"}
    assert distance(model(x), expected) < TIGHT
    model.unmerge_adapter()
    assert same_bits(model(x), expected)
    assert same_bits(model.unload()(x), base(x))


@pytest.mark.parametrize("case", [case for case in CASES if case.turns], ids=str)
def test_of_two_that_turn_the_later_is_not_merged_alone(case: Case) -> None:
    # b turns the input before a does, or the output after it: with b in the weight, a could only come outside it.
    model, x = case.adapted("a", "b"), case.input()
    model.set_adapter(["a", "b"])
    expected = model(x)
    with refused(model, r"'a' and 'b' rotate the (input|output) of 'layer' in this order.*merge the earlier"):
        model.merge_adapter(["b"])
    assert not layer_of(model).merged
    assert same_bits(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in FIRST_CASES if case.mergeable], ids=str)
def test_unmerging_restores_every_bit_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    model, x = case.adapted(dtype=dtype), case.input(dtype)
    before, expected = frozen_state(model), model(x)
    model.merge_adapter()
    assert distance(model(x), expected) < 20 * torch.finfo(dtype).eps
    model.unmerge_adapter()
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


# 3. Saved and loaded on a fresh base, the outputs are the same, bit for bit


@every_case
def test_reloaded_adapter_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.net(torch.float32), tmp_path)
    assert same_bits(again(x), model(x))
    empty = PeftModel.from_pretrained(case.net(torch.float32), tmp_path, low_cpu_mem_usage=True)
    assert same_bits(empty(x), model(x))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()
    saved, stored = (read_adapter(folder) for folder in (tmp_path, tmp_path / "again"))
    assert (saved.state.keys(), saved.base) == (stored.state.keys(), stored.base)
    assert all(same_bits(stored.state[key], value) for key, value in saved.state.items())


# 4. Every trained parameter gets a gradient, and no frozen one does


@every_case
def test_gradients_reach_what_is_trained_and_nothing_else(case: Case) -> None:
    model, x = case.adapted().train(), case.input()
    directed(model(x)).backward()
    own = {id(value) for _, value in model.adapters.parameters("default") if isinstance(value, nn.Parameter)}
    assert own
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@every_case
def test_one_step_from_the_start_lowers_the_loss(case: Case) -> None:
    x = case.input()
    model = get_peft_model(case.net(), case.config()).eval()
    target = randomised(get_peft_model(case.net(), case.config())).eval()(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@every_case
def test_what_comes_after_may_work_in_place(case: Case) -> None:
    model, x, found = case.adapted().train(), case.input(), []
    for after in (torch.relu, torch.relu_):
        model.zero_grad()
        torch.manual_seed(0)
        y = after(model(x))
        directed(y).backward()
        found.append({"": y.detach(), **gradients(model)})
    assert found[0].keys() == found[1].keys() > {""}
    assert all(distance(value, found[0][name]) < TIGHT for name, value in found[1].items())


# 5. The fast path equals the dense form, forward and backward, and never builds it


@every_case
def test_layer_equals_its_dense_form_forward_and_backward(case: Case) -> None:
    model, x = case.adapted("a", "b"), case.input()
    model.set_adapter(["a", "b"])
    layer = layer_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = [x.requires_grad_(), *trained] if x.is_floating_point() else trained
    fast, slow = layer(x), written_out(case, layer, ["a", "b"], x)
    assert distance(fast, slow) < TIGHT
    direction = torch.randn_like(slow)
    # What only training reads (a posterior's width) has no gradient here, on either side.
    found = torch.autograd.grad(fast, wanted, direction, allow_unused=True)
    expected = torch.autograd.grad(slow, wanted, direction, allow_unused=True)
    assert any(grad is not None for grad in expected[-len(trained) :])
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or distance(one, other) < TIGHT


@pytest.mark.parametrize("case", [case for case in FIRST_CASES if case.has_operator], ids=str)
def test_operators_pass_gradcheck(case: Case) -> None:
    layer = layer_of(case.adapted())
    method, config = layer.method_of("default")
    values = layer.values("default")
    trained = {suffix: value for suffix, value in values.items() if value.requires_grad}
    inputs = layer.frozen.in_features
    weight = layer.frozen.matrix()
    at = torch.tensor([[0, inputs - 1], [inputs // 2, 0]])

    def change(own: tuple[Tensor, ...]) -> Change:
        return method.change(config, values | dict(zip(trained, own, strict=True)), layer.frozen)

    def fast(x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        made, found = change(own), []
        if made.delta is not None:
            found += [made.delta.apply(x), made.delta.rows(at), made.delta.joined(x, weight, None)]
        if made.rotation is not None:
            found += [made.rotation.apply(x), made.rotation.times(weight), made.rotation.turned(x, weight, None)]
        return (*found, *([] if made.left is None else [made.left.apply(x @ weight.T), made.left.times(weight.T)]))

    def slow(x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        made, found = change(own), []
        if made.delta is not None:
            D = made.delta.dense()
            found += [x @ D.T, D.T[at], x @ (weight + D).T]
        if made.rotation is not None:
            R = made.rotation.dense()
            found += [x @ R.T, weight @ R, x @ (weight @ R).T]
        L = None if made.left is None else made.left.dense()
        return (*found, *([] if L is None else [x @ weight.T @ L.T, weight.T @ L]))

    x = torch.randn(3, inputs, dtype=torch.float64, requires_grad=True)
    assert fast(x, *trained.values())
    assert torch.autograd.gradcheck(fast, (x, *trained.values()), fast_mode=True)
    for found, expected in zip(fast(x, *trained.values()), slow(x, *trained.values()), strict=True):
        assert distance(found, expected) < TIGHT


class Shapes(TorchDispatchMode):
    """Notes the size of every tensor that is newly made."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.made.append(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("case", [case for case in CASES if case.low_rank], ids=str)
def test_low_rank_change_is_never_built(case: Case) -> None:
    model, x = case.adapted(), case.input()
    layer = layer_of(model)
    assert isinstance(layer.change("default").delta, LowRank)
    out, inputs = layer.frozen.out_features, layer.frozen.in_features
    forbidden = {(out, inputs), (inputs, out), tuple(layer.weight.shape)}
    with Shapes(layer.weight) as watch:
        directed(model(x)).backward()
    assert not forbidden & set(watch.made)
    with Shapes(layer.weight) as watch:
        layer.delta("default")
    assert forbidden & set(watch.made)  # the watch sees it where it is built


def kept_beside(model: PeftModel, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output for ``x``, and what its backward keeps beside ``x`` and the model's own tensors."""
    kept: dict[int, Tensor] = {}
    known = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers(), x]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    kept.pop(y.untyped_storage().data_ptr(), None)  # the output itself, which is there anyway
    return y, list(kept.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.multiplies], ids=str)
def test_no_dense_change_is_kept(case: Case) -> None:
    model = case.adapted()
    layer = layer_of(model)
    _, kept = kept_beside(model, torch.cat([case.input()] * 8))
    out, inputs = layer.frozen.out_features, layer.frozen.in_features
    dense = {(out, inputs), (inputs, out), tuple(layer.weight.shape)}
    assert not [tuple(tensor.shape) for tensor in kept if tuple(tensor.shape) in dense]


@pytest.mark.parametrize("case", [case for case in CASES if case.takes_features], ids=str)
def test_no_second_set_of_activations_is_kept(case: Case) -> None:
    model, x = case.adapted(), torch.cat([case.input()] * 8)
    layer, (y, kept) = layer_of(model), kept_beside(model, x)
    # What grows with the tokens: at most one tensor of the output's size, which a gain needs for its gradient.
    growing = [tensor.numel() for tensor in kept if tensor.shape[:1] == x.shape[:1]]
    assert sum(growing) <= (y.numel() if layer.change("default").left is not None else 0)


# 6. Two adapters: each alone, both together, one for each sample


PAIRS = [(case, other) for case in FIRST_CASES for other in FIRST_CASES if case.kind == other.kind]


@pytest.mark.parametrize(("case", "other"), PAIRS, ids=str)
def test_two_adapters_together_and_mixed_by_sample(case: Case, other: Case) -> None:
    model, x, base = case.adapted("a"), case.input(), case.net()
    model.add_adapter("b", other.config())
    randomised(model, ["b"]).eval()
    layer, plain, alone = layer_of(model), base(x), {}
    for name in ("a", "b"):
        model.set_adapter(name)
        assert change_in_output(model, base, x) > 0.02
        alone[name] = model(x)
    assert distance(alone["a"], alone["b"]) > 0.02
    model.set_adapter(["a", "b"])
    assert distance(model(x), written_out(case, layer, ["a", "b"], x)) < TIGHT
    if all(layer.change(name).adds for name in alone):
        assert distance(model(x), alone["a"] + alone["b"] - plain) < TIGHT
    names = ["b", "__base__", "a", "b"]
    mixed = model(x, adapter_names=names)
    expected = torch.stack([{**alone, "__base__": plain}[name][row] for row, name in enumerate(names)])
    assert distance(mixed, expected) < TIGHT
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert same_bits(model(x), alone["a"])


# 7. Every dtype, autocast, checkpointing and compiling: the same result within the dtype's error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_case
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    model, x = case.adapted(dtype=dtype), case.input(dtype)
    exact = case.adapted()
    exact.load_state_dict(model.state_dict())
    for own, found in zip(exact.buffers(), model.buffers(), strict=True):
        own.copy_(found)  # those that a state dict leaves out too
    reference = exact(x.double() if x.is_floating_point() else x)
    y = model(x)
    assert y.dtype == dtype
    assert distance(y, reference) < 20 * torch.finfo(dtype).eps
    directed(y).backward()
    for _, value in model.adapters.parameters("default"):
        assert not value.is_floating_point() or value.dtype == torch.float32
        assert value.grad is None or value.grad.dtype == torch.float32
    assert gradients(model)


@one_case_a_kind
def test_autocast(case: Case) -> None:
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    expected = model(x)
    directed(expected).backward()
    exact = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    with torch.no_grad():
        before = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with torch.no_grad():
            evaluated = model(x)
    assert y.dtype == (torch.float32 if case.kind in ("embedding", "norm") else torch.bfloat16)
    assert distance(y, expected) < 0.05
    assert distance(evaluated, expected) < 0.05
    directed(y).backward()
    found = gradients(model)
    assert found.keys() == exact.keys()
    assert all(distance(grad, exact[name]) < 0.1 for name, grad in found.items())
    with torch.no_grad():
        assert same_bits(model(x), before)  # nothing that was computed in bfloat16 is kept for later
        assert distance(before, expected) < 1e-5


CHECKPOINTED = [(case, False) for case in CASES]
CHECKPOINTED += [(case, True) for case in CASES if case.kind != "embedding"]  # it needs an input with a gradient


@pytest.mark.parametrize(("case", "reentrant"), CHECKPOINTED, ids=str)
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    model, x = case.adapted().train(), case.input()
    x = x.requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(5)
    directed(model(x)).backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    torch.manual_seed(5)
    directed(checkpoint(model, x, use_reentrant=reentrant)).backward()
    found = gradients(model)
    assert expected.keys() == found.keys() > set()
    assert all(distance(found[name], grad) < TIGHT for name, grad in expected.items())


@one_case_a_kind
def test_compiles_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    directed(model(x)).backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert distance(y, model(x)) < 1e-5
    directed(y).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(distance(grad, expected[name]) < 1e-5 for name, grad in found.items())
    with torch.no_grad():
        assert distance(compiled(x), y) < 1e-5


# 8. The peer's implementation, loaded from our file, gives our outputs; ours, loaded from its file, gives its


@peer_cases
def test_peer_loads_our_file(case: Case, tmp_path: Path) -> None:
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    assert change_in_output(model, case.net(torch.float32), x) > 0.02
    model.save_pretrained(tmp_path)
    theirs = peer_loaded(case.net(torch.float32), tmp_path)
    assert distance(model(x), theirs(x)) < 1e-5


@peer_cases
def test_we_load_the_file_of_the_peer(case: Case, tmp_path: Path) -> None:
    x = case.input(torch.float32)
    theirs = peer_model(case.net(torch.float32), case.config())
    scattered([p for p in theirs.parameters() if p.requires_grad])
    assert change_in_output(theirs, case.net(torch.float32), x) > 0.02
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.net(torch.float32), tmp_path)
    assert distance(model(x), theirs(x)) < 1e-5


# 8. What scripts do with parameters


@one_case_a_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_cast_afterwards(case: Case, dtype: torch.dtype) -> None:
    """As ``model.to(torch.bfloat16)`` casts adapters too: the answer is that of what they then are, in float64."""
    model, exact, x = case.adapted(dtype=torch.float32).to(dtype), case.adapted(), case.input(dtype)
    exact.load_state_dict(model.state_dict())
    for own, found in zip(exact.buffers(), model.buffers(), strict=True):
        own.copy_(found)
    y, expected = model(x), exact(x.double() if x.is_floating_point() else x)
    near = 20 * max(torch.finfo(dtype).eps, TIGHT)
    assert y.dtype == dtype
    assert distance(y, expected) < near
    directed(y).backward()
    directed(expected).backward()
    found, wanted = gradients(model), gradients(exact)
    assert found.keys() == wanted.keys() > set()
    assert all(grad.dtype == dtype for grad in found.values())
    assert all(distance(grad, wanted[name]) < 2 * near for name, grad in found.items() if wanted[name].any())
    if case.mergeable:
        model.merge_adapter()
        assert distance(model(x), expected) < near
        model.unmerge_adapter()
        assert same_bits(model(x), y)
    directed(model.train()(x)).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@every_case
def test_parameters_are_contiguous(case: Case) -> None:
    """Flat vectors are made of views of them."""
    model = get_peft_model(case.net(), case.config())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.is_contiguous() for parameter in trained)
    flat = nn.utils.parameters_to_vector(trained)
    nn.utils.vector_to_parameters(flat * 2, trained)
    assert torch.equal(nn.utils.parameters_to_vector(trained), flat * 2)
