"""The streaming head under higher derivatives, torch.func transforms and torch.compile."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lossmith import losses
from lossmith.heads import linear_loss

CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1, "log_partition_penalty": 0.3}),
    ("focal_loss", {"gamma": 1.5}),
    ("z_loss", {"a": 0.3, "b": 2.0}),
]
each_loss = pytest.mark.parametrize(("loss", "options"), CASES)


def layer(rows=5, features=3, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, features), (classes, features), (classes,), (rows,))
    ]
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[1] = -100
    return tuple(tensors[:3]), targets, tensors[3]


def both(loss, options, targets, chunk_size=2, row_weights=None):
    """The streamed and the plain computation as functions of hidden, weight and bias."""

    def streamed(hidden, weight, bias):
        more = {"bias": bias, "chunk_size": chunk_size, "row_weights": row_weights}
        return linear_loss(loss, hidden, weight, targets, **more, **options)

    def plain(hidden, weight, bias):
        return getattr(losses, loss)(F.linear(hidden, weight, bias), targets, **options)

    return streamed, plain


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@each_loss
def test_first_and_second_derivatives_pass_gradcheck(loss, options):
    inputs, targets, _ = layer()
    streamed, _ = both(loss, options, targets)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(streamed, inputs)
    assert torch.autograd.gradgradcheck(streamed, inputs)


@pytest.mark.parametrize("known", [False, True])
@each_loss
def test_transforms_and_their_nests_equal_the_plain_computation(loss, options, known):
    inputs, targets, upstream = layer()
    functions = both(loss, options, targets, row_weights=upstream if known else None)
    direction = layer(seed=1)[0]
    every = (0, 1, 2)

    def total(function):
        return lambda *inputs: (function(*inputs) * upstream).sum()

    for transform in (
        lambda f: grad(total(f), every)(*inputs),
        lambda f: vjp(f, *inputs)[1](upstream),
        lambda f: jvp(f, inputs, direction),
        lambda f: jvp(grad(total(f), every), inputs, direction),
        lambda f: jvp(grad(total(f), 1), inputs, direction),
        lambda f: vjp(grad(total(f), every), *inputs)[1](direction),
        lambda f: jacrev(f, every)(*inputs),
        lambda f: jacfwd(f, every)(*inputs),
        lambda f: hessian(total(f), every)(*inputs),
        lambda f: jacrev(jacrev(total(f), every), every)(*inputs),
        lambda f: jacfwd(jacfwd(total(f), 1), 1)(*inputs),
        lambda f: jacrev(jacfwd(total(f), every), every)(*inputs),
        lambda f: jacfwd(jacfwd(jacrev(total(f), 1), 1), 1)(*inputs),
        lambda f: vjp(lambda *x: jvp(f, x, direction)[1], *inputs)[1](upstream),
        lambda f: vjp(lambda *x: jvp(grad(total(f), every), x, direction)[1], *inputs)[1](direction),
    ):
        assert_same(*map(transform, functions))


@each_loss
def test_per_example_gradients_and_ensembles_by_vmap(loss, options):
    (hidden, weight, bias), targets, _ = layer()
    weights = torch.randn(3, *weight.shape, dtype=torch.float64)
    biases = torch.randn(3, *bias.shape, dtype=torch.float64)
    batched = torch.stack([hidden, hidden.flip(0)], 1)

    def streamed(hidden, targets, weight, bias):
        return linear_loss(loss, hidden, weight, targets, bias=bias, **options)

    def plain(hidden, targets, weight, bias):
        return getattr(losses, loss)(F.linear(hidden, weight, bias), targets, **options)

    rows = (0, 0, None, None)
    for transform in (
        lambda f: vmap(f, rows)(hidden, targets, weight, bias),
        lambda f: vmap(f, (1, None, None, None))(batched, targets, weight, bias),
        lambda f: vmap(grad(f), rows)(hidden, targets, weight, bias),
        lambda f: vmap(grad(f, (0, 2, 3)), rows)(hidden, targets, weight, bias),
        lambda f: vmap(f, (None, None, 0, 0))(hidden, targets, weights, biases),
        lambda f: vmap(grad(lambda *x: f(*x).sum(), 2), (None, None, 0, None))(hidden, targets, weights, bias),
        lambda f: vmap(vmap(f, (0, None, None, None)), (None, None, 0, 0))(
            batched.movedim(1, 0), targets, weights, biases
        ),
        lambda f: grad(lambda w: vmap(f, rows)(hidden, targets, w, bias).sum())(weight),
        lambda f: vmap(hessian(f, 0), rows)(hidden, targets, weight, bias),
    ):
        assert_same(*map(transform, (streamed, plain)))


@each_loss
def test_a_third_derivative_is_right(loss, options):
    inputs, targets, upstream = layer()
    direction = layer(seed=1)[0]

    def third(function):
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        value = (function(*leaves) * upstream).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return torch.autograd.grad(value, leaves)

    assert_same(*map(third, both(loss, options, targets)))


@each_loss
def test_forward_mode_differentiation_outside_torch_func(loss, options):
    inputs, targets, upstream = layer()
    direction = layer(seed=1)[0]
    streamed, plain = both(loss, options, targets, row_weights=upstream)
    _, expected = jvp(plain, inputs, direction)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, direction, strict=True)]
        assert_same(forward_ad.unpack_dual(streamed(*duals)).tangent, expected)


def test_backward_through_a_hessian_vector_product():
    inputs, targets, upstream = layer()
    direction = layer(seed=1)[0]

    def third(function):
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        _, product = jvp(grad(lambda *x: (function(*x) * upstream).sum(), (0, 1, 2)), leaves, direction)
        return torch.autograd.grad(sum(p.square().sum() for p in product), leaves)

    assert_same(*map(third, both("cross_entropy", {}, targets)))


@pytest.mark.parametrize("known", [False, True])
def test_a_compiled_function_gives_the_same_losses_and_gradients(known):
    inputs, targets, upstream = layer()
    streamed, plain = both("cross_entropy", {"label_smoothing": 0.1}, targets, row_weights=upstream if known else None)

    def step(function):
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        compiled = torch.compile(lambda h, w, b: (function(2 * h, w, b) * upstream).sum() / 3, backend="aot_eager")
        value = compiled(*leaves)
        return value, *torch.autograd.grad(value, leaves)

    assert_same(step(streamed), step(plain))
