"""Loss functions: pure, one value per example, never reduced.

``f(inputs..., targets, *, options) -> Float[Tensor, "*batch"]``. Examples with ``ignore_index`` have loss and
gradient exactly zero. This package imports nothing else of lossmith.
"""

from lossmith.losses.binary_kl import binary_kl, binary_kl_norm
from lossmith.losses.classification import cross_entropy, focal_loss, z_loss
from lossmith.losses.clipped_kl import clipped_kl, span_correlation
from lossmith.losses.contrastive import contrastive_rationale_loss, rationale_quality_loss
from lossmith.losses.distillation import (
    decoupled_kl,
    dist,
    distillation_kl,
    jensen_shannon,
    plackett_luce_distillation,
    reverse_kl,
)
from lossmith.losses.masked_diffusion import masked_diffusion_loss
from lossmith.losses.overlap import class_weights, dice_loss, set_dice_loss, set_tversky_loss, tversky_loss
from lossmith.losses.recommendation import bpr_loss, implicit_bce_loss
from lossmith.losses.spherical import spherical_softmax_loss, taylor_softmax_loss

__all__ = [
    "binary_kl",
    "binary_kl_norm",
    "bpr_loss",
    "class_weights",
    "clipped_kl",
    "contrastive_rationale_loss",
    "cross_entropy",
    "decoupled_kl",
    "dice_loss",
    "dist",
    "distillation_kl",
    "focal_loss",
    "implicit_bce_loss",
    "jensen_shannon",
    "masked_diffusion_loss",
    "plackett_luce_distillation",
    "rationale_quality_loss",
    "reverse_kl",
    "set_dice_loss",
    "set_tversky_loss",
    "span_correlation",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "tversky_loss",
    "z_loss",
]
