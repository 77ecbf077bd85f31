"""The run record: nothing half-written is ever believed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmith.errors import InputError
from lossmith.files import replacing, write_json
from lossmith.training.checkpoint import load_state, random_state, save_state, set_random_state
from lossmith.training.record import RunRecord, differences, environment, locked, mark_complete


def test_a_half_written_last_line_is_dropped_and_rewind_forgets_later_steps(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {"seed": 1})
    for step in (1, 2, 3):
        record.append({"step": step, "train/loss": 1.0 / step, "bad": float("nan")})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "train/lo')
    assert [line["step"] for line in record.metrics()] == [1, 2, 3]
    assert record.metrics()[0]["bad"] is None
    record.rewind(2)
    record.append({"step": 3})
    assert [line["step"] for line in RunRecord(tmp_path).metrics()] == [1, 2, 3]


def test_a_checkpoint_counts_only_when_it_is_whole(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {})
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        mark_complete(folder)
    assert record.last_checkpoint() == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "checkpoint-12").mkdir()
    assert record.last_checkpoint() == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-10").exists()
    assert not (tmp_path / "checkpoint-12").exists()


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    RunRecord(tmp_path, {"seed": 1, "model": {"name": "tiny"}})
    RunRecord(tmp_path, {"seed": 1, "model": {"name": "tiny"}})
    with pytest.raises(InputError, match=r"model.name \('tiny' there, 'small' asked for\)"):
        RunRecord(tmp_path, {"seed": 1, "model": {"name": "small"}})
    assert differences({"a": 1}, {"b": 1}) == ["a (1 there, None asked for)", "b (None there, 1 asked for)"]


def test_state_survives_with_types_and_bits(tmp_path: Path) -> None:
    tied = torch.randn(3, dtype=torch.bfloat16)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 2).T},
            1: {"tied": tied, "again": tied},
        },
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "name": None, "flag": True, "params": [0, 1]}],
        "array": np.arange(4, dtype=np.uint32),
        "number": np.float64(0.1),
        "infinite": float("inf"),
    }
    save_state(state, tmp_path / "s.safetensors")
    loaded = load_state(tmp_path / "s.safetensors")
    assert torch.equal(loaded["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert loaded["state"][1]["tied"].dtype == torch.bfloat16
    assert loaded["groups"] == state["groups"]
    assert isinstance(loaded["groups"][0]["betas"], tuple)
    assert np.array_equal(loaded["array"], state["array"])
    assert (loaded["number"], loaded["infinite"]) == (0.1, float("inf"))
    with pytest.raises(TypeError, match=r"state.f is a function, which cannot be stored without pickle"):
        save_state({"f": lambda: 0}, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_random_state_continues_exactly(tmp_path: Path) -> None:
    save_state(random_state(), tmp_path / "r.safetensors")
    expected = (random.random(), np.random.rand(), torch.rand(3))
    torch.rand(10)
    set_random_state(load_state(tmp_path / "r.safetensors"))
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert expected[:2] == again[:2]
    assert torch.equal(expected[2], again[2])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def half() -> None:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        half()
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_locked_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(InputError, match="another lossmith process"),
        locked(tmp_path, wait_seconds=0.1),
    ):
        pass


def test_the_environment_names_versions_and_machine() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cores"] >= 1
    json.dumps(found)
