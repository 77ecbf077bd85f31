"""Questions about images: files, and pictures that are drawn on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError, did_you_mean
from .completions import read_completions

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = ("all", "row", "top")
SHAPES = ("square", "circle", "triangle", "cross", "ring", "stripes")
COLOURS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.9, 0.3),
    "blue": (0.2, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.2),
}


@dataclass(frozen=True, slots=True)
class ImageQuestion:
    """An image (a file, or pixels in [0, 1] of shape (channels, height, width)), what is asked, the right answer."""

    image: Path | Tensor
    prompt: str
    completion: str = ""


def read_image_questions(
    source: str | Path,
    *,
    image_field: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str | None = "completion",
) -> list[ImageQuestion]:
    """Questions in a table of which one column names image files, relative to the table.

    Args:
        source: a JSONL, JSON, CSV, TSV or Parquet file, or a folder with ``metadata.jsonl`` or ``metadata.csv`` (as
            ``datasets``' ``imagefolder``).
        image_field: its column; default ``image`` of a file, ``file_name`` of a folder.
        prompt_field, completion_field: the others. Rows with a blank completion are left out; ``None``: there are none.

    Raises:
        InputError: no such file or column, an image that is not there, nothing in it.

    Instead of a path, ``"digits"`` and ``"shapes"`` are 256 questions of :func:`digit_questions` and
    :func:`shape_questions`.

    >>> len(read_image_questions("shapes"))
    256
    """
    if str(source) in ("digits", "shapes"):
        return (digit_questions if str(source) == "digits" else shape_questions)(256, part="test")
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
        if not found:
            raise InputError(f"folder {path} holds neither metadata.jsonl nor metadata.csv")
        path, image_field = found[0], image_field or "file_name"
    image_field = image_field or "image"
    # Rows without an answer, or where none are wanted, without an image, are left out of both columns.
    needed = completion_field or image_field
    texts = read_completions(path, prompt_field=prompt_field, completion_field=needed)
    named = read_completions(path, prompt_field=image_field, completion_field=needed)
    rows = []
    for number, (name, text) in enumerate(zip((pair.prompt for pair in named), texts, strict=True), 1):
        file = path.parent / name
        if not name.strip() or not file.is_file():
            raise InputError(f"{path}: question {number} names the image '{name}', which is not in {path.parent}")
        rows.append(ImageQuestion(file, text.prompt, text.completion if completion_field else ""))
    return rows


def digit_questions(
    number: int,
    *,
    seed: int = 0,
    part: Literal["train", "test"] = "train",
    grid: int = 2,
    questions: Sequence[Literal["all", "row", "top"]] = ("all", "row"),
) -> list[ImageQuestion]:
    """Grids of handwritten digits (scikit-learn's, 8 x 8 pixels each): read all of them, or a row or column.

    Args:
        number: of questions, each about a picture of its own.
        seed: of the draws.
        part: ``test``: every fifth digit of the data set, which ``train`` never shows.
        grid: digits on a side.
        questions: kinds, in turn: ``all`` has a long answer (``grid²`` words); ``row``, about any row or column, and
            ``top``, about the first row, have a short one (``grid`` words).

    >>> digit_questions(2)[0].completion.split()
    ['eight', 'zero', 'six', 'two']
    """
    from .images import read_images

    _check(number, part, grid, questions)
    images = read_images("digits")
    held_out = torch.arange(len(images.labels)) % 5 == 4
    rows = torch.nonzero(held_out if part == "test" else ~held_out).flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = rows[torch.randint(len(rows), (number, grid, grid), generator=generator)]
    names = [[NUMBERS[k] for k in row] for row in images.labels[chosen].flatten(1).tolist()]
    pixels = images.pixels[chosen.flatten()].view(number, grid, grid, 8, 8).permute(0, 1, 3, 2, 4)
    return _asked(pixels.reshape(number, 1, 8 * grid, 8 * grid), names, grid, questions, generator)


def shape_questions(
    number: int,
    *,
    seed: int = 0,
    part: Literal["train", "test"] = "train",
    grid: int = 2,
    cell: int = 8,
    questions: Sequence[Literal["all", "row", "top"]] = ("all", "row"),
) -> list[ImageQuestion]:
    """Grids of coloured shapes with a little noise: name all of them, or those of a row or column.

    Args:
        number, seed, grid, questions: see :func:`digit_questions`; each name is a colour and a shape.
        part: seeds of ``test`` are others than those of ``train``.
        cell: pixels on a side of each shape's place.

    >>> shape_questions(2)[0].completion.split()[:2]
    ['green', 'triangle']
    """
    _check(number, part, grid, questions)
    if cell < 8:
        # In fewer pixels some shapes are the same.
        raise ValueError(f"cell must be at least 8 pixels, got {cell}")
    generator = torch.Generator().manual_seed(2 * seed + (part == "test"))
    shapes = torch.randint(len(SHAPES), (number, grid * grid), generator=generator)
    colours = torch.randint(len(COLOURS), (number, grid * grid), generator=generator)
    masks = torch.stack(list(_shape_masks(cell)))[shapes]
    tones = torch.tensor(list(COLOURS.values()))[colours]
    cells = masks.unsqueeze(2) * tones[..., None, None]
    pixels = cells.view(number, grid, grid, 3, cell, cell).permute(0, 3, 1, 4, 2, 5).reshape(number, 3, grid * cell, -1)
    pixels = (pixels + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    colour_names = list(COLOURS)
    names = [
        [f"{colour_names[c]} {SHAPES[s]}" for s, c in zip(*pair, strict=True)]
        for pair in zip(shapes.tolist(), colours.tolist(), strict=True)
    ]
    return _asked(pixels, names, grid, questions, generator)


def _shape_masks(cell: int) -> Iterator[Tensor]:
    """In the order of ``SHAPES``."""
    axis = (torch.arange(cell) - (cell - 1) / 2) / (cell / 2)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    inside = torch.maximum(x.abs(), y.abs()) < 0.8
    yield inside.float()
    yield (radius < 0.8).float()
    yield ((y < 0.8) & (x.abs() < (y + 0.8) / 2)).float()
    yield (inside & (torch.minimum(x.abs(), y.abs()) < 0.25)).float()
    yield ((radius < 0.9) & (radius > 0.5)).float()
    yield (inside & (torch.arange(cell) % 2 == 0).unsqueeze(1)).float()


def _asked(
    pixels: Tensor, names: Sequence[Sequence[str]], grid: int, questions: Sequence[str], generator: torch.Generator
) -> list[ImageQuestion]:
    """One question about each picture; its row or column is drawn."""
    lines = torch.randint(2 * grid, (len(names),), generator=generator).tolist()
    rows = []
    for number, (picture, objects, line) in enumerate(zip(pixels, names, lines, strict=True)):
        kind = questions[number % len(questions)]
        if kind != "row":
            said = objects if kind == "all" else objects[:grid]
            rows.append(ImageQuestion(picture, f"read {kind}", " ".join(said)))
            continue
        place = line % grid
        chosen = objects[place * grid : (place + 1) * grid] if line < grid else objects[place::grid]
        what = "row" if line < grid else "column"
        rows.append(ImageQuestion(picture, f"read {what} {NUMBERS[place + 1]}", " ".join(chosen)))
    return rows


def _check(number: int, part: str, grid: int, questions: Sequence[str]) -> None:
    if number < 1 or not 1 <= grid <= 9:
        raise ValueError(f"number must be at least 1 and grid 1 to 9, got {number} and {grid}")
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got '{part}'")
    for name in questions:
        if name not in QUESTIONS:
            raise ValueError(f"unknown kind of question '{name}': {did_you_mean(name, QUESTIONS)}")
    if not questions:
        raise ValueError("questions must name at least one kind, got none")
