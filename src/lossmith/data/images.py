"""Small image data sets as tensors: scikit-learn's digits, or a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


# Above this many numbers, pixels are read from the files when they are wanted.
MOST_IN_MEMORY = 2**28


class PixelsOnDisk:
    """Images read when they are indexed with a list of numbers; otherwise like a tensor of pixels."""

    def __init__(self, files: Sequence[Path], size: int | None):
        self.files, self.size = files, size
        self.shape = (len(files), *_read(files[0], size).shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Float[Tensor, "images channels height width"]:
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        pictures = [_read(self.files[i], self.size) for i in numbers]
        for i, picture in zip(numbers, pictures, strict=True):
            if picture.shape != self.shape[1:]:
                raise InputError(f"{self.files[i]} has another size than the first image; give a size to scale all to")
        return torch.stack(pictures)


class Augmented:
    """Pixels that come with a random crop (after zero padding) and a random horizontal flip, each time anew.

    The draws follow ``seed`` and the order in which batches are asked for, so that runs with the same order see the
    same pictures.
    """

    def __init__(self, pixels: Tensor | PixelsOnDisk, *, padding: int, seed: int):
        self.pixels, self.padding = pixels, padding
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Float[Tensor, "images channels height width"]:
        pixels = self.pixels[indices]
        *_, height, width = pixels.shape
        padded = F.pad(pixels, (self.padding,) * 4)
        shifts = torch.randint(2 * self.padding + 1, (len(pixels), 2), generator=self.generator)
        flips = torch.rand(len(pixels), generator=self.generator) < 0.5
        crops = [p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, shifts.tolist(), strict=True)]
        result = torch.stack(crops)
        result[flips] = result[flips].flip(-1)
        return result


@dataclass(frozen=True, slots=True)
class Images:
    """Pixels in [0, 1], labels and the classes' names."""

    pixels: Float[Tensor, "images channels height width"] | PixelsOnDisk
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]


def read_images(source: str | Path = "digits", *, size: int | None = None) -> Images:
    """Images with their classes.

    Args:
        source: ``"digits"`` (1,797 handwritten digits of 8 x 8 grey pixels, from scikit-learn: the extra ``images``),
            or a folder that holds one sub-folder of image files per class (as torchvision's ``ImageFolder``).
        size: height and width to scale the folder's images to; default: they must all be of one size.

    Raises:
        InputError: no such folder, no classes or images in it, a file that is no image, images of several sizes.

    >>> images = read_images("digits")
    >>> images.pixels.shape, len(images.classes)
    (torch.Size([1797, 1, 8, 8]), 10)
    """
    if str(source) == "digits":
        return _digits()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"image data {source} is not a folder (one sub-folder of images per class), nor 'digits'")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"image folder {folder} must hold a sub-folder for each of 2 or more classes, got {classes}")
    found: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"image folder {folder / name} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += files
        labels += [label] * len(files)
    pixels = PixelsOnDisk(found, size)
    small = torch.Size(pixels.shape).numel() <= MOST_IN_MEMORY
    return Images(pixels[range(len(found))] if small else pixels, torch.tensor(labels), tuple(classes))


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits need the extra 'images': pip install 'lossmith[images]'") from None
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return Images(pixels, torch.tensor(digits.target), tuple(map(str, digits.target_names)))


def _read(path: Path, size: int | None) -> Tensor:
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            if size is not None:
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 255
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
