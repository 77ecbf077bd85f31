"""The streaming head against the plain computation: values, gradients, masks, dtypes, weights, memory."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lossmith import losses
from lossmith.errors import InputError
from lossmith.heads import linear_loss

CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"log_partition_penalty": 0.3}),
    ("cross_entropy", {"label_smoothing": 0.2, "log_partition_penalty": 1e-2, "ignore_index": 1}),
    ("focal_loss", {"gamma": 1.5}),
    ("z_loss", {"a": 0.3, "b": 2.0}),
]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def layer(rows=13, features=5, classes=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias, upstream = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, features), (classes, features), (classes,), (rows,))
    )
    targets = torch.randint(classes, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets, upstream


def plain(loss, hidden, weight, targets, bias=None, **options):
    loss = getattr(losses, loss) if isinstance(loss, str) else loss
    return loss(F.linear(hidden, weight, bias), targets, **options)


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or EXACT))


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 50])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_losses_and_gradients_equal_the_plain_computation(loss, options, chunk_size):
    hidden, weight, bias, targets, upstream = layer()
    targets[[0, 5, 12]] = -100 if options.get("ignore_index") is None else 1
    expected = plain(loss, hidden, weight, targets, bias, **options)
    found = linear_loss(loss, hidden, weight, targets, bias=bias, chunk_size=chunk_size, **options)
    assert_same(found, expected)
    inputs = (hidden, weight, bias)
    gradients = torch.autograd.grad(found, inputs, upstream)
    assert_same(gradients, torch.autograd.grad(expected, inputs, upstream))


@given(
    rows=st.integers(0, 9),
    features=st.integers(0, 4),
    classes=st.integers(1, 6),
    chunk_size=st.none() | st.integers(1, 11),
    known=st.booleans(),
    with_bias=st.booleans(),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_every_size_and_mask_gives_the_plain_result(rows, features, classes, chunk_size, known, with_bias, case, seed):
    loss, options = case
    hidden, weight, bias, targets, upstream = layer(rows, features, classes, seed=seed)
    mask = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed)) < 0.3
    targets = targets.masked_fill(mask[0], options.get("ignore_index", -100)) if classes > 1 else targets
    upstream = upstream.masked_fill(mask[1], 0.0)
    bias = bias if with_bias else None
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    found = linear_loss(
        loss,
        hidden,
        weight,
        targets,
        bias=bias,
        chunk_size=chunk_size,
        row_weights=upstream / 3 if known else None,
        **options,
    )
    expected = plain(loss, hidden, weight, targets, bias, **options)
    assert_same(found, expected)
    assert_same(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize(("loss", "options"), CASES[:4])
def test_the_fused_cross_entropy_agrees_with_the_path_for_any_loss_to_1e_12(loss, options):
    hidden, weight, bias, targets, upstream = layer(40, 6, 30)
    hidden = (hidden * 4).detach().requires_grad_()  # confident rows, too

    def not_recognised(logits, targets, **options):
        return losses.cross_entropy(logits, targets, **options)

    results = []
    for function in (losses.cross_entropy, not_recognised):
        out = linear_loss(function, hidden, weight, targets, bias=bias, chunk_size=7, **options)
        results.append((out, *torch.autograd.grad(out, (hidden, weight, bias), upstream)))
    assert_same(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_extreme_and_ruled_out_logits_behave_as_in_the_plain_computation():
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf], dtype=torch.float64)
    hidden = torch.tensor([[1e4, 0, -1e4, 0], [1, 2, 3, 4], [-1e4, -1e4, -1e4, 0]], dtype=torch.float64)
    hidden.requires_grad_()
    targets = torch.tensor([2, 1, 0])
    found = linear_loss("cross_entropy", hidden, weight, targets, bias=bias)
    assert_same(found, plain("cross_entropy", hidden, weight, targets, bias))
    assert found[0] == 2e4
    assert linear_loss("cross_entropy", hidden, weight, torch.tensor([3, 3, 3]), bias=bias).eq(torch.inf).all()
    assert hidden.grad is None
    found.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


class TestKnownWeights:
    def test_a_multiple_of_the_promised_weights_uses_the_saved_gradients(self, monkeypatch):
        hidden, weight, bias, targets, upstream = layer()
        weights = upstream.abs()
        weights[3] = 0.0
        expected = torch.autograd.grad(
            (0.37 * weights * plain("focal_loss", hidden, weight, targets, bias)).sum(),
            (hidden, weight, bias),
        )
        found = linear_loss("focal_loss", hidden, weight, targets, bias=bias, chunk_size=4, row_weights=weights)
        assert_same(found, plain("focal_loss", hidden, weight, targets, bias))
        # Were anything recomputed, it would be with this.
        monkeypatch.setattr("lossmith.heads.derivatives.StreamedGradients", None)
        assert_same(torch.autograd.grad((0.37 * weights * found).sum(), (hidden, weight, bias)), expected)

    @pytest.mark.parametrize(
        "break_promise",
        [
            lambda w: w + torch.linspace(0, 1e-9, 13, dtype=w.dtype),
            lambda w: w.square(),
            lambda w: torch.ones_like(w),
            lambda w: torch.zeros_like(w),
            lambda w: w * torch.arange(13) % 2,
        ],
    )
    def test_a_broken_promise_still_gives_the_right_gradient(self, break_promise):
        hidden, weight, bias, targets, weights = layer()
        weights[0] = 0.0
        upstream = break_promise(weights)
        found = linear_loss("cross_entropy", hidden, weight, targets, bias=bias, row_weights=weights)
        expected = plain("cross_entropy", hidden, weight, targets, bias)
        assert_same(
            torch.autograd.grad(found, (hidden, weight, bias), upstream),
            torch.autograd.grad(expected, (hidden, weight, bias), upstream),
        )

    def test_weights_that_are_all_zero_or_not_finite_do_no_harm(self):
        hidden, weight, _, targets, upstream = layer()
        expected = torch.autograd.grad(plain("cross_entropy", hidden, weight, targets), weight, upstream)
        for value in (0.0, torch.nan, torch.inf):
            weights = torch.full_like(upstream, value)
            found = linear_loss("cross_entropy", hidden, weight, targets, row_weights=weights)
            assert_same(torch.autograd.grad(found, weight, upstream), expected)

    def test_a_second_backward_and_a_gradient_with_a_graph_are_right(self):
        hidden, weight, bias, targets, upstream = layer()
        found = linear_loss("cross_entropy", hidden, weight, targets, bias=bias, row_weights=upstream)
        expected = plain("cross_entropy", hidden, weight, targets, bias)
        inputs = (hidden, weight, bias)
        reference = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
        first = torch.autograd.grad(found, inputs, upstream, retain_graph=True)
        for gradient in first:
            gradient.add_(1.0)  # the caller owns what it was given
        assert_same(torch.autograd.grad(found, inputs, upstream, retain_graph=True), reference)
        with_graph = [
            torch.autograd.grad(losses_, hidden, upstream, create_graph=True)[0].square().sum()
            for losses_ in (found, expected)
        ]
        assert_same(*[torch.autograd.grad(s, inputs) for s in with_graph])

    def test_half_precision_weights_and_float32_losses_keep_the_promise(self):
        hidden, weight, _, targets, upstream = layer(dtype=torch.float32)
        weights = upstream.abs().to(torch.bfloat16)
        found = linear_loss("cross_entropy", hidden, weight, targets, row_weights=weights)
        expected = plain("cross_entropy", hidden, weight, targets)
        gradients = [torch.autograd.grad((weights * rows).sum() / 7, (hidden, weight)) for rows in (found, expected)]
        assert_same(*gradients, rtol=1e-4, atol=1e-6)


class TestIgnoredRows:
    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    @pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss", "z_loss"])
    def test_nothing_leaks_from_a_row_that_does_not_count(self, loss, poison, known):
        hidden, weight, bias, targets, upstream = layer()
        targets[4:7] = -100
        clean = plain(loss, hidden, weight, targets, bias)
        expected = torch.autograd.grad(clean, (hidden, weight, bias), upstream)
        poisoned = hidden.detach().clone()
        poisoned[4:7] = poison
        poisoned.requires_grad_()
        weights = upstream if known else None
        found = linear_loss(loss, poisoned, weight, targets, bias=bias, chunk_size=3, row_weights=weights)
        gradients = torch.autograd.grad(found, (poisoned, weight, bias), upstream)
        assert_same(found, clean)
        assert_same(gradients, expected)
        assert (found[4:7] == 0).all()
        assert (gradients[0][4:7] == 0).all()
        assert_same(
            torch.func.grad(
                lambda h, w, b: (linear_loss(loss, h, w, targets, bias=b, chunk_size=3) * upstream).sum(),
                (0, 1, 2),
            )(poisoned.detach(), weight.detach(), bias.detach()),
            expected,
        )

    def test_nothing_leaks_into_second_derivatives(self):
        hidden, weight, _, targets, _ = layer()
        targets[4:7] = -100

        def second(hidden):
            gradient = torch.autograd.grad(
                linear_loss("cross_entropy", hidden, weight, targets).sum(), weight, create_graph=True
            )[0]
            return torch.autograd.grad(gradient.square().sum(), (hidden, weight))

        poisoned = hidden.detach().clone()
        poisoned[4:7] = torch.nan
        assert_same(second(poisoned.requires_grad_()), second(hidden))

    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss", "z_loss"])
    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_empty_and_wholly_ignored_batches_give_zeros(self, rows, loss, known):
        hidden, weight, bias, targets, upstream = layer(rows)
        targets.fill_(-100)
        found = linear_loss(loss, hidden, weight, targets, bias=bias, row_weights=upstream if known else None)
        assert found.shape == (rows,)
        assert (found == 0).all()
        for gradient in torch.autograd.grad((found * upstream).sum(), (hidden, weight, bias)):
            assert (gradient == 0).all()

    def test_a_loss_without_ignore_index_sees_every_row(self):
        hidden, weight, _, targets, _ = layer()
        targets[0] = -100

        def counts(logits, targets):
            return (targets == -100).to(logits.dtype) + 0 * logits.sum(-1)

        assert linear_loss(counts, hidden, weight, targets).sum() == 1


@pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
def test_half_precision_is_at_least_as_near_to_the_truth_as_the_plain_computation(dtype, known, loss):
    hidden, weight, bias, targets, upstream = layer(257, 33, 101, dtype=dtype)
    upstream = upstream.float().abs()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth_rows = plain(loss, *wide[:2], targets, wide[2])
    truth = (truth_rows, *torch.autograd.grad(truth_rows, wide, upstream.double()))
    dense_rows = plain(loss, hidden, weight, targets, bias)
    dense = (dense_rows, *torch.autograd.grad(dense_rows, (hidden, weight, bias), upstream))
    rows = linear_loss(loss, hidden, weight, targets, bias=bias, chunk_size=50, row_weights=upstream if known else None)
    found = (rows, *torch.autograd.grad(rows, (hidden, weight, bias), upstream))
    assert rows.dtype == torch.float32
    for ours, theirs, true in zip(found, dense, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - true).norm() <= (theirs.double() - true).norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_mixed_dtypes_and_is_no_worse_than_the_plain_computation(hidden_dtype):
    hidden, weight, bias, targets, upstream = layer(64, 33, 101, dtype=torch.float32)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    inputs = (hidden, weight, bias)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth_rows = plain("cross_entropy", *wide[:2], targets, wide[2])
    truth = (truth_rows, *torch.autograd.grad(truth_rows, wide, upstream.double()))
    with torch.autocast("cpu", torch.bfloat16):
        dense_rows = plain("cross_entropy", hidden, weight, targets, bias)
        rows = linear_loss("cross_entropy", hidden, weight, targets, bias=bias)
    dense = (dense_rows, *torch.autograd.grad(dense_rows, inputs, upstream))
    found = (rows, *torch.autograd.grad(rows, inputs, upstream))
    for ours, theirs, true in zip(found, dense, truth, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - true).norm() <= (theirs.double() - true).norm()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss"])
def test_float32_with_many_classes_stays_near_float64(loss, with_bias):
    hidden, weight, bias, targets, upstream = layer(300, 16, 5003, dtype=torch.float32)
    inputs = [hidden, weight, bias][: 2 + with_bias]
    rows = linear_loss(loss, hidden, weight, targets, bias=bias if with_bias else None, chunk_size=97)
    found = (rows, *torch.autograd.grad(rows, inputs, upstream))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth_rows = plain(loss, wide[0], wide[1], targets, *wide[2:])
    truth = (truth_rows, *torch.autograd.grad(truth_rows, wide, upstream.double()))
    for ours, true in zip(found, truth, strict=True):
        assert_same(ours.double(), true, rtol=1e-4, atol=2e-5)


class TestInputs:
    def test_tied_embeddings_get_both_gradients(self):
        _, weight, _, targets, _ = layer()
        tokens = torch.arange(13) % 7
        for known in (None, torch.full((13,), 1 / 13, dtype=torch.float64)):
            streamed, dense = (
                torch.autograd.grad(rows.mean(), weight)
                for rows in (
                    linear_loss("cross_entropy", F.embedding(tokens, weight), weight, targets, row_weights=known),
                    plain("cross_entropy", F.embedding(tokens, weight), weight, targets),
                )
            )
            assert_same(streamed, dense)

    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2), (1, 2), ()])
    def test_only_what_requires_a_gradient_gets_one(self, needing, known):
        hidden, weight, bias, targets, upstream = layer()
        inputs = [x.detach().requires_grad_(i in needing) for i, x in enumerate((hidden, weight, bias))]
        weights = upstream if known else None
        found = linear_loss("cross_entropy", *inputs[:2], targets, bias=inputs[2], row_weights=weights, chunk_size=5)
        assert found.requires_grad == bool(needing)
        if needing:
            wanted = [inputs[i] for i in needing]
            expected = plain("cross_entropy", *inputs[:2], targets, inputs[2])
            assert_same(torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream))

    def test_batches_of_any_shape_and_memory_layout(self):
        hidden, weight, _, targets, upstream = layer(24)
        hidden = hidden.reshape(2, 3, 4, 5).permute(2, 0, 1, 3)
        weight_t = weight.detach().t().contiguous().t().requires_grad_()
        targets = targets.reshape(2, 3, 4).permute(2, 0, 1)
        upstream = upstream.reshape(4, 2, 3)
        found = linear_loss("cross_entropy", hidden, weight_t, targets, chunk_size=7, row_weights=upstream)
        expected = plain("cross_entropy", hidden, weight_t, targets)
        assert_same(found, expected)
        assert_same(*[torch.autograd.grad((r * upstream).sum(), weight_t) for r in (found, expected)])
        one = linear_loss("cross_entropy", hidden[0, 0, 0], weight, targets[0, 0, 0])
        assert_same(one, expected[0, 0, 0])

    def test_an_expanded_upstream_gradient_and_a_sliced_weight(self):
        hidden, weight, _, targets, _ = layer()
        part = weight[::2, 1:4]
        results = [
            torch.autograd.grad(rows.sum(), (hidden, weight))
            for rows in (
                linear_loss("cross_entropy", hidden[:, 1:4], part, targets % 4),
                plain("cross_entropy", hidden[:, 1:4], part, targets % 4),
            )
        ]
        assert_same(*results)

    def test_soft_targets_and_a_loss_of_the_users_own(self):
        hidden, weight, bias, _, upstream = layer()
        soft = torch.rand(13, 7, dtype=torch.float64).softmax(-1)

        def kl(logits, targets, temperature=1.0):
            return F.kl_div((logits / temperature).log_softmax(-1), targets, reduction="none").sum(-1)

        found = linear_loss(kl, hidden, weight, soft, bias=bias, chunk_size=4, temperature=2.0)
        expected = kl(F.linear(hidden, weight, bias), soft, 2.0)
        inputs = (hidden, weight, bias)
        assert_same(found, expected)
        assert_same(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_class_indices_of_any_integer_dtype(self, dtype):
        hidden, weight, _, targets, _ = layer()
        found = linear_loss("cross_entropy", hidden, weight, targets.to(dtype), ignore_index=200)
        assert_same(found, plain("cross_entropy", hidden, weight, targets))

    def test_a_partial_function_is_the_function_with_options(self):
        hidden, weight, _, targets, _ = layer()
        loss = functools.partial(losses.cross_entropy, label_smoothing=0.2, ignore_index=3)
        assert_same(linear_loss(loss, hidden, weight, targets), loss(F.linear(hidden, weight), targets))

    def test_no_grad_and_inference_mode(self):
        hidden, weight, _, targets, upstream = layer()
        expected = plain("cross_entropy", hidden, weight, targets).detach()
        with torch.no_grad():
            assert_same(linear_loss("cross_entropy", hidden, weight, targets, row_weights=upstream), expected)
        with torch.inference_mode():
            assert_same(linear_loss("cross_entropy", hidden, weight, targets, chunk_size=3), expected)

    def test_chunks_are_chosen_to_bound_the_logits(self):
        sizes = []

        def spy(logits, targets):
            sizes.append(tuple(logits.shape))
            return logits.sum(-1)

        hidden, weight = torch.zeros(1000, 2), torch.zeros(2**17, 2)
        linear_loss(spy, hidden, weight, torch.zeros(1000))
        assert sum(rows for rows, _ in sizes) == 1000
        assert max(rows for rows, _ in sizes) * 2**17 * 4 <= 16 * 2**20
        sizes.clear()
        linear_loss(spy, hidden, weight[:100], torch.zeros(1000))
        assert sizes == [(1000, 100)]


class TestErrors:
    def call(self, loss="cross_entropy", **changes):
        hidden, weight, bias, targets, upstream = layer()
        inputs = {
            "hidden": hidden,
            "weight": weight,
            "targets": targets,
            "bias": bias,
            "row_weights": upstream,
        }
        return linear_loss(loss, **(inputs | changes))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"loss": "cross_entrop"}, InputError, "did you mean 'cross_entropy'"),
            ({"loss": 3}, TypeError, "loss must be a function"),
            ({"loss": lambda o, t: o.sum()}, ValueError, "one value per row"),
            ({"loss": lambda o, t: o}, ValueError, "one value per row"),
            ({"loss": lambda o, t: 1.0}, ValueError, "one value per row"),
            ({"targets": torch.full((13,), 7)}, ValueError, r"targets must be class indices in \[0, 7\)"),
            ({"targets": torch.full((13,), -1)}, ValueError, "got -1"),
            ({"targets": torch.zeros(12, dtype=torch.long)}, ValueError, "targets must begin with"),
            ({"targets": torch.zeros(13)}, TypeError, "targets must be integer"),
            ({"targets": torch.rand(13, 7).requires_grad_()}, ValueError, "targets require a gradient"),
            ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, ValueError, "features=5"),
            ({"weight": torch.zeros(0, 5, dtype=torch.float64)}, ValueError, "at least one class"),
            ({"weight": torch.zeros(7, 5)}, TypeError, "weight must have the dtype of hidden"),
            ({"hidden": torch.zeros(13, 5, dtype=torch.long)}, TypeError, "hidden must be floating"),
            ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must have shape"),
            ({"bias": torch.zeros(5)}, ValueError, "bias must have shape"),
            ({"row_weights": torch.zeros(13, 1)}, ValueError, "row_weights must have the batch shape"),
            ({"chunk_size": 0}, ValueError, "chunk_size must be a whole number >= 1"),
            ({"chunk_size": 2.5}, ValueError, "chunk_size"),
            ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
            ({"label_smoothin": 0.5}, TypeError, "label_smoothin"),
            (
                {"loss": "focal_loss", "gamma": torch.tensor(1.0, requires_grad=True)},
                ValueError,
                "option gamma",
            ),
        ],
    )
    def test_a_mistake_is_named(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)


class _LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss"])
@pytest.mark.parametrize("known", [False, True])
def test_no_operation_ever_makes_more_logits_than_a_chunk(loss, known):
    hidden, weight, _, targets, upstream = layer(200, 3, 400, dtype=torch.float32)
    with _LargestTensor() as largest:
        rows = linear_loss(loss, hidden, weight, targets, chunk_size=10, row_weights=upstream if known else None)
        (gradient,) = torch.autograd.grad(rows, hidden, upstream, create_graph=True)
        gradient.square().sum().backward()
        torch.func.jvp(
            torch.func.grad(lambda w: linear_loss(loss, hidden.detach(), w, targets, chunk_size=10).sum()),
            (weight.detach(),),
            (weight.detach(),),
        )
    assert largest.numel == 10 * 400


MEMORY_PROGRAM = """
import sys, torch
from pathlib import Path
from lossmith.heads import linear_loss
torch.set_num_threads(1)
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
def run(rows, classes):
    hidden, weight = torch.randn(rows, 8).requires_grad_(), torch.randn(classes, 8).requires_grad_()
    targets = torch.randint(classes, (rows,))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    linear_loss("cross_entropy", hidden, weight, targets, chunk_size=32).sum().backward()
    return status("VmHWM") - before
run(8, 16)
print(run(2048, 8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark from /proc")
def test_the_process_never_grows_by_a_tenth_of_the_logits():
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2048 * 8192 * 4 / 1024 / 10  # KiB
