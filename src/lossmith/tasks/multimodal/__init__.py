"""Systems for images and text: answers that are unmasked beside an image."""

from lossmith.tasks.multimodal.answering import AnswerGroup, AnswerScores, ImageAnswerer
from lossmith.tasks.multimodal.model import MultimodalDiffusionConfig, MultimodalDiffusionModel
from lossmith.tasks.multimodal.vision import PatchEncoder, VisionEncoder

__all__ = [
    "AnswerGroup",
    "AnswerScores",
    "ImageAnswerer",
    "MultimodalDiffusionConfig",
    "MultimodalDiffusionModel",
    "PatchEncoder",
    "VisionEncoder",
]
