"""After a failure a model is what it was, and there is no folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.errors import InputError
from lossmith.sparsity import (
    activation_magnitude,
    apply_masks,
    d_pruner,
    d_pruner_domain,
    one_shot_masks,
    optimal_brain_surgeon,
    prune,
    prune_checkpoint,
)

RANKED = ("magnitude", "uniform", "nm", "wanda", "sparsegpt", "d-pruner")
CALIBRATED = ("wanda", "sparsegpt", "d-pruner", "d-pruner-finetuned")


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **shape, **options))


def _arguments(method: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(50, (2, 9), generator=generator)} for _ in range(3)]
    found: dict[str, Any] = {"method": method.removesuffix("-finetuned")}
    if method == "nm":
        found["pattern"] = "2:4"
    if method in CALIBRATED:
        found["calibration"] = batches
    if method.startswith("d-pruner"):
        found |= {"general": batches[::-1], "epochs": 1, "reg_ratio": 10.0, "learning_rate": 0.5}
    if method.endswith("-finetuned"):
        found["apply_to"] = "finetuned"
    return found


class _Watched:
    """Everything about a model that a failure might leave behind."""

    def __init__(self, model: Any) -> None:
        model.train()
        next(model.parameters()).requires_grad_(False)
        last = model.lm_head.weight
        last.grad = torch.ones_like(last)
        self.model = model
        self.before = {n: v.clone() for n, v in model.state_dict().items()}

    def is_as_it_was(self) -> bool:
        own = self.model.state_dict()
        assert own.keys() == self.before.keys()
        for name, value in self.before.items():
            # Bit for bit: NaN equals NaN, and -0.0 is not 0.0.
            assert torch.equal(own[name].view(torch.uint8), value.view(torch.uint8)), name
        assert self.model.training
        assert [p.requires_grad for p in self.model.parameters()] == [False, *[True] * (len(list(own)) - 1)]
        assert [n for n, p in self.model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in self.model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in self.model.parameters())
        return True


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("method", [*RANKED, "d-pruner-finetuned"])
def test_a_weight_without_a_rank_in_the_last_layer_changes_nothing(method: str, value: float) -> None:
    model = _llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    watched = _Watched(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has weights that are NaN or infinite"):
        prune(model, 0.5, **_arguments(method))
    assert watched.is_as_it_was()


@pytest.mark.parametrize("method", CALIBRATED)
def test_inputs_without_a_number_in_the_second_block_change_nothing(method: str) -> None:
    model = _llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.nan
    watched = _Watched(model)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj\.weight sees inputs that are NaN or infinite"):
        prune(model, 0.5, **_arguments(method))
    assert watched.is_as_it_was()


def _failing(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    left = [call]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise error
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")])
@pytest.mark.parametrize(
    ("method", "module", "name", "call"),
    [
        ("wanda", activation_magnitude, "_largest", 9),
        ("sparsegpt", optimal_brain_surgeon, "surgeon", 9),
        ("d-pruner", d_pruner, "surgeon", 9),
        ("d-pruner", d_pruner_domain, "taylor_term", 20),
        ("d-pruner-finetuned", d_pruner_domain, "taylor_term", 20),
    ],
)
def test_an_interrupt_in_the_middle_changes_nothing(
    method: str, module: Any, name: str, call: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _llama(tie_word_embeddings=False)
    watched = _Watched(model)
    monkeypatch.setattr(module, name, _failing(getattr(module, name), call, error))
    with pytest.raises(type(error)):
        prune(model, 0.5, **_arguments(method))
    assert watched.is_as_it_was()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"blocks": 1000}, "blocks must lie"), ({"of": "all", "sparsity": 0.99}, "cannot be removed")],
)
@pytest.mark.parametrize("method", ["d-pruner", "d-pruner-finetuned"])
def test_masks_that_cannot_be_made_change_nothing(method: str, change: dict[str, Any], sentence: str) -> None:
    model = _llama(tie_word_embeddings=False)
    watched = _Watched(model)
    with pytest.raises(ValueError, match=sentence):
        prune(model, **{"sparsity": 0.5, **_arguments(method), **change})
    assert watched.is_as_it_was()


def test_finetuned_weights_are_not_kept_when_the_masks_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmith.sparsity import one_shot

    model = _llama(tie_word_embeddings=False)
    watched = _Watched(model)
    monkeypatch.setattr(one_shot, "importance_masks", _failing(one_shot.importance_masks, 2, ValueError("no masks")))
    with pytest.raises(ValueError, match="no masks"):
        prune(model, 0.5, **_arguments("d-pruner-finetuned"))
    assert watched.is_as_it_was()


@pytest.mark.parametrize("hold", [False, True])
def test_one_mask_that_does_not_fit_changes_nothing(hold: bool) -> None:
    model = _llama(tie_word_embeddings=False)
    masks = one_shot_masks(model, 0.5)
    watched = _Watched(model)
    last = list(masks)[-1]
    for wrong, sentence in ((masks | {last: masks[last][:1]}, "has shape"), (masks | {"no": masks[last]}, "not have")):
        with pytest.raises(InputError, match=sentence):
            apply_masks(model, wrong, hold=hold)
        assert watched.is_as_it_was()


def test_half_precision_that_compensation_would_leave_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)).half()
    with torch.no_grad():
        net[0].weight.fill_(40000)
    # Inputs that are all the same: what stays has to do the work of all.
    inputs = torch.full((64, 4), 0.01, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"0\.weight would have to grow beyond float16"):
        prune(net, 0.5, method="sparsegpt", calibration=[inputs], targets="all", damping=1e-4)
    assert bool((net[0].weight == 40000).all())


@pytest.mark.parametrize("method", ["magnitude", "uniform", "2:4"])
def test_a_checkpoint_that_fails_leaves_no_folder(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmith.sparsity import magnitude_files

    model = _llama()
    model.save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
    with monkeypatch.context() as patch:
        # In the third pass, in which half of the matrices are written already.
        calls = 12 + (28 if method == "magnitude" else 0)
        patch.setattr(
            magnitude_files, "_magnitude", _failing(magnitude_files._magnitude, calls, OSError("disk is full"))
        )
        with pytest.raises(OSError, match="disk is full"):
            prune_checkpoint(tmp_path / "dense", tmp_path / "out", method=method)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match="NaN or infinite"):
        prune_checkpoint(tmp_path / "broken", tmp_path / "out", method=method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "dense"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()} == files
