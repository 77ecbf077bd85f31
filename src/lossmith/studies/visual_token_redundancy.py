"""Visual token redundancy: which image tokens can a model spare that unmasks its answers, and until when?

"A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language Models", 2025,
arXiv 2511.15098.

A small model reads grids of 2 x 2 handwritten digits: all four (long answers) or the first row (short ones). It is
trained once by masked diffusion from scratch and once first autoregressively; every arm drops tokens of the same two.
``--data`` takes a table of questions about images; ``full`` has a SigLIP encoder and a pre-trained language model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    from lossmith.data import ImageQuestion
    from lossmith.tasks.multimodal import ImageAnswerer

ARMS = {
    "full": "nothing is dropped",
    "random": "tokens at random",
    "divprune": "the most different tokens",
    "one-nn": "tokens without a near neighbour",
    "fastv": "tokens that all queries attend to",
    "sparsevlm": "tokens that the prompt's words attend to",
    "answer-attention": "tokens that the masked answer attends to",
    "answer-logits": "tokens without which the answer is less sure",
    "layer-skipping": "all tokens leave after the middle layer of every step",
}
KINDS = ("scratch", "adapted")
# Where a quarter of the tokens is kept, in the order of the steps.
PLACES = ("input", "first", "mid", "late")

CLAIMS = (
    Claim(
        "Half of the image is enough for long answers", "answer-attention", "scratch/long/half", "higher", margin=-0.02
    ),
    Claim("Long answers lose less than short ones", "answer-attention", "long_less_short", "higher"),
    Claim("A model from scratch loses less than an adapted one", "answer-attention", "scratch_less_adapted", "higher"),
    Claim("Each later step saves 10 points", "random", "scratch/long/least_rise", "higher", margin=0.1),
    Claim(
        "Attention of the answer beats chance, late", "answer-attention", "scratch/long/late", "higher", "random", 0.03
    ),
    Claim(
        "And progressively",
        "answer-attention",
        "scratch/long/progressive",
        "higher",
        "random",
        0.03,
    ),
    Claim("Answer logits beat chance at the input", "answer-logits", "scratch/long/half", "higher", "random", 0.03),
    Claim("Lost information comes back late", "random", "scratch/long/recovery", "higher"),
    Claim(
        "Progressive pruning beats layer skipping from scratch",
        "answer-attention",
        "scratch/long/progressive",
        "higher",
        "layer-skipping",
    ),
    Claim(
        "Layer skipping beats progressive pruning when adapted",
        "layer-skipping",
        "adapted/long/progressive",
        "higher",
        "answer-attention",
    ),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Accuracies of one selector in all places, on both models and both lengths of answers."""
    from lossmith.sparsity import PruneSchedule

    metrics: dict[str, float] = {}
    steps = tokens = 0
    flops = seconds = 0.0
    for kind in KINDS:
        answerer = _trained(kind, seed, options, folder)
        steps += int(options["steps"])
        per_example = answerer.model_.vision.tokens + answerer.answer_length_
        tokens += int(options["steps"]) * int(options["batch_size"]) * per_example
        for task, questions in _tests(answerer, seed, options).items():
            schedules = _schedules(arm, answerer)
            # A share of the steps that is no step (short answers) is left out.
            report = answerer.redundancy(
                questions, selectors=(), schedules=[s for s in schedules.values() if s is not None]
            )
            found = {"full": report.accuracy}
            for place, schedule in schedules.items():
                point = None
                if schedule is not None:
                    chosen = str(PruneSchedule.parse(schedule))
                    point = next((p for p in report.points if p.schedule == chosen), None)
                if point is not None:
                    found[place] = point.accuracy
                    found[f"{place}/mixture"] = point.mixture
                if kind == "scratch" and task == "long" and place == "progressive":
                    flops = report.flops * (point.flops if point is not None else 1.0)
                    seconds = report.seconds * (point.seconds if point is not None else 1.0)
            metrics |= {f"{kind}/{task}/{name}": value for name, value in _derived(arm, found).items()}
    for metric, one, other in (
        ("long_less_short", "scratch/long/half_change", "scratch/short/half_change"),
        ("scratch_less_adapted", "scratch/long/half_change", "adapted/long/half_change"),
    ):
        if one in metrics and other in metrics:
            metrics[metric] = metrics[one] - metrics[other]
    cost = Cost(tokens=tokens, steps=steps, seconds=seconds, flops=flops)
    return Experiment(metrics, cost)


def _schedules(arm: str, answerer: ImageAnswerer) -> dict[str, str | None]:
    """By place. Layer skipping has one schedule, which stands beside progressive pruning: their costs are alike."""
    if arm == "full":
        return {"progressive": None}
    # Tokens keep their numbers: models this small lose more by the new ones than by what is dropped.
    own = "keep_positions=True"
    if arm == "layer-skipping":
        middle = (answerer.model_.shape.layers - 1) // 2
        return {"progressive": f"vtw(layer={middle}, every_step=True, {own})"}
    name = arm.replace("-", "_")
    places: dict[str, str | None] = {"half": f"{name}(step=input, keep=0.5, {own})"}
    steps = {"input": "input", "first": "0", "mid": "mid", "late": "late"}
    places |= {place: f"{name}(step={step}, keep=0.25, {own})" for place, step in steps.items()}
    places["progressive"] = f"{name}(progressive=[0.25, 0.5, 0.75], {own})"
    if arm == "answer-logits":
        # One forward pass for each group of patches.
        places = {place: f"{str(text)[:-1]}, groups=4)" for place, text in places.items()}
    return places


def _derived(arm: str, found: Mapping[str, float]) -> dict[str, float]:
    full = found["full"]
    if arm == "full":
        # What the claims compare with.
        same = dict.fromkeys(("half", *PLACES, "progressive"), full)
        return {**same, "half_change": 0.0, "recovery": 0.0, "least_rise": 0.0}
    metrics = {name: value for name, value in found.items() if "/" not in name and name != "full"}
    if "half" in found:
        metrics["half_change"] = found["half"] - full
    beyond = [found[p] - found[f"{p}/mixture"] for p in PLACES[1:] if p in found and f"{p}/mixture" in found]
    beyond = [value for value in beyond if value == value]
    if beyond:
        metrics["recovery"] = sum(beyond) / len(beyond)
    if all(place in found for place in PLACES):
        metrics["least_rise"] = min(found[b] - found[a] for a, b in itertools.pairwise(PLACES))
    return metrics


# ---- models and questions -------------------------------------------------------------------------------------------


def _trained(kind: str, seed: int, options: Mapping[str, Any], folder: Path) -> ImageAnswerer:
    """The model of a kind and a seed, trained by the arm that asks first."""
    from lossmith.data import digit_questions
    from lossmith.files import replacing_folder
    from lossmith.tasks.multimodal import ImageAnswerer
    from lossmith.training.record import locked

    place = Path(options.get("models", folder)) / f"{kind}-{seed}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.parent / f"{kind}-{seed}-training", wait_seconds=24 * 3600):
        if not place.exists():
            if options["data"] == "digits":
                questions = digit_questions(int(options["questions"]), seed=seed, questions=("all", "top"))
            else:
                questions = _split(options)[0]
            answerer = _untrained(kind, seed, options).fit(questions)
            with replacing_folder(place) as unfinished:
                answerer.save_pretrained(unfinished)
        answerer = ImageAnswerer.from_pretrained(place)
    answerer.batch_size = int(options["test_batch_size"])
    return answerer


def _untrained(kind: str, seed: int, options: Mapping[str, Any]) -> ImageAnswerer:
    import torch

    from lossmith.tasks.multimodal import ImageAnswerer

    trunk: Any = options["trunk"]
    if trunk is not None and kind == "scratch":
        # The same shape and tokenizer without the weights of autoregressive training.
        from transformers import AutoConfig

        trunk = AutoConfig.from_pretrained(trunk).to_dict()
    return ImageAnswerer(
        kind,  # type: ignore[arg-type]
        vision=options["vision"],
        trunk=trunk,
        tokenizer=options["trunk"],
        steps=int(options["steps"]),
        batch_size=int(options["batch_size"]),
        learning_rate=float(options["learning_rate"]),
        autoregressive_share=0.4,
        stop=options["data"] != "digits",
        seed=seed,
        width=int(options["width"]),
        layers=int(options["layers"]),
        use_cpu=not torch.cuda.is_available(),
    )


def _tests(answerer: ImageAnswerer, seed: int, options: Mapping[str, Any]) -> dict[str, list[ImageQuestion]]:
    """Questions with long and with short answers; the same for all kinds and arms."""
    from lossmith.data import digit_questions
    from lossmith.errors import InputError

    number = int(options["test_questions"])
    if options["data"] == "digits":
        return {
            "long": digit_questions(number, seed=1000 + seed, part="test", questions=("all",)),
            "short": digit_questions(number, seed=1000 + seed, part="test", questions=("top",)),
        }
    held_out = _split(options)[1]
    words = int(options["short_words"])
    tests = {
        "long": [q for q in held_out if len(q.completion.split()) > words][:number],
        "short": [q for q in held_out if len(q.completion.split()) <= words][:number],
    }
    for task, found in tests.items():
        if not found:
            raise InputError(
                f"{options['data']}: no {task} answers among {len(held_out)} held out (a short one has at most {words} "
                "words; --set short_words=N)"
            )
    return tests


def _split(options: Mapping[str, Any]) -> tuple[list[ImageQuestion], list[ImageQuestion]]:
    """User's questions for training and for testing; no image is on both sides."""
    import random

    from lossmith.data import read_image_questions
    from lossmith.errors import InputError

    if options["data"] is None:
        raise InputError("this scale needs --data: a table of questions about images (image, prompt, completion)")
    rows = read_image_questions(options["data"])
    # Drawn pictures are all different.
    keys = [str(q.image) if isinstance(q.image, Path) else str(i) for i, q in enumerate(rows)]
    images = sorted(set(keys))
    random.Random(0).shuffle(images)
    test = set(images[: max(1, len(images) // 5)])
    training = [q for q, key in zip(rows, keys, strict=True) if key not in test]
    if not training:
        raise InputError(f"{options['data']}: questions about one image only; some must be held out")
    return training, [q for q, key in zip(rows, keys, strict=True) if key in test]


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where the arms share their trained models."""
    return {"models": str(folder / "models")}


DIGITS = {
    "data": "digits",
    "vision": None,
    "trunk": None,
    "questions": 8192,
    "test_questions": 96,
    "test_batch_size": 96,
    "short_words": 2,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "width": 64,
    "layers": 2,
}

STUDY = Study(
    slug="visual-token-redundancy",
    family="sparsity",
    question="Which image tokens can a model spare that unmasks its answers, and until when?",
    paper=Paper(
        "A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language "
        "Models",
        2025,
        "2511.15098",
    ),
    arms=ARMS,
    baseline="full",
    metric="scratch/long/progressive",
    metrics=(
        "scratch/long/progressive",
        "scratch/long/half",
        "scratch/long/input",
        "scratch/long/first",
        "scratch/long/mid",
        "scratch/long/late",
        "scratch/long/recovery",
        "scratch/long/least_rise",
        "scratch/short/half",
        "scratch/short/input",
        "adapted/long/progressive",
        "adapted/long/half",
        "adapted/long/recovery",
        "adapted/short/half",
        "long_less_short",
        "scratch_less_adapted",
    ),
    lower_is_better=False,
    better={"scratch/long/half": "higher", "scratch/long/late": "higher", "adapted/long/progressive": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {**DIGITS, "steps": 8, "questions": 64, "test_questions": 8, "width": 16},
        "quick": {**DIGITS, "steps": 400},
        "full": {
            **DIGITS,
            "data": None,
            "vision": "google/siglip-base-patch16-224",
            "trunk": "HuggingFaceTB/SmolLM2-135M",
            "steps": 20_000,
            "batch_size": 64,
            "learning_rate": 1e-4,
            "test_questions": 2000,
            "test_batch_size": 16,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="questions about images: a table with image, prompt and completion, or a folder with metadata.jsonl",
    notes=(
        "Accuracy: share of the answers' tokens that are right. half: half of the tokens are dropped before the first "
        "step; input, first, mid, late: three quarters, before the first step, after it, after a half and after three "
        "quarters of the steps; progressive: a quarter after each quarter of the steps (layer skipping: its one "
        "schedule). recovery: mean over first, mid and late of the accuracy beyond the trivial mixture of the full "
        "model's and the input's rates. long_less_short, scratch_less_adapted: differences of what half costs.",
        "Compute and time are those of one long answer under the progressive schedule, with the passes that only score "
        "tokens; tokens and steps are those of the training of the two models, the same for every arm.",
    ),
)
