"""Early stopping: how long a figure may go on without becoming better."""

from typing import Any


class Patience:
  """Counts evaluations in a row that brought nothing better.

  A function of the scores alone, so a resumed run stops where the run would
  have.
  """

  def __init__(
    self,
    limit: int,
    *,
    lowest: bool,
    best: float | None = None,
    since: int = 0,
  ) -> None:
    """Goes on from what `to_json` gave.

    Args:
      limit: evaluations without a better figure that end training; 0 = none
        do.
      lowest: whether lower is better.
      best: the best figure so far.
      since: evaluations since then.

    Raises:
      ValueError: a negative limit.
    """
    if limit < 0:
      raise ValueError(
        f"eval.patience: got {limit}, expected 0 (off) or more. Set it so."
      )
    self.limit, self._lowest = limit, lowest
    self._best, self._since = best, since

  def look(self, score: float) -> None:
    """Another evaluation; an equal figure is no better one."""
    sign = 1 if self._lowest else -1
    if self._best is None or sign * score < sign * self._best:
      self._best, self._since = score, 0
    else:
      self._since += 1

  @property
  def out(self) -> bool:
    """True once training ends."""
    return 0 < self.limit <= self._since

  def to_json(self) -> dict[str, Any]:
    """What another one goes on from."""
    return {"best": self._best, "since": self._since}
