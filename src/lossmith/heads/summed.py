"""Small matrices to which every step adds a little, exact in the long run and cheap in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Summed(nn.Module):
    """A matrix in float64 plus its latest changes in the type of the products, which BLAS adds up in place.

    Adding each change to float64 takes two passes over the matrix, and rounding the matrix to the type of the products
    a third. Here both are done once in a while: the latest changes are small, so that their own rounding is too.

    Args:
        value: float64.
        dtype: of the products.
        symmetric: the changes are halves: each stands for itself and its transpose.

    >>> total = Summed(torch.ones(2, 2, dtype=torch.float64), torch.float32)
    >>> _ = total.recent.addmm_(torch.ones(2, 3), torch.ones(3, 2), alpha=0.5)
    >>> total.narrow().tolist(), total.value.dtype
    ([[2.5, 2.5], [2.5, 2.5]], torch.float64)
    """

    exact: Tensor
    recent: Tensor

    def __init__(self, value: Tensor, dtype: torch.dtype, *, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("exact", value.clone())
        self.register_buffer("recent", torch.zeros_like(value, dtype=dtype))
        self._rounded: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module._moved())

    @property
    def value(self) -> Tensor:
        """The whole, in float64."""
        whole = self.exact + self.recent
        return whole.add_(self.recent.T) if self.symmetric else whole

    def narrow(self) -> Tensor:
        """The whole, in the type of the products: a new tensor."""
        if self._rounded is None:
            self._rounded = self.exact.to(self.recent.dtype)
        whole = torch.add(self._rounded, self.recent)
        return whole.add_(self.recent.T) if self.symmetric else whole

    def settle(self) -> None:
        """Add the latest changes to the whole."""
        self.set(self.value)

    def set(self, value: Tensor, rows: slice = slice(None)) -> None:
        """Replace rows."""
        self.exact[rows] = value
        self.recent[rows] = 0
        self._moved()

    def scale(self, factor: float) -> None:
        """Multiply by a number."""
        self.exact *= factor
        self.recent *= factor
        self._moved()

    def _moved(self) -> None:
        self._rounded = None

    def _apply(self, fn: Any, recurse: bool = True) -> Summed:
        # float64 is what the whole is for; half precision would spoil the changes.
        exact, recent = self.exact, self.recent
        super()._apply(fn, recurse)
        dtype = self.recent.dtype if self.recent.dtype in (torch.float32, torch.float64) else recent.dtype
        self.exact = moved(exact, self.exact, torch.float64)
        self.recent = moved(recent, self.recent, dtype)
        self._moved()
        return self


def moved(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """``before`` where ``after`` is, in ``dtype``; ``after`` itself where that loses nothing."""
    if after.dtype == before.dtype == dtype or before.is_meta:
        return after.to(dtype)
    return before.to(after.device, dtype)
