"""Products of Householder reflections, applied to a layer's input; the operator of HRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cayley import in_full
from .delta import captured, product_dtype, shaped, wide
from .low_rank import LowRank
from .rotation import Rotation

__all__ = ["Householder"]


@dataclass(frozen=True, eq=False)
class Householder(Rotation):
    """R = I − V K Vᵀ with V (in, r) and K (r, r), a product of r reflections in compact form: two thin products.

    The backward saves x, V and K, and r numbers a token.
    """

    vectors: Tensor
    core: Tensor

    @staticmethod
    def reflections(directions: Tensor) -> Householder:
        """H₁ H₂ … H_r with H_i = I − 2 u_i u_iᵀ for the directions u_i/‖u_i‖, the columns (in, r).

        The columns of V are u₁, u₂−u₁, u₃, u₄−u₃, …: of two equal reflections nothing is left, exactly and in every
        dtype, where I − U T Uᵀ would leave the rounding of a difference. With E the inner products of V between
        different pairs (upper triangle) and D those within them, K = (D + E)⁻¹; D⁻¹ is known in closed form,
        [[2q, 2q−2], [2, 2]] with q = ‖u₂−u₁‖² for a pair and 2 for a reflection that is left over.
        """
        directions = wide(directions)
        r, device = directions.shape[1], directions.device
        # One row for each direction, so that equal directions are normalised to equal bits.
        units = F.normalize(directions.T.contiguous(), dim=1, eps=torch.finfo(directions.dtype).tiny)
        units = units * directions.any(0)[:, None]  # else the gradient of a direction of zero length is infinite
        place = torch.arange(r, device=device)
        rows = torch.where(place[:, None] % 2 == 1, units - units.roll(1, 0), units)
        first = torch.arange(0, r - 1, 2, device=device)
        eye = torch.eye(r, dtype=units.dtype, device=device)
        with in_full(device):
            products = rows @ rows.T
            q = products[first + 1, first + 1]
            at = torch.cat([first, first, first + 1]), torch.cat([first, first + 1, first])
            inverse = (2 * eye).index_put(at, torch.cat([2 * q, 2 * q - 2, torch.full_like(q, 2.0)]))
            between = products * (place[:, None] // 2 < place // 2)
            core = torch.linalg.solve_triangular(eye + inverse @ between, inverse, upper=True, unitriangular=True)
        return Householder(rows.T, core)

    @staticmethod
    def orthogonal(directions: Tensor) -> Householder:
        """I − 2 Q Qᵀ, the reflections in an orthonormal basis Q of the directions' span, (in, r)."""
        with in_full(directions.device):
            basis = torch.linalg.qr(wide(directions)).Q
        return Householder(basis, 2 * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device))

    @property
    def width(self) -> int:
        return self.vectors.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        x, vectors, core = x.to(dtype), self.vectors.to(dtype), self.core.to(dtype)
        tokens = x.reshape(-1, self.width)
        return shaped(torch.addmm(tokens, tokens @ vectors @ core.T, vectors.T, alpha=-1), x.shape[:-1])

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As x Wᵀ and a low-rank change, −(W V K) Vᵀ: x itself is not multiplied or copied.

        Without a gradient few tokens are multiplied themselves: W V costs as much as W's rows would.
        """
        if not (torch.is_grad_enabled() or captured()) and x.numel() < weight.numel():
            return super().turned(x, weight, bias)
        dtype = product_dtype(x)
        x, weight, vectors, core = (value.to(dtype) for value in (x, weight, self.vectors, self.core))
        bias = None if bias is None else bias.to(dtype)
        return LowRank(weight @ vectors @ core, vectors.T, -1.0).joined(x, weight, bias)

    def beyond_identity(self) -> tuple[Tensor, Tensor]:
        """I − V K Vᵀ is I plus a product of rank r."""
        return -self.vectors @ self.core, self.vectors.T

    def times(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return Householder(self.vectors, self.core.T).apply(weight)

    def dense(self) -> Tensor:
        return self.times(torch.eye(self.width, dtype=self.vectors.dtype, device=self.vectors.device))
