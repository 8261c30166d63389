"""One place that scores a completion: rule rewards at once, judged ones through the judge, all with the same outcome.

Three outcomes are kept apart: a number; *missing* (the judge was asked and gave none); and not applicable (a sample whose
solution has no context can't have a context reward).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hov2.rewards import accuracy_reward, block_text, format_reward


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1], or None when it is missing or doesn't apply; `raw` is the judge's reply."""

    value: float | None
    raw: str | None = None
    missing: bool = False

    @property
    def number(self):
        """The value as a float, NaN for None."""
        return float("nan") if self.value is None else self.value


class Scorer:
    """`submit(name, text, sample)` for the rewards format, accuracy, context and logic.

    Raises ValueError when a judged reward is asked for and there is no judge.
    """
