"""What arms that draw or weigh by domain do to each domain, said before and after they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lossmith.errors import InputError
from lossmith.training.language_model import LanguageModelRun

# Passes through a domain beyond which it is likely to be learned by heart.
_MANY = 10
# Nats by which a domain's loss must have risen, on average over seeds, to be worth a line.
_RISE = 0.02


def passes_by_domain(run: LanguageModelRun, corpus: Any) -> dict[str, float]:
    """How often a run passes through each domain's training rows; empty where it does not draw by domain.

    Raises:
        InputError: a schedule that does not fit the run's steps.
    """
    import numpy as np

    from lossmith.data.sampling import domains_of
    from lossmith.data.temperature import Cooldown
    from lossmith.registry import SAMPLERS, WEIGHTINGS

    try:
        tau = getattr(WEIGHTINGS.build(run.weighting), "tau", None)
        if isinstance(tau, Cooldown):
            tau.switch_step(run.steps)
        sampling = SAMPLERS.build(run.sampler)
        if run.sampler == "shuffled":
            return {}
        sampler = sampling.draw(corpus.train, steps=run.steps, batch_size=run.batch_size, seed=run.seed)
    except ValueError as error:
        raise InputError(f"arm '{run.arm}': {error}") from None
    if not hasattr(sampler, "passes"):
        return {}
    numbers = np.unique(domains_of(corpus.train)).tolist()
    return {corpus.domains[number]: float(p) for number, p in zip(numbers, sampler.passes(), strict=True)}


def rise_notes(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], domains: Sequence[str]) -> list[str]:
    """Where a domain's validation loss has risen again along the run: it is being learned by heart.

    Args:
        curves: for each arm the metrics of its runs, one list of logged lines per seed.
        domains: names.
    """
    notes = []
    for arm, runs in curves.items():
        for name in domains:
            rises, steps = [], []
            for lines in runs:
                points = [(m[f"eval/{name}/loss"], m["step"]) for m in lines if m.get(f"eval/{name}/loss") is not None]
                if len(points) > 1:
                    lowest, step = min(points)
                    rises.append(points[-1][0] - lowest)
                    steps.append(str(step))
            if rises and (rise := sum(rises) / len(rises)) > _RISE:
                notes.append(
                    f"{arm}: the loss on {name} ends {rise:.3g} nats above its lowest (step {', '.join(steps)}): it is "
                    "learned by heart."
                )
    return notes


def draw_notes(runs: list[LanguageModelRun], corpus: Any) -> list[str]:
    """A line for every arm that draws by domain (one run of each is given), with a warning of many repetitions."""
    notes = []
    for run in runs:
        if passes := passes_by_domain(run, corpus):
            parts = ", ".join(f"{name} {number:.3g} times" for name, number in passes.items())
            many = [name for name, number in passes.items() if number > _MANY]
            warning = f"; more than {_MANY}: {', '.join(many)} may be learned by heart" if many else ""
            notes.append(f"{run.arm} passes through {parts}{warning}.")
        if len(corpus.domains) == 1 and (run.sampler != "shuffled" or run.weighting.startswith("scalarization")):
            notes.append(
                f"{run.arm} goes by domains, but the data have only one: name the column with --domain-field, or give "
                "a folder with one sub-folder per domain."
            )
    return notes
