"""The orthogonal operators against their dense formulas, written out one rotation after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peanut.lab.measure import saved_bytes
from peanut.operators import Rotation, block_factors
from peanut.operators.block_factors import BlockFactors
from peanut.operators.cayley import cayley, cayley_neumann
from peanut.operators.householder import Householder

from ..support import directed, distance, one_thread  # noqa: F401

TIGHT = 1e-12


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(*shape: int) -> Tensor:
    values = drawn(*shape)
    return values - values.transpose(-1, -2)


def blocks_written_out(blocks: Tensor, copies: int = 1) -> Tensor:
    return torch.block_diag(*[block for _ in range(copies) for block in blocks])


def butterfly_written_out(factors: Tensor) -> Tensor:
    """Factor i: block k of group g takes the half blocks k and k + 2^i of the group's 2^(i+1) half blocks."""
    f, n, b, _ = factors.shape
    half, total = b // 2, torch.eye(n * b, dtype=factors.dtype)
    for level in range(f):
        factor = torch.zeros(n * b, n * b, dtype=factors.dtype)
        for block in range(n):
            group, k = divmod(block, 2**level)
            starts = [(group * 2 ** (level + 1) + k + offset) * half for offset in (0, 2**level)]
            at = (
                torch.cat([torch.arange(start, start + half) for start in starts])
                if f > 1
                else block * b + torch.arange(b)
            )
            factor[at[:, None], at] = factors[level, block]
        total = total @ factor
    return total


def reflections_written_out(directions: Tensor) -> Tensor:
    eye = torch.eye(directions.shape[0], dtype=directions.dtype)
    total = eye
    for u in (directions / directions.norm(dim=0)).T:
        total = total @ (eye - 2 * torch.outer(u, u))
    return total


def spanned_written_out(directions: Tensor) -> Tensor:
    """Gram-Schmidt, one direction after the other, then the product of the reflections."""
    basis: list[Tensor] = []
    for u in directions.T.clone():
        for v in basis:
            u = u - (u @ v) * v  # noqa: PLW2901
        basis.append(u / u.norm())
    return reflections_written_out(torch.stack(basis, 1))


Case = tuple[Callable[[Tensor], Rotation], Callable[[Tensor], Tensor], Tensor]
CASES: dict[str, Case] = {
    "blocks": (BlockFactors.diagonal, blocks_written_out, drawn(3, 5, 5)),
    "wide blocks": (BlockFactors.diagonal, blocks_written_out, drawn(2, 40, 40)),
    "many narrow blocks": (BlockFactors.diagonal, blocks_written_out, drawn(24, 3, 3)),
    "one block": (BlockFactors.diagonal, blocks_written_out, drawn(1, 6, 6)),
    "1 × 1 blocks": (BlockFactors.diagonal, blocks_written_out, drawn(7, 1, 1)),
    "shared block": (lambda b: BlockFactors.diagonal(b, 12), lambda b: blocks_written_out(b, 12), drawn(1, 4, 4)),
    "repeated blocks": (lambda b: BlockFactors.diagonal(b, 3), lambda b: blocks_written_out(b, 3), drawn(2, 4, 4)),
    "butterfly 1": (BlockFactors.butterfly, butterfly_written_out, drawn(1, 5, 3, 3)),
    "butterfly 2": (BlockFactors.butterfly, butterfly_written_out, drawn(2, 6, 2, 2)),
    "butterfly 3": (BlockFactors.butterfly, butterfly_written_out, drawn(3, 12, 4, 4)),
    "butterfly 4, wide": (BlockFactors.butterfly, butterfly_written_out, drawn(4, 8, 34, 34)),
    "one reflection": (Householder.reflections, reflections_written_out, drawn(9, 1)),
    "two reflections": (Householder.reflections, reflections_written_out, drawn(9, 2)),
    "five reflections": (Householder.reflections, reflections_written_out, drawn(9, 5)),
    "eight reflections": (Householder.reflections, reflections_written_out, drawn(9, 8)),
    "more reflections than features": (Householder.reflections, reflections_written_out, drawn(4, 7)),
    "orthogonal reflections": (Householder.orthogonal, spanned_written_out, drawn(9, 4)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_equals_its_dense_formula_forward_and_backward(case: Case) -> None:
    make, written_out, values = case
    values = values.clone().requires_grad_()
    operator, matrix = make(values), written_out(values)
    width = matrix.shape[0]
    assert operator.width == width
    x, weight = drawn(2, 3, width, seed=2).requires_grad_(), drawn(5, width, seed=3).requires_grad_()
    fast = {
        "dense": operator.dense(),
        "apply": operator.apply(x),
        "times": operator.times(weight),
    }
    slow = {
        "dense": matrix,
        "apply": x @ matrix.T,
        "times": weight @ matrix,
    }
    inputs = {"apply": [x], "times": [weight]}
    for name, found in fast.items():
        expected = slow[name]
        assert distance(found, expected) < TIGHT, name
        direction = drawn(*expected.shape, seed=4)
        wanted = [values, *inputs.get(name, ())]
        for one, other in zip(
            torch.autograd.grad(found, wanted, direction, retain_graph=True),
            torch.autograd.grad(expected, wanted, direction, retain_graph=True),
            strict=True,
        ):
            assert distance(one, other) < TIGHT, name


def test_two_adjacent_factors_mix_what_neither_mixes_alone() -> None:
    factors = drawn(3, 4, 4, 4)
    reach = (butterfly_written_out(factors).abs() > 1e-9).sum(1)
    assert reach.tolist() == [16] * 16
    assert (BlockFactors.butterfly(factors[:2]).dense().abs() > 1e-9).sum(1).tolist() == [8] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [2, 6, 8, 64])
def test_pairs_of_equal_reflections_are_the_identity_bit_for_bit(r: int, dtype: torch.dtype) -> None:
    directions = drawn(96, r // 2).float().repeat_interleave(2, 1)
    rotation, x = Householder.reflections(directions).to(dtype), drawn(5, 96).to(dtype)
    assert torch.equal(rotation.apply(x), x)
    assert torch.equal(rotation.dense(), torch.eye(96, dtype=dtype))


def test_nearly_equal_reflections_lose_no_digits_in_bfloat16() -> None:
    directions = drawn(64, 4).repeat_interleave(2, 1) + 1e-3 * drawn(64, 8, seed=2)
    x = drawn(7, 64, seed=3).bfloat16()
    exact = x.double() @ (reflections_written_out(directions) - torch.eye(64, dtype=torch.float64)).T
    rotation = Householder.reflections(directions.float()).to(torch.bfloat16)
    tokens = rotation.vectors, rotation.core
    moved = -(x @ tokens[0] @ tokens[1].T @ tokens[0].T)
    assert distance(moved, exact) < 0.02


def with_a_zero_direction() -> Tensor:
    directions = drawn(5, 3)
    directions[:, 1] = 0
    return directions


def test_direction_of_zero_length_reflects_nothing() -> None:
    directions = with_a_zero_direction()
    rotation = Householder.reflections(directions)
    assert distance(rotation.dense(), reflections_written_out(directions[:, [0, 2]])) < TIGHT


def test_direction_of_zero_length_has_a_finite_gradient() -> None:
    directions = with_a_zero_direction().requires_grad_()
    (gradient,) = torch.autograd.grad(directed(Householder.reflections(directions).dense()), directions)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("b", [1, 2, 5, 32])
def test_cayley_is_orthogonal_and_exactly_one_at_zero(b: int) -> None:
    S, eye = skew(3, b, b), torch.eye(b, dtype=torch.float64)
    R = cayley(S)
    assert distance(R @ R.transpose(1, 2), eye.expand(3, b, b)) < TIGHT
    assert distance(R, (eye + S) @ torch.linalg.inv(eye - S)) < TIGHT
    assert torch.equal(cayley(torch.zeros(3, b, b)), torch.eye(b).expand(3, b, b))


@pytest.mark.parametrize(
    ("terms", "factors"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 2, 1]), (4, [1, 2, 2, 1]), (7, [1, 2, 2, 2, 2, 2, 1])]
)
def test_neumann_series_has_the_terms_asked_for(terms: int, factors: list[int]) -> None:
    S = 0.1 * skew(2, 4, 4)
    expected = sum(factor * torch.linalg.matrix_power(S, power) for power, factor in enumerate(factors))
    assert isinstance(expected, Tensor)
    assert distance(cayley_neumann(S, terms), expected) < TIGHT
    assert distance(cayley_neumann(S, 200), cayley(S)) < TIGHT
    assert torch.equal(cayley_neumann(torch.zeros(2, 4, 4), terms), torch.eye(4).expand(2, 4, 4))


@pytest.mark.parametrize("name", [name for name, (_, _, values) in CASES.items() if values.numel() <= 1000])
def test_passes_gradcheck(name: str) -> None:
    make, _, values = CASES[name]
    x = drawn(2, make(values).width, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, values: make(values).apply(x), (x, values.clone().requires_grad_()), fast_mode=True
    )


@every_case
def test_backward_keeps_x_and_what_has_the_size_of_the_parameters(case: Case) -> None:
    make, _, values = case
    operator = make(values.clone().requires_grad_())
    x = drawn(4000, operator.width, seed=2).requires_grad_()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        operator.apply(x).sum()
    a_token = operator.core.shape[0] if isinstance(operator, Householder) else 0  # numbers that it may keep beside x
    places = [tensor.untyped_storage().data_ptr() for tensor in kept if 4000 in tensor.shape]
    assert x.untyped_storage().data_ptr() in places
    sizes = [tensor.numel() for tensor in kept if 4000 in tensor.shape and tensor.data_ptr() != x.data_ptr()]
    assert all(size <= 4000 * a_token for size in sizes)


@every_case
def test_takes_any_batch_shape_dtype_and_autocast(case: Case) -> None:
    make, written_out, values = case
    operator, matrix = make(values), written_out(values)
    width = matrix.shape[0]
    for shape in ((width,), (0, width), (2, 0, width), (2, 3, width)):
        x = drawn(*shape).requires_grad_()
        y = operator.apply(x)
        directed(y).backward()
        assert y.shape == x.shape
        assert x.grad is not None
    apart = drawn(width, 3).T
    assert distance(operator.apply(apart), apart @ matrix.T) < TIGHT
    for dtype in (torch.bfloat16, torch.float16):
        y = operator.to(dtype).apply(drawn(5, width).to(dtype))
        assert y.dtype == dtype
        assert distance(y, drawn(5, width) @ matrix.T) < 100 * torch.finfo(dtype).eps
    x = drawn(5, width).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.to(torch.float32).apply(x)
    assert y.dtype == torch.bfloat16
    direction = drawn(5, width, seed=4).bfloat16()
    (gradient,) = torch.autograd.grad(y, x, direction)
    assert gradient.dtype == torch.float32
    assert distance(gradient, direction.double() @ matrix) < 0.1


@pytest.mark.parametrize(
    "name", ["many narrow blocks", "shared block", "butterfly 3", "five reflections", "orthogonal reflections"]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(name: str) -> None:
    make, _, values = CASES[name]
    torch._dynamo.reset()

    def run(x: Tensor, values: Tensor) -> Tensor:
        return make(values).apply(x)

    values = values.clone().requires_grad_()
    x = drawn(2, 3, make(values).width, seed=2).requires_grad_()
    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, found = run(x, values), compiled(x, values)
    assert distance(found, expected) < TIGHT
    direction = drawn(*expected.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(found, (x, values), direction),
        torch.autograd.grad(expected, (x, values), direction),
        strict=True,
    ):
        assert distance(one, other) < TIGHT


def turned_written_out(x: Tensor, weight: Tensor, bias: Tensor | None, matrix: Tensor) -> Tensor:
    y = x @ matrix.T @ weight.T
    return y if bias is None else y + bias


@every_case
@pytest.mark.parametrize(("span", "biased"), [(1, False), (7, True), (1 << 20, False), (1 << 20, True)])
def test_turned_product_equals_its_formula_forward_and_backward(
    case: Case, span: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, written_out, values = case
    width = make(values).width
    monkeypatch.setattr(block_factors, "SPAN", span * width)  # so many tokens are turned at a time
    weight, x = drawn(5, width, seed=3), drawn(2, 5, width, seed=2)
    bias = drawn(5, seed=4).requires_grad_() if biased else None
    inputs = [values.clone().requires_grad_(), x.requires_grad_(), *([] if bias is None else [bias])]
    found = make(inputs[0]).turned(inputs[1], weight, bias)
    expected = turned_written_out(inputs[1], weight, bias, written_out(inputs[0]))
    assert distance(found, expected) < TIGHT
    with torch.no_grad():
        settled: Any = make(values).for_inference(torch.float64)
        assert distance(settled.turned(inputs[1], weight, bias), expected) < TIGHT
        assert distance(settled.apply(x), x @ written_out(values).T) < TIGHT
        assert distance(settled.dense(), written_out(values)) < TIGHT
    firsts, twice = [], [value for value in inputs if value is not bias]
    for y in (found, expected):
        grads = torch.autograd.grad(y, inputs, drawn(2, 5, 5, seed=6), create_graph=True)
        seconds = torch.autograd.grad(sum(directed(grad) for grad in grads), twice)
        firsts.append((*grads, *seconds))
    for one, other in zip(*firsts, strict=True):
        assert distance(one, other) < 1e-10


@every_case
def test_turned_product_keeps_nothing_of_the_size_of_the_tokens_but_x_and_y(case: Case) -> None:
    make, _, values = case
    operator: Any = make(values.clone().requires_grad_())
    x = drawn(4000, operator.width, seed=2).requires_grad_()
    weight, gelu = drawn(6, operator.width), torch.nn.GELU()
    size = x.untyped_storage().nbytes()
    assert 0 < saved_bytes(lambda: gelu(operator.turned(x, weight, None)), [gelu], [weight, x]) < size / 2


@pytest.mark.parametrize("name", ["blocks", "butterfly 3", "five reflections"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_turned_product_in_16_bits_and_under_autocast(name: str, dtype: torch.dtype) -> None:
    make, written_out, values = CASES[name]
    operator, matrix = make(values), written_out(values)
    x, weight = drawn(20, matrix.shape[0], seed=2), drawn(6, matrix.shape[0], seed=3)
    bias = drawn(6, seed=4)
    expected = turned_written_out(x, weight, bias, matrix)
    low: Any = operator.to(dtype)
    found = low.turned(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert found.dtype == dtype
    assert distance(found, expected) < 50 * torch.finfo(dtype).eps
    wide: Any = operator.to(torch.float32)
    with torch.autocast("cpu", dtype):
        found = wide.turned(x.float(), weight.float(), bias.float())
    assert found.dtype == dtype
    assert distance(found, expected) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 4, 4), (2, 7, 7)])
def test_gradient_of_cayley_comes_from_its_result(shape: tuple[int, ...]) -> None:
    half = drawn(*shape).requires_grad_()

    def turned(half: Tensor) -> Tensor:
        return cayley(half - half.transpose(-1, -2))

    assert torch.autograd.gradcheck(turned, half)
    assert torch.autograd.gradgradcheck(turned, half)
    kept = saved_bytes(lambda: turned(half), [], [])
    assert kept == half.untyped_storage().nbytes()


@pytest.mark.parametrize("b", [4, 32, 300])
@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_cayley_has_the_digits_of_its_dtype_also_far_from_zero(b: int, size: float) -> None:
    S = (size * skew(2, b, b)).float()
    eye = torch.eye(b, dtype=torch.float64)
    expected = (eye + S.double()) @ torch.linalg.inv(eye - S.double())
    R = cayley(S)
    apart = 1 - torch.eye(b)
    assert (R.double() @ R.double().mT - eye).abs().max() < 5e-6
    assert (R - expected).abs().max() < 5e-6
    assert (apart * (R - expected)).norm() < 5e-6 * (apart * expected).norm()


def test_cayley_hands_on_what_is_no_number() -> None:
    S = torch.zeros(2, 5, 5)
    S[1, 2, 3], S[1, 3, 2] = torch.nan, -torch.nan
    R = cayley(S)
    assert torch.equal(R[0], torch.eye(5))
    assert R[1].isnan().any()


@pytest.mark.parametrize("name", ["many narrow blocks", "butterfly 3", "five reflections"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_turned_product_compiles_in_one_graph(name: str) -> None:
    make, _, values = CASES[name]
    torch._dynamo.reset()
    width = make(values).width
    weight = drawn(5, width, seed=3)

    def run(x: Tensor, values: Tensor) -> Tensor:
        operator: Any = make(values)
        y: Tensor = operator.turned(x, weight, None)
        return y

    inputs = [value.requires_grad_() for value in (drawn(2, 3, width, seed=2), values.clone())]
    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, found = run(*inputs), compiled(*inputs)
    assert distance(found, expected) < TIGHT
    direction = drawn(*expected.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert distance(one, other) < TIGHT
