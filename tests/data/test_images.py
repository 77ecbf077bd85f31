"""Images from folders and from scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from lossmith.data import images as module
from lossmith.data.images import Augmented, PixelsOnDisk, read_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = numpy.full((4, 6, 3), 40 * (3 * label + i), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_sub_folders_are_classes_in_alphabetical_order(folder: Path) -> None:
    images = read_images(folder)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels.shape == (6, 3, 4, 6)
    torch.testing.assert_close(images.pixels[:, 0, 0, 0], torch.arange(6) * 40 / 255)
    assert read_images(folder, size=2).pixels.shape == (6, 3, 2, 2)


def test_what_does_not_fit_into_memory_is_read_when_it_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_images(folder).pixels
    monkeypatch.setattr(module, "MOST_IN_MEMORY", 10)
    pixels = read_images(folder).pixels
    assert isinstance(pixels, PixelsOnDisk)
    assert torch.equal(pixels[[4, 1]], whole[[4, 1]])
    assert torch.equal(pixels[torch.tensor([2])], whole[[2]])


def test_augmentation_repeats_itself_with_its_seed(folder: Path) -> None:
    whole = read_images(folder).pixels
    first, again = (Augmented(whole, padding=1, seed=3) for _ in range(2))
    assert torch.equal(first[[0, 5]], again[[0, 5]])
    assert first[[1] * 20].unique(dim=0).shape[0] > 1
    assert torch.equal(Augmented(whole, padding=0, seed=0)[[5]], whole[[5]])  # of one colour: a flip does not show


def test_wrong_input_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "dog" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        read_images(folder)
    (tmp_path / "dog" / "bad.png").unlink()
    Image.new("RGB", (3, 3)).save(tmp_path / "dog" / "small.png")
    with pytest.raises(ValueError, match="another size"):
        read_images(folder)
    (tmp_path / "emu").mkdir()
    with pytest.raises(ValueError, match="emu holds no images"):
        read_images(folder)
    with pytest.raises(ValueError, match="2 or more classes"):
        read_images(folder / "cat")
