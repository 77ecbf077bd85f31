"""Loss functions: pure, one value per example, never reduced.

``f(inputs..., targets, *, options) -> Float[Tensor, "*batch"]``. Examples with ``ignore_index`` have loss and
gradient exactly zero. This package imports nothing else of lossmith.
"""

from lossmith.losses.classification import cross_entropy, focal_loss, z_loss

__all__ = ["cross_entropy", "focal_loss", "z_loss"]
