"""Tables, files, splits, noise and scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.tasks.recommendation import (
    Interactions,
    inject_noise,
    noise_auc,
    ranking_scores,
    split_interactions,
    synthetic_feedback,
)
from lossmith.tasks.recommendation.reading import read_interactions, read_parts


def pairs(table: Interactions) -> set[tuple[str, str]]:
    return {(table.users[u], table.items[i]) for u, i in zip(table.rows, table.indices, strict=True)}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- tables -----------------------------------------------------------------------------------------------------


def test_repeated_interactions_count_once() -> None:
    table = Interactions.from_pairs([7, 7, 8, 7], ["x", "y", "x", "x"])
    assert pairs(table) == {("7", "x"), ("7", "y"), ("8", "x")}
    assert table.merged == 1
    assert "1 repeated" in table.summary()
    assert table.contains(np.array([0, 1, 1]), np.array([1, 1, 0])).tolist() == [True, False, True]
    with pytest.raises(InputError, match="same length, got 1 and 2"):
        Interactions.from_pairs("a", "xy")
    with pytest.raises(InputError, match="the item of interaction 1 is missing"):
        Interactions.from_pairs("ab", [1.0, math.nan])
    with pytest.raises(InputError, match="no interactions"):
        Interactions.from_pairs([], [])
    with pytest.raises(InputError, match="item 'z' is not in the given list"):
        Interactions.from_pairs("a", "z", known_items="xy")


# ---- files ------------------------------------------------------------------------------------------------------

EXPECTED = {("u1", "i9"), ("u1", "i2"), ("u2", "i9")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.txt", "u1 i9\nu1 i2\nu2 i9\n"),
        ("counts.txt", "u1\ti9\t3\nu1\ti2\t1\n\nu2\ti9\t12\n"),
        ("zeros.txt", "u1 i9 3\nu1 i2 0.5\nu2 i9 1\nu2 i2 0\n"),
        ("lists.txt", "u1 i9 i2 i9\nu2 i9\n"),
        ("comma.csv", "u1,i9\nu1,i2\nu2,i9\n"),
        ("header.csv", "userId,itemId,rating\nu1,i9,3\nu1,i2,1\nu2,i9,2\n"),
        ("swapped.csv", "rating,item_id,user_id\n3,i9,u1\n1,i2,u1\n2,i9,u2\n"),
        ("mark.csv", "\ufeffuser_id,item_id\nu1,i9\nu1,i2\nu2,i9\n"),
        ("quoted.csv", 'user,item,note\nu1,i9,"a, b"\nu1,i2,c\nu2,i9,d\n'),
        ("users.json", json.dumps({"u1": ["i9", "i2"], "u2": ["i9"], "u3": []})),
    ],
)
def test_layouts_of_tables(tmp_path: Path, name: str, text: str) -> None:
    table = read_interactions(write(tmp_path / name, text))
    assert pairs(table) == EXPECTED
    assert table.dropped_users == (1 if name == "users.json" else 0)


def test_other_columns_thresholds_and_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"stars": [5, 1, 4, 5], "film": ["i9", "i5", "i2", "i9"], "who": ["u1", "u1", "u1", "u2"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        table = read_interactions(tmp_path / name, user="who", item="film", count="stars", least=4)
        assert pairs(table) == EXPECTED
        with pytest.raises(InputError, match="has no column 'film2': did you mean 'film'"):
            read_interactions(tmp_path / name, user="who", item="film2")
        with pytest.raises(InputError, match="has no column of items; name one of: stars, film, who"):
            read_interactions(tmp_path / name, user="who")


def test_a_first_line_of_words_is_data_where_others_are_words_or_a_layout_is_given(tmp_path: Path) -> None:
    words = write(tmp_path / "w.csv", "ann,tea\nbob,milk\n")
    assert pairs(read_interactions(words)) == {("ann", "tea"), ("bob", "milk")}
    mixed = write(tmp_path / "m.csv", "ann,tea\nu1,i1\n")
    assert len(read_interactions(mixed, layout="pairs")) == 2


def test_a_table_with_a_broken_line_is_not_read_as_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "0 5 6\n1 7 8\n2\n")
    with pytest.raises(InputError, match="line 3: 1 cells, other lines have 3"):
        read_interactions(path)
    lists = read_interactions(path, layout="lists")
    assert (len(lists), lists.dropped_users) == (4, 1)
    longer = write(tmp_path / "l.txt", "0 5 6 7\n1 7 8\n2\n")
    assert len(read_interactions(longer)) == 5
    same = write(tmp_path / "s.txt", "0 5 6\n1 7 8\n")
    assert len(read_interactions(same)) == 2
    assert len(read_interactions(same, layout="lists")) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds no interactions"),
        (
            "a.csv",
            "customer,product\nu1,i1\nu2,i2\n",
            "line 1: 'customer,product' looks like a header .*item_id",
        ),
        ("a.csv", "user,product,n\nann,tea,3\nbob,tea,1\n", "looks like a header"),
        ("a.txt", "u1 i1 x\nu2 i2 1\n", "line 1: a count must be a number >= 0, found 'x'"),
        ("a.txt", "u1 i1 1\nu2 i2 -1\n", "line 2: a count must be a number >= 0, found '-1'"),
        ("a.txt", "u1 i1 1\nu2 i2 nan\n", "line 2: a count must be"),
        ("a.csv", "user,item\nu1,i1\nu2,\n", "line 3: a user, an item were expected"),
        ("a.txt", "u1 i1 0\n", "holds no interactions"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"u1": 3}', "user 'u1' must have a list of items"),
        ("a.json", "{}", "holds no interactions"),
        ("a.parquet", "x", "cannot be read as Parquet"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_interactions(write(tmp_path / name, text))
    with pytest.raises(InputError, match="does not exist"):
        read_interactions(tmp_path / "none.txt")
    with pytest.raises(InputError, match="did you mean 'counts'"):
        read_interactions(tmp_path / name, layout="count")
    with pytest.raises(InputError, match=r"holds no train\.txt"):
        read_parts(tmp_path)


def test_real_listening(real_data: Path) -> None:
    train, test = read_parts(real_data / "lastfm")
    assert test is not None
    assert 1800 < len(train.users) <= 1892
    assert len(train) + train.merged == 42135
    assert len(test) + test.merged == 10533


# ---- splits and noise -------------------------------------------------------------------------------------------


def test_a_split_is_by_user_and_loses_nothing() -> None:
    table = Interactions.from_pairs(["a"] * 10 + ["b"] * 25 + ["c"] * 9, [*range(10), *range(25), *range(9)])
    train, validation, test = split_interactions(table, seed=3)
    assert [p.counts.tolist() for p in (train, validation, test)] == [[7, 17, 0], [1, 3, 0], [2, 5, 0]]
    whole = pairs(train) | pairs(validation) | pairs(test)
    assert whole == {p for p in pairs(table) if p[0] != "c"}
    assert not pairs(train) & pairs(test)
    assert pairs(split_interactions(table, seed=4)[0]) != pairs(train)
    one = Interactions.from_pairs("abb", "xxy")
    assert [len(p) for p in split_interactions(one, train=0.5, test=0.0, least=1)] == [2, 1, 0]
    with pytest.raises(InputError, match="no user has 30 interactions"):
        split_interactions(table, least=30)
    with pytest.raises(InputError, match="sum is at most 1"):
        split_interactions(table, train=0.9, test=0.2)


def test_noise_is_new_and_so_much_of_it() -> None:
    table = Interactions.from_pairs(["a"] * 10 + ["b"] * 3, [*range(10), *range(3)], known_items=map(str, range(14)))  # type: ignore[arg-type]
    other = table.with_pairs(np.array([0, 1]), np.array([12, 13]))
    noisy, is_noise = inject_noise(table, 0.3, exclude=other)
    assert noisy.counts.tolist() == [13, 3]
    assert pairs(noisy) >= pairs(table)
    added = {
        p
        for p, new in zip(
            [(noisy.users[u], noisy.items[i]) for u, i in zip(noisy.rows, noisy.indices, strict=True)],
            is_noise,
            strict=True,
        )
        if new
    }
    assert added == pairs(noisy) - pairs(table)
    assert added == {("a", "10"), ("a", "11"), ("a", "13")}  # "12" is a test item
    assert inject_noise(table, 0)[1].sum() == 0
    assert inject_noise(table, 9)[0].counts.tolist() == [14, 14]
    with pytest.raises(InputError, match="noise ratio must be"):
        inject_noise(table, -0.1)


def test_synthetic_feedback_is_as_described() -> None:
    feedback = synthetic_feedback(seed=2)
    assert set(feedback.train.counts) == {36}
    assert np.bincount(feedback.train.rows[feedback.noisy]).tolist() == [8] * 600
    assert not feedback.train.contains(feedback.test.rows, feedback.test.indices).any()
    assert set(feedback.test.counts) == {8}
    with pytest.raises(InputError, match="per_user must be"):
        synthetic_feedback(10, 10, per_user=10)


# ---- scores -----------------------------------------------------------------------------------------------------


def reference(relevant: list[str], ranked: list[str], k: int, ideal: int) -> tuple[float, float]:
    gains = [1 / math.log2(r + 2) for r, item in enumerate(ranked[:k]) if item in relevant]
    return len(gains) / len(relevant), sum(gains) / sum(1 / math.log2(r + 2) for r in range(ideal))


def test_scores_are_their_formulas() -> None:
    draw = np.random.default_rng(0)
    names = [str(i) for i in range(40)]
    relevant = {str(u): list(draw.choice(names, 1 + u, replace=False)) for u in range(30)}
    ranked = {str(u): list(draw.permutation(names)[: 5 + u]) for u in range(30)}
    for kind in ("truncated", "released"):
        found = ranking_scores(relevant, ranked, (3, 10), ndcg=kind)  # type: ignore[arg-type]
        for k in (3, 10):
            expected = [
                reference(r, ranked[u], k, min(k, len(r)) if kind == "truncated" else len(r))
                for u, r in relevant.items()
            ]
            assert found.recall[k] == pytest.approx(np.mean([e[0] for e in expected]), abs=1e-9)
            assert found.ndcg[k] == pytest.approx(np.mean([e[1] for e in expected]), abs=1e-9)


def test_a_user_without_recommendations_is_a_miss() -> None:
    found = ranking_scores({"a": ["x"], "b": ["y"]}, {"a": ["x"]}, (5,))
    assert (found.recall[5], found.users) == (0.5, 2)
    with pytest.raises(InputError, match="no users to judge"):
        ranking_scores({}, {})
    with pytest.raises(InputError, match="ndcg must be"):
        ranking_scores({"a": ["x"]}, {}, ndcg="full")  # type: ignore[arg-type]


def test_area_under_the_curve_is_the_share_of_right_pairs() -> None:
    draw = np.random.default_rng(0)
    losses, noisy, users = draw.integers(0, 6, 200) * 1.0, draw.random(200) < 0.3, draw.integers(0, 9, 200)

    def share(rows: np.ndarray) -> float:
        above = losses[rows & noisy][:, None] - losses[rows & ~noisy][None]
        return float(((above > 0) + 0.5 * (above == 0)).mean())

    assert noise_auc(losses, noisy) == pytest.approx(share(np.ones(200, bool)))
    assert noise_auc(losses, noisy, users) == pytest.approx(np.mean([share(users == u) for u in range(9)]))
    assert math.isnan(noise_auc(losses, np.zeros(200, bool)))
    with pytest.raises(ValueError, match="same length"):
        noise_auc(losses, noisy[:3])
