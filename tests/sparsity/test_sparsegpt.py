"""Optimal Brain Surgeon against its closed form; SparseGPT and Wanda on models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity import InputNorms, InputProducts, sparsegpt, surgeon, wanda, wanda_scores

D = torch.float64
W = torch.tensor([[1, -0.5, 0.2, 0.8], [0.3, 0.9, -0.7, 0.1]], dtype=D)
SEQUENCES = (
    torch.tensor([[[1, 0, 2, 1], [0, 1, 1, 0]]], dtype=D),
    torch.tensor([[[2, 1, 0, 1], [1, -1, 0, 1], [0, 0, 1, -1]]], dtype=D),
)


def _hessian(scale: float = 1.0) -> torch.Tensor:
    seen = InputProducts()
    for sequence in SEQUENCES:
        seen.add(scale * sequence)
    return seen.hessian()


def _random(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, dtype=D, generator=generator) @ torch.randn(
        columns, columns, dtype=D, generator=generator
    )
    return torch.randn(rows, columns, dtype=D, generator=generator), 2 * inputs.T @ inputs


def test_the_hessian_is_a_mean_over_sequences_not_tokens() -> None:
    assert _hessian().tolist() == [[6, 1, 2, 4], [1, 3, 1, 0], [2, 1, 6, 1], [4, 0, 1, 4]]
    norms = InputNorms()
    for sequence in SEQUENCES:
        norms.add(sequence)
    assert torch.allclose(2 * norms.squared(), _hessian().diagonal())


def test_numbers_of_the_digest() -> None:
    found = surgeon(W, _hessian(), 0.5, block_size=4, count="released")
    G = [[1.6809098751, 0.7187747761, 0.2320173564, 2.5904], [0.1512818888, 2.3288302747, 2.8422126158, 0.040475]]
    assert torch.allclose(found.importance, torch.tensor(G, dtype=D), atol=5e-11, rtol=0)
    assert (~found.mask).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 1]]
    rest = [[0, 0, 0, 1.8376775788], [0, 0.9861440778, -0.6625240771, 0]]
    assert torch.allclose(found.weight, torch.tensor(rest, dtype=D), atol=5e-11, rtol=0)
    U2 = (W.square() / found.importance)[0, :1]
    assert float(U2) == pytest.approx(0.5949158934, abs=1e-10)

    blocks = surgeon(W, _hessian(), 0.5, block_size=2, count="released")
    last = [[0.4818588146, 12.6298459274], [2.5460317455, 0.6068803046]]
    assert torch.allclose(blocks.importance[:, 2:], torch.tensor(last, dtype=D), atol=5e-10, rtol=0)
    assert (~blocks.mask).int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]


def test_scores_are_of_the_trailing_inverse_not_of_the_inverse() -> None:
    hessian = _hessian()
    hessian.diagonal().add_(0.0475)
    found = surgeon(W, _hessian(), 0.0, block_size=4)
    trailing = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(4)]
    # Nothing is removed, so that every column still has its own value.
    assert torch.allclose(found.importance, W.square() / torch.stack(trailing), rtol=1e-10)
    whole = torch.linalg.inv(hessian).diagonal()
    assert not torch.allclose(found.importance[:, 1:], (W.square() / whole)[:, 1:], rtol=0.05)


@pytest.mark.parametrize("block_size", [1, 3, 7, 64])
def test_compensation_is_the_closed_form_column_by_column(block_size: int) -> None:
    weight, hessian = _random(5, 12)
    found = surgeon(weight, hessian, 0.5, block_size=block_size)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=D)
    slow = weight.clone()
    for row in range(5):
        for j in range(12):
            if not found.mask[row, j]:
                inverse = torch.linalg.inv(damped[j:, j:])
                slow[row, j:] -= slow[row, j] / inverse[0, 0] * inverse[:, 0]
    assert torch.allclose(found.weight, slow, atol=1e-9)
    # What a removal costs adds up to the whole error.
    change = found.weight - weight
    assert found.error == pytest.approx(0.5 * float(((change @ damped) * change).sum()), rel=1e-9)


def test_one_removed_weight_has_the_error_of_optimal_brain_surgeon() -> None:
    weight, hessian = _random(1, 6)
    found = surgeon(weight, hessian, 1 / 6, block_size=6, damping=0)
    j = int((~found.mask[0]).nonzero())
    # Columns before j are frozen: minimise over those behind it under w_j = 0.
    inverse = torch.linalg.inv(hessian[j:, j:])
    assert found.error == pytest.approx(float(0.5 * weight[0, j] ** 2 / inverse[0, 0]), rel=1e-9)
    free = torch.linalg.solve(hessian[j + 1 :, j + 1 :], weight[0, j] * hessian[j + 1 :, j])
    assert torch.allclose(found.weight[0, j + 1 :] - weight[0, j + 1 :], free, atol=1e-9)


def test_doubled_inputs_multiply_importance_by_four_and_permuted_rows_permute_it() -> None:
    once, twice = surgeon(W, _hessian(), 0.5), surgeon(W, _hessian(2.0), 0.5)
    assert torch.allclose(twice.importance, 4 * once.importance, rtol=1e-10)
    assert torch.equal(twice.mask, once.mask)
    turned = surgeon(W.flip(0), _hessian(), 0.5)
    assert torch.allclose(turned.importance, once.importance.flip(0), rtol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "block"), [(7, 13, 4), (1, 5, 128), (3, 130, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.99])
def test_the_number_is_exact_over_blocks(rows: int, columns: int, block: int, sparsity: float) -> None:
    weight, hessian = _random(rows, columns)
    found = surgeon(weight, hessian, sparsity, block_size=block)
    assert int((~found.mask).sum()) == round(sparsity * rows * columns)
    assert bool((found.weight[~found.mask] == 0).all())


def test_patterns_keep_n_of_every_m_inputs_and_beat_plain_removal() -> None:
    weight, hessian = _random(6, 16)
    found = surgeon(weight, hessian, pattern="2:4", block_size=6)
    assert bool((found.mask.reshape(6, 4, 4).sum(-1) == 2).all())
    plain = (~found.mask) * weight
    assert found.error < 0.5 * float(((plain @ hessian) * plain).sum())


def test_dead_inputs_go_first_and_change_nothing_else() -> None:
    weight, hessian = _random(4, 8)
    hessian[3], hessian[:, 3] = 0, 0
    found = surgeon(weight, hessian, 4 / 32)
    assert (~found.mask).nonzero()[:, 1].unique().tolist() == [3]
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(found.weight[:, others], weight[:, others])
    # As released, all of them go, however few are asked for.
    assert bool((surgeon(weight, hessian, 0.01, count="released").weight[:, 3] == 0).all())
    assert bool(torch.isfinite(surgeon(weight, torch.zeros(8, 8, dtype=D), 0.5).weight).all())


def test_singular_hessians_get_more_damping_or_an_error_with_the_name() -> None:
    weight, _ = _random(2, 3)
    negative = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=D))
    with pytest.warns(UserWarning, match="of here is nearly singular: damping 0.1"):
        assert surgeon(weight, negative, name="here").damping == pytest.approx(0.1)
    with pytest.raises(torch.linalg.LinAlgError, match="the Hessian of here"):
        surgeon(weight, torch.diag(torch.tensor([1.0, 1.0, -2.0], dtype=D)), name="here", damping=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sparsity": 1.0}, "sparsity must lie"),
        ({"sparsity": float("nan")}, "sparsity must lie"),
        ({"pattern": "2:3"}, "not a multiple of 3"),
        ({"pattern": "4:2"}, "N < M"),
        ({"count": "some"}, "count must be"),
        ({"block_size": 0}, "block_size"),
        ({"weight": torch.full((2, 4), float("nan"))}, "NaN or infinite"),
        ({"hessian": torch.eye(3)}, "square over its inputs"),
    ],
)
def test_wrong_numbers_are_named(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        surgeon(**{"weight": W, "hessian": _hessian(), **change})  # type: ignore[arg-type]


def test_wanda_is_magnitude_times_norm_by_row() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(50, 6)
    weight = net[0].weight.detach().clone()
    masks = wanda(net, [x[:20], x[20:]], 0.5, targets="all")
    scores = weight.abs() * x.norm(dim=0)
    for row, mask in zip(scores, masks["0.weight"], strict=True):
        assert set(row.argsort()[:3].tolist()) == set((~mask).nonzero().flatten().tolist())
    assert torch.equal(net[0].weight, weight * masks["0.weight"])
    # Equal norms: magnitude by row.
    even = wanda_scores(weight, torch.ones(6))
    assert torch.equal(even, weight.abs())


def test_sparsegpt_changes_outputs_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    from lossmith.sparsity import apply_masks, one_shot_masks

    # Inputs of unequal size that go together: what the three methods know more and more of.
    torch.manual_seed(0)
    x = torch.randn(400, 32) @ torch.randn(32, 32) * torch.logspace(-1, 1, 32)
    errors = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(32, 16))
        wanted = net(x).detach()
        if method == "magnitude":
            apply_masks(net, one_shot_masks(net, 0.5, targets="all"))
        else:
            {"wanda": wanda, "sparsegpt": sparsegpt}[method](net, [x], 0.5, targets="all")  # type: ignore[operator]
        errors.append(float((net(x).detach() - wanted).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8)).to(dtype), torch.randn(64, 16)
    exact = surgeon(net[0].weight.float(), _product(x.to(dtype).float()), 0.5)
    masks = sparsegpt(net, [x.to(dtype)], 0.5, targets="all")
    assert torch.equal(masks["0.weight"], exact.mask)
    assert net[0].weight.dtype == dtype
    assert torch.equal(net[0].weight, exact.weight.to(dtype))


def _product(x: torch.Tensor) -> torch.Tensor:
    seen = InputProducts()
    seen.add(x)
    return seen.hessian()


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    x[3, 1] = float("nan")
    with pytest.raises(InputError, match=r"^0.weight sees inputs that are NaN"):
        sparsegpt(net, [x], targets="all")
