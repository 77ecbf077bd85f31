"""What every registered study must declare."""

from __future__ import annotations

import pytest

from lossmith.studies.study import SCALES, studies

every_study = pytest.mark.parametrize("slug", list(studies()))


@every_study
def test_arms_baseline_and_claims_belong_together(slug: str) -> None:
    """A claim names arms and metrics that the study has."""
    study = studies()[slug]
    assert study.slug == slug
    assert study.baseline in study.arms
    assert study.metric == study.metrics[0]
    assert study.claims
    for claim in study.claims:
        assert claim.arm in study.arms
        assert claim.against is None or claim.against in study.arms
        assert claim.metric in study.metrics
        assert claim.arm != (claim.against or study.baseline)


@every_study
def test_every_scale_says_how_many_seeds(slug: str) -> None:
    """``smoke``, ``quick`` and ``full``; intervals need two seeds or more."""
    study = studies()[slug]
    assert set(study.seeds) == set(SCALES)
    assert all(seeds >= 2 for seeds in study.seeds.values())
    assert set(study.options) <= set(SCALES)
    for scale in SCALES:
        assert scale in study.options or study.comparison is not None


@every_study
def test_the_question_is_one_line_and_the_paper_is_cited(slug: str) -> None:
    """What ``lossmith list`` shows."""
    study = studies()[slug]
    assert "\n" not in study.question
    assert study.paper.title
    assert 1900 < study.paper.year < 2100
