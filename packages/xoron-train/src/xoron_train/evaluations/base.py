"""What an evaluation is: a config, and a class that judges a model on conversations.

A recipe names evaluations:

    evaluations:
      sees: {use: seeing, source: digits, split: held-out, samples: 256}

The trainer runs each on its source's split, with the model in evaluation mode and no gradient, and
writes what it returns into the evaluation's record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from xoron_core.config import Config
from xoron_train.conversation import HELD_OUT, Conversation

if TYPE_CHECKING:
    from xoron_core.model import XoronModel
    from xoron_core.processor import XoronProcessor


class EvaluationConfig(Config):
    """What every evaluation has.

    Attributes:
        source: of the recipe's mixture.
        split: of that source.
        samples: the first so many conversations of it.
        batch_size: conversations at once.
        required: whether a run whose last evaluation does not pass is a failed run (exit code 1;
            its model is saved all the same).
    """

    source: str
    split: str = HELD_OUT
    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)
    required: bool = False


class Evaluation(ABC):
    """Judges a model. Called as `Class(config)`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def run(
        self, model: XoronModel, processor: XoronProcessor, samples: Sequence[Conversation]
    ) -> dict[str, Any]:
        """Returns plain data; `passed`, a bool, stands in it if the evaluation has gates.

        Args:
            model: in evaluation mode.
            processor: of the model.
            samples: what to judge it on.

        Raises:
            DataError: if the samples do not suit the evaluation.
        """
