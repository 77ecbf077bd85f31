"""``lossmith recommend``: train, use and judge a recommender from who used what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lossmith.cli import app, checks
from lossmith.cli.sentences import say

recommend = typer.Typer(
    help="Recommendations from implicit feedback (clicks, plays), part of which may be noise.", no_args_is_help=True
)
app.add_typer(recommend, name="recommend")

LAYOUT = typer.Option(help="pairs, counts, lists (user item item ...) or auto.")
USER = typer.Option(help="Name of the user's column.", show_default=False)
ITEM = typer.Option(help="Name of the item's column.", show_default=False)
COUNT = typer.Option(help="Name of the count's column.", show_default=False)
LEAST = typer.Option(help="Leave out interactions with a smaller count or rating.", show_default=False)
K = typer.Option(
    "--k", help="Recall and NDCG at these; several times [20, 50].", show_default=False, callback=checks.at_least(1)
)


@recommend.command()
def fit(
    train: Annotated[
        Path, typer.Argument(help="Table of `user item [count]`, .json, .parquet, or a folder with train.txt.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the trained recommender.")],
    test: Annotated[
        Path | None, typer.Option(help="Table to judge it on; default: test.txt of the folder.", show_default=False)
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of each user's items by which the best epoch is chosen; 0: the last epoch.")
    ] = 0.0,
    layout: Annotated[str, LAYOUT] = "auto",
    user_col: Annotated[str | None, USER] = None,
    item_col: Annotated[str | None, ITEM] = None,
    count_col: Annotated[str | None, COUNT] = None,
    least: Annotated[float | None, LEAST] = None,
    backbone: Annotated[str, typer.Option(help="mf, lightgcn or neumf.")] = "mf",
    loss: Annotated[str, typer.Option(help="bpr or bce.")] = "bpr",
    denoise: Annotated[
        str,
        typer.Option(help="plain, personal(pool_size=5, tau=0.1), truncated(drop_rate=0.2), reweighted(beta=0.2)."),
    ] = "plain",
    inject_noise: Annotated[
        float, typer.Option(help="Add random items, so many per true one, to see what denoising does.")
    ] = 0.0,
    dim: Annotated[int, typer.Option(help="Width of the embeddings.")] = 64,
    epochs: Annotated[int, typer.Option(help="Passes over as many examples as there are interactions.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Users drawn per step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and draws.", callback=checks.seed)] = 0,
    k: Annotated[list[int] | None, K] = None,
) -> None:
    """Train a recommender and save it.

    `lossmith recommend fit clicks.csv --test later.csv --denoise "personal(tau=0.1)" --out recommender`
    """
    import sys

    from lossmith.errors import InputError
    from lossmith.files import check_new_folder
    from lossmith.tasks.recommendation import Recommender, noise_auc
    from lossmith.tasks.recommendation import inject_noise as noised
    from lossmith.tasks.recommendation.noise import split_interactions
    from lossmith.tasks.recommendation.reading import read_parts
    from lossmith.training import NonFiniteLossError

    check_new_folder(out)
    if not 0 <= validation < 1:
        raise InputError(f"--validation must be a share in [0, 1), got {validation}")
    table, judged = read_parts(
        train, test=test, layout=layout, user=user_col, item=item_col, count=count_col, least=least
    )
    say(table.summary())
    held = noisy = None
    if validation:
        table, held, _ = split_interactions(table, train=1 - validation, test=0.0, least=1, seed=seed)
    if inject_noise:
        others = judged.renamed(table) if judged is not None else None
        table, noisy = noised(table, inject_noise, exclude=others, seed=seed)
        say(f"{int(noisy.sum())} false interactions added")
    recommender = Recommender(
        backbone,
        loss=loss,
        denoise=denoise,
        dim=dim,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        disable_tqdm=not sys.stderr.isatty(),
    )
    try:
        recommender.fit(table, held)
    except NonFiniteLossError as error:
        raise InputError(f"{error}; choose a smaller --learning-rate than {learning_rate:g}") from None
    recommender.save_pretrained(out)
    say(f"{recommender.steps_} steps; saved in {out}")
    if noisy is not None:
        losses = recommender.interaction_losses()
        share = recommender.drawn_[noisy].sum() / recommender.drawn_.sum()
        say(
            f"false interactions: {noisy.mean():.1%} of the table, {share:.1%} of training; told by their loss with "
            f"AUC {noise_auc(losses.loss, noisy):.3f} over all, {noise_auc(losses.loss, noisy, table.rows):.3f} "
            "within users"
        )
    if judged is not None:
        say(recommender.evaluate(judged, k or (20, 50), exclude=held).summary())


@recommend.command()
def predict(
    recommender: Annotated[Path, typer.Argument(help="Folder of a trained recommender.")],
    out: Annotated[Path, typer.Option(help="File for user, item, score, rank: .csv, .tsv or .parquet.")],
    k: Annotated[int, typer.Option(help="Items per user.")] = 20,
    user: Annotated[list[str] | None, typer.Option(help="Only this user; several times.", show_default=False)] = None,
    with_seen: Annotated[bool, typer.Option(help="Also items that the user has used.")] = False,
) -> None:
    """Write the best items of each user.

    `lossmith recommend predict recommender --k 10 --out top.csv`
    """
    from lossmith.tasks.recommendation import Recommender
    from lossmith.tasks.recommendation.reading import check_ending, write_recommendations

    check_ending(out)
    found = Recommender.from_pretrained(recommender).recommend(user, k, exclude_seen=not with_seen)
    write_recommendations(out, found)
    say(f"{len(found)} recommendations for {found.user.nunique()} users written to {out}")


@recommend.command()
def suspects(
    recommender: Annotated[Path, typer.Argument(help="Folder of a trained recommender.")],
    out: Annotated[Path, typer.Option(help="File for user, item, loss, suspicion: .csv, .tsv or .parquet.")],
) -> None:
    """Write each interaction's loss, and its rank among the user's: 1 is the likeliest to be noise.

    `lossmith recommend suspects recommender --out suspects.csv`
    """
    from lossmith.tasks.recommendation import Recommender
    from lossmith.tasks.recommendation.reading import check_ending, write_recommendations

    check_ending(out)
    found = Recommender.from_pretrained(recommender).interaction_losses().drop(columns="drawn")
    write_recommendations(out, found.sort_values("suspicion", ascending=False, kind="stable"))
    say(f"{len(found)} interactions written to {out}, the most suspicious first")


@recommend.command()
def evaluate(
    recommender: Annotated[Path, typer.Argument(help="Folder of a trained recommender.")],
    test: Annotated[Path, typer.Argument(help="Table of held-out interactions.")],
    k: Annotated[list[int] | None, K] = None,
    layout: Annotated[str, LAYOUT] = "auto",
    user_col: Annotated[str | None, USER] = None,
    item_col: Annotated[str | None, ITEM] = None,
    count_col: Annotated[str | None, COUNT] = None,
    least: Annotated[float | None, LEAST] = None,
    ndcg: Annotated[str, typer.Option(help="truncated (TREC's) or released (the paper's code).")] = "truncated",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Recall and NDCG of the recommendations on held-out interactions.

    `lossmith recommend evaluate recommender later.csv --k 10 --k 20`
    """
    import dataclasses
    import json

    from lossmith.tasks.recommendation import Recommender
    from lossmith.tasks.recommendation.reading import read_interactions

    judged = read_interactions(test, layout=layout, user=user_col, item=item_col, count=count_col, least=least)
    scores = Recommender.from_pretrained(recommender).evaluate(judged, k or (20, 50), ndcg=ndcg)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(scores)))
    else:
        say(scores.summary())
