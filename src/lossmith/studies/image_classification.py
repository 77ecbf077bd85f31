"""What the studies of image classifiers share: data splits, networks, a teacher, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Split:
    """Pixels (a tensor, or read from disk), labels, the number of classes, and which examples serve for what."""

    pixels: Any
    labels: Tensor
    classes: int
    teacher: Tensor
    student: Tensor
    test: Tensor


def read_split(options: Mapping[str, Any], seed: int) -> Split:
    """The examples of ``options["data"]``, cut once (the same for all seeds); the student's are drawn by ``seed``.

    ``teacher_examples`` and ``student_examples`` are numbers of training examples; the rest is for testing.
    """
    import torch

    from lossmith.data.images import read_images

    if options["data"] is None:
        raise InputError(
            "this scale needs --data: a folder with one sub-folder of images per class, such as ImageNet's"
        )
    images = read_images(options["data"], size=options.get("size"))
    number, wanted = len(images.labels), int(options["teacher_examples"])
    # Of smaller data the same share as of the digits.
    taught = wanted if wanted <= 0.9 * number else int(0.55 * number)
    if taught < 2 * len(images.classes):
        raise InputError(
            f"{options['data']} holds {number} images of {len(images.classes)} classes: too few to train on"
        )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    teacher, test = order[:taught], order[taught:]
    drawn = torch.randperm(taught, generator=torch.Generator().manual_seed(seed))
    student = teacher[drawn[: min(taught, int(options["student_examples"]))]]
    return Split(images.pixels, images.labels, len(images.classes), teacher, student, test)


def noisy_labels(labels: Tensor, classes: int, probability: float, seed: int) -> Tensor:
    """Each label replaced, with ``probability``, by one drawn from all classes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    replaced = torch.rand(len(labels), generator=generator) < probability
    return torch.where(replaced, torch.randint(classes, labels.shape, generator=generator), labels)


def build_network(description: str, shape: tuple[int, ...], classes: int, *, pretrained: bool = False) -> nn.Module:
    """``mlp(256, 256)``, fully connected, or an image classifier by folder or hub id.

    The latter gets random weights, unless ``pretrained``.
    """
    from lossmith.registry import parse_spec
    from lossmith.training.networks import ImagePerceptron

    if description.startswith("mlp("):
        spec = parse_spec(description)
        return ImagePerceptron(shape, tuple(int(w) for w in spec.arguments), classes, **spec.options)
    from transformers import AutoConfig, AutoModelForImageClassification

    if pretrained:
        return AutoModelForImageClassification.from_pretrained(description)
    config = AutoConfig.from_pretrained(description, num_labels=classes)
    return AutoModelForImageClassification.from_config(config)


def predict(model: nn.Module, pixels: Any, rows: Tensor, *, batch_size: int = 512) -> Tensor:
    """Logits in evaluation mode."""
    import torch

    from lossmith.training.objectives import output_logits

    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [output_logits(model(pixel_values=pixels[part].to(device))).cpu() for part in rows.split(batch_size)]
    return torch.cat(parts)


def prepare_teacher(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the teacher, once for all arms and seeds; or name the pretrained one."""
    import torch
    from safetensors.torch import save_file

    from lossmith.files import replacing
    from lossmith.studies.tensor_training import train_on_tensors
    from lossmith.training import Classification

    if not str(options["teacher"]).startswith("mlp("):
        return {}
    path = folder / "teacher.safetensors"
    if not path.exists():
        split = read_split(options, 0)
        torch.manual_seed(0)
        teacher = build_network(options["teacher"], split.pixels.shape[1:], split.classes)
        columns = {"pixel_values": split.pixels[split.teacher], "labels": split.labels[split.teacher]}
        steps = int(options["teacher_epochs"]) * -(-len(split.teacher) // 64)
        train_on_tensors(
            teacher,
            columns,
            Classification(),
            steps=steps,
            batch_size=64,
            seed=0,
            folder=folder / "teacher",
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
        )
        with replacing(path) as temporary:
            save_file(teacher.state_dict(), temporary)
    return {"teacher_weights": str(path)}


def load_teacher(options: Mapping[str, Any], split: Split) -> nn.Module:
    """The teacher that :func:`prepare_teacher` trained, or the pretrained one."""
    from safetensors.torch import load_file

    pretrained = "teacher_weights" not in options
    teacher = build_network(options["teacher"], split.pixels.shape[1:], split.classes, pretrained=pretrained)
    if not pretrained:
        teacher.load_state_dict(load_file(options["teacher_weights"]))
    return teacher.eval()


def rank_correlation(student: Tensor, teacher: Tensor) -> float:
    """Mean over examples of Spearman's correlation between two orders of the classes."""
    import torch

    ranks = [logits.argsort(-1).argsort(-1).double() for logits in (student, teacher)]
    centred = [r - r.mean(-1, keepdim=True) for r in ranks]
    products = (centred[0] * centred[1]).sum(-1)
    scale = torch.sqrt(centred[0].square().sum(-1) * centred[1].square().sum(-1))
    return float((products / scale).mean())
