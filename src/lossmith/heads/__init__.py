"""Output layers with their losses, which never build the (examples x classes) matrix."""

from lossmith.heads.distillation import linear_distillation_loss
from lossmith.heads.linear import linear_loss

__all__ = ["linear_distillation_loss", "linear_loss"]
