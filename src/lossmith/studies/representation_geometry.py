"""Representation geometry: the loss falls smoothly, the shape of the representations does not.

"Tracing the Representation Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025,
arXiv 2509.23024.

Arms are moments of one training (of the same seed): before it, at the end of warm-up, in the middle, at the end; and
the end once more with leading directions of the last hidden state removed, or only those kept. The small model is the
digest's (two layers of 32); compression is a phase of much longer training and is not claimed here. ``--data`` takes a
corpus; ``full`` are revisions of Pythia.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.sharing import tensors_once
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "start": "random weights",
    "warmup": "where the rank is least, early in training",
    "middle": "a quarter of the training",
    "end": "the whole training",
    "end-removed": "the whole training; the leading directions removed in front of the output layer",
    "end-retained": "the whole training; only the leading directions retained",
}

CLAIMS = (
    Claim("Representations collapse during warm-up: the rank halves", "warmup", "rankme", "lower", "start", ratio=0.5),
    Claim("Then they expand: the rank is three times that of the trough", "end", "rankme", "higher", "warmup", ratio=3),
    Claim("The decay is fastest in the trough", "warmup", "alpha", "higher", "start"),
    Claim("The loss falls in warm-up", "warmup", "loss", "lower", "start"),
    Claim("The loss falls on from there", "middle", "loss", "lower", "warmup"),
    Claim("The loss falls to the end", "end", "loss", "lower", "middle"),
    Claim(
        "What leading directions alone can do is less than what all others can",
        "end-retained",
        "accuracy",
        "lower",
        "end-removed",
    ),
)


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tokenise the corpus once."""
    import torch
    from safetensors.torch import save_file

    from lossmith.data import read_corpus, train_tokenizer
    from lossmith.data.tokenization import encode

    if options["model"] is not None:
        return {}
    data = options.get("data")
    texts = [d.text for d in read_corpus(str(data or "python")) if data or d.domain == "code"]
    tokenizer = train_tokenizer(texts, vocab_size=int(options["vocab_size"]))
    ids = torch.cat([torch.from_numpy(row).long() for row in encode(tokenizer, texts[: int(options["documents"])])])
    path = folder / "tokens.safetensors"
    save_file({"tokens": ids}, path)
    return {"tokens": str(path), "vocabulary": len(tokenizer), "trained": str(folder / "trained")}


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One moment: rank, decay, loss and accuracy on held-out windows."""
    started = time.perf_counter()
    if options["model"] is not None:
        return _published(arm, seed, options, started)
    import torch

    length, steps = int(options["sequence_length"]), _moment(arm, options)
    train, held_out = _windows(options, length)
    model = _small_model(options, seed)
    cost, seconds = Cost(), 0.0
    if steps:

        def train_to_moment() -> dict[str, Any]:
            began = time.perf_counter()
            flops = _train(model, train, steps, seed, options, folder)
            spent = torch.tensor([flops, time.perf_counter() - began], dtype=torch.float64)
            return {**model.state_dict(), "spent": spent}

        # Arms of one moment look at one model.
        found = tensors_once(Path(options["trained"]) / f"step-{steps}-seed-{seed}.safetensors", train_to_moment)
        flops, seconds = found.pop("spent").tolist()
        model.load_state_dict(found)
        cost = Cost(tokens=steps * int(options["batch_size"]) * length, steps=steps, flops=flops)
    started = time.perf_counter()
    samples = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))]
    metrics = _measure(model, samples[: int(options["samples"])], arm, options)
    seconds += time.perf_counter() - started
    return Experiment(metrics, Cost(cost.tokens, cost.steps, seconds=seconds, flops=cost.flops))


def _train(model: Any, windows: Any, steps: int, seed: int, options: Mapping[str, Any], folder: Path) -> float:
    """The first ``steps`` of the whole training; its floating-point operations."""
    import torch

    from lossmith.studies.tensor_training import train_on_tensors
    from lossmith.training.objectives import NextToken

    total, batch = int(options["steps"]), int(options["batch_size"])

    def optimizers(network: Any) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=float(options["learning_rate"]), weight_decay=0.01)
        warmup = max(1, total // 20)

        # The schedule of the whole training, wherever this arm stops.
        def factor(step: int) -> float:
            return min((step + 1) / warmup, 1 - 0.9 * max(0, step - warmup) / max(1, total - warmup))

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    generator = torch.Generator().manual_seed(seed)
    rows = windows[torch.randperm(len(windows), generator=generator)[: total * batch]]
    trained = train_on_tensors(
        model,
        {"input_ids": rows, "labels": rows},
        NextToken(),
        steps=steps,
        batch_size=batch,
        seed=seed,
        folder=folder,
        optimizers=optimizers,
        tokens_per_example=windows.shape[1],
        max_grad_norm=1.0,
    )
    return float(trained.flops)


def _moment(arm: str, options: Mapping[str, Any]) -> int:
    total = int(options["steps"])
    return {"start": 0, "warmup": int(options["warmup_steps"]), "middle": total // 4}.get(arm, total)


def _windows(options: Mapping[str, Any], length: int) -> tuple[Any, Any]:
    from safetensors.torch import load_file

    tokens = load_file(options["tokens"])["tokens"]
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    # Every tenth window is held out.
    held_out = windows[::10]
    return windows[[i for i in range(len(windows)) if i % 10]], held_out


def _small_model(options: Mapping[str, Any], seed: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=int(options["vocabulary"]),
            n_positions=int(options["sequence_length"]),
            n_embd=int(options["width"]),
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def _measure(model: Any, windows: Any, arm: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Geometry of the last hidden state of each window's last token; loss and accuracy at all tokens."""
    import torch

    from lossmith.losses import cross_entropy
    from lossmith.probes import SpectralMetrics, StreamingCovariance, ablate_directions, leading_directions

    model.eval()
    width = int(model.config.hidden_size)
    geometry = StreamingCovariance(width)
    every = StreamingCovariance(width)
    with torch.no_grad():
        for part in windows.split(256):
            hidden = model(input_ids=part, output_hidden_states=True).hidden_states[-1]
            geometry.update(hidden[:, -1])
            every.update(hidden.reshape(-1, width))
        change: Any = nullcontext()
        if arm.startswith("end-"):
            mode: Any = "remove" if arm == "end-removed" else "retain"
            directions = leading_directions(every, int(options["directions"]))
            change = ablate_directions(model, directions, mode=mode, mean=every.mean)
        total = right = count = 0.0
        with change:
            for part in windows.split(256):
                logits = model(input_ids=part).logits[:, :-1].float()
                targets = part[:, 1:]
                total += float(cross_entropy(logits, targets).sum())
                right += float((logits.argmax(-1) == targets).sum())
                count += targets.numel()
    # Small corpora have fewer eigenvalues than the fit is meant for.
    first, last = options["ranks"] if len(windows) > options["ranks"][1] else (None, None)
    found = SpectralMetrics.from_covariance(geometry, first=first, last=last)
    return {"rankme": found.rankme, "alpha": found.alpha, "loss": total / count, "accuracy": right / count}


def _published(arm: str, seed: int, options: Mapping[str, Any], started: float) -> Experiment:
    import torch
    from transformers import AutoModelForCausalLM

    from lossmith.data import load_tokenizer, read_corpus

    revision = options["revisions"][arm]
    # A local folder holds one folder for each revision.
    local = Path(options["model"]) / str(revision)
    where, which = (str(local), {}) if local.is_dir() else (options["model"], {"revision": revision})
    model = AutoModelForCausalLM.from_pretrained(where, **which)
    tokenizer: Any = load_tokenizer(where)
    length = int(options["sequence_length"])
    # Every seed has texts of its own.
    rows, skip = [], seed * int(options["samples"])
    for document in read_corpus(str(options.get("data") or options["corpus"])):
        ids = tokenizer(document.text, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        if len(ids) == length and skip:
            skip -= 1
        elif len(ids) == length:
            rows.append(ids)
        if len(rows) == int(options["samples"]):
            break
    metrics = _measure(model, torch.tensor(rows), arm, options)
    return Experiment(metrics, Cost(seconds=time.perf_counter() - started))


SMALL = {
    "model": None,
    "vocab_size": 1000,
    "documents": 2000,
    "width": 32,
    "sequence_length": 16,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "directions": 2,
    "ranks": [6, 28],
}

STUDY = Study(
    slug="representation-geometry",
    family="probes",
    question="What happens to the shape of representations while the loss falls?",
    paper=Paper(
        "Tracing the Representation Geometry of Language Models from Pretraining to Post-training", 2025, "2509.23024"
    ),
    arms=ARMS,
    baseline="start",
    metric="rankme",
    metrics=("rankme", "alpha", "loss", "accuracy"),
    better={"loss": "lower", "accuracy": "higher"},
    lower_is_better=False,
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {**SMALL, "documents": 60, "vocab_size": 400, "steps": 8, "warmup_steps": 4, "samples": 80},
        "quick": {**SMALL, "steps": 1500, "warmup_steps": 76, "samples": 1500},
        "full": {
            "model": "EleutherAI/pythia-160m",
            "revisions": {
                "start": "step0",
                "warmup": "step512",
                "middle": "step16000",
                "end": "step143000",
                "end-removed": "step143000",
                "end-retained": "step143000",
            },
            "corpus": "HuggingFaceFW/fineweb:sample-10BT:train",
            "sequence_length": 512,
            "samples": 15_000,
            "directions": 10,
            "ranks": [12, 100],
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a corpus of text",
    notes=(
        "rankme, alpha: of the last token's last hidden state, after the final norm, over held-out windows. Arms are "
        "moments of one training, so that their costs differ by their nature.",
        "Ablation is centred: the mean is taken away before and added back after.",
    ),
)
