"""``lossmith prune``: fewer weights, and how many go for free."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lossmith.cli import app, checks, prune_ending
from lossmith.cli.sentences import say
from lossmith.errors import InputError

# How a method is called in lossmith.sparsity. ``nm`` takes its pattern from --pattern.
METHODS = {"magnitude": "magnitude", "uniform": "uniform", "nm": None, "random": "random", "erk": "erk"}
# Those that look at text; they are given with options, such as d-pruner(reg_ratio=10).
CALIBRATED = ("d-pruner", "sparsegpt", "wanda")
# The loss of fewer tokens says more of the words than of the weights.
_LEAST_TOKENS = 32


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Folder of a model (with --sweep also a hub id).")],
    method: Annotated[
        str,
        typer.Option(
            help="magnitude, uniform, nm; with --calibration wanda, sparsegpt or d-pruner, as in "
            "d-pruner(reg_ratio=10); with --sweep also random, erk."
        ),
    ] = "magnitude",
    sparsity: Annotated[float, typer.Option(help="Share of the prunable weights to remove, in [0, 1).")] = 0.5,
    pattern: Annotated[
        str | None,
        typer.Option(help="N of every M inputs stay, whatever --sparsity says; nm: 2:4.", show_default=False),
    ] = None,
    targets: Annotated[str, typer.Option(help="blocks: layers in repeated blocks; all: also the head.")] = "blocks",
    out: Annotated[
        Path | None, typer.Option(help="New folder of the pruned model; with --sweep a JSON file.", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text that the model is for: a file, a folder, a hub id; a tenth is only scored.", show_default=False
        ),
    ] = None,
    general: Annotated[
        str | None,
        typer.Option(help="Open-domain text: needed by d-pruner, for others only scored.", show_default=False),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Of --calibration and --general: column that holds the text.")
    ] = "text",
    samples: Annotated[
        int, typer.Option(help="Rows of text whose layers' inputs are looked at.", callback=checks.at_least(1))
    ] = 128,
    length: Annotated[
        int,
        typer.Option(
            help="Tokens of such a row, at most what the model reads; of a domain text at most 1024.",
            callback=checks.at_least(2),
        ),
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Which rows.", callback=checks.seed)] = 0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure the loss at every sparsity of --grid.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--eval", help="Text to measure the loss on: text, JSONL, a folder; without --sweep: Python's own."
        ),
    ] = None,
    grid: Annotated[str, typer.Option(help="Of --sweep: from:to:step, or a list.")] = "0:0.9:0.1",
    tolerance: Annotated[float, typer.Option(help="Of --sweep: rise of the perplexity that is allowed.")] = 0.01,
    texts: Annotated[
        int | None, typer.Option(min=1, help="Of --eval: how many texts; default 200 with --sweep, else 32.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Of --eval: tokens of a text; default 512 with --sweep, else 128.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Write the model without its zeros.")] = False,
    expand: Annotated[
        bool, typer.Option("--expand", help="Make a plain model of one that --compact wrote; nothing is pruned.")
    ] = False,
    measure: Annotated[
        bool, typer.Option(help="Measure size, memory, time and loss beside the dense model at the end.")
    ] = True,
    blockwise: Annotated[
        bool,
        typer.Option(
            "--blockwise",
            help="With --calibration: one block of the model in memory at a time; its folder may be larger.",
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Of --sweep: a .png, .svg or .pdf.", show_default=False)] = None,
) -> None:
    """Remove the weights that matter least, in one step; or measure how many go for free.

    **Examples**

    `lossmith prune my_model/ --sparsity 0.5 --out pruned/`

    `lossmith prune my_model/ --method nm --pattern 2:4 --out pruned/`

    `lossmith prune my_model/ --method d-pruner --calibration domain.jsonl --general general.jsonl --out pruned/`

    `lossmith prune my_model/ --sparsity 0.5 --compact --out small/`

    `lossmith prune my_model/ --sweep --eval val.jsonl --plot curve.png`
    """
    if expand:
        prune_ending.expand(model, out)
        return
    method, options = _method(method)
    if targets not in ("blocks", "all"):
        raise InputError(f"--targets must be blocks or all, got '{targets}'")
    if not 0 <= sparsity < 1:
        raise InputError(f"--sparsity must lie in [0, 1), got {sparsity}")
    if blockwise and (method not in CALIBRATED or (general is not None and method != "d-pruner")):
        raise InputError(f"--blockwise goes with --method {' or '.join(CALIBRATED)}; with --general d-pruner alone")
    if method in CALIBRATED or (calibration is not None and not sweep):
        if sweep or data is not None or plot is not None:
            raise InputError(f"--sweep, --eval and --plot do not go with --method {method} and --calibration")
        _calibrated(
            model, out, sparsity, method, calibration, general, text_field=text_field, samples=samples, length=length,
            max_length=max_length or min(1024, length), pattern=pattern or ("2:4" if method == "nm" else None),
            targets=targets, seed=seed, blockwise=blockwise, **options,
        )  # fmt: skip
        assert out is not None
        # Its losses are those of held-out text, above.
        prune_ending.finish(model, out, compact=compact, measure=measure, texts=0, max_length=max_length)
        return
    if calibration is not None or general is not None:
        name = "--calibration" if calibration is not None else "--general"
        raise InputError(f"{name} goes with --calibration and without --sweep")
    chosen = METHODS[method] or pattern or "2:4"
    try:
        if sweep:
            if compact:
                raise InputError("--compact goes without --sweep, which writes no model")
            longest = 512 if max_length is None else max_length
            _sweep(model, method, chosen, targets, data, _grid(grid), tolerance, texts or 200, longest, out, plot)
            return
        if plot is not None:
            raise InputError("--plot belongs to --sweep")
        prune_ending.check_text(data)
        if out is None:
            raise InputError("--out FOLDER says where the pruned model goes")
        from lossmith.sparsity import prune_checkpoint

        report = prune_checkpoint(model, out, sparsity, method=chosen, targets=targets)  # type: ignore[arg-type]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    say(report.summary())
    prune_ending.finish(model, out, compact=compact, measure=measure, data=data, texts=texts, max_length=max_length)


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """The name of a method, and its options where it has some in brackets."""
    from lossmith.errors import did_you_mean
    from lossmith.registry import parse_spec

    name, bracket, rest = text.partition("(")
    name = name.strip().replace("_", "-")
    if name not in METHODS and name not in CALIBRATED:
        raise InputError(f"unknown method '{name}': {did_you_mean(name, [*METHODS, *CALIBRATED])}")
    if not bracket:
        return name, {}
    # A dash is a minus in a name with options.
    spec = parse_spec(f"{name.replace('-', '_')}({rest}")
    if spec.arguments or (spec.options and name not in CALIBRATED):
        raise InputError(f"method '{name}' takes no value '{text}'; options are written {CALIBRATED[0]}(reg_ratio=10)")
    return name, dict(spec.options)


def _calibrated(
    model: str,
    out: Path | None,
    sparsity: float,
    method: str,
    calibration: str | None,
    general: str | None,
    *,
    blockwise: bool,
    **options: Any,
) -> None:
    from lossmith.sparsity.one_shot_text import prune_language_model, prune_language_model_blockwise

    if out is None:
        raise InputError("--out FOLDER says where the pruned model goes")
    if calibration is None:
        raise InputError(f"--method {method} needs --calibration: text that the model is for")
    if method == "d-pruner" and general is None:
        raise InputError("--method d-pruner needs --general: open-domain text")
    started = last = time.monotonic()

    def progress(done: int, steps: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > 30:
            last = now
            say(f"domain: step {done} of {steps}, about {(now - started) / done * (steps - done):.0f} s left", err=True)

    try:
        if blockwise:
            if method == "d-pruner":
                options |= {"general": general, "progress": progress}
            else:
                options.pop("max_length")
            report = prune_language_model_blockwise(
                model, out, sparsity, method=method, calibration=calibration, **options
            )
            say(report.summary())
            say("perplexity not measured: the model is never in memory as a whole")
            return
        found = prune_language_model(
            model, out, sparsity, method=method, calibration=calibration, general=general, progress=progress, **options
        )
    except InputError:
        raise
    except (ValueError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "LinAlgError":
            raise
        raise InputError(str(error)) from None
    say(found.report.summary())
    if found.cut:
        say(f"{found.cut} domain texts are longer than the model or D-Pruner's limit reads; their ends were left out")
    for quality in found.quality:
        say(quality.summary())


def _sweep(
    model: str,
    method: str,
    chosen: str,
    targets: Any,
    data: str | None,
    grid: tuple[float, ...],
    tolerance: float,
    texts: int,
    max_length: int,
    out: Path | None,
    plot: Path | None,
) -> None:
    from lossmith.files import write_json
    from lossmith.sparsity import essential_sparsity, load_causal_model, text_evaluation

    if data is None:
        raise InputError("--sweep needs --eval: text to measure the loss on")
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise InputError(f"--tolerance must be at least 0, got {tolerance}")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot} must end in .png, .svg or .pdf")
    if out is not None and out.is_dir():
        raise InputError(f"with --sweep --out is a JSON file, but {out} is a folder")
    loaded, tokenizer = load_causal_model(model)
    limit = min(max_length, getattr(loaded.config, "max_position_embeddings", None) or max_length)
    evaluate = text_evaluation(data, tokenizer, texts=texts, max_length=limit)
    if evaluate.tokens < _LEAST_TOKENS:
        raise InputError(
            f"--eval {data} has {evaluate.tokens} tokens to predict; at least {_LEAST_TOKENS} are needed to tell what "
            "goes for free"
        )
    curve = essential_sparsity(
        loaded,
        evaluate,
        grid=grid,
        method="magnitude" if method == "nm" else chosen,
        patterns=(chosen,) if method == "nm" else (),
        targets=targets,
        # The perplexity rises by the tolerance where the loss rises by its logarithm.
        tolerance=math.log1p(tolerance),
        absolute=True,
        lower_is_better=True,
    )
    say(f"{method}, {len(evaluate.rows)} texts, {evaluate.tokens:,} tokens; score: minus the loss in nats")
    say(curve.summary())
    say(f"allowed: perplexity up by {tolerance:.2%}")
    if out is not None:
        write_json(out, {"model": model, "eval": data, **json.loads(json.dumps(curve.to_dict()))})
        say(f"curve: {out}")
    if plot is not None:
        curve.plot(plot)
        say(f"plot: {plot}")


def _grid(text: str) -> tuple[float, ...]:
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not step > 0:
                raise ValueError
            found = tuple(round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1))
        else:
            found = tuple(float(part) for part in text.strip("[] ").split(","))
    except (ValueError, OverflowError):
        raise InputError(f"--grid {text} is not from:to:step or numbers with commas") from None
    if len(found) < 2:
        raise InputError(f"--grid {text} has fewer than 2 sparsities")
    return found
