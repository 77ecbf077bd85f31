"""Sparse layers against dense ones: outputs, gradients, files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossmith.errors import InputError
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks
from lossmith.sparsity.sparse_linear import SparseLinear, to_dense_linear, to_sparse_linear


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < sparsity, 0)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50)).eval()
    return apply_masks(model, one_shot_masks(model, 0.9))


@pytest.mark.parametrize("shape", [(), (1,), (31,), (33,), (2, 50), (0,), (3, 0)])
@pytest.mark.parametrize(("rows", "columns", "sparsity"), [(7, 5, 0.5), (64, 33, 0.95), (4, 4, 1.0), (1, 1, 0.0)])
def test_is_the_dense_layer(rows: int, columns: int, sparsity: float, shape: tuple[int, ...]) -> None:
    """To rounding of float64, whatever the number of rows; the gradient of the input too."""
    weight, bias = pruned(rows, columns, sparsity), torch.randn(rows, dtype=torch.float64)
    layer = SparseLinear(weight, bias)
    assert torch.equal(layer.weight, weight)
    # Not contiguous: every other feature of a wider input.
    x = torch.randn(*shape, 2 * columns, dtype=torch.float64)[..., ::2].requires_grad_()
    y, wanted = layer(x), F.linear(x, weight, bias)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    given = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, given)[0], torch.autograd.grad(wanted, x, given)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 64, 65, 150])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("outputs", "inputs", "sparsity"), [(9, 7, 0.5), (70, 130, 0.9), (4, 4, 1.0), (1, 1, 0.0)])
def test_is_the_dense_layer_in_every_precision(
    dtype: torch.dtype, rows: int, threads: int, outputs: int, inputs: int, sparsity: float
) -> None:
    """Sums are taken in float32: the error is one rounding to the type, and float32's own rounding of a sum."""
    weight = pruned(outputs, inputs, sparsity, torch.float32).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    layer, x = SparseLinear(weight, bias), torch.randn(rows, 2 * inputs).to(dtype)[:, ::2].requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    finally:
        torch.set_num_threads(before)
    assert y.is_contiguous()
    product = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    # The product is rounded, then its sum with the bias.
    bound = torch.finfo(dtype).eps * (product.abs() + (product + bias).abs()) + 1e-6 * size + 1e-30
    assert bool(((y - product - bias).abs() <= bound).all())
    given = torch.randn(rows, outputs).to(dtype)
    wanted = given @ weight
    torch.testing.assert_close(torch.autograd.grad(y, x, given)[0], wanted)


def test_half_precision_inputs_and_autocast_keep_their_type() -> None:
    weight = pruned(16, 8, 0.9, torch.float32)
    layer, x = SparseLinear(weight), torch.randn(3, 8)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), F.linear(x.double(), weight.double()).float())


def test_a_model_keeps_its_outputs_and_its_file(tmp_path: Path) -> None:
    """GPT-2, whose matrices lie the other way round: the saved checkpoint is the pruned one, for plain Transformers."""
    from transformers import AutoModelForCausalLM

    model, tokens = gpt2(), torch.arange(24).view(2, 12)
    sparse = copy.deepcopy(model)
    found = to_sparse_linear(sparse, only_faster=False)
    assert len(found.replaced) == 8
    assert not found.kept
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    sparse.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    back = to_dense_linear(copy.deepcopy(sparse))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    # A state dict of another model goes in, and one of another shape is named.
    other = {name: 2 * weight for name, weight in model.state_dict().items()}
    sparse.load_state_dict(other)
    assert torch.equal(to_dense_linear(sparse).state_dict()["transformer.h.0.mlp.c_fc.weight"], other[
        "transformer.h.0.mlp.c_fc.weight"
    ])  # fmt: skip


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    layer = SparseLinear(pruned(4, 6, 0.5))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(6, 4\)"):
        layer.load_state_dict({"weight": torch.zeros(6, 4)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_only_layers_that_are_faster_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import lossmith.sparsity.sparse_linear as module

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    model[3].to(torch.float8_e4m3fn)
    with torch.no_grad():
        model[0].weight.copy_(pruned(32, 32, 0.9))
        model[1].weight.copy_(pruned(16, 32, 0.9))
    monkeypatch.setattr(module, "_speed", lambda weight, layer, rows: 2.0 if len(weight) == 32 else 0.5)
    found = to_sparse_linear(model)
    assert found.replaced == ("0",)
    assert {name: reason.split(",")[0] for name, reason in found.kept.items()} == {
        "1": "slower",
        "2": "more than half of the weights are left",
        "3": "is float8_e4m3fn",
    }
    assert "1 of 4 linear layers are sparse matrices now, each 2.0 to 2.0x as fast" in found.summary()


def test_a_case_that_is_slower_says_so() -> None:
    """Half of the weights of a small layer: measured, never a gain, and left dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    apply_masks(model, one_shot_masks(model, 0.5, targets="all"))
    found = to_sparse_linear(model, rows=256)
    assert not found.replaced
    assert type(model[0]) is nn.Linear
    assert "none of the 1 linear layers is faster as a sparse matrix: slower" in found.summary()


@pytest.mark.slow
def test_nine_tenths_of_a_wide_matrix_pay() -> None:
    """The published target is 1.5x on four cores; here, with whatever else runs, more than 1.05x."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048))
    apply_masks(model, one_shot_masks(model, 0.9, targets="all"))
    assert to_sparse_linear(model).replaced == ("0",)


def test_what_cannot_be_sparse_is_refused() -> None:
    with pytest.raises(ValueError, match="is float8_e5m2, for which PyTorch has no sparse product"):
        SparseLinear(torch.zeros(2, 2).to(torch.float8_e5m2))
    with pytest.raises(ValueError, match="is on meta, not on a CPU"):
        SparseLinear(torch.zeros(2, 2, device="meta"))
    layer = SparseLinear(pruned(4, 6, 0.5))
    with pytest.raises(ValueError, match=r"6 features, got shape \(1, 5\)"):
        layer(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"is on meta.*to_dense_linear"):
        copy.deepcopy(layer).to("meta")(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="rows must be at least 1"):
        to_sparse_linear(nn.Sequential(nn.Linear(2, 2)), rows=0)
    with pytest.raises(InputError, match="no linear layer"):
        to_sparse_linear(nn.Sequential(nn.ReLU()))
