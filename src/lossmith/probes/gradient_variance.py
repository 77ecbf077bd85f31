"""Whether a model's gradient is noisier when small domains count more than when they are drawn more often."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossmith.data.temperature import check_temperature, scalarization_weights, temperature_probabilities
from lossmith.errors import InputError
from lossmith.files import finite_or_none, write_picture, write_text
from lossmith.losses import cross_entropy
from lossmith.probes.geometry import _load, _tokenizer_near
from lossmith.theory.gradient_variance import GradientVariances, gradient_variances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAUS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True)
class DomainGradients:
    """The gradients of a domain's examples.

    Attributes:
        name: of the domain.
        size: examples that it has.
        measured: examples looked at.
        second_moment: mean squared norm of an example's gradient.
        stderr: its standard error; 0 where every example was looked at.
        mean_squared: squared norm of the mean gradient, without bias.
    """

    name: str
    size: int
    measured: int
    second_moment: float
    stderr: float
    mean_squared: float


@dataclass(frozen=True, slots=True)
class GradientVarianceReport:
    """What :func:`gradient_variance` found. Variances are of one draw; a batch of B has a B-th of them."""

    model: str
    tau: float
    domains: tuple[DomainGradients, ...]
    products: tuple[tuple[float, ...], ...]

    def at(self, tau: float) -> GradientVariances:
        """Both variances at any temperature: the gradients are measured once for all of them."""
        return gradient_variances(self._sizes, [d.second_moment for d in self.domains], self.products, tau)

    @property
    def difference_stderr(self) -> float:
        """Standard error of the difference of the variances, which the second moments alone decide."""
        p, w = temperature_probabilities(self._sizes, self.tau), scalarization_weights(self._sizes, self.tau)
        errors = torch.tensor([d.stderr for d in self.domains], dtype=torch.float64)
        return float((p * (w - 1) * errors).square().sum().sqrt())

    @property
    def _sizes(self) -> list[float]:
        return [float(d.size) for d in self.domains]

    def summary(self) -> str:
        """A few lines, for people."""
        found = self.at(self.tau)
        p, w = temperature_probabilities(self._sizes, self.tau), scalarization_weights(self._sizes, self.tau)
        lines = [
            f"{self.model}: gradient variance of one example at tau = {self.tau:g}",
            f"{'domain':>16} {'size':>9} {'measured':>8} {'drawn':>7} {'weight':>8} {'E|g|²':>10} {'± s.e.':>8}",
        ]
        for number, domain in enumerate(self.domains):
            lines.append(
                f"{domain.name[:16]:>16} {domain.size:>9} {domain.measured:>8} {float(p[number]):>7.1%} "
                f"{float(w[number]):>8.3g} {domain.second_moment:>10.4g} {domain.stderr:>8.2g}"
            )
        # Two standard errors on either side.
        sure = abs(found.difference) > 2 * self.difference_stderr
        verdict = "draw small domains more often" if found.difference > 0 else "let small domains count more"
        lines += [
            f"upsampling {found.upsampling:.4g}, upweighting {found.upweighting:.4g}: {found.ratio:.3g} times "
            f"(F = {found.weight_second_moment:.3g})",
            f"difference {found.difference:.3g} ± {self.difference_stderr:.2g}: "
            + (f"less variance: {verdict}" if sure else "not told apart"),
        ]
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; written to ``path``, if given."""
        content = {
            "probe": "gradient_variance",
            "model": self.model,
            **dataclasses.asdict(self.at(self.tau)),
            "ratio": self.at(self.tau).ratio,
            "difference": self.at(self.tau).difference,
            "difference_stderr": self.difference_stderr,
            "domains": [dataclasses.asdict(domain) for domain in self.domains],
            "products": self.products,
        }
        text = json.dumps(finite_or_none(content), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def plot(self, path: str | Path | None = None) -> Figure:
        """Both variances by temperature, and the domains' second moments; written to ``path``, if given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        taus = sorted({*_TAUS, self.tau} - {math.inf})
        found = [self.at(tau) for tau in taus]
        left.plot(taus, [v.upweighting for v in found], marker="o", color="#D55E00", label="upweighting")
        left.plot(taus, [v.upsampling for v in found], marker="s", color="#0072B2", label="upsampling")
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("temperature")
        left.set_ylabel("variance of one example's gradient")
        left.legend(frameon=False)
        names = [f"{d.name} ({d.size})" for d in self.domains]
        right.barh(
            names,
            [d.second_moment for d in self.domains],
            xerr=[d.stderr for d in self.domains],
            color="#0072B2",
            capsize=3,
        )
        right.set_xlabel("mean squared norm of an example's gradient (± s.e.)")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.suptitle(self.model, fontsize=10, parse_math=False)
        if path is not None:
            write_picture(figure, path)
        return figure


def gradient_variance(
    model: Any,
    data: str | Mapping[str, Sequence[str]] = "python",
    *,
    tau: float = 5.0,
    samples: int = 64,
    max_length: int = 128,
    tokenizer: Any = None,
    text_field: str = "text",
    domain_field: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> GradientVarianceReport:
    r"""Variance of a causal language model's gradient under upsampling and upweighting, which have the same mean.

    An example is a document's beginning, its loss the mean over its next tokens. The trace of the covariance over
    all parameters is estimated from the gradients of ``samples`` examples of each domain; squared norms of means are
    corrected for their own noise. Where a domain has no more examples than that, it is exact for that domain.

    Source: Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025,
    arXiv 2410.04579, theorem 2; see :func:`lossmith.theory.gradient_variances` for what is true of it.

    Args:
        model: a Hugging Face model, its folder or hub id.
        data: texts by domain, or a corpus with several domains as :func:`lossmith.data.read_corpus` takes it.
        tau: temperature.
        samples: examples of each domain, at least 2.
        max_length: tokens of a document.
        tokenizer: default: the model's own.
        text_field: of the corpus.
        domain_field: of the corpus.
        seed: of the choice of examples.
        progress: told ``(examples done, examples)``.

    Raises:
        InputError: options out of range, a corpus with one domain, a domain without a text of two tokens.
    """
    if samples < 2 or max_length < 2:
        raise InputError(f"samples and max_length must be at least 2, got {samples} and {max_length}")
    try:
        check_temperature(tau)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    loaded, words = _load(model, tokenizer if tokenizer is not None else _tokenizer_near(model))
    if isinstance(model, str):
        loaded = loaded.float()
    chosen, sizes = _texts_by_domain(data, samples, text_field, domain_field, seed)
    rows: dict[str, list[Tensor]] = {}
    for name, texts in chosen.items():
        encoded = (words(text, truncation=True, max_length=max_length)["input_ids"] for text in texts)
        rows[name] = [torch.tensor([ids]) for ids in encoded if len(ids) >= 2]
        if not rows[name]:
            raise InputError(f"domain '{name}' has no text of at least two tokens")
        if len(texts) == sizes[name]:
            # All are here, less those too short to predict anything.
            sizes[name] = len(rows[name])
    device = next(loaded.parameters()).device

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[0, :-1], ids[0, 1:]).mean()

    title = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "") or type(model).__name__
    return measure_gradients(loaded, loss, rows, sizes, tau=tau, title=str(title), progress=progress)


def measure_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    examples: Mapping[str, Sequence[Any]],
    sizes: Mapping[str, int] | None = None,
    *,
    tau: float = 5.0,
    title: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> GradientVarianceReport:
    """The probe for any model and loss: one backward pass per example, one sum of gradients per domain in memory.

    Args:
        model: run in evaluation mode and put back; its own gradients are left alone.
        loss: ``loss(model, example) -> scalar``.
        examples: of each domain, at least two unless the domain has one.
        sizes: how many examples each domain has; by default those given are all, and the result is exact.
        tau: temperature.
        title: for the report.
        progress: told ``(examples done, examples)``.

    Raises:
        ValueError: a domain with fewer examples than it takes, a gradient that is not finite.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> examples = {"large": [torch.ones(1).double()] * 9, "small": [torch.ones(1).double()]}
    >>> report = measure_gradients(model, lambda model, x: model(x).sum(), examples)
    >>> round(report.at(5).upsampling, 12), report.at(5).upweighting > 0
    (0.0, True)
    """
    sizes = {name: len(rows) for name, rows in examples.items()} if sizes is None else sizes
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, done = sum(map(len, examples.values())), 0
    means: list[Tensor] = []
    domains: list[DomainGradients] = []
    training = model.training
    model.eval()
    try:
        for name, rows in examples.items():
            if len(rows) < min(2, sizes[name]) or not 0 < len(rows) <= sizes[name]:
                raise ValueError(f"domain '{name}' has {sizes[name]} examples, but {len(rows)} are given")
            summed, norms = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), []
            for row in rows:
                found = torch.autograd.grad(loss(model, row), parameters, allow_unused=True, materialize_grads=True)
                gradient = torch.cat([g.detach().flatten().double().cpu() for g in found])
                norms.append(float(gradient.square().sum()))
                if not math.isfinite(norms[-1]):
                    raise ValueError(f"the gradient of an example of domain '{name}' is not finite")
                summed += gradient
                done += 1
                if progress is not None:
                    progress(done, total)
            means.append(summed / len(rows))
            domains.append(_described(name, sizes[name], norms, float(means[-1].square().sum())))
    finally:
        model.train(training)
    stacked = torch.stack(means)
    products = stacked @ stacked.T
    for number, domain in enumerate(domains):
        products[number, number] = domain.mean_squared
    return GradientVarianceReport(title, float(tau), tuple(domains), tuple(tuple(row) for row in products.tolist()))


def _described(name: str, size: int, norms: list[float], mean_squared: float) -> DomainGradients:
    values = torch.tensor(norms, dtype=torch.float64)
    number = len(values)
    second = float(values.mean())
    if number == size:
        return DomainGradients(name, size, number, second, 0.0, mean_squared)
    # The squared norm of a mean of n has the variance of one over n too much.
    unbiased = (number * mean_squared - second) / (number - 1)
    return DomainGradients(name, size, number, second, float(values.std()) / math.sqrt(number), unbiased)


def _texts_by_domain(
    data: str | Mapping[str, Sequence[str]], samples: int, text_field: str, domain_field: str | None, seed: int
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Up to ``samples`` texts of each domain, drawn evenly from all, and how many there are."""
    from lossmith.data import read_corpus

    pairs: Iterable[tuple[str, str]]
    if isinstance(data, str):
        documents = read_corpus(data, text_field=text_field, domain_field=domain_field)
        pairs = ((document.domain or "", document.text) for document in documents)
    else:
        pairs = ((name, text) for name, texts in data.items() for text in texts)
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, text in pairs:
        if not text.strip():
            continue
        texts = kept.setdefault(name, [])
        sizes[name] = sizes.get(name, 0) + 1
        if len(texts) < samples:
            texts.append(text)
        elif (place := int(torch.randint(sizes[name], (), generator=generator))) < samples:
            texts[place] = text
    if len(kept) < 2:
        raise InputError(
            f"the variance over domains needs at least two, found {len(kept)}: name the column with domain_field, or "
            "give a folder with one sub-folder per domain"
        )
    return dict(sorted(kept.items())), sizes
