"""Δ as the inverse Fourier transform of a sparse spectrum; the operator of FourierFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .delta import Delta, wide
from .inference import Evaluated
from .materialised import Materialised

__all__ = ["Fourier"]

_AT_ONCE = 256  # tokens that are transformed together


@dataclass(frozen=True, eq=False)
class Fourier(Materialised):
    """Δ = scaling · Re ifft2(S), S zero but for ``spectrum`` at ``places``.

    A place (row, column) adds to Δ the wave spectrum/(out·in) · cos 2π(row·j/out + column·k/in), the same as its mirror
    (−row, −column) does. So the places are folded into the half of the spectrum that a real transform needs.

    Args:
        spectrum: the trained entries of S, (n).
        places: their rows and columns, (2, n), integers.
        size: (out, in).
        scaling: a number.
    """

    trained = ("spectrum",)

    spectrum: Tensor
    places: Tensor
    size: tuple[int, int]
    scaling: float = 1.0

    def dense(self) -> Tensor:
        out, inputs = self.size
        rows, columns = self._folded()
        # A column of the half other than the first and (for even sizes) the last has a mirror in the other half.
        paired = (columns != 0) & (2 * columns != inputs)
        values = wide(self.spectrum) * torch.where(paired, 0.5, 1.0) * (self.scaling / out)
        entries = values.new_zeros(inputs // 2 + 1, out).index_put((columns, rows), values, accumulate=True)
        # Δ[−j, −k] = Δ[j, k]: the entries are real. So half the rows are transformed and mirrored.
        upper = torch.fft.irfft(torch.fft.rfft(entries).conj().T, n=inputs)
        waves = self.spectrum.new_empty(self.size)
        waves[: len(upper)] = upper
        lower = upper[1 : (out + 1) // 2].flip(0)
        waves[len(upper) :, :1] = lower[:, :1]
        waves[len(upper) :, 1:] = lower[:, 1:].flip(1)
        return waves

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        out, inputs = self.size
        transform = torch.fft.rfft2(wide(grad)).real
        entries = transform[self._folded()] * (self.scaling / (out * inputs))
        return (entries.to(self.spectrum.dtype),)

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """From the tokens' transforms, Σ_t Re ĝ_t[row] x̂_t[column], where that is less than the whole product."""
        out, inputs = self.size
        # By measurement on a CPU: what a token takes by waves, and the product with its share of the transform.
        waves = 352 * len(tokens) * (len(self.spectrum) + (out + inputs) // 2)
        if waves > out * inputs * (len(tokens) + 192) or torch.finfo(grads.dtype).bits < 32 or not len(tokens):
            return super().pulled(grads, tokens)
        rows, columns, sign = self._halved()
        step = len(tokens) if torch.compiler.is_compiling() else _AT_ONCE
        total: Any = 0
        for some, seen in zip(grads.split(step), tokens.split(step), strict=True):
            high, low = torch.fft.rfft(some)[:, rows], torch.fft.rfft(seen)[:, columns]
            products = (torch.view_as_real(high) * torch.view_as_real(low)).sum(0)
            total = total + products
        return ((total[:, 0] - sign * total[:, 1]) * (self.scaling / (out * inputs)),)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        out, inputs = self.size
        rows, columns = self.places.long()
        lower = rows > out // 2  # such a place is replaced by its mirror, and a row that is its own counts once
        rows, columns = torch.where(lower, out - rows, rows), torch.where(lower, columns, -columns % inputs)
        values = wide(self.spectrum.to(dtype)) * torch.where((rows == 0) | (2 * rows == out), 1.0, 0.5)
        return _EvaluatedFourier(self.to(dtype), rows, columns, values * (self.scaling / inputs))

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The rows and columns, those in the right half of the spectrum replaced by their mirrors."""
        out, inputs = self.size
        rows, columns = self.places.long()
        right = columns > inputs // 2
        return torch.where(right, -rows % out, rows), torch.where(right, inputs - columns, columns)

    def _halved(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows and columns in the halves that a real transform has, and the sign of the rows' frequencies."""
        out = self.size[0]
        rows, columns = self._folded()
        lower = rows > out // 2
        sign = 1 - 2 * lower.to(torch.promote_types(self.spectrum.dtype, torch.float32))
        return torch.where(lower, out - rows, rows), columns, sign


@dataclass(frozen=True, eq=False)
class _EvaluatedFourier(Evaluated):
    """y = irfft(M fft(x)), M real, (out/2 + 1, in), and zero but for ``values`` at (``rows_of``, ``columns``)."""

    origin: Fourier
    rows_of: Tensor
    columns: Tensor
    values: Tensor

    @property
    def few(self) -> int:
        """As many as cost less to transform than Δ does: by measurement on a CPU."""
        out, inputs = self.origin.size
        return (out * inputs + 2**18) // (out + inputs + 2 * len(self.values))

    def answer(self, tokens: Tensor) -> Tensor:
        out, count = self.origin.size[0], len(tokens)
        shares = torch.fft.fft(wide(tokens)).gather(1, self.columns.expand(count, -1)).mul_(self.values)
        sums = shares.new_zeros(count, out // 2 + 1).scatter_add_(1, self.rows_of.expand(count, -1), shares)
        y: Tensor = torch.fft.irfft(sums, n=out)
        return y.to(tokens.dtype)
