"""Fourier against the sum of its waves."""

from __future__ import annotations

import math

import pytest
import torch

from peanut.operators.fourier import Fourier
from peanut.operators.inference import Evaluated, few_tokens

from ..support import distance, one_thread  # noqa: F401
from .test_materialised import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize(
    ("size", "share"),
    [
        *(((6, 8), 1), ((6, 8), 0.4), ((7, 8), 1), ((6, 5), 0.4), ((5, 7), 0.4), ((4, 1), 1), ((1, 6), 1), ((2, 2), 1)),
        *(((90, 80), 1 / 1024), ((91, 79), 1 / 1024)),  # so few that the gradient is made from the tokens' transforms
    ],
    ids=str,
)
def test_laws(size: tuple[int, int], share: float) -> None:
    torch.manual_seed(1)
    out, inputs = size
    n = int(share * out * inputs)  # all of them: places that are their own mirror, and pairs that are mirrors
    flat = torch.randperm(out * inputs)[:n]
    places = torch.stack([flat // inputs, flat % inputs])
    spectrum = torch.randn(n, dtype=torch.float64, requires_grad=True)
    j, k = torch.arange(out).double()[:, None], torch.arange(inputs).double()
    waves = [torch.cos(2 * math.pi * (row * j / out + column * k / inputs)) for row, column in places.T.tolist()]
    dense = 5.0 / (out * inputs) * (spectrum[:, None, None] * torch.stack(waves)).sum(0)
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    check_laws(Fourier(spectrum, places, size, 5.0), (spectrum,), dense, x, compiled=size in ((7, 8), (90, 80)))


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 4), (4, 1), (90, 80)], ids=str)
@torch.no_grad()
def test_settled_on_both_sides_of_its_border(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    out, inputs = size
    flat = torch.arange(out * inputs) if out < 10 else torch.randperm(out * inputs)[:50]
    places, spectrum = torch.stack([flat // inputs, flat % inputs]), torch.randn(len(flat), dtype=torch.float64)
    j, k = torch.arange(out).double()[:, None], torch.arange(inputs).double()
    dense = torch.zeros(size, dtype=torch.float64)
    for value, (row, column) in zip(spectrum, places.T.tolist(), strict=True):
        dense += 5.0 / (out * inputs) * value * torch.cos(2 * math.pi * (row * j / out + column * k / inputs))
    settled = Fourier(spectrum, places, size, 5.0).for_inference(torch.float64)
    assert isinstance(settled, Evaluated)
    weight = torch.randn(size, dtype=torch.float64)
    for count in (1, 2, settled.few, settled.few + 1):
        x = torch.randn(count, inputs, dtype=torch.float64)
        assert few_tokens(x, settled.few) == (count <= settled.few)
        assert distance(settled.joined(x, weight, None), x @ (weight + dense).T) < 1e-13
        assert distance(settled.apply(x), x @ dense.T) < 1e-12


@torch.no_grad()
def test_more_entries_are_transformed_for_fewer_tokens() -> None:
    few = []
    for n in (10, 1000):
        settled = Fourier(torch.randn(n), torch.randint(90, (2, n)), (90, 90)).for_inference(torch.float32)
        assert isinstance(settled, Evaluated)
        few.append(settled.few)
    assert 0 < few[1] < few[0]
