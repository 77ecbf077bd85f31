"""Traces, eigenvalues and label noise against closed forms, full Hessians and the digest's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lossmith.probes import Curvature, hessian_trace, score_norms, top_eigenvalues

F64 = torch.float64
X = torch.tensor([[1, 2, -1], [0.5, -1, 3]], dtype=F64)
Y = torch.tensor([0, 2])


def regression() -> nn.Linear:
    model = nn.Linear(3, 4, dtype=F64)
    weight = [[0.1, -0.2, 0.3], [0, 0.4, -0.1], [-0.3, 0.2, 0.2], [0.5, 0, -0.4]]
    model.load_state_dict(
        {"weight": torch.tensor(weight, dtype=F64), "bias": torch.tensor([0.1, -0.1, 0, 0.2], dtype=F64)}
    )
    return model


def tanh_network() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.tensor([[0.3, -0.5], [0.8, 0.1], [-0.2, 0.4]], dtype=F64)
    model[2].weight.data = torch.tensor([[0.5, -0.3, 0.2], [-0.4, 0.6, 0.1], [0.1, 0.2, -0.7]], dtype=F64)
    return model, torch.tensor([[1, -0.5], [0.3, 0.8]], dtype=F64), torch.tensor([2, 0])


def dense(model: nn.Module, batches: list[tuple[Tensor, Tensor]], ignore_index: int = -100) -> Tensor:
    """The plain way: autograd twice, element by element, one loss over everything."""
    parameters = list(model.parameters())
    total, count = torch.zeros((), dtype=F64), 0
    for inputs, targets in batches:
        logits = model(inputs).flatten(0, -2)
        for row, target in zip(logits, targets.flatten().tolist(), strict=True):
            if target != ignore_index:
                total, count = total - row.log_softmax(-1)[target], count + 1
    first = torch.autograd.grad(total / count, parameters, create_graph=True, materialize_grads=True)
    rows = []
    for element in torch.cat([g.flatten() for g in first]):
        second = torch.autograd.grad(element, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(second, parameters, strict=True)]
            )
        )
    return torch.stack(rows)


def close(value: float | Tensor, reference: float | Tensor, rel: float = 1e-12) -> bool:
    return torch.allclose(torch.as_tensor(value, dtype=F64), torch.as_tensor(reference, dtype=F64), rtol=rel, atol=rel)


def test_softmax_regression_has_the_closed_form() -> None:
    curvature = Curvature(regression(), [(X, Y)])
    found = hessian_trace(curvature, estimator="exact")
    assert close(curvature.loss, 1.9489974015501081)
    assert close(found.trace, 5.485403240438592)
    assert close(found.by_module["weight"], 4.8719577926323465)
    assert close(found.by_module["bias"], 0.6134454478062459)
    vector = torch.tensor([[1, -1, 1, 1, -1, -1, 1, 1, -1, 1, -1, 1, -1, 1, 1, -1]], dtype=F64)
    assert close((vector * curvature.matmul(vector)).sum(), 7.367314814231594)
    matrix = curvature.matmul(torch.eye(16, dtype=F64))
    assert close(matrix.square().sum(), 7.539666739233147)
    assert close(matrix, matrix.T)
    found_values, bounds, _ = top_eigenvalues(curvature, 3, tolerance=1e-10)
    assert close(found_values[0], 2.0531902983836234, 1e-9)
    assert close(found_values, torch.linalg.eigvalsh(matrix).flip(0)[:3], 1e-8)
    assert bool((bounds < 1e-9).all())


def test_its_trace_does_not_depend_on_the_labels() -> None:
    traces = {
        round(hessian_trace(regression(), [(X, y)], estimator="exact").trace, 12) for y in (Y, 1 - Y.clamp(max=1))
    }
    assert len(traces) == 1


def test_the_three_traces_of_a_tanh_network_differ_as_the_digest_says() -> None:
    model, x, y = tanh_network()
    curvature = Curvature(model, [(x, y)])
    assert close(hessian_trace(curvature, estimator="exact").trace, 0.68170368302402)
    assert close(curvature.matmul(torch.eye(15, dtype=F64)), dense(model, [(x, y)]))
    for labels, value in (("exact", 0.6192509759689395), ("data", 0.6127893315876627)):
        norms, counts = score_norms(curvature, labels=labels)
        assert close(norms.sum() / counts.sum(), value), labels
    # Forward mode alone finds the Gauss-Newton part.
    found = hessian_trace(curvature, estimator="ggn", n_probes=4000)
    assert abs(found.trace - 0.6192509759689395) < 4 * found.stderr < 0.1


def test_the_hessian_is_the_gauss_newton_part_and_the_curvature_of_the_logits() -> None:
    """tr H = tr GGN + E sum_k (p_k - y_k) tr (second derivative of z_k), on the tanh network by autograd."""
    model, x, y = tanh_network()
    weights = [p.detach() for p in model.parameters()]

    def logits(flat: Tensor) -> Tensor:
        a, b = flat[:6].view(3, 2), flat[6:].view(3, 3)
        return torch.tanh(x @ a.T) @ b.T

    start = torch.cat([w.flatten() for w in weights])
    p = logits(start).softmax(-1)
    second = torch.zeros((), dtype=F64)
    for row in range(2):
        for k in range(3):

            def one(flat: Tensor, row: int = row, k: int = k) -> Tensor:
                return logits(flat)[row, k]

            curvature = torch.autograd.functional.hessian(one, start).trace()
            second += (p[row, k] - float(k == y[row])) * curvature / 2
    jacobian = torch.autograd.functional.jacobian(logits, start)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    gauss_newton = torch.einsum("nkd,nkl,nld->", jacobian, inner, jacobian) / 2
    assert close(gauss_newton, 0.6192509759689395)
    assert close(gauss_newton + second, 0.68170368302402)


def test_a_constant_on_all_logits_of_a_context_leaves_the_gauss_newton_part() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = regression()

        def forward(self, inputs: Tensor) -> Tensor:
            # Of the context and of the parameters: its gradient is the same for all classes.
            shift = 3 * inputs.sum(-1, keepdim=True) + inputs.square().sum(-1, keepdim=True) * self.inner.weight.sum()
            found: Tensor = self.inner(inputs) + shift
            return found

    for labels in ("exact", "data"):
        plain, shifted = (score_norms(m, [(X, Y)], labels=labels)[0] for m in (regression(), Shifted()))  # type: ignore[arg-type]
        assert close(plain, shifted)
    found = [hessian_trace(m, [(X, Y)], estimator="ggn", n_probes=3, seed=1).trace for m in (regression(), Shifted())]
    assert close(*found)


def test_at_saturation_hessian_and_fisher_agree() -> None:
    model, x, _ = tanh_network()
    p = model(x).softmax(-1).detach()
    # Labels in the model's own proportions: every class as its own row, weighted, by the linearity of the trace.
    total = 0.0
    for row in range(2):
        for label in range(3):
            single = hessian_trace(model, [(x[row : row + 1], torch.tensor([label]))], estimator="exact").trace
            total += float(p[row, label]) * single / 2
    assert close(total, 0.6192509759689395)


def test_relu_networks_have_no_second_part_for_any_labels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    x = torch.randn(6, 4, dtype=F64)
    norms, counts = score_norms(model, [(x, torch.zeros(6, dtype=torch.long))], labels="exact")
    for labels in (torch.zeros(6, dtype=torch.long), torch.randint(5, (6,))):
        assert close(hessian_trace(model, [(x, labels)], estimator="exact").trace, norms.sum() / counts.sum(), 1e-10)


class Tied(nn.Module):
    """Tokens in, next tokens out, one matrix for both; a parameter in the middle that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.mix = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.drop(torch.tanh(self.mix(self.embed(tokens))))))
        return logits


def sentences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, (3, 4), generator=generator)
    labels = torch.randint(5, (3, 4), generator=generator)
    labels[0, 1:] = -100
    return [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])]


@pytest.mark.filterwarnings("ignore:the model is in training mode")
def test_masked_tied_and_unused_parameters_match_the_full_hessian() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    curvature = Curvature(model, sentences())
    assert curvature.count == 9
    assert curvature.counts == [5, 4]
    reference = dense(model.eval(), sentences())
    assert close(curvature.matmul(torch.eye(curvature.size, dtype=F64)), reference, 1e-10)
    # Mean of the batches' means is another number: they have different numbers of places.
    assert close(hessian_trace(curvature, estimator="exact").trace, reference.trace(), 1e-10)
    parts = [float(dense(model, [batch]).trace()) for batch in sentences()]
    assert abs(sum(parts) / 2 - float(reference.trace())) > 1e-3


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model = Tied().double().train()
    with pytest.warns(UserWarning, match="training mode with dropout"):
        first = hessian_trace(model, sentences(), n_probes=2)
    assert model.training
    assert model.drop.training
    with pytest.warns(UserWarning, match="training mode"):
        assert hessian_trace(model, sentences(), n_probes=2) == first


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_hutchinson_is_unbiased_with_the_variance_of_its_distribution(distribution: Any) -> None:
    curvature = Curvature(regression(), [(X, Y)])
    matrix = curvature.matmul(torch.eye(16, dtype=F64))
    n = 20_000
    found = hessian_trace(curvature, n_probes=n, distribution=distribution)
    diagonal = matrix.diagonal().square().sum() if distribution == "rademacher" else 0.0
    expected = math.sqrt(2 * float(matrix.square().sum() - diagonal) / n)
    assert found.probe_stderr == pytest.approx(expected, rel=0.05)
    assert abs(found.trace - 5.485403240438592) < 4 * expected
    assert close(sum(found.by_module.values()), found.trace, 1e-10)


def test_hutch_plus_plus_is_exact_on_a_low_rank_and_better_than_hutchinson() -> None:
    curvature = Curvature(regression(), [(X, Y)])
    # Two examples of four classes: rank six at most, of sixteen.
    assert close(hessian_trace(curvature, estimator="hutch++", n_probes=18).trace, 5.485403240438592, 1e-10)
    torch.manual_seed(0)
    model = nn.Linear(10, 5, bias=False, dtype=F64)
    # Features of ever smaller scale: few directions hold most of the trace.
    data = [(torch.randn(30, 10, dtype=F64) * 3.0 ** -torch.arange(10), torch.randint(5, (30,)))]
    many = Curvature(model, data)
    exact = hessian_trace(many, estimator="exact").trace
    errors = {
        name: sum(
            (hessian_trace(many, estimator=name, n_probes=24, seed=s).trace - exact) ** 2  # type: ignore[arg-type]
            for s in range(12)
        )
        for name in ("hutchinson", "hutch++")
    }
    assert errors["hutch++"] < 0.1 * errors["hutchinson"]


@pytest.mark.parametrize("kind", ["model", "fisher"])
def test_labels_of_the_model_give_the_exact_fisher_on_average(kind: str) -> None:
    torch.manual_seed(0)
    model = Tied().double().eval()
    curvature = Curvature(model, sentences())
    norms, counts = score_norms(curvature, labels="exact")
    exact = float(norms.sum() / counts.sum())
    if kind == "fisher":
        found = hessian_trace(curvature, estimator="fisher", n_probes=150)
        values = torch.tensor([found.trace])
    else:
        values = torch.stack([score_norms(curvature, seed=s)[0].sum() / 9 for s in range(150)])
    # One draw spreads by about the trace itself: three standard errors.
    assert abs(float(values.mean()) - exact) < 0.25 * exact
    assert counts.tolist() == [1, 4, 4]


def test_the_standard_error_over_batches_covers_the_population() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(4000, 3, dtype=F64), torch.randint(4, (4000,))
    truth = hessian_trace(model, [(x, y)], estimator="exact").trace
    inside = wider = 0
    for trial in range(20):
        chosen = torch.randperm(4000, generator=torch.Generator().manual_seed(trial))[:160].split(8)
        found = hessian_trace(model, [(x[i], y[i]) for i in chosen], n_probes=16, seed=trial)
        wider += found.stderr > found.probe_stderr
        inside += abs(found.trace - truth) < 2 * found.stderr
    assert inside >= 16
    # The other data that might have been drawn are in the one error, not in the other.
    assert wider >= 14


def test_permuting_hidden_units_and_padding_leave_the_trace() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 4, bias=False)).double()
    wide = nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 4, bias=False)).double()
    for parameter in wide.parameters():
        parameter.data.zero_()
    order = torch.tensor([2, 0, 1])
    wide[0].weight.data[:, :3] = small[0].weight.data[:, order]
    wide[1].weight.data[:, :3] = small[1].weight.data[:, order]
    data = [(torch.arange(6), torch.arange(6) % 4)]
    assert close(*(hessian_trace(m, data, estimator="exact").trace for m in (small, wide)), 1e-12)


def test_scaling_two_layers_against_each_other_changes_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    before = hessian_trace(model, [(X, Y)], estimator="exact")
    model[0].weight.data *= 3
    model[2].weight.data /= 3
    after = hessian_trace(model, [(X, Y)], estimator="exact")
    assert close(before.loss, after.loss)
    assert abs(after.trace - before.trace) > 0.1 * before.trace


def test_excluded_parameters_do_not_count() -> None:
    found = hessian_trace(regression(), [(X, Y)], estimator="exact", exclude=["bias"])
    assert close(found.trace, 4.8719577926323465)
    assert found.parameters == 12


def test_exact_in_several_batches_is_exact_in_one() -> None:
    model, x, y = tanh_network()
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    assert close(hessian_trace(model, parts, estimator="exact").trace, 0.68170368302402)


def test_lanczos_goes_on_beside_an_invariant_subspace() -> None:
    # Zero features: only the bias has curvature, three equal eigenvalues 1/4 and a zero among its four.
    model = nn.Linear(3, 4, dtype=F64)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    curvature = Curvature(model, [(torch.zeros(2, 3, dtype=F64), Y)])
    values, bounds, _ = top_eigenvalues(curvature, 3)
    assert close(values[0], 0.25, 1e-10)
    assert bool((bounds < 1e-8).all())


def bad(**change: Any) -> Any:
    arguments: dict[str, Any] = {"model": regression(), "batches": [(X, Y)]} | change
    return hessian_trace(arguments.pop("model"), arguments.pop("batches"), **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "no batch"),
        ({"batches": [(X, Y), (X, Y - Y - 100)]}, "batch 1: no label counts"),
        ({"batches": [(X, Y + 2)]}, "labels must lie from 0 to 3"),
        ({"batches": [(X, Y[:1])]}, "do not fit labels"),
        ({"batches": [(X, X)]}, "whole-numbered labels"),
        ({"batches": [X]}, "pairs .inputs, targets. or dictionaries"),
        ({"batches": [(X * math.nan, Y)]}, "batch 0: the loss is nan"),
        ({"batches": [(X * math.inf, Y)]}, "batch 0: the loss is nan"),
        ({"model": regression().half(), "batches": [(X.half(), Y)]}, r"parameter weight is torch.float16.*model.float"),
        ({"exclude": ["*"]}, "no trained parameter"),
        ({"estimator": "lanczos"}, "estimator must be hutchinson"),
        ({"distribution": "uniform"}, "distribution must be"),
        ({"n_probes": 0}, "n_probes must be at least 1"),
        ({"n_probes": 2, "estimator": "hutch++"}, "at least 3 for hutch"),
        (
            {
                "model": nn.Linear(300, 100),
                "batches": [(torch.zeros(1, 300), Y[:1])],
                "estimator": "exact",
            },
            "up to 20000 parameters, got 30100",
        ),
    ],
)
def test_wrong_input_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(**change)


def test_vectors_and_eigenvalues_out_of_range() -> None:
    curvature = Curvature(regression(), [(X, Y)])
    for k, steps, message in ((0, 9, "k must lie from 1 to 16"), (17, 99, "k must lie"), (3, 2, "max_steps")):
        with pytest.raises(ValueError, match=message):
            top_eigenvalues(curvature, k, max_steps=steps)
    with pytest.raises(ValueError, match=r"shape \(vectors, 16\)"):
        curvature.matmul(torch.zeros(16, dtype=F64))
    with pytest.raises(ValueError, match="labels must be model"):
        score_norms(curvature, labels="true")  # type: ignore[arg-type]


def test_inputs_need_not_be_contiguous_and_one_example_is_enough() -> None:
    strided = X.T.contiguous().T
    assert close(hessian_trace(regression(), [(strided, Y)], estimator="exact").trace, 5.485403240438592)
    one = hessian_trace(regression(), [(X[:1], Y[:1])], estimator="fisher")
    assert math.isnan(one.stderr)
    assert one.trace > 0
