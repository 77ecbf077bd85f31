"""Output layers with their losses, which never build the (examples x classes) matrix."""

from lossmith.heads.distillation import linear_distillation_loss
from lossmith.heads.dual import DualHead, attach_dual_head, dual_head, export_main_head
from lossmith.heads.linear import linear_loss

__all__ = [
    "DualHead",
    "attach_dual_head",
    "dual_head",
    "export_main_head",
    "linear_distillation_loss",
    "linear_loss",
]
