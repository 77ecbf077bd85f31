"""Questions about images: drawn, and from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lossmith.data import ImageQuestion, digit_questions, read_image_questions, shape_questions
from lossmith.errors import InputError


def test_digits_are_read_in_raster_order_and_test_digits_are_others() -> None:
    from lossmith.data.image_questions import NUMBERS
    from lossmith.data.images import read_images

    images = read_images("digits")
    cells = {tuple(p.flatten().tolist()): (i, int(c)) for i, (p, c) in enumerate(zip(*images_of(images), strict=True))}
    seen: dict[str, set[int]] = {}
    for part in ("train", "test"):
        rows = digit_questions(40, seed=2, part=part)  # type: ignore[arg-type]
        for row in rows:
            assert isinstance(row.image, torch.Tensor)
            assert row.image.shape == (1, 16, 16)
            found = [
                cells[tuple(row.image[0, y : y + 8, x : x + 8].flatten().tolist())] for y in (0, 8) for x in (0, 8)
            ]
            names = [NUMBERS[label] for _, label in found]
            lines = {"read all": names, "read row one": names[:2], "read row two": names[2:],
                     "read column one": names[::2], "read column two": names[1::2]}  # fmt: skip
            assert row.completion.split() == lines[row.prompt]
            seen.setdefault(part, set()).update(number for number, _ in found)
    assert not seen["train"] & seen["test"]


def images_of(images: object) -> tuple[torch.Tensor, torch.Tensor]:
    return images.pixels, images.labels  # type: ignore[attr-defined]


def test_the_same_seed_draws_the_same_questions() -> None:
    for draw in (digit_questions, shape_questions):
        first, second, third = draw(6, seed=1), draw(6, seed=1), draw(6, seed=2)
        assert [q.completion for q in first] == [q.completion for q in second]
        assert all(torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]
        assert [q.completion for q in first] != [q.completion for q in third]


def test_shapes_differ_from_each_other_and_kinds_alternate() -> None:
    from lossmith.data.image_questions import SHAPES, _shape_masks

    for cell in (8, 9, 13, 16):
        masks = torch.stack(list(_shape_masks(cell)))
        assert len(masks) == len(SHAPES)
        assert len({tuple(m.flatten().tolist()) for m in masks}) == len(SHAPES)
    rows = shape_questions(4, grid=3, cell=9, questions=("all", "top"))
    assert [len(q.completion.split()) for q in rows] == [18, 6, 18, 6]
    assert rows[0].image.shape == (3, 27, 27)  # type: ignore[union-attr]
    assert all(float(q.image.min()) >= 0 and float(q.image.max()) <= 1 for q in rows)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"number": 0}, "at least 1"),
        ({"number": 2, "grid": 0}, "grid 1 to 9"),
        ({"number": 2, "part": "dev"}, "'train' or 'test'"),
        ({"number": 2, "questions": ("al",)}, "did you mean 'all'"),
        ({"number": 2, "questions": ()}, "at least one kind"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], sentence: str) -> None:
    for draw in (digit_questions, shape_questions):
        with pytest.raises(ValueError, match=sentence):
            draw(**options)  # type: ignore[operator]
    with pytest.raises(ValueError, match="at least 8 pixels"):
        shape_questions(1, cell=7)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{name}.png")
    rows = [
        {"image": "pictures/a.png", "prompt": "colour?", "completion": "red"},
        {"image": "pictures/b.png", "prompt": "", "completion": "blue"},
        {"image": "pictures/b.png", "prompt": "what?", "completion": "  "},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_table_names_images_beside_it(table: Path) -> None:
    rows = read_image_questions(table)
    assert rows == [
        ImageQuestion(table.parent / "pictures/a.png", "colour?", "red"),
        ImageQuestion(table.parent / "pictures/b.png", "", "blue"),
    ]


def test_a_folder_with_metadata_is_read(table: Path) -> None:
    metadata = table.parent / "metadata.csv"
    metadata.write_text("file_name,prompt,completion\npictures/a.png,colour?,red\n")
    assert [q.completion for q in read_image_questions(table.parent)] == ["red"]


def test_what_is_wrong_with_a_table_is_said(table: Path, tmp_path: Path) -> None:
    table.write_text(json.dumps({"image": "pictures/c.png", "prompt": "?", "completion": "red"}) + "\n")
    with pytest.raises(InputError, match=r"names the image 'pictures/c.png', which is not in"):
        read_image_questions(table)
    with pytest.raises(InputError, match="picture"):
        read_image_questions(table, image_field="picture")
    with pytest.raises(InputError, match=r"neither metadata\.jsonl nor metadata\.csv"):
        read_image_questions(tmp_path / "pictures")
    with pytest.raises(InputError, match="is not a file"):
        read_image_questions(tmp_path / "nothing.jsonl")
