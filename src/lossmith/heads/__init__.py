"""Output layers with their losses, which never build the (examples x classes) matrix."""

from lossmith.heads.adaptive_clipped_kl import (
    AdaptiveClippedKL,
    attach_adaptive_clipped_kl,
    detach_adaptive_clipped_kl,
)
from lossmith.heads.distillation import linear_distillation_loss
from lossmith.heads.dual import DualHead, attach_dual_head, dual_head, export_main_head
from lossmith.heads.hierarchical import HierarchicalSoftmax
from lossmith.heads.linear import linear_loss
from lossmith.heads.spherical import SphericalHead

__all__ = [
    "AdaptiveClippedKL",
    "DualHead",
    "HierarchicalSoftmax",
    "SphericalHead",
    "attach_adaptive_clipped_kl",
    "attach_dual_head",
    "detach_adaptive_clipped_kl",
    "dual_head",
    "export_main_head",
    "linear_distillation_loss",
    "linear_loss",
]
