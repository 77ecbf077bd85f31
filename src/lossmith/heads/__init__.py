"""Output layers with their losses, which never build the (examples x classes) matrix."""

from lossmith.heads.linear import linear_loss

__all__ = ["linear_loss"]
