"""Steps of rows of similar length, so that less of each batch is padding.

The rows of several steps are drawn ahead, sorted by length, cut into steps again, and those are
taken in a shuffled order. It pays where conversations differ much in length, or stand beside text,
and a step is few micro-batches; but the rows of a step are then alike in more than their length.
"""

from __future__ import annotations

from xoron_train.data.order import permutation
from xoron_train.data.packing import Row
from xoron_train.data.stream import TrainStream, row_length
from xoron_train.data.talks import Talk
from xoron_train.data.text_rows import StreamState


class LengthGroups:
    """A stream whose rows come in steps of similar length.

    Rows that are drawn but not taken are not saved: a checkpoint holds the stream as it was before
    they were drawn, and a resume draws them anew.

    Args:
        stream: of single rows.
        steps: that are drawn ahead; 1 leaves the stream as it is.
        seed: of the order in which they are taken.
    """

    def __init__(self, stream: TrainStream, *, steps: int, seed: int) -> None:
        self.stream = stream
        self.steps = steps
        self.seed = seed
        self.groups = 0  # begun so far
        self.waiting: list[list[Row | Talk]] = []
        self._before: StreamState | None = None  # the stream before the current group

    def rows(self, count: int) -> list[Row | Talk]:
        """Returns the next step's rows; `count` must stay the same.

        Raises:
            DataError: if a source has nothing to train on, or too much that is unreadable.
        """
        if self.steps == 1:
            return self.stream.rows(count)
        if not self.waiting:
            self._before = self.stream.state_dict()
            self._draw(count)
        return self.waiting.pop(0)

    def state_dict(self, count: int) -> StreamState:
        """Everything that decides the rows to come, `count` in each step."""
        if not self.waiting or self._before is None:
            state, taken = self.stream.state_dict(), 0
        else:
            state, taken = self._before, self.steps - len(self.waiting)
        groups = self.groups - bool(taken)
        group = {"begun": groups, "taken": taken, "rows": count}
        return state._replace(data={**state.data, "group": group})

    def load_state_dict(self, state: StreamState) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: if a source's documents have changed.
        """
        self.stream.load_state_dict(state)
        group = state.data["group"]
        self.groups, self.waiting = group["begun"], []
        if group["taken"]:
            self._before = state
            self._draw(group["rows"])
            self.waiting = self.waiting[group["taken"] :]

    def _draw(self, count: int) -> None:
        rows = sorted(self.stream.rows(count * self.steps), key=row_length)
        order = permutation(self.steps, self.seed, "steps", self.groups)
        self.waiting = [rows[n * count : (n + 1) * count] for n in order.tolist()]
        self.groups += 1
