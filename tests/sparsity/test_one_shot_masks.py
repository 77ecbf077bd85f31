"""One-shot masks against closed forms and torch.nn.utils.prune."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from lossmith.errors import InputError
from lossmith.sparsity.magnitude import (
    apply_masks,
    block_weights,
    erk_densities,
    mask_similarity,
    one_shot_masks,
    release_masks,
    sparsity_report,
)
from lossmith.sparsity.threshold import KthSmallest

W1 = torch.tensor([[0.5, -0.1, 0.3, 0.05], [-0.8, 0.2, -0.25, 0.6]])
W2 = torch.tensor([[0.15, -0.9, 0.02, 0.4], [0.7, -0.35, 0.12, -0.08]])
LAYERS = {"a": W1, "b": W2}


def _lists(masks: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    return [mask.int().tolist() for mask in masks.values()]


@pytest.mark.parametrize("method", ["magnitude", "2:4"])
def test_masks_of_the_worked_example(method: str) -> None:
    assert _lists(one_shot_masks(LAYERS, 0.5, method=method)) == [
        [[1, 0, 1, 0], [1, 0, 0, 1]],
        [[0, 1, 0, 1], [1, 1, 0, 0]],
    ]


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.1, 2), (0.3, 5), (0.45, 7)])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_number_of_zeros_is_rounded(sparsity: float, zeros: int, method: str) -> None:
    masks = one_shot_masks(LAYERS, sparsity, method=method)
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros


def test_rounds_half_to_even() -> None:
    assert int((~one_shot_masks({"w": torch.rand(1, 5)}, 0.5)["w"]).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_to_torch_where_there_are_no_ties(dtype: torch.dtype) -> None:
    values = (torch.randperm(240) + 1).to(dtype) * (torch.randint(2, (240,)) * 2 - 1).to(dtype)
    model = nn.ModuleList([nn.Linear(10, 12, bias=False), nn.Linear(12, 10, bias=False)]).to(dtype)
    with torch.no_grad():
        for layer, part in zip(model, values.split(120), strict=True):
            layer.weight.copy_(part.reshape(layer.weight.shape))
    ours = one_shot_masks(model, 0.37, targets="all")
    torch_prune.global_unstructured([(m, "weight") for m in model], torch_prune.L1Unstructured, amount=0.37)
    for i, layer in enumerate(model):
        assert torch.equal(ours[f"{i}.weight"], layer.weight_mask.bool())


@pytest.mark.parametrize("method", ["magnitude", "uniform", "random"])
def test_nested_even_with_ties(method: str) -> None:
    torch.manual_seed(0)
    layers = {"a": torch.randint(-2, 3, (8, 8)).float(), "b": torch.zeros(4, 6)}
    before = {k: torch.zeros_like(v, dtype=torch.bool) for k, v in layers.items()}
    for sparsity in (0.1, 0.35, 0.5, 0.8, 0.97):
        gone = {k: ~m for k, m in one_shot_masks(layers, sparsity, method=method).items()}
        assert all(bool((gone[k] | ~before[k]).all()) for k in layers)
        before = gone


def test_global_masks_know_scale_and_uniform_ones_do_not() -> None:
    scaled = {k: 7 * w for k, w in LAYERS.items()}
    assert _lists(one_shot_masks(scaled, 0.4)) == _lists(one_shot_masks(LAYERS, 0.4))
    one = {"a": 7 * W1, "b": W2}
    assert _lists(one_shot_masks(one, 0.4)) != _lists(one_shot_masks(LAYERS, 0.4))
    assert _lists(one_shot_masks(one, 0.4, method="uniform")) == _lists(one_shot_masks(LAYERS, 0.4, method="uniform"))


def test_n_of_m_keeps_n_along_the_inputs_also_of_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, conv = nn.Linear(12, 5), Conv1D(5, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    model = nn.ModuleList([linear, conv])
    masks = one_shot_masks(model, method="1:3", targets="all")
    assert bool((masks["0.weight"].reshape(5, 4, 3).sum(-1) == 1).all())
    assert torch.equal(masks["1.weight"].T, masks["0.weight"])
    with pytest.raises(ValueError, match=r"0\.weight has 12 inputs, not a multiple of 8"):
        one_shot_masks(model, method="4:8", targets="all")


def test_erk_densities_of_bert_and_a_saturated_layer() -> None:
    bert = [(768, 768)] * 4 + [(3072, 768)] * 2
    for sparsity, small, large in ((0.5, 2 / 3, 5 / 12), (0.3, 0.93333333, 0.58333333), (0.9, 0.13333333, 0.08333333)):
        found = erk_densities(bert, sparsity)
        np.testing.assert_allclose([found[0], found[-1]], [small, large], rtol=1e-7)
        total = sum(d * a * b for d, (a, b) in zip(found, bert, strict=True))
        np.testing.assert_allclose(total / sum(a * b for a, b in bert), 1 - sparsity)
    assert erk_densities([(4, 4), (64, 64)], 0.5) == [1.0, 0.498046875]
    assert erk_densities([(4, 4)], 0.0) == [1.0]
    kept = one_shot_masks({"w": torch.rand(400, 400)}, 0.3, method="erk")["w"].double().mean()
    # Five standard deviations of 160,000 Bernoulli draws.
    assert abs(float(kept) - 0.7) < 0.006


def test_held_masks_have_no_gradient_and_never_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    masks = one_shot_masks(model, 0.6, targets="all")
    apply_masks(model, masks, hold=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
        assert not bool(model[0].weight_orig.grad[~masks["0.weight"]].any())
        optimizer.step()
    assert torch_prune.is_pruned(model)
    release_masks(model)
    assert not torch_prune.is_pruned(model)
    assert set(dict(model.named_parameters())) >= set(masks)
    for name, mask in masks.items():
        assert not bool(model.get_parameter(name)[~mask].any())
    report = sparsity_report(model, targets="all")
    assert report.zeros == round(0.6 * 72)
    assert report.of_all < report.sparsity


def test_sparsity_zero_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(4, 6)
    before = model(x)
    assert torch.equal(apply_masks(model, one_shot_masks(model, 0.0, targets="all"))(x), before)


def test_similarity_of_equal_and_of_random_masks() -> None:
    layers = {"w": torch.rand(300, 300)}
    one, other = (one_shot_masks(layers, 0.7, method="random", seed=s) for s in (0, 1))
    assert mask_similarity(one, one)["cosine"] == 1.0 == mask_similarity(one, one)["jaccard"]
    assert abs(mask_similarity(one, other)["cosine"] - 0.3) < 0.01
    with pytest.raises(ValueError, match="different layers"):
        mask_similarity(one, {})


def test_only_blocks_are_pruned_and_tied_ones_once() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, vocab_size=11))
    names = set(block_weights(model).weights)
    assert len(names) == 8
    assert all(name.startswith("transformer.h.") for name in names)
    with pytest.raises(InputError, match="its linear layers are weight"):
        block_weights(nn.Linear(3, 3))


@pytest.mark.parametrize("k", [0, 1, 17, 500, 1000])
def test_threshold_search_equals_a_stable_sort(k: int) -> None:
    rng = np.random.default_rng(k)
    numbers = np.abs(rng.standard_normal(1000)).astype(np.float32).round(1)
    numbers[:50] = 0
    search, pieces = KthSmallest(k), np.array_split(numbers, 7)
    while not search.done:
        for piece in pieces:
            search.see(piece)
        search.close()
    expected = np.zeros(1000, dtype=bool)
    expected[np.argsort(numbers, kind="stable")[:k]] = True
    np.testing.assert_array_equal(np.concatenate([search.smaller(piece) for piece in pieces]), expected)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        one_shot_masks(LAYERS, sparsity)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="b has weights that are NaN"):
        one_shot_masks({"a": W1, "b": torch.full((2, 2), torch.nan)}, 0.5)
    with pytest.raises(InputError, match="unknown method 'size'"):
        one_shot_masks(LAYERS, 0.5, method="size")
    with pytest.raises(ValueError, match="N < M"):
        one_shot_masks(LAYERS, method="4:2")
    with pytest.raises(InputError, match="the mask of weight has shape"):
        apply_masks(nn.Linear(3, 3), {"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(InputError, match="which Linear does not have"):
        apply_masks(nn.Linear(3, 3), {"x.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.warns(UserWarning, match="zero already"):
        one_shot_masks(
            apply_masks(nn.Linear(9, 9), {"weight": torch.zeros(9, 9, dtype=torch.bool)}), 0.5, targets="all"
        )
