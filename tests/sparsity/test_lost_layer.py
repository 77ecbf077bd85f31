"""The LOST layer: its first weights, forward, gradients, and what it refuses; exact numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lossmith.sparsity import LOSTLinear, SLTrainLinear, column_scores, lost_start

W0 = torch.tensor([[4, 0, 0, 1, 0], [0, 3, 0, 0, 1], [0, 0, 2, 1, 0], [1, 0, 1, 0, 2]], dtype=torch.float64)
X = torch.tensor([1, -1, 2, 0.5, 0], dtype=torch.float64)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def random_weight(outputs: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_published_column_scores_and_channels() -> None:
    expected = [0.5220823151, 0.9940447427, 2.1242272454, 0.9384923595, 1.4896355116]
    torch.testing.assert_close(column_scores(W0, 2), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    first = [0.5163977795, 0.7745966692, 2.065591118, 0.5163977795, 0.7745966692]
    one = column_scores(W0, 2, complement_rank=1)
    torch.testing.assert_close(one, torch.tensor(first, dtype=torch.float64), rtol=0, atol=1e-9)
    layer = LOSTLinear.from_linear(linear(W0), 2, 0.4)
    assert layer.index.tolist() == [2, 4]
    assert layer.values is not None
    # The values are the weight's own, not those of what is left over.
    assert torch.equal(layer.values, W0[:, [2, 4]])


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (0.5, [2.7933537915, -0.9709494893, 2.2389114632, 1.5528349563]),
        (1.0, [5.586707583, -1.9418989787, 0.4778229264, 1.1056699126]),
        (0.0, [0, 0, 4, 2]),
    ],
)
def test_the_published_outputs(gamma: float, expected: list[float]) -> None:
    layer = LOSTLinear.from_linear(linear(W0), 2, 0.4, gamma=gamma, activation=None)
    torch.testing.assert_close(layer(X), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_output_is_affine_in_gamma(activation: str | None) -> None:
    at = [LOSTLinear.from_linear(linear(W0), 2, 0.4, gamma=g, activation=activation)(X) for g in (0, 0.5, 1)]  # type: ignore[arg-type]
    torch.testing.assert_close(at[1], (at[0] + at[2]) / 2, rtol=1e-14, atol=1e-14)


def test_full_rank_without_activation_is_the_first_weight() -> None:
    layer = LOSTLinear.from_linear(linear(W0), 4, 0.4, gamma=1, activation=None, choose="norm")
    torch.testing.assert_close(layer(X), W0 @ X, rtol=0, atol=1e-12)
    columns = LOSTLinear.from_linear(linear(W0), 2, 0.4, gamma=0)
    assert torch.equal(columns(X), W0[:, columns.index] @ X[columns.index])
    every = LOSTLinear.from_linear(linear(W0), 2, 1, gamma=0)
    torch.testing.assert_close(every(X), W0 @ X, rtol=0, atol=1e-13)


def test_scores_are_what_the_rank_does_not_explain() -> None:
    """c_j^2 = ||W_j||^2 - sum over i <= r of s_i^2 v_ji^2."""
    weight = random_weight(9, 13)
    _, s, v = torch.linalg.svd(weight, full_matrices=False)
    left = weight.square().sum(0) - (s[:4, None] * v[:4]).square().sum(0)
    torch.testing.assert_close(column_scores(weight, 4).square(), left, rtol=1e-10, atol=1e-12)


def test_invariances_of_the_choice() -> None:
    weight = random_weight(9, 13)
    scores, first = column_scores(weight, 4), lost_start(weight, 4, 3)
    turn = torch.linalg.qr(random_weight(9, 9, seed=1)).Q
    torch.testing.assert_close(column_scores(turn @ weight, 4), scores, rtol=1e-10, atol=1e-12)
    assert torch.equal(lost_start(turn @ weight, 4, 3).index, first.index)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(column_scores(weight[:, order], 4), scores[order], rtol=1e-10, atol=1e-12)
    scaled = lost_start(9 * weight, 4, 3)
    torch.testing.assert_close(column_scores(9 * weight, 4), 9 * scores, rtol=1e-10, atol=1e-12)
    assert torch.equal(scaled.index, first.index)
    torch.testing.assert_close(scaled.A, 3 * first.A, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.B, 3 * first.B, rtol=1e-9, atol=1e-12)


def test_the_pair_is_the_best_approximation_with_fixed_signs() -> None:
    weight = random_weight(9, 13)
    first = lost_start(weight, 4, 3)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(first.B @ first.A.T, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-10, atol=1e-12)
    # Both factors have the root of the spectrum.
    torch.testing.assert_close(first.A.norm(dim=0), s[:4].sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(first.B.norm(dim=0), s[:4].sqrt(), rtol=1e-10, atol=0)
    assert bool((first.A.gather(0, first.A.abs().argmax(0, keepdim=True)) > 0).all())


def plain(layer: LOSTLinear, x: Tensor) -> Tensor:
    inner = x @ layer.A
    inner = inner * torch.sigmoid(inner) if layer.activation == "silu" else inner
    y = (layer.gamma if layer.values is not None else 1.0) * inner @ layer.B.T
    if layer.values is not None:
        y = y + (1 - layer.gamma) * x[..., layer.index] @ layer.values.T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_those_of_the_formula(activation: str | None, density: float, bias: bool) -> None:
    first = linear(random_weight(6, 7), random_weight(1, 6)[0] if bias else None)
    layer = LOSTLinear.from_linear(first, 3, density, gamma=0.7, activation=activation)  # type: ignore[arg-type]
    x = random_weight(10, 7, seed=3).view(2, 5, 7).requires_grad_()
    upstream = random_weight(10, 6, seed=4).view(2, 5, 6)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x), inputs, upstream)
    reference = torch.autograd.grad(plain(layer, x), inputs, upstream)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_second_derivatives() -> None:
    layer = LOSTLinear.from_linear(linear(random_weight(4, 5)), 2, 0.4)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y

    inputs = (random_weight(3, 5, seed=5).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_no_dense_matrix_is_ever_there_and_little_is_kept() -> None:
    """No operation, forward or backward, makes anything as large as the weight; ``x`` and ``x A`` are kept."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*arguments, **(options or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    layer = LOSTLinear.from_linear(nn.Linear(96, 128, bias=False), 16, 0.05)
    kept: list[int] = []
    x = torch.randn(8, 96, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(0 if isinstance(tensor, nn.Parameter) or tensor is layer.index else tensor.numel())
        return tensor

    with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).square().sum().backward()
    assert 0 < largest <= 128 * 16 < 96 * 128
    # The square keeps the output.
    assert sum(kept) == 8 * 96 + 8 * 16 + 8 * 128


def test_merged_layers_are_the_same_function() -> None:
    bias = random_weight(1, 6)[0]
    layer = LOSTLinear.from_linear(linear(random_weight(6, 7), bias), 3, 0.3, gamma=0.3, activation=None)
    x = random_weight(10, 7, seed=3)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-12, atol=1e-12)
    sparse = SLTrainLinear.from_linear(linear(random_weight(6, 7), bias), 3, 0.3, alpha=2)
    with torch.no_grad():
        sparse.B.normal_()
    torch.testing.assert_close(sparse.merged()(x), sparse(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="activation=none"):
        LOSTLinear.from_linear(linear(W0), 2, 0.4).merged()


def test_sltrain_is_a_pair_plus_random_places_and_keeps_no_dense_matrix() -> None:
    torch.manual_seed(0)
    layer = SLTrainLinear.from_linear(linear(random_weight(6, 7)), 3, 0.3, alpha=6)
    assert (layer.entries, layer.scale) == (12, 2.0)
    assert len(set(layer.places.tolist())) == 12
    with torch.no_grad():
        layer.B.normal_()
    dense = 2 * layer.B @ layer.A.T
    S = torch.zeros(42, dtype=torch.float64)
    S[layer.places] = layer.values[0]
    x = random_weight(10, 7, seed=3)
    reference = x @ (dense + S.view(6, 7)).T
    torch.testing.assert_close(layer(x), reference, rtol=1e-12, atol=1e-12)
    parameters = [layer.A, layer.B, layer.values]
    ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    dense, S = 2 * layer.B @ layer.A.T, torch.zeros(42, dtype=torch.float64)
    reference = x @ (dense + S.index_put((layer.places,), layer.values[0]).view(6, 7)).T
    for a, b in zip(ours, torch.autograd.grad(reference.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_single(dtype: torch.dtype) -> None:
    layer = LOSTLinear.from_linear(nn.Linear(16, 12, dtype=dtype), 4, 0.2)
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    layer(x).float().sum().backward()
    assert layer.A.dtype == dtype
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_autocast_multiplies_in_half_and_gradients_are_single() -> None:
    layer = LOSTLinear.from_linear(nn.Linear(16, 12), 4, 0.2)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_empty_single_and_strided_inputs() -> None:
    layer = LOSTLinear.from_linear(linear(W0), 2, 0.4)
    assert layer(torch.zeros(0, 5, dtype=torch.float64)).shape == (0, 4)
    wide = random_weight(5, 6, seed=1)
    torch.testing.assert_close(layer(wide.T), layer(wide.T.contiguous()))
    torch.testing.assert_close(layer(wide.T[0]), layer(wide.T)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a share"),
        ({"rank": 1.5}, "rank must be a share"),
        ({"rank": float("nan")}, "rank must be a share"),
        ({"rank": 5}, "at most the smaller side, 4"),
        ({"rank": 4}, "leaves nothing over of a weight of 4 x 5"),
        ({"density": -0.1}, r"density must be in \[0, 1\]"),
        ({"density": 1.1}, r"density must be in \[0, 1\]"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\]"),
        ({"activation": "relu"}, "activation must be 'silu' or none"),
        ({"choose": "best"}, "choose must be"),
        ({"start": "zero"}, "start must be"),
        ({"complement_rank": 0}, "complement_rank must be"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSTLinear.from_linear(linear(W0), **{"rank": 2, "density": 0.4, **options})  # type: ignore[arg-type]


def test_weights_that_are_not_finite_and_other_layers_are_refused() -> None:
    broken = W0.clone()
    broken[1, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        LOSTLinear.from_linear(linear(broken), 2)
    with pytest.raises(TypeError, match="got Embedding"):
        LOSTLinear.from_linear(nn.Embedding(4, 4), 2)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        SLTrainLinear.from_linear(linear(W0), 2, 0)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        SLTrainLinear.from_linear(linear(W0), 2, alpha=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("complement_rank", [None, 5])
def test_the_gram_matrix_gives_the_same_start(
    shape: tuple[int, int], dtype: torch.dtype, complement_rank: int | None
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*shape, dtype=dtype)
    one, other = (
        lost_start(weight, 6, 3, complement_rank=complement_rank, decomposition=kind)  # type: ignore[arg-type]
        for kind in ("svd", "gram")
    )
    assert one.index.tolist() == other.index.tolist()
    # Squaring costs half of the digits of what is small; these are not.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for mine, theirs in ((one.A, other.A), (one.B, other.B)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_the_gram_matrix_of_a_weight_of_low_rank_is_no_trouble() -> None:
    """Components without length: finite, and the product is still the matrix."""
    torch.manual_seed(0)
    weight = torch.randn(20, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    for matrix in (weight, weight.T.contiguous(), torch.zeros(5, 4, dtype=torch.float64)):
        found = lost_start(matrix, 4, 1, choose="norm", decomposition="gram")
        torch.testing.assert_close(found.B @ found.A.T, matrix, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="decomposition must be 'svd' or 'gram'"):
        lost_start(weight, 2, 1, decomposition="qr")  # type: ignore[arg-type]
