"""Questions about images, from training to answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lossmith.data import ImageQuestion, shape_questions
from lossmith.errors import InputError
from lossmith.sparsity import PruneSchedule, prune_visual_tokens
from lossmith.tasks.multimodal import ImageAnswerer

TINY: dict[str, Any] = {"width": 16, "layers": 2, "batch_size": 16}


def colours(number: int) -> list[ImageQuestion]:
    """One flat colour in each picture: learnt in no time."""
    shades = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
    names = [list(shades)[i % 3] for i in range(number)]
    pictures = [torch.tensor(shades[n]).view(3, 1, 1).expand(3, 8, 8) for n in names]
    long = [i % 2 for i in range(number)]
    return [
        ImageQuestion(p, "twice" if two else "once", f"{n} {n}" if two else n)
        for p, n, two in zip(pictures, names, long, strict=True)
    ]


@pytest.fixture(scope="module")
def trained() -> ImageAnswerer:
    return ImageAnswerer(steps=120, learning_rate=1e-2, **TINY).fit(colours(48))


def test_colours_are_learnt_with_their_number_of_words(trained: ImageAnswerer) -> None:
    assert trained.predict(colours(6)) == [q.completion for q in colours(6)]
    scores = trained.evaluate(colours(12))
    assert scores.exact == scores.tokens == 1.0
    assert scores.questions == 12
    assert "1.000 of 12 answers right" in scores.summary()


def test_a_question_needs_no_answer_to_be_answered(trained: ImageAnswerer) -> None:
    assert trained.predict([ImageQuestion(q.image, q.prompt) for q in colours(3)]) == [q.completion for q in colours(3)]
    assert trained.denoise([ImageQuestion(colours(1)[0].image, "")], prune="one_nn").ids.shape == (1, 4)


def test_a_wrong_answer_counts_as_wrong(trained: ImageAnswerer) -> None:
    wrong = [ImageQuestion(q.image, q.prompt, "blue" if q.completion == "red" else "red") for q in colours(3)[::2]]
    scores = trained.evaluate(wrong)
    assert scores.exact == 0.0
    # The end of each answer is right.
    assert scores.tokens == 0.5


@pytest.mark.slow
def test_a_schedule_goes_with_the_model_into_a_new_process(trained: ImageAnswerer, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "full")
    again = ImageAnswerer.from_pretrained(tmp_path / "full")
    prune_visual_tokens(again, "divprune(step=input, keep=0.5)")
    again.save_pretrained(tmp_path / "pruned")
    found = again.denoise(colours(4))
    assert found.kept_indices.shape == (4, 2)
    assert again.denoise(colours(4), prune=None).kept_indices.shape == (4, 4)
    code = f"""
import torch
from lossmith.data import ImageQuestion
from lossmith.tasks.multimodal import ImageAnswerer
red = ImageQuestion(torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8), "once", "red")
answerer = ImageAnswerer.from_pretrained({str(tmp_path / "pruned")!r})
print(answerer.predict([red]), tuple(answerer.denoise([red]).kept_indices.shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "['red'] (1, 2)"


@pytest.mark.slow
def test_an_adapted_model_is_shifted_and_trained_in_two_phases() -> None:
    answerer = ImageAnswerer("adapted", steps=160, learning_rate=1e-2, **TINY).fit(colours(48))
    assert answerer.model_.shifted
    assert answerer.steps_ == 160
    assert answerer.evaluate(colours(12)).exact == 1.0


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (ImageAnswerer(steps=3, **TINY).fit(colours(8)) for _ in range(2))
    for one, other in zip(first.model_.parameters(), second.model_.parameters(), strict=True):
        assert torch.equal(one, other)


def test_answers_without_an_end_are_as_long_as_is_asked() -> None:
    answerer = ImageAnswerer(steps=2, stop=False, **TINY).fit(shape_questions(8))
    assert sorted({g.length for g in answerer.groups(shape_questions(8))}) == [4, 8]
    ids = answerer.denoise(shape_questions(2), answer_length=5, steps=5).ids
    assert ids.shape == (2, 5)
    assert not torch.isin(ids, torch.tensor(answerer.tokenizer_.all_special_ids)).any()


def test_images_may_be_files_of_any_size(tmp_path: Path, trained: ImageAnswerer) -> None:
    Image.new("RGB", (31, 17), (255, 0, 0)).save(tmp_path / "red.png")
    assert trained.predict([ImageQuestion(tmp_path / "red.png", "once", "red")]) == ["red"]
    (tmp_path / "none.png").write_text("no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        trained.predict([ImageQuestion(tmp_path / "none.png", "once", "red")])


def test_encoder_and_language_model_with_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, Qwen2Config, Qwen2ForCausalLM

    from lossmith.data import train_tokenizer

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**small, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**small, "vocab_size": 50}))  # type: ignore[arg-type]
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}'
    )
    tokenizer = train_tokenizer(["once twice red green blue"], vocab_size=270)
    text = Qwen2ForCausalLM(Qwen2Config(**small, num_key_value_heads=1, vocab_size=len(tokenizer)))
    text.save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    answerer = ImageAnswerer(
        "adapted", vision=str(tmp_path / "clip"), trunk=str(tmp_path / "qwen"), steps=1, learning_rate=1e-12
    ).fit(colours(6))
    model = answerer.model_
    assert model.configuration.image_mean == (0.4, 0.5, 0.6)
    assert model.vision.tokens == 4
    old, new = text.model.layers[0].mlp.up_proj.weight, model.trunk.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(old, new, rtol=0, atol=1e-6)
    assert answerer.tokenizer_.mask_token_id == len(tokenizer)
    answerer.save_pretrained(tmp_path / "model")
    again = ImageAnswerer.from_pretrained(tmp_path / "model")
    assert again.predict(colours(2)) == answerer.predict(colours(2))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "scrach"}, "did you mean 'scratch'"),
        ({"steps": 0}, "at least 1"),
        ({"autoregressive_share": 1.0}, r"\[0, 1\)"),
        ({"trunk": "/no/such/folder"}, "tokenizer"),
        ({"vision": "/no/such/folder"}, "cannot be loaded"),
        ({"patch_size": 3}, "does not divide"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ImageAnswerer(**{"steps": 1, **TINY, **options}).fit(colours(4))


def test_wrong_questions_are_refused_in_a_sentence(trained: ImageAnswerer) -> None:
    with pytest.raises(InputError, match="no questions to train on"):
        ImageAnswerer().fit([])
    with pytest.raises(InputError, match="not been trained"):
        ImageAnswerer().predict(colours(1))
    with pytest.raises(InputError, match="no questions to answer"):
        trained.denoise([])
    with pytest.raises(InputError, match=r"question 1 .* has no answer"):
        trained.evaluate([ImageQuestion(colours(1)[0].image, "once", " ")])
    with pytest.raises(InputError, match="8 x 8 pixels, got"):
        trained.predict([ImageQuestion(torch.zeros(3, 4, 4), "once", "red")])
    with pytest.raises(InputError, match="one shape"):
        ImageAnswerer(**TINY).fit([*colours(1), ImageQuestion(torch.zeros(3, 4, 4), "a", "b")])
    with pytest.raises(InputError, match="holds no image answerer"):
        ImageAnswerer.from_pretrained("/no/such/folder")
    gray = ImageQuestion(torch.zeros(1, 8, 8), "", "red")
    assert len(trained.predict([gray])) == 1


@pytest.mark.slow
def test_half_of_the_visual_tokens_is_faster_from_pixels_to_text() -> None:
    """Where visual tokens are most of the sequence. The target is 1.4 times; less is asked on a busy machine."""
    torch.manual_seed(0)
    pictures = [ImageQuestion(torch.rand(3, 96, 96), "once", "red green blue red green blue red") for _ in range(4)]
    answerer = ImageAnswerer(steps=1, width=128, layers=3, batch_size=4).fit(pictures)
    assert answerer.model_.vision.tokens == 576
    for text in ("divprune(step=input, keep=0.5)", "answer_attention(step=0, keep=0.5)"):
        schedule = PruneSchedule.parse(text)
        assert schedule is not None
        assert answerer.time_ratio(schedule) < 1 / 1.2
