"""Δ as the inverse Fourier transform of a spectrum with few entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .built import Built

__all__ = ["Fourier"]


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
        half = 0.5 * _wide(self.spectrum)
        # The first and (for even sizes) the last column of the half are their own mirrors: there both entries count.
        edge = torch.where((columns == 0) | (2 * columns == inputs), half, 0)
        entries = half.new_zeros(out, inputs // 2 + 1)
        entries = entries.index_put((rows, columns), half, accumulate=True)
        entries = entries.index_put((mirror, columns), edge, accumulate=True)
        waves: Tensor = torch.fft.irfft2(torch.complex(entries, torch.zeros_like(entries)), s=self.size)
        return (self.scaling * waves).to(self.spectrum.dtype)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        out, inputs = self.size
        transform = torch.fft.rfft2(_wide(grad)).real
        entries = transform[self._folded()] * (self.scaling / (out * inputs))
        return (entries.to(self.spectrum.dtype),)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The rows and columns, those in the right half of the spectrum replaced by their mirrors."""
        out, inputs = self.size
        rows, columns = self.places.long()
        right = columns > inputs // 2
        return torch.where(right, -rows % out, rows), torch.where(right, inputs - columns, columns)


def _wide(values: Tensor) -> Tensor:
    """In at least 32 bits: there is no Fourier transform in 16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
