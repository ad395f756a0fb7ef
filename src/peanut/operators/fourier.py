"""Δ as the inverse Fourier transform of a spectrum with few entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .built import Built
from .operator import Operator
from .settled import Settled

__all__ = ["Fourier"]

_AT_ONCE = 256  # tokens that are transformed together


@dataclass(frozen=True)
class Fourier(Built):
    """Δ = scaling · Re ifft2(S), S zero but for ``spectrum`` at ``places``.

    A place (row, column) adds to Δ the wave spectrum/(out·in) · cos 2π(row·j/out + column·k/in), the same as its mirror
    (−row, −column) does. So the places are folded into the half of the spectrum that a real transform needs.

    Args:
        spectrum: the trained entries of S, (n).
        places: their rows and columns, (2, n), integers.
        size: (out, in).
        scaling: a number.
    """

    spectrum: Tensor
    places: Tensor
    size: tuple[int, int]
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def parts(self) -> tuple[Tensor, ...]:
        return (self.spectrum,)

    def dense(self) -> Tensor:
        out, inputs = self.size
        rows, columns = self._folded()
        mirror = -rows % out
        half = 0.5 * self.scaling * _wide(self.spectrum)
        # The first and (for even sizes) the last column of the half are their own mirrors: there both entries count.
        edge = torch.where((columns == 0) | (2 * columns == inputs), half, 0)
        entries = half.new_zeros(out, inputs // 2 + 1)
        entries = entries.index_put((rows, columns), half, accumulate=True)
        entries = entries.index_put((mirror, columns), edge, accumulate=True)
        waves: Tensor = torch.fft.irfft2(torch.complex(entries, torch.zeros_like(entries)), s=self.size)
        return waves.to(self.spectrum.dtype)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        out, inputs = self.size
        transform = torch.fft.rfft2(_wide(grad)).real
        entries = transform[self._folded()] * (self.scaling / (out * inputs))
        return (entries.to(self.spectrum.dtype),)

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """From the tokens' transforms, Σ_t Re ĝ_t[row] x̂_t[column], where that is less than the whole product."""
        out, inputs = self.size
        if 1024 * len(self.spectrum) > out * inputs or torch.finfo(grads.dtype).bits < 32 or not len(tokens):
            return super().pulled(grads, tokens)
        rows, columns, sign, _ = self._halved()
        step = len(tokens) if torch.compiler.is_compiling() else _AT_ONCE
        total = None
        for some, seen in zip(grads.split(step), tokens.split(step), strict=True):
            high, low = torch.fft.rfft(some)[:, rows], torch.fft.rfft(seen)[:, columns]
            products = (torch.view_as_real(high) * torch.view_as_real(low)).sum(0)
            total = products if total is None else total + products
        assert total is not None  # there are tokens
        return ((total[:, 0] - sign * total[:, 1]) * (self.scaling / (out * inputs)),)

    def settled(self, dtype: torch.dtype) -> Operator:
        inputs = self.size[1]
        rows, columns, sign, edge = self._halved()
        entries = _wide(self.spectrum.to(dtype)) * torch.where(edge, 1.0, 0.5) * (self.scaling / inputs)
        return _SettledFourier(
            self.to(dtype),
            dtype,
            torch.cat([2 * rows, 2 * rows + 1]),
            torch.cat([2 * columns, 2 * columns + 1]),
            torch.cat([entries, torch.where(edge, 0, -sign * entries)]),
        )

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The rows and columns, those in the right half of the spectrum replaced by their mirrors."""
        out, inputs = self.size
        rows, columns = self.places.long()
        right = columns > inputs // 2
        return torch.where(right, -rows % out, rows), torch.where(right, inputs - columns, columns)

    def _halved(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows and columns in the halves that a real transform has, of either dimension.

        With them the sign of the rows' frequencies, and whether a row is its own mirror.
        """
        out = self.size[0]
        rows, columns = self._folded()
        lower = rows > out // 2
        sign = 1 - 2 * lower.to(torch.promote_types(self.spectrum.dtype, torch.float32))
        rows = torch.where(lower, out - rows, rows)
        return rows, columns, sign, (rows == 0) | (2 * rows == out)


@dataclass(frozen=True)
class _SettledFourier(Settled):
    """y = irfft(M rfft(x)), M real and ``values`` at (rows_of, columns), on real and imaginary parts side by side."""

    rows_of: Tensor
    columns: Tensor
    values: Tensor

    def answer(self, tokens: Tensor) -> Tensor:
        count, size = len(tokens), 2 * (self.shape[0] // 2 + 1)
        waves = torch.view_as_real(torch.fft.rfft(_wide(tokens))).flatten(1)
        shares = waves.index_select(1, self.columns) * self.values
        at = self.rows_of + size * torch.arange(count, device=tokens.device).unsqueeze(1)
        sums = shares.new_zeros(count * size).index_add_(0, at.flatten(), shares.flatten())
        y: Tensor = torch.fft.irfft(torch.view_as_complex(sums.view(count, -1, 2)), n=self.shape[0])
        return y.to(tokens.dtype)


def _wide(values: Tensor) -> Tensor:
    """In at least 32 bits: there is no Fourier transform in 16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
