"""What an evaluation is: a config, and a class that judges a model on conversations.

A recipe names evaluations:

    evaluations:
      sees: {use: seeing, source: digits, split: held-out, samples: 256}

The trainer runs each on its source's split, with the model in evaluation mode and no gradient, and
writes what it returns into the evaluation's record. `xoron gate` runs several on a finished model
and holds their figures against thresholds (see `xoron_train.gates`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Check:
    """One figure of a record beside what it must be.

    Attributes:
        figure: its name.
        value: finite.
        samples: how many conversations it is of.
        at_least, at_most: thresholds; at least one of them is given.
        interval: of the value, 95 %; None where there is none to give.
    """

    figure: str
    value: float
    samples: int
    at_least: float | None = None
    at_most: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        """Whether the value lies within the thresholds."""
        high_enough = self.at_least is None or self.value >= self.at_least
        return high_enough and (self.at_most is None or self.value <= self.at_most)


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

    def checks(self, record: Mapping[str, Any]) -> list[Check]:
        """The figures of a record beside the thresholds of this evaluation's config.

        A pure function of the two, so that a stored record can be judged again.

        Args:
            record: as `run` returned it.
        """
        if "passed" not in record:
            return []
        samples = int(record.get("samples", 0))
        return [Check("passed", float(record["passed"]), samples, at_least=1.0)]

    def suits(self, sample: Conversation) -> bool:
        """Whether the evaluation can judge by this conversation; a gate skips those it cannot."""
        return True
