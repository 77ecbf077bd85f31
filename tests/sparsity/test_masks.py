"""Which weights stay: by hand, nested, in groups, with ties, tied matrices and bad weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity import magnitude_masks, prunable_weights

LAYERS = {"first": torch.tensor([[0.1, -0.9, 0.4]]), "second": torch.tensor([[0.2, -0.3, 0.8]])}


def matrices(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("a", (8, 12)), ("b", (5, 4)))}


def test_one_threshold_for_all_layers() -> None:
    masks = magnitude_masks(LAYERS, 0.5)
    assert masks["first"].int().tolist() == [[0, 1, 1]]
    assert masks["second"].int().tolist() == [[0, 0, 1]]


@given(st.integers(0, 10), st.lists(st.floats(0.02, 1), min_size=2, max_size=5))
def test_masks_are_nested_and_hold_the_number_asked_for(seed: int, densities: list[float]) -> None:
    weights, masks = matrices(seed), None
    for number, density in enumerate(sorted(densities, reverse=True)):
        # Weights move between prunings.
        moved = {name: weight + 0.1 * number * torch.cos(9 * weight) for name, weight in weights.items()}
        after = magnitude_masks(moved, density, masks=masks)
        assert sum(int(m.sum()) for m in after.values()) == max(int(116 * density + 1e-6), 1)
        assert masks is None or all(bool((after[name] <= masks[name]).all()) for name in after)
        alive = torch.cat([moved[name][after[name]].abs() for name in after])
        dead = torch.cat([moved[n][(~after[n]) & (masks[n] if masks else True)].abs() for n in after])
        assert dead.numel() == 0 or alive.min() >= dead.max()
        masks = after


def test_repeated_pruning_agrees_with_torch_prune() -> None:
    """``torch.nn.utils.prune`` removes shares of what remains: ``1 - rho_k / rho_(k-1)``."""
    from torch.nn.utils import prune

    torch.manual_seed(0)
    layers = [nn.Linear(12, 8), nn.Linear(8, 6)]
    weights = {str(i): layer.weight.detach().clone() for i, layer in enumerate(layers)}
    masks, before = None, 1.0
    for density in (0.75, 0.5, 0.25):
        masks = magnitude_masks(weights, density, masks=masks)
        amount = round((before - density) * 144)
        prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=amount)
        before = density
        for i, layer in enumerate(layers):
            assert torch.equal(masks[str(i)], layer.weight_mask.bool())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_ties_do_not_change_the_number(dtype: torch.dtype) -> None:
    weights = {"a": torch.ones(10, 10, dtype=dtype), "b": torch.zeros(10, 10, dtype=dtype)}
    assert sum(int(m.sum()) for m in magnitude_masks(weights, 0.25).values()) == 50
    assert sum(int(m.sum()) for m in magnitude_masks(weights, 0.75).values()) == 150
    # The released code keeps whatever equals the threshold.
    assert sum(int(m.sum()) for m in magnitude_masks(weights, 0.25, variant="released").values()) == 100


def test_a_live_zero_outranks_a_dead_weight() -> None:
    weights = {"a": torch.tensor([[0.0, 0.0, 5.0, 3.0]])}
    old = {"a": torch.tensor([[True, False, True, True]])}
    assert magnitude_masks(weights, 0.75, masks=old)["a"].tolist() == [[True, False, True, True]]
    # A dead weight that has grown stays dead.
    assert not magnitude_masks({"a": torch.tensor([[1.0, 9.0, 5.0, 3.0]])}, 0.75, masks=old)["a"][0, 1]


def test_two_of_four_remain_exactly_at_half_density() -> None:
    weights, masks = matrices(3), None
    for density in (0.9, 0.7, 0.5):
        masks = magnitude_masks(weights, density, masks=masks, structure="2:4")
        assert sum(int(m.sum()) for m in masks.values()) == int(116 * density + 1e-6)
        assert all(int(m.reshape(-1, 4).sum(-1).min()) >= 2 for m in masks.values())
    for name, mask in masks.items():
        assert (mask.reshape(-1, 4).sum(-1) == 2).all()
        kept = weights[name].abs().reshape(-1, 4).topk(2, -1).values.sort().values
        assert torch.equal(weights[name].abs()[mask].reshape(-1, 2).sort().values, kept)


def test_the_released_two_of_four_is_denser_than_asked_for() -> None:
    masks = magnitude_masks(matrices(3), 0.5, structure="2:4", variant="released")
    assert sum(int(m.sum()) for m in masks.values()) > 58
    assert max(int(m.reshape(-1, 4).sum(-1).max()) for m in masks.values()) > 2


@pytest.mark.parametrize("structure, wrong", [("4:2", "N:M"), ("2", "N:M"), ("0:4", "N:M"), ("1:5", "not a multiple")])
def test_structures_that_do_not_fit_are_refused(structure: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        magnitude_masks(matrices(0), 0.9, structure=structure)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weights = matrices(0)
    weights["b"][1, 1] = value
    with pytest.raises(ValueError, match="b has weights that are NaN or infinite"):
        magnitude_masks(weights, 0.5)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_densities_out_of_range_are_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        magnitude_masks(matrices(0), density)


def test_not_contiguous_weights_and_tiny_densities() -> None:
    weights = {"a": torch.arange(12.0).reshape(3, 4).T}
    assert magnitude_masks(weights, 1e-9)["a"].sum() == 1
    assert magnitude_masks(weights, 1e-9)["a"][3, 2]
    assert magnitude_masks(weights, 1.0)["a"].all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.embedding.weight
        self.again = nn.Linear(4, 4)
        self.again.weight = self.body.weight


def test_a_head_tied_to_the_embedding_is_left_out_and_shared_matrices_count_once() -> None:
    found = prunable_weights(Tied())
    assert list(found.weights) == ["body.weight"]
    assert found.tied == ("head.weight",)
    assert found.number == 16


def test_an_untied_head_is_pruned_and_embeddings_and_norms_are_not() -> None:
    from lossmith.training.models import build_model

    model = build_model("nano", vocab_size=300, sequence_length=8, overrides={"tie_word_embeddings": False})
    found = prunable_weights(model)
    assert "lm_head.weight" in found.weights
    assert not any("embed" in name or "norm" in name for name in found.weights)
    # Four attention matrices, three of the MLP, the head.
    assert found.number == 4 * 32 * 32 + 3 * 32 * 96 + 300 * 32
    tied = prunable_weights(build_model("nano", vocab_size=300, sequence_length=8))
    assert tied.tied == ("lm_head.weight",)


def test_layers_can_be_excluded_and_misspelt_exclusions_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert list(prunable_weights(model, exclude=("0.",)).weights) == ["1.weight"]
    with pytest.raises(InputError, match="exclude names 'head', which is in no linear layer's name"):
        prunable_weights(model, exclude=("head",))


@pytest.mark.parametrize(
    "model, options, reason",
    [
        (nn.Sequential(nn.Embedding(3, 3)), {}, "has no linear layer to prune$"),
        (nn.Linear(2, 2), {"exclude": ("weight",)}, "all of them are excluded"),
    ],
)
def test_a_model_with_nothing_to_prune_is_refused(model: nn.Module, options: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prunable_weights(model, **options)
