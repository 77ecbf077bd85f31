"""Keeping the model that does best on held-out interactions while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lossmith.errors import InputError
from lossmith.tasks.recommendation.interactions import Interactions
from lossmith.tasks.recommendation.scores import RankingScores

if TYPE_CHECKING:
    from lossmith.tasks.recommendation.recommender import Recommender


class BestByRecall(TrainerCallback):
    """Looks at Recall@20 every ``evaluate_every`` epochs and remembers the best weights after ``best_after``."""

    def __init__(self, recommender: Recommender, validation: Interactions, steps_per_epoch: int):
        if len(validation) == 0:
            raise InputError("the validation table holds no interactions")
        self.recommender, self.validation, self.steps_per_epoch = recommender, validation, steps_per_epoch
        self.history: list[tuple[int, RankingScores]] = []
        self._best: dict[str, Any] | None = None
        self._recall, self._looks_since = -1.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Look, at the end of an epoch whose turn it is, and of the last one."""
        epoch, rest = divmod(state.global_step, self.steps_per_epoch)
        recommender = self.recommender
        last = epoch == recommender.epochs
        if rest or (epoch % recommender.evaluate_every and not last):
            return control
        scores = recommender.evaluate(self.validation, k=(20,))
        self.history.append((epoch, scores))
        # The last look counts where all come before best_after.
        if epoch < recommender.best_after and not last:
            return control
        if scores.recall[20] > self._recall:
            self._recall, self._looks_since = scores.recall[20], 0
            self._best = {name: tensor.detach().clone() for name, tensor in recommender.model_.state_dict().items()}
        else:
            self._looks_since += 1
            if recommender.patience is not None and self._looks_since >= recommender.patience:
                control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Put the best weights back."""
        if self._best is not None:
            self.recommender.model_.load_state_dict(self._best)
