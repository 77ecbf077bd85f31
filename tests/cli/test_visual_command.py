"""``lossmith visual``: from a table of questions to a model that answers with fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from lossmith.cli import app
from lossmith.errors import InputError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def lossmith(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["visual", *map(str, arguments)])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with questions, and a model that was trained on them."""
    folder = tmp_path_factory.mktemp("visual")
    (folder / "photos").mkdir()
    rows = []
    for number in range(12):
        name, colour = list(COLOURS.items())[number % 3]
        Image.new("RGB", (40, 24), colour).save(folder / "photos" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "prompt": "which colour ?", "completion": name})
    (folder / "photos" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lossmith("fit", folder / "photos", "--out", folder / "model", "--steps", 120, "--width", 16, "--layers", 2,
                     "--batch-size", 6, "--learning-rate", 1e-2)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "12 questions, 120 steps" in found.output
    return folder


def test_answers_are_written_and_judged(workplace: Path) -> None:
    out = workplace / "answers.jsonl"
    found = lossmith("answer", workplace / "model", workplace / "photos", "--out", out)
    assert found.exit_code == 0, found.output
    assert "1.000 of 12 answers right" in found.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["answer"] for line in lines] == [line["completion"] for line in lines]


def test_questions_without_answers_are_answered(workplace: Path) -> None:
    table = workplace / "photos" / "new.csv"
    table.write_text("image,prompt\n1.png,which colour ?\n5.png,which colour ?\n")
    found = lossmith("answer", workplace / "model", table, "--unlabelled")
    assert found.output.splitlines() == ["which colour ? -> green", "which colour ? -> blue"]
    assert isinstance(lossmith("answer", workplace / "model", table).exception, InputError)


def test_redundancy_is_reported_as_table_file_and_picture(workplace: Path) -> None:
    common = ("redundancy", workplace / "model", workplace / "photos", "--selectors", "one_nn,vtw", "--keeps", "0.5")
    found = lossmith(*common, "--steps", "input,mid", "--schedule", "fastv(step=0, keep=0.25)", "--layer", 0,
                     "--out", workplace / "report.csv", "--plot", workplace / "curve.svg")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "fastv(keep=0.25, step=0)" in found.output
    assert len((workplace / "report.csv").read_text().splitlines()) == 1 + 4
    assert (workplace / "curve.svg").read_text().startswith("<?xml")
    lossmith(*common, "--out", workplace / "report.json")
    assert json.loads((workplace / "report.json").read_text())["questions"] == 12


def test_a_pruned_model_answers_by_its_schedule(workplace: Path) -> None:
    found = lossmith("prune", workplace / "model", "--schedule", "one_nn(step=input, keep=0.5)",
                     "--eval", workplace / "photos", "--out", workplace / "cheaper")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "one_nn(keep=0.5, step=input): 0." in found.output
    assert "files 1.00x (the weights stay), time of one answer " in found.output
    assert "right tokens 1.000 -> " in found.output
    assert "over 12 questions" in found.output
    answered = lossmith("answer", workplace / "cheaper", workplace / "photos")
    full = lossmith("answer", workplace / "cheaper", workplace / "photos", "--prune", "none")
    assert "which colour ? -> " in answered.output
    assert answered.output.splitlines()[-1].split("; ")[1] != full.output.splitlines()[-1].split("; ")[1]


def test_a_schedule_that_is_slower_says_so(workplace: Path) -> None:
    """More than thirty scoring passes for each answer cost more than the tokens that they save."""
    found = lossmith("prune", workplace / "model", "--schedule", "answer_logits(step=0, keep=0.5, groups=32)",
                     "--out", workplace / "dearer")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "x: slower than the full model" in found.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("answer", "MODEL", "nothing.jsonl"), "nothing.jsonl is not a file"),
        (("answer", "nowhere", "shapes"), "holds no image answerer"),
        (("answer", "MODEL", "PHOTOS", "--prune", "random(keep=2)"), "keep must be in"),
        (("redundancy", "MODEL", "PHOTOS", "--plot", "curve.txt"), "must end in"),
        (("redundancy", "MODEL", "PHOTOS", "--out", "x.txt"), ".json or .csv"),
        (("redundancy", "MODEL", "PHOTOS", "--keeps", "half"), "'half' is no number"),
        (("redundancy", "MODEL", "PHOTOS", "--selectors", "chance"), "unknown selector"),
        (("redundancy", "MODEL", "PHOTOS", "--selectors", ","), "no schedule to measure: name --selectors"),
        (
            ("redundancy", "MODEL", "PHOTOS", "--keeps", "2"),
            "'random(step=input, keep=2.0)': keep must be",
        ),
        (("prune", "MODEL", "--schedule", "vtw(layer=9)", "--out", "NEW"), "layer 9 of a model with 2"),
        (("prune", "MODEL", "--schedule", "random(step=99)", "--out", "NEW"), "never fires"),
        (("prune", "MODEL", "--schedule", "random", "--out", "MODEL"), "not an empty folder"),
        (("fit", "PHOTOS", "--out", "NEW", "--width", 10), "multiple of 16"),
        (("fit", "PHOTOS", "--out", "NEW", "--kind", "adopted"), "did you mean 'adapted'"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    workplace: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    places = {"MODEL": workplace / "model", "PHOTOS": workplace / "photos", "NEW": workplace / "new"}
    found = lossmith(*(places.get(a, a) for a in arguments))
    assert isinstance(found.exception, InputError), found.output
    assert sentence in str(found.exception)
    assert not (workplace / "new").exists()
