"""Pruning files against pruning in memory; what a damaged folder gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.errors import InputError
from lossmith.sparsity.essential_tickets import sparsification
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks
from lossmith.sparsity.magnitude_files import open_weights, prune_checkpoint


def _gpt2(path: Path, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50))
    model.to(options.pop("dtype", torch.float32)).save_pretrained(path, **options)
    return model


def _llama(path: Path, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **shape))
    model.to(options.pop("dtype", torch.float32)).save_pretrained(path, **options)
    return model


@pytest.mark.parametrize("method", ["magnitude", "uniform", "2:4"])
@pytest.mark.parametrize(
    ("targets", "dtype"), [("blocks", torch.float32), ("all", torch.bfloat16), ("blocks", torch.float16)]
)
@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_files_are_pruned_like_models_in_memory(
    build: Any, dtype: torch.dtype, targets: Any, method: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = build(tmp_path / "dense", dtype=dtype, max_shard_size="8KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.37, method=method, targets=targets)
    masks = one_shot_masks(model, 0.37, method=method, targets=targets)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    if dtype == torch.float32 or method != "magnitude":
        apply_masks(model, masks)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, pruned.state_dict()[name]), name
    # Ties of half precision are removed in the order of the files there, of the layers here.
    assert report.zeros >= sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.slow
def test_plain_transformers_gives_the_same_outputs_in_a_new_process(tmp_path: Path) -> None:
    model = _llama(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.5)
    apply_masks(model, one_shot_masks(model, 0.5))
    code = (
        "import sys, torch, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval();"
        "print(m(torch.arange(8)[None]).logits.double().sum().item()); assert 'lossmith' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pruned")], capture_output=True, text=True, check=True
    )
    expected = model.eval()(torch.arange(8)[None]).logits.double().sum().item()
    # Two processes add in the same order; printed digits are all.
    assert float(out.stdout) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_memory_stays_far_below_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8, vocab_size=64,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = tmp_path / "dense"
    config.save_pretrained(folder)
    shapes = {"self_attn.q_proj": (512, 512), "self_attn.k_proj": (512, 512), "self_attn.v_proj": (512, 512),
              "self_attn.o_proj": (512, 512), "mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512),
              "mlp.down_proj": (512, 2048)}  # fmt: skip
    tensors = {f"model.layers.{i}.{n}.weight": torch.randn(s) for i in range(24) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = (
        "import resource, sys, torch, transformers, lossmith.sparsity as s; from transformers import LlamaForCausalLM;"
        "s.prune_checkpoint; import numpy; s.open_weights(sys.argv[1]);"
        "r = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; b = r();"
        "s.prune_checkpoint(sys.argv[1], sys.argv[2], 0.5); print(r() - b)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    # Mapped pages of a file count as resident until the system wants them back: at most one matrix's at a time.
    assert int(out.stdout) * 1024 < (folder / "model.safetensors").stat().st_size / 2


def test_checkpoints_are_read_one_matrix_at_a_time(tmp_path: Path) -> None:
    _llama(tmp_path / "checkpoint-1", dtype=torch.bfloat16)
    prune_checkpoint(tmp_path / "checkpoint-1", tmp_path / "pruned", 0.8)
    found = sparsification(
        {"dense": open_weights(tmp_path / "checkpoint-1"), "sparse": open_weights(tmp_path / "pruned")}
    )
    # Zeros at 80 percent: the threshold that removes half is zero.
    assert found.threshold == 0
    assert found.shares == (0.0, pytest.approx(0.8, abs=1e-3))


def test_wrong_folders_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    with pytest.raises(InputError, match=r"no config\.json"):
        prune_checkpoint(tmp_path / "nowhere", out)
    _llama(dense, max_shard_size="8KB")
    shard = sorted(dense.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks {shard.name}"):
        prune_checkpoint(dense, out)
    shard.write_bytes(content[:-10])
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        prune_checkpoint(dense, out)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="not a multiple of 5"):
        prune_checkpoint(dense, out, method="2:5")
    with pytest.raises(InputError, match="comparisons in memory"):
        prune_checkpoint(dense, out, method="random")
    with pytest.raises(InputError, match="not an empty folder"):
        prune_checkpoint(dense, dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.2"):
        prune_checkpoint(dense, out)
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["Nothing"]}))
    with pytest.raises(InputError, match="describes no model"):
        prune_checkpoint(dense, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = _llama(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has weights that are NaN"):
        prune_checkpoint(tmp_path / "broken", tmp_path / "out", method="2:4")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
