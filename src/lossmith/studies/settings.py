"""The settings of a comparison: what decides the numbers, and what only decides how they are computed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lossmith.errors import InputError, did_you_mean
from lossmith.studies.arms import Arm, parse_arms, parse_count
from lossmith.training.language_model import check_training_options

DEFAULT_TOKENS = 250_000
# Of a comparison that only shows that everything runs.
SMOKE: dict[str, Any] = {
    "model": "nano",
    "tokens": 4096,
    "sequence_length": 64,
    "batch_size": 8,
    "eval_tokens": 2000,
    "evaluations": 1,
}

DEFAULT_ARMS = (
    "baseline",
    "linupper: weighting=linupper(r=0.4)",
    "quadratic: weighting=quadratic(r=0.4)",
    "log-partition: loss=cross_entropy(log_partition_penalty=1e-3)",
)


class CompareSettings(BaseModel):
    """What is compared. Two comparisons with equal settings give equal numbers.

    The field names are the keys of ``compare.yaml``, and with dashes the options of ``lossmith compare``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True)

    data: str = Field("python", description="a file, a folder, a hub id, or 'python': the standard library's own text")
    text_field: str = Field("text", description="column that holds the text")
    domain_field: str | None = Field(None, description="column that names the domain of a document")
    tokenizer: str | None = Field(
        None, description="folder or hub id; default: the model's, or byte-level BPE trained here"
    )
    vocab_size: int = Field(1024, ge=257, description="size of a tokenizer trained here")
    packing: str = Field("isolated", description="isolated, concatenated or none")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of documents held out")
    model: str = Field("tiny", description="preset (nano, tiny, small, base), folder or hub id")
    random_weights: bool = Field(False, description="start a folder's or hub model from random weights")
    model_overrides: dict[str, Any] = Field(
        default_factory=dict, description="changes to the configuration of a model with random weights"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field("float32", description="of the weights")
    attention: str = Field("sdpa", description="attention implementation of transformers")
    tokens: int | None = Field(None, ge=1, description="budget per run; default: 250k, less if the corpus is smaller")
    max_epochs: float = Field(1.0, gt=0, description="how often the corpus may be repeated")
    sequence_length: int = Field(64, ge=2, description="tokens per row; default: 64 for nano and tiny, else 256")
    batch_size: int = Field(16, ge=1, description="sequences per optimiser step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences at a time per process; the rest is accumulation"
    )
    layout: Literal["padded", "packed"] = Field("padded", description="packed: one long row without padding")
    chunk_size: int | None = Field(None, ge=1, description="rows of logits held at once")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes a GPU where there is one")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="a number of seeds, or a list of them")
    arms: tuple[Arm, ...] = Field(DEFAULT_ARMS)  # type: ignore[arg-type, assignment]
    baseline: str | None = Field(None, description="arm to compare with; default: 'baseline', else the first")
    eval_tokens: int | None = Field(50_000, ge=1, description="validation tokens used at most")
    evaluations: int = Field(5, ge=0, description="evaluations along a run")
    checkpoints: int = Field(4, ge=0, description="checkpoints along a run")
    keep_checkpoints: bool = Field(False, description="keep the weights of all of them, for lossmith probe")
    level: float = Field(0.95, gt=0.5, lt=1, description="confidence level of the intervals")
    training: dict[str, Any] = Field(default_factory=dict, description="transformers.TrainingArguments by name")

    @field_validator("tokens", "eval_tokens", "vocab_size", mode="before")
    @classmethod
    def _count(cls, value: Any, info: Any) -> Any:
        return None if value is None else parse_count(value, info.field_name)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return parse_seeds(value)

    @field_validator("arms", mode="before")
    @classmethod
    def _arms(cls, value: Any) -> Any:
        return parse_arms([value] if isinstance(value, str) else value)

    @field_validator("training")
    @classmethod
    def _training(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_training_options(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("sequence_length") is None:
            short = values.get("model", "tiny") in ("nano", "tiny")
            return {**values, "sequence_length": 64 if short else 256}
        return values

    def baseline_arm(self) -> str:
        """Name of the arm that the others are compared with."""
        names = [arm.name for arm in self.arms]
        if self.baseline is not None:
            if self.baseline not in names:
                raise InputError(f"--baseline '{self.baseline}' is not an arm: {did_you_mean(self.baseline, names)}")
            return self.baseline
        return "baseline" if "baseline" in names else names[0]

    def identity(self) -> dict[str, Any]:
        """The settings as JSON: what a folder of results is recognised by."""
        plain = self.model_dump(mode="json", exclude={"arms"})
        return {**plain, "arms": {arm.name: dict(arm.options) for arm in self.arms}}

    def default_folder(self) -> Path:
        """``runs/compare-<hash of the settings>``: the same command finds its own results again."""
        text = json.dumps(self.identity(), sort_keys=True)
        return Path("runs") / f"compare-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Execution:
    """How a comparison is computed: nothing here changes its numbers beyond rounding."""

    out: Path | None = None
    jobs: int | None = None
    threads: int | None = None
    backend: Literal["local", "ray"] = "local"
    cache: Path | None = None


def make_settings(values: Mapping[str, Any]) -> CompareSettings:
    """Settings from a mapping (a YAML file, command-line options).

    Raises:
        InputError: an unknown key (names the nearest) or a value out of range.
    """
    allowed = list(CompareSettings.model_fields)
    for key in values:
        if key not in allowed:
            raise InputError(f"unknown setting '{key}': {did_you_mean(key, allowed)}")
    try:
        settings = CompareSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise cause from None
        raise InputError(f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}") from None
    settings.baseline_arm()
    return settings


def parse_seeds(value: Any) -> tuple[int, ...]:
    """``3`` is seeds 0, 1, 2; a list, or text like ``7,8,9``, is those seeds themselves.

    >>> parse_seeds(3), parse_seeds("7,8")
    ((0, 1, 2), (7, 8))
    """
    if isinstance(value, str):
        parts = [p.strip() for p in value.split(",") if p.strip()]
        if not parts or not all(re.fullmatch(r"-?\d+", p) for p in parts):
            raise InputError(f"--seeds must be a number of seeds or a list such as 0,1,2, got {value!r}")
        value = [int(p) for p in parts] if "," in value else int(parts[0])
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise InputError(f"--seeds must be at least 1, got {value}")
        return tuple(range(value))
    if not isinstance(value, list | tuple) or not value or not all(isinstance(s, int) and s >= 0 for s in value):
        raise InputError(f"--seeds must be a number of seeds or a list of seeds >= 0, got {value!r}")
    if len(set(value)) != len(value):
        raise InputError(f"--seeds names a seed twice: {list(value)}")
    return tuple(value)
