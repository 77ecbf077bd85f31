"""``lossmith select --method preselect``: seed documents, their losses under some models, a classifier, and its scores.

Everything on the way lies in ``OUT.preselect/``; the same command continues there.
"""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.cli.score import ScoreProgress, load_scorers, named_models
from lossmith.cli.sentences import say
from lossmith.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from lossmith.data import Document, DocumentClassifier

# Of each domain: what is drawn cannot be selected.
_LARGEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PreselectOptions:
    """What the user gave; see the options of ``lossmith select``."""

    models: str | None
    model_scores: str | None
    targets: str | None
    seed_documents: int
    seed_corpus: str | None
    scores: Path | None
    classifier: Path | None
    positives: str
    epochs: int
    jobs: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Seeds:
    """Where the seed documents are, their columns, and their places in the corpus if they were drawn from it."""

    source: str
    fields: dict[str, Any]
    held: frozenset[int] = frozenset()


def preselect_scores(
    corpus: str, fields: dict[str, Any], out: Path, options: PreselectOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of every document of the corpus (NaN for seed documents), and its characters."""
    from lossmith.data import DocumentClassifier, classify_corpus
    from lossmith.data.preselect import POSITIVES
    from lossmith.training.record import locked, removed_if_bare

    # Before hours of scoring.
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out must end in .jsonl or .jsonl.gz, got {str(out)!r}")
    if options.positives not in POSITIVES:
        raise InputError(f"unknown --positives '{options.positives}': {did_you_mean(options.positives, POSITIVES)}")
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}")
    if options.epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {options.epochs}")
    held: frozenset[int] = frozenset()
    if options.classifier is not None:
        given = {"--models": options.models, "--model-scores": options.model_scores, "--scores": options.scores}
        if named := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--classifier is ready to use: leave {', '.join(named)} out")
        classifier = DocumentClassifier.load(options.classifier)
    else:
        if options.scores is None:
            _models_and_abilities(options)
        folder = out.with_name(out.name + ".preselect")
        with removed_if_bare(folder), locked(folder):
            seeds = _seed_documents(corpus, fields, folder, options)
            classifier = _classifier(seeds, fields, folder, options)
        held = seeds.held
    number = itertools.count()

    def progress(done: int) -> None:
        told(done, 0)

    told = ScoreProgress()
    scores, characters = classify_corpus(
        corpus,
        classifier,
        text_field=fields["text_field"],
        jobs=options.jobs,
        allowed=lambda document: next(number) not in held,
        progress=progress,
    )
    return scores, characters


def _seed_documents(corpus: str, fields: dict[str, Any], folder: Path, options: PreselectOptions) -> _Seeds:
    from lossmith.data import read_corpus, sample_documents
    from lossmith.data.corpus import content_key
    from lossmith.files import read_json, write_json, write_text
    from lossmith.training.record import differences

    drawn = None
    if options.seed_corpus is None:
        drawn = {"documents": options.seed_documents, "seed": options.seed}
    plan = {"corpus": content_key(corpus) or corpus, "seeds": drawn or options.seed_corpus, **fields}
    path = folder / "seeds.jsonl"
    if (folder / "plan.json").exists():
        if changed := differences(read_json(folder / "plan.json"), plan):
            raise InputError(f"{folder} was made for something else: {'; '.join(changed)}; remove it, or change --out")
    else:
        if drawn is not None:
            if options.seed_documents < 2:
                raise InputError(f"--seed-documents must be at least 2, got {options.seed_documents}")
            sample = sample_documents(
                lambda: read_corpus(corpus, **fields),
                options.seed_documents,
                largest_share=_LARGEST_SHARE,
                seed=options.seed,
            )
            if len(sample) < 2:
                raise InputError(
                    f"{corpus} is too small to hold seed documents out of it (at most a tenth of each domain): give "
                    "--seed-corpus; it may be the corpus itself"
                )
            rows = ({"text": d.text, "domain": d.domain, "index": index} for index, d in sample)
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(folder / "plan.json", plan)
    if drawn is None:
        return _Seeds(str(options.seed_corpus), fields)
    with path.open(encoding="utf-8") as stream:
        held = frozenset(int(json.loads(line)["index"]) for line in stream)
    say(f"{len(held)} seed documents, held out of the selection: {path}")
    return _Seeds(str(path), {"text_field": "text", "domain_field": "domain"}, held)


def _classifier(seeds: _Seeds, fields: dict[str, Any], folder: Path, options: PreselectOptions) -> DocumentClassifier:
    """The classifier of the seed documents, and a report on the way to it."""
    import numpy as np

    from lossmith.data import DocumentClassifier, predictive_strength, read_corpus, strength_labels
    from lossmith.files import write_json

    documents = list(read_corpus(seeds.source, **seeds.fields))
    names, nats, ability = _losses_and_abilities(seeds, documents, fields, folder, options)
    order = np.argsort(-ability, kind="stable")
    say("models, the best first: " + ", ".join(f"{names[i]} ({ability[i]:.4g})" for i in order))
    try:
        strength = predictive_strength(nats, ability)
    except ValueError as error:
        raise InputError(str(error)) from None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = strength_labels(strength, positives=options.positives, seed=options.seed)
    for warning in caught:
        say(f"note: {warning.message}", err=True)
    histogram = ", ".join(f"{level:.2f}: {count}" for level, count in labels.histogram.items())
    say(f"seed documents by predictive strength: {histogram}")
    if labels.missing:
        say(f"{labels.missing} seed documents have no finite loss under some model and were left out")
    say(f"{len(labels.positives)} positives, {len(labels.negatives)} negatives")
    texts = [document.text for document in documents]
    positives, negatives = ([texts[i] for i in some] for some in (labels.positives, labels.negatives))
    classifier = DocumentClassifier.fit(positives, negatives, epochs=options.epochs, seed=options.seed)
    classifier.save(folder / "classifier.bin")
    words = list(classifier.word_weights())
    report = {
        "models": {names[i]: float(ability[i]) for i in order},
        "strength": {f"{level:.4f}": count for level, count in labels.histogram.items()},
        "rule": labels.rule,
        "positives": len(labels.positives),
        "negatives": len(labels.negatives),
        "missing": labels.missing,
        "strength_of_domains": _by_domain(documents, strength),
        "words_for": words[:30],
        "words_against": words[::-1][:30],
    }
    write_json(folder / "report.json", report)
    say(f"classifier: {folder / 'classifier.bin'}; what it goes by: {folder / 'report.json'}")
    return classifier


def _losses_and_abilities(
    seeds: _Seeds, documents: list[Document], fields: dict[str, Any], folder: Path, options: PreselectOptions
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the models, nats ``(models, seed documents)``, and how able they are."""
    import numpy as np

    from lossmith.data import document_hash, read_scores

    if options.scores is not None:
        if options.models is not None or options.seed_corpus is None or options.model_scores is None:
            raise InputError(
                "--scores are losses of the documents of --seed-corpus that lossmith score has written; they need "
                "--model-scores, and no --models"
            )
        table = read_scores(options.scores)
        hashes = [document_hash(document.text) for document in documents]
        if hashes != table.column("hash").tolist():
            raise InputError(f"{options.scores} was not made from {options.seed_corpus} as it is; score it again")
        names = list(table.models)
        nats = np.stack([table.column(f"{name}/nats") for name in names])
        return names, nats, _given_abilities(options.model_scores, names)
    models, given = _models_and_abilities(options)
    names = list(models)
    seed_losses, target_losses = [], []
    for name, model in models.items():
        # One model in memory at a time; the targets first, since they are soon done.
        if given is None:
            target_losses.append(_nats(str(options.targets), fields["text_field"], name, model, folder / "targets"))
        seed_losses.append(_nats(seeds.source, seeds.fields["text_field"], name, model, folder / "seeds"))
    if given is None:
        given = _measured_abilities(np.stack(target_losses), str(options.targets), fields["text_field"])
    return names, np.stack(seed_losses), given


def _models_and_abilities(options: PreselectOptions) -> tuple[dict[str, str], np.ndarray | None]:
    """Models by name, and how able they are where that is given; wrong names are told before anything is scored."""
    from lossmith.data import load_tokenizer

    if options.models is None:
        raise InputError("--method preselect needs --models m1,m2,... (or --classifier, or --scores)")
    models = named_models([name.strip() for name in options.models.split(",") if name.strip()])
    if len(models) < 2:
        raise InputError(f"--models needs at least 2 models of different ability, got {len(models)}")
    given = None
    if options.model_scores is not None:
        given = _given_abilities(options.model_scores, list(models))
    elif options.targets is None:
        raise InputError(
            "--method preselect needs --targets, texts that an able model predicts well, or --model-scores"
        )
    for model in models.values():
        load_tokenizer(model)
    return models, given


def _measured_abilities(nats: np.ndarray, targets: str, text_field: str) -> np.ndarray:
    """Minus the bits per character of each model, on the documents of which all have a finite loss."""
    import numpy as np

    from lossmith.data import bits_per_character, read_corpus

    characters = np.array([len(document.text) for document in read_corpus(targets, text_field=text_field)])
    finite = np.isfinite(nats).all(axis=0)
    if not finite.any():
        raise InputError(f"no document of --targets {targets} has a finite loss under every model")
    return -bits_per_character(nats[:, finite].sum(axis=1), characters[finite].sum())


def _nats(source: str, text_field: str, name: str, model: str, table: Path) -> np.ndarray:
    """A model's losses of the documents, from their table if it is there."""
    from lossmith.data import read_scores, score_corpus

    out = table.with_name(f"{table.name}.{name.replace('/', '_')}.parquet")
    scorers = load_scorers({name: model}, {"dtype": "float32", "device": "auto", "max_length": None})
    score_corpus(source, scorers, out, text_field=text_field, progress=ScoreProgress())
    return read_scores(out).column(f"{name}/nats")


def _given_abilities(text: str, names: list[str]) -> np.ndarray:
    """Numbers in the order of the models, or a JSON or YAML file of numbers by name."""
    import numpy as np
    import yaml

    from lossmith.files import read_utf8

    path = Path(text)
    values: list[Any]
    if path.suffix in (".json", ".yaml", ".yml"):
        try:
            table = yaml.safe_load(read_utf8(path, "--model-scores"))
        except yaml.YAMLError:
            table = None
        if not isinstance(table, dict) or not set(names) <= set(table):
            raise InputError(f"--model-scores {path} must give a number for each of: {', '.join(names)}")
        values = [table[name] for name in names]
    else:
        values = text.split(",")
        if len(values) != len(names):
            raise InputError(f"--model-scores needs one number for each of {', '.join(names)}, got {len(values)}")
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise InputError(f"--model-scores must be numbers (31.2,40.5) or a JSON or YAML file, got {text!r}") from None


def _by_domain(documents: list[Document], strength: np.ndarray) -> dict[str, float]:
    """Mean strength of the domains, the strongest first."""
    import numpy as np

    names = np.array([document.domain for document in documents])
    finite = np.isfinite(strength)
    there = sorted(set(names[finite].tolist()) - {""})
    means = {name: float(strength[finite & (names == name)].mean()) for name in there}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))
