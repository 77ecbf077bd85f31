"""Contrastive rationale distillation: the objective against a slow reference, the judge, iterations, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lossmith.data import RationaleExample, train_tokenizer
from lossmith.errors import InputError
from lossmith.losses import contrastive_rationale_loss, rationale_quality_loss
from lossmith.training import (
    RationaleDistillation,
    RationaleJudge,
    RationaleSchedule,
    RationaleTable,
    RationaleTrainer,
)
from lossmith.training.trainer import last_complete_checkpoint

EXAMPLES = [
    RationaleExample("1 + 2 + 3", "6", ("1 + 2 = 3 ; 3 + 3 = 6", "3 + 3 = 6"), ("1 + 2 = 4 ; 4 + 3 = 7", "7", "8 = 8")),
    RationaleExample("2 + 2 - 1", "3", ("2 + 2 = 4 ; 4 - 1 = 3",)),
    RationaleExample("4 - 1 + 5", "8", ("4 - 1 = 3 ; 3 + 5 = 8", "so 8", "4 + 5 = 9 ; 9 - 1 = 8"), ("9",)),
    RationaleExample("0 + 1 - 1", "0", ("0 + 1 = 1 ; 1 - 1 = 0",), ("1 - 1 = 1",)),
] * 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [f"predict: explain: {e.question} {' '.join(e.positives + e.negatives)}" for e in EXAMPLES]
    return train_tokenizer(texts * 2, vocab_size=300)


def student(tokenizer: Any, **changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
        **changes,
    }
    return T5ForConditionalGeneration(T5Config(**shape))


def one_loss(model: Any, tokenizer: Any, prompt: str, target: str) -> Tensor:
    """The mean cross entropy of one target after one prompt, by the model's own loss, without any padding."""
    ids = torch.tensor([[*tokenizer(prompt)["input_ids"], 0]])
    labels = torch.tensor([[*tokenizer(target)["input_ids"], 0]])
    return model(input_ids=ids, labels=labels).loss


def one_score(judge: RationaleJudge, tokenizer: Any, question: str, rationale: str) -> Tensor:
    ids = torch.tensor([[*tokenizer(question)["input_ids"], 0, *tokenizer(rationale)["input_ids"], 0]])
    states = judge.encoder(input_ids=ids)[0][0]
    return torch.sigmoid(judge.score(torch.relu(judge.hidden(states.max(0).values))))[0]


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("all_at_once", [False, True])
@pytest.mark.parametrize("scheme", ["minmax", "maxmin", "mean", "weighted_mean"])
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_single_rationales(
    judged: bool, all_at_once: bool, scheme: Any, tokenizer: Any
) -> None:
    model = student(tokenizer).double()
    judge = RationaleJudge.from_model(model) if judged else None
    table = RationaleTable(EXAMPLES[:4], tokenizer)
    objective = RationaleDistillation(
        table, judge, beta=0.4, margin=8.0, scheme=scheme, all_at_once=all_at_once, rows_at_once=3
    )
    losses = objective(model, table.collate([2, 0, 1, 3]))
    expected = []
    for example in (EXAMPLES[i] for i in (2, 0, 1, 3)):
        good, bad = (
            torch.stack([one_loss(model, tokenizer, f"explain: {example.question}", r) for r in group])
            if group
            else torch.zeros(0, dtype=torch.float64)
            for group in (example.positives, example.negatives)
        )
        scores: list[Any] = [None, None]
        if judge is not None:
            scores = [
                torch.stack([one_score(judge, tokenizer, example.question, r) for r in group])
                if group
                else torch.zeros(0, dtype=torch.float64)
                for group in (example.positives, example.negatives)
            ]
        contrast = contrastive_rationale_loss(good, bad, *scores, beta=0.4, margin=8.0, scheme=scheme)
        expected.append(
            0.5 * one_loss(model, tokenizer, f"predict: {example.question}", example.label) + 0.5 * contrast
        )
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-10)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((weights * losses).sum(), parameters)
    theirs = torch.autograd.grad((weights * torch.stack(expected)).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_without_contrast_and_judge_it_is_distilling_step_by_step(tokenizer: Any) -> None:
    model, example = student(tokenizer).double(), EXAMPLES[1]
    table = RationaleTable([example], tokenizer)
    loss = RationaleDistillation(table, beta=0.0)(model, table.collate([0]))
    plain = one_loss(model, tokenizer, f"predict: {example.question}", example.label)
    plain = 0.5 * plain + 0.5 * one_loss(model, tokenizer, f"explain: {example.question}", example.positives[0])
    torch.testing.assert_close(loss[0], plain, rtol=1e-10, atol=1e-12)


def test_the_total_is_the_published_number() -> None:
    schedule = RationaleSchedule()
    judge = rationale_quality_loss(
        torch.tensor([[0.9, 0.7, 0.95]], dtype=torch.float64), torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64)
    )
    total = 0.5 * 0.7 + 0.5 * 0.65 + schedule.weight(0) * judge.item()
    assert total == pytest.approx(0.4244869405744328, abs=1e-15)
    assert schedule.weight(10) == pytest.approx(0.17433922005, abs=1e-12)


def test_student_and_judge_learn_from_their_own_loss_only(tokenizer: Any) -> None:
    model = student(tokenizer)
    judge = RationaleJudge.from_model(model)
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in judge.parameters())
    table = RationaleTable(EXAMPLES[:4], tokenizer)
    objective = RationaleDistillation(table, judge)
    objective.judge_learns = True
    objective(model, table.collate([0, 1, 2, 3])).sum().backward()
    assert all(p.grad is None for p in judge.parameters())
    model.zero_grad()
    assert objective.last is not None
    assert objective.last.judge is not None
    assert objective.last.judge[1] == 0  # without a bad rationale there is nothing to judge
    objective.last.judge.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert sum(float(p.grad.abs().sum()) for p in judge.parameters() if p.grad is not None) > 0


def test_a_judge_learns_to_tell_good_from_bad(tokenizer: Any) -> None:
    judge = RationaleJudge.from_model(student(tokenizer))
    table = RationaleTable(EXAMPLES[:4], tokenizer)
    objective = RationaleDistillation(table, judge)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    for _ in range(40):
        candidates = table.candidates([0, 2, 3])
        loss = objective.judge_loss(candidates, objective.judge_scores(candidates), 3).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = objective.judge_scores(candidates)
    assert scores[candidates.is_good].min() > scores[~candidates.is_good].max()
    assert bool(((scores > 0) & (scores < 1)).all())


def test_scores_do_not_depend_on_padding_and_a_saved_judge_gives_the_same(tokenizer: Any, tmp_path: Path) -> None:
    judge = RationaleJudge.from_model(student(tokenizer, dropout_rate=0.3)).train()
    table = RationaleTable(EXAMPLES[:4], tokenizer)
    together = table.candidates([0, 1, 2, 3])
    scores = judge(together.judge_ids, together.judge_mask)
    for row in range(len(scores)):
        length = int(together.judge_mask[row].sum())
        alone = judge(together.judge_ids[row : row + 1, :length], together.judge_mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], scores[row], rtol=1e-5, atol=1e-6)
    judge.save_pretrained(tmp_path)
    again = RationaleJudge.from_pretrained(tmp_path)
    assert torch.equal(again(together.judge_ids, together.judge_mask), scores)
    assert judge(together.judge_ids[:0], together.judge_mask[:0]).shape == (0,)
    with pytest.raises(InputError, match="holds no judge"):
        RationaleJudge.from_pretrained(tmp_path / "no")


def test_a_judge_in_half_precision_scores_in_float32(tokenizer: Any) -> None:
    judge = RationaleJudge.from_model(student(tokenizer).to(torch.bfloat16))
    rows = RationaleTable(EXAMPLES[:2], tokenizer).candidates([0, 1])
    scores = judge(rows.judge_ids, rows.judge_mask)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_own_negatives_take_the_place_of_those_before_and_never_say_what_a_good_one_says(tokenizer: Any) -> None:
    table = RationaleTable(EXAMPLES[:2], tokenizer)
    assert table.replace_own({0: ["nonsense", " "], 1: ["2 + 2 = 4 ;  4 - 1 = 3"]}) == (1, 2)
    rows = table.candidates([0, 1])
    assert int((~rows.is_good & (rows.owners == 0)).sum()) == 4
    assert int((~rows.is_good & (rows.owners == 1)).sum()) == 0
    table.replace_own({})
    assert int((~table.candidates([0, 1]).is_good).sum()) == 3


def test_spoilt_rationales_balance_the_kinds(tokenizer: Any) -> None:
    table = RationaleTable(EXAMPLES[:4], tokenizer)
    table.corrupt(seed=0)
    rows = table.candidates([0, 1, 2, 3], corruptions=True)
    for owner in range(4):
        good, bad = (int((rows.is_good[rows.owners == owner] == kind).sum()) for kind in (True, False))
        assert bad == max(good, len(EXAMPLES[owner].negatives), 1)


def trainer(tokenizer: Any, folder: Path, model: nn.Module | None = None, **changes: Any) -> RationaleTrainer:
    transformers.utils.logging.set_verbosity_error()
    schedule = {"steps": 2, "negative_lag": 2, "pretraining_steps": 2, **changes.pop("schedule", {})}
    options = {"judged": True, "beta": 0.2, "rationale_weight": 0.5, **changes.pop("options", {})}
    model = model or student(tokenizer)
    judge = RationaleJudge.from_model(model) if options.pop("judged") else None
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 9,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "seed": 3,
            "data_seed": 3,
            **changes,
        }
    )
    objective = RationaleDistillation(RationaleTable(EXAMPLES, tokenizer, max_target_length=16), judge, **options)
    made = RationaleTrainer(model, arguments, objective=objective, schedule=RationaleSchedule(**schedule))
    made.remove_callback(transformers.PrinterCallback)
    return made


def weights(made: RationaleTrainer) -> list[Tensor]:
    every = [*made.model.parameters()]
    if made.objective.judge is not None:
        every += made.objective.judge.parameters()
    return [p.detach().clone() for p in every]


def test_iterations_refresh_negatives_from_the_student_of_the_past(tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tokenizer, tmp_path)
    initial = [p.clone() for p in made.model.parameters()]
    made.train()
    files = sorted(p.name for p in (tmp_path / "rationales").iterdir())
    # Iteration 4 begins at step 8; those before 4 - 2 are not needed any more.
    assert files == [f"negatives-{i}.jsonl" for i in range(1, 5)] + [f"student-{i}.safetensors" for i in (2, 3, 4)]
    lines = (tmp_path / "rationales" / "negatives-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(8))
    from lossmith.training.text_sampling import generate_texts

    past = student(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(past.parameters(), initial, strict=True))
    said = generate_texts(
        past, tokenizer, [f"explain: {e.question}" for e in EXAMPLES], samples=1, temperature=1.5, max_new_tokens=16,
        seed=1_000_003 * 3 + 1,
    )  # fmt: skip
    assert [json.loads(line)["texts"] for line in lines] == said
    logged = made.state.log_history[0]
    names = {"answer_loss", "contrast_loss", "judge_loss", "positive_loss", "negative_loss", "loss", "tokens"}
    assert names <= logged.keys()
    assert 0.5 * logged["answer_loss"] + 0.5 * logged["contrast_loss"] == pytest.approx(logged["loss"], rel=1e-5)


def test_the_judges_rate_decays_and_it_rests_between_its_iterations(tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tokenizer, tmp_path, schedule={"judge_every": 2, "judge_learning_rate": 1e-3})
    seen: list[tuple[int, float, float]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert made.judge_optimizer is not None
            assert made.objective.judge is not None
            rate = made.judge_optimizer.param_groups[0]["lr"]
            seen.append((state.global_step, rate, float(made.objective.judge.score.weight.detach().sum())))

    made.add_callback(Watch())
    made.train()
    for step, rate, _ in seen:
        assert rate == pytest.approx(1e-3 * 0.9 ** ((step - 1) // 2))
    changes = [seen[i][2] != seen[i - 1][2] for i in range(1, len(seen))]
    assert changes == [True, False, False, True, True, False, False, True]


def test_a_factor_on_the_judges_loss_changes_next_to_nothing_under_adam(tokenizer: Any, tmp_path: Path) -> None:
    """Which is why the printed decay of the weight acts on the learning rate here."""
    judges = []
    for weight in (0.5, 0.05):
        made = trainer(tokenizer, tmp_path / str(weight), schedule={"judge_weight": weight}, max_steps=2)
        assert made.objective.judge is not None
        before = torch.cat([p.detach().flatten().clone() for p in made.objective.judge.parameters()])
        made.train()
        after = torch.cat([p.detach().flatten() for p in made.objective.judge.parameters()])
        judges.append((before, after))
    (start, one), (_, other) = judges
    assert (one - other).norm() < 0.02 * (one - start).norm()  # the epsilon of Adam


@pytest.mark.parametrize("steps", [3, 4])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(steps: int, tokenizer: Any, tmp_path: Path) -> None:
    whole = trainer(tokenizer, tmp_path / "whole")
    whole.train()
    first = trainer(tokenizer, tmp_path / "cut", save_strategy="steps", save_steps=steps)

    class Stop(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == steps
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    torch.manual_seed(99)
    second = trainer(tokenizer, tmp_path / "cut", save_strategy="steps", save_steps=100)
    second.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_without_its_past_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    import shutil

    first = trainer(tokenizer, tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    first.train()
    shutil.rmtree(tmp_path / "rationales")
    with pytest.raises(InputError, match=r"negatives-1\.jsonl is missing: a resumed run needs the folder"):
        trainer(tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-3" / "judge_state.safetensors").unlink()
    with pytest.raises(InputError, match="holds no judge"):
        trainer(tokenizer, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_micro_batches_give_the_same_student_and_judge(tokenizer: Any, tmp_path: Path) -> None:
    whole = trainer(tokenizer, tmp_path / "a", student(tokenizer).double(), max_steps=5)
    whole.train()
    cut = trainer(
        tokenizer, tmp_path / "b", student(tokenizer).double(), max_steps=5, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    cut.train()
    for a, b in zip(weights(whole), weights(cut), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_other_methods_leave_no_trace(tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(tokenizer, tmp_path, options={"judged": False, "beta": 0.0})
    made.train()
    assert not (tmp_path / "rationales").exists()
    assert made.state.total_flos > 0
    only = trainer(tokenizer, tmp_path / "b", options={"judged": True, "rationale_weight": 0.0})
    before = weights(only)[-1]
    only.train()
    assert torch.equal(weights(only)[-1], before)  # the judge has nothing to do


def test_evaluation_is_of_the_labels(tokenizer: Any) -> None:
    model, table = student(tokenizer), RationaleTable(EXAMPLES[:2], tokenizer)
    found = RationaleDistillation(table).evaluate(model, table.collate([0, 1]))
    expected = [one_loss(model, tokenizer, f"predict: {e.question}", e.label) for e in EXAMPLES[:2]]
    torch.testing.assert_close(found.loss_sums / found.targets, torch.stack(expected).detach())


def test_long_inputs_are_cut_and_the_end_token_stays(tokenizer: Any) -> None:
    example = RationaleExample("word " * 50, "label " * 50, ("because " * 50,))
    table = RationaleTable([example], tokenizer, max_input_length=10, max_target_length=6)
    batch, rows = table.collate([0]), table.candidates([0])
    assert batch["input_ids"].shape == (1, 10)
    assert batch["labels"].shape == (1, 6)
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == rows.labels[0, -1] == 0
    assert rows.judge_ids.shape[1] <= 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: RationaleTable([], t), "no examples to learn from"),
        (lambda t: RationaleTable([RationaleExample("q", "a", ())], t), "example 0 has no rationale to learn"),
        (lambda t: RationaleTable(EXAMPLES, t, max_input_length=1), "max_input_length must be at least 4"),
        (lambda t: RationaleDistillation(RationaleTable(EXAMPLES, t), beta=-1), "beta must be"),
        (lambda t: RationaleDistillation(RationaleTable(EXAMPLES, t), answer_weight=-1), "answer_weight must be"),
        (lambda t: RationaleDistillation(RationaleTable(EXAMPLES, t), rows_at_once=0), "rows_at_once must be"),
        (lambda t: RationaleSchedule(negative_lag=0), "negative_lag must be at least 1, got 0"),
        (lambda t: RationaleSchedule(negative_temperature=0), "negative_temperature must be"),
        (lambda t: RationaleSchedule(judge_decay=2), "judge_decay in"),
        (lambda t: RationaleSchedule(decays="both"), "decays must be learning_rate or loss, got 'both'"),
        (lambda t: RationaleSchedule(steps=0), "steps of an iteration must be at least 1"),
        (lambda t: RationaleSchedule(corruption=0), "corruption in"),
    ],
)
def test_wrong_options_are_named(make: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer)


def test_a_student_without_an_encoder_is_refused(tokenizer: Any) -> None:
    table = RationaleTable(EXAMPLES, tokenizer)
    with pytest.raises(InputError, match="must be a sequence-to-sequence model"):
        RationaleDistillation(table)(nn.Linear(2, 2), table.collate([0]))
    with pytest.raises(InputError, match="needs objective=RationaleDistillation"):
        RationaleTrainer(student(tokenizer))
