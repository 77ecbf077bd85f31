"""Every method on models and data that are unusual, and on those that cannot be meant."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from small_models import SHAPE, small_gpt2_model, small_llama
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity import calibration_rows, convert_to_lost, next_token_loss, prune, release_masks, text_batches

METHODS = ("magnitude", "uniform", "random", "erk", "nm", "wanda", "sparsegpt", "d-pruner")
CALIBRATED = ("wanda", "sparsegpt", "d-pruner")


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=3, num_key_value_heads=2, **SHAPE)
    return MixtralForCausalLM(config)


def _tokens(batches: int = 3, rows: int = 2, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(50, (rows, length), generator=generator)} for _ in range(batches)]


def _arguments(method: str, data: Any = None, **options: Any) -> dict[str, Any]:
    data = _tokens() if data is None else data
    found: dict[str, Any] = {"method": method}
    if method == "nm":
        found["pattern"] = "2:4"
    if method in CALIBRATED:
        found["calibration"] = data
    if method == "d-pruner":
        found |= {"general": data, "epochs": 1}
    return found | options


def _masks_hold(model: nn.Module, masks: dict[str, torch.Tensor]) -> bool:
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [small_llama, small_gpt2_model])
@pytest.mark.parametrize("method", METHODS)
def test_every_type_of_number_and_conv1d(method: str, build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    found = prune(model, 0.5, **_arguments(method))
    # By chance ``erk`` keeps a few more or fewer.
    assert found.report.sparsity == pytest.approx(0.5, abs=0.02 if method == "erk" else 1e-3)
    assert _masks_hold(model, found.masks)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_do_not_lie_in_a_row(method: str) -> None:
    plain, strided = small_llama(), small_llama()
    for layer in strided.model.layers:
        for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
            rows, columns = linear.weight.shape
            wide = torch.zeros(columns, 2 * rows)
            wide[:, ::2] = linear.weight.detach().T
            linear.weight = nn.Parameter(wide[:, ::2].T)
            assert not linear.weight.is_contiguous()
    first, second = prune(plain, 0.4, **_arguments(method)), prune(strided, 0.4, **_arguments(method))
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())
    for name, weight in plain.state_dict().items():
        # A product of strided matrices may add in another order.
        assert torch.allclose(weight, strided.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("method", [m for m in METHODS if m != "nm"])
def test_no_sparsity_changes_no_bit(method: str) -> None:
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    found = prune(model, 0.0, **_arguments(method))
    assert found.report.sparsity == 0
    assert all(bool(mask.all()) for mask in found.masks.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_zero_already(method: str) -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero already")
        found = prune(model, 0.5, **_arguments(method))
    assert _masks_hold(model, found.masks)
    rows = {name: (zeros, number) for name, zeros, number in found.report.layers}
    assert rows["model.layers.0.mlp.up_proj.weight"] == (384, 384)
    # The matrix behind it reads only zeros: it is pruned all the same, and says so.
    assert rows["model.layers.0.mlp.down_proj.weight"][0] >= 0.4 * 384 or method in ("magnitude", "erk")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("method", CALIBRATED)
def test_one_example_is_enough_for_all_but_a_domain(method: str, rows: int) -> None:
    model = small_llama()
    data = _tokens(batches=1, rows=rows)
    if method == "d-pruner" and rows == 1:
        with pytest.raises(InputError, match="at least 2 texts, got 1"):
            prune(model, 0.5, **_arguments(method, data))
        # One of general text is.
        data = _tokens(batches=1, rows=2)
        found = prune(model, 0.5, **_arguments(method, data, general=_tokens(batches=1, rows=1)))
    else:
        found = prune(model, 0.5, **_arguments(method, data))
    assert found.report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert _masks_hold(model, found.masks)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_tied_embedding_is_left_alone(method: str, hold: bool) -> None:
    model = small_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    found = prune(model, 0.5, targets="all", hold=hold, **_arguments(method))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)
    assert not any("lm_head" in name or "embed" in name for name in found.masks)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_of_two_layers_is_pruned_once_for_both(method: str) -> None:
    model = small_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    found = prune(model, 0.5, hold=True, **_arguments(method))
    assert "model.layers.1.mlp.up_proj.weight" not in found.masks
    mask = found.masks["model.layers.0.mlp.up_proj.weight"]
    assert found.report.parameters == sum(p.numel() for p in model.parameters())
    # Held in both: a step of training moves neither.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = _tokens()[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    model(**batch)
    release_masks(model)
    for layer in (first, second):
        assert bool((layer.weight[~mask] == 0).all())


class _Experts(nn.Module):
    """A block of two experts, of which the second is asked for inputs with a positive first feature only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[:, 0] > 0
        for experts in self.blocks:
            y = torch.zeros_like(x)
            for number, expert in enumerate(experts):
                here = chosen if number else ~chosen
                if bool(here.any()):
                    y[here] = expert(x[here])
            x = x + y.tanh()
        return self.head(x)


def _square(model: nn.Module, x: Any) -> torch.Tensor:
    found: torch.Tensor = model(x).square().mean()
    return found


@pytest.mark.parametrize("method", CALIBRATED)
def test_experts_without_a_token_are_named(method: str) -> None:
    torch.manual_seed(0)
    net, x = _Experts(), torch.randn(40, 8)
    both, one = [x[:20], x[20:]], [x[x[:, 0] < 0]]
    before = copy.deepcopy(net.state_dict())
    options = {"loss": _square} if method == "d-pruner" else {}
    with pytest.raises(InputError, match=r"blocks\.0\.1\.weight is not reached by the calibration data; exclude it"):
        prune(net, 0.5, **_arguments(method, one), **options)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    # As the sentence says.
    found = prune(copy.deepcopy(net), 0.5, exclude=("blocks.0.1", "blocks.1.1"), **_arguments(method, one), **options)
    assert set(found.masks) == {"blocks.0.0.weight", "blocks.1.0.weight"}
    # One batch that reaches it is enough.
    found = prune(net, 0.5, **_arguments(method, [*one, *both]), **options)
    assert len(found.masks) == 4
    assert found.report.sparsity == 0.5


def test_experts_that_the_domain_never_asks_are_pruned_by_their_general_importance() -> None:
    torch.manual_seed(0)
    net, x = _Experts(), torch.randn(40, 8)
    domain, general = [x[x[:, 0] < 0]], [x]
    by_sparsegpt = prune(copy.deepcopy(net), 0.5, method="sparsegpt", calibration=general).masks
    with pytest.warns(UserWarning, match=r"blocks\.\d\.1\.weight has no gradient on the domain"):
        found = prune(net, 0.5, method="d-pruner", calibration=domain, general=general, loss=_square, epochs=1).masks
    # Its first block of columns is all of it, so that SparseGPT's importance is the whole of its choice.
    assert torch.equal(found["blocks.0.1.weight"], by_sparsegpt["blocks.0.1.weight"])
    assert not torch.equal(found["blocks.0.0.weight"], by_sparsegpt["blocks.0.0.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_experts_in_one_parameter_are_left_alone_and_named(method: str) -> None:
    model = _mixtral()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj and 3 more hold many matrices .* 6\d% of all param"):
        found = prune(model, 0.5, **_arguments(method))
    assert set(found.masks) == {name for name in before if "_proj.weight" in name}
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items() if name not in found.masks)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_sparsity_out_of_range(method: str, sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        prune(small_llama(), sparsity, **_arguments(method))


@pytest.mark.parametrize("sparsity", ["0.5", None, True])
def test_a_sparsity_that_is_no_number(sparsity: Any) -> None:
    with pytest.raises(TypeError, match="sparsity must be a number"):
        prune(small_llama(), sparsity)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("4:2", "1 <= N < M"),
        ("4:4", "1 <= N < M"),
        ("0:4", "1 <= N < M"),
        ("2", "1 <= N < M"),
        ("2:5", r"model\.layers\.0\.self_attn\.q_proj\.weight has 16 inputs, not a multiple of 5, which 2:5 needs"),
        ("1:16", r"model\.layers\.0\.mlp\.down_proj\.weight has 24 inputs, not a multiple of 16"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "nm", *CALIBRATED])
def test_patterns_that_do_not_fit(method: str, pattern: str, sentence: str) -> None:
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        prune(model, 0.5, **_arguments(method, pattern=pattern))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_models_without_a_linear_layer(method: str) -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    for targets in ("blocks", "all"):
        with pytest.raises(InputError, match="Sequential has no linear layer to prune"):
            prune(net, 0.5, targets=targets, **_arguments(method, [torch.zeros(2, 3, dtype=torch.long)]))


def test_a_rank_larger_than_the_layer() -> None:
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"rank.*16"):
        convert_to_lost(model, rank=17)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from lossmith.data import train_tokenizer

    return train_tokenizer(["weights that matter to one domain " * 4], vocab_size=300)


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer that knows two words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2, "[END]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[END]", pad_token="[UNK]")


@pytest.mark.parametrize("make", [calibration_rows, text_batches])
@pytest.mark.parametrize("texts", [[], [""], [" \n\t"], ["maybe", "maybe not"], ["perhaps", ""]])
def test_texts_without_a_known_token_are_refused(make: Any, texts: list[str], words: Any) -> None:
    with pytest.raises(InputError, match="no usable tokens: give at least one text that is not blank"):
        make(texts, words)


def test_short_and_monotonous_texts_are_usable(words: Any) -> None:
    # Shorter than a row: joined to one that is as long as they are together.
    (rows,) = calibration_rows(["yes", "maybe", "no"], words, length=64)
    assert rows["input_ids"].tolist() == [[3, 1, 3, 3, 2, 3]]
    (rows,) = calibration_rows(["no no no no no no"], words, length=2, samples=9)
    assert sorted(rows["input_ids"].tolist()) == [[2, 2], [2, 2], [2, 3], [3, 2]]
    assert text_batches(["yes", "maybe", "no"], words)[0]["input_ids"].tolist() == [[3, 1, 3], [3, 2, 3]]


def test_a_tokenizer_without_an_end_is_refused(words: Any) -> None:
    endless = copy.deepcopy(words)
    endless.eos_token = None
    for make in (calibration_rows, text_batches):
        with pytest.raises(InputError, match="the tokenizer has no end token"):
            make(["yes"], endless)


@pytest.mark.parametrize("texts", [[], [""], [" \n\t"]])
@pytest.mark.parametrize("method", CALIBRATED)
def test_methods_refuse_texts_without_tokens(method: str, texts: list[str], tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"no usable tokens|calibration data is empty"):
        prune(small_llama(), 0.5, tokenizer=tokenizer, **_arguments(method, texts))


def test_batches_of_one_token_have_nothing_to_predict() -> None:
    with pytest.raises(InputError, match="no token to predict"):
        prune(small_llama(), 0.5, **_arguments("d-pruner", _tokens(length=1)))
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match="no token to predict"):
        next_token_loss(small_llama(), {"input_ids": ids, "labels": torch.full_like(ids, -100)})
