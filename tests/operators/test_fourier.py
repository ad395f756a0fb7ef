"""Fourier against the sum of its waves."""

from __future__ import annotations

import math

import pytest
import torch

from peanut.operators.fourier import Fourier

from ..support import one_thread  # noqa: F401
from .test_built import check_laws

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
