"""Public faults of pruning visual tokens: the faulty form fails what ours passes."""

from __future__ import annotations

import pytest
import torch

from lossmith.sparsity import PruneSchedule, TransformerShape, select_tokens, visual_flops
from lossmith.sparsity.visual_tokens_scores import mean_of_queries, received_by_all, received_by_each


def test_a_step_that_there_is_not_saves_nothing_in_silence() -> None:
    """The released FastV acts in the 48th forward pass: with 16 steps it does nothing, and says nothing."""

    def released(steps: int, at: int = 47) -> list[int]:
        return [step for step in range(steps) if step == at]

    assert released(48) == [47]
    assert released(16) == []
    with pytest.raises(ValueError, match="never fires: step 47 of 16 steps"):
        PruneSchedule("fastv", step=47, layer=2, keep=0.25).cuts(steps=16, layers=32, visual=729)


def test_pruning_in_the_last_step_is_no_acceleration() -> None:
    """The released LLaDA-V setting of FastV drops three quarters of the image, and 1.1 % of the cost."""
    shape = TransformerShape(layers=32, width=4096, ffn=12288)
    size = {"text": 100, "visual": 729, "answer": 96, "steps": 48}
    full = visual_flops(shape, **size)
    late, early = (PruneSchedule("fastv", step=step, layer=2, keep=0.25) for step in (47, 0))
    assert visual_flops(shape, **size, prune=late) / full > 0.988
    assert visual_flops(shape, **size, prune=early) / full < 0.4


def test_scores_in_order_of_size_scramble_the_image() -> None:
    """``torch.topk`` gives the best first, and positions are numbered anew: the image is read in another order."""
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8]])
    released = scores.topk(3).indices
    assert released.tolist() == [[1, 3, 2]]
    features = torch.zeros(1, 4, 2)
    assert select_tokens(features, 3, "scores", scores=scores).tolist() == [[1, 2, 3]]
    assert torch.equal(select_tokens(features, 3, "scores", scores=scores, sort=False), released)


def test_a_mean_of_softmaxes_is_not_the_softmax_of_a_mean() -> None:
    """FastV here averages the heads' logits first: one head that is sure then outweighs several that are not."""
    # Two queries, three keys: one head is sure of key 0, three lean to key 1.
    sure, leaning = torch.tensor([6.0, 0.0, 0.0]), torch.tensor([-0.5, 0.9, 0.0])
    logits = torch.stack([sure, leaning, leaning, leaning]).view(1, 4, 1, 3).expand(1, 4, 2, 3)
    of_mean, mean_of = received_by_all(logits), received_by_each(logits).sum(1)
    assert int(of_mean.argmax()) == 0
    assert int(mean_of.argmax()) == 1
    torch.testing.assert_close(of_mean.sum(), torch.tensor(2.0))


def test_the_last_tokens_attention_is_not_that_of_all() -> None:
    """FastV's first code asks the last token, its paper the average over tokens (FastV #14, #44): other tokens stay."""
    logits = torch.tensor([[[[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]]]])
    paid = received_by_each(logits)
    last = mean_of_queries(paid, torch.tensor([[False, False, True]]))
    everybody = mean_of_queries(paid, torch.tensor([[True, True, True]]))
    assert int(last.argmax()) == 1
    assert int(everybody.argmax()) == 0


def test_both_of_a_pair_are_dropped_by_their_equal_scores() -> None:
    """1-NN drops two tokens that are alike together, and what they show is gone."""
    features = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 0.01, 0.0], [0.0, 1.0, 0.3], [0.0, 0.3, 1.0]]])
    assert select_tokens(features, 2, "one_nn").tolist() == [[2, 3]]
    assert 0 in select_tokens(features, 2, "one_nn_pairs")[0].tolist()
    assert (
        0 in select_tokens(features, 2, "divprune", pivot=2)[0].tolist()
        or 1 in select_tokens(features, 2, "divprune", pivot=2)[0].tolist()
    )
