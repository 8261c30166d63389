"""One place that scores a completion: rule rewards at once, judged ones by asking the judge.

Three outcomes are kept apart: a number; *missing* (the judge was asked and gave none); and not applicable (a sample
whose solution has no context can't have a context reward).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hov2.rewards import accuracy_reward, format_reward


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1], or None when it is missing or doesn't apply; `raw` is the judge's reply to a judged reward."""

    value: float | None
    raw: str | None = None
    missing: bool = False

    @property
    def number(self):
        """The value as a float, NaN for None."""
        return float("nan") if self.value is None else self.value


@dataclass(frozen=True)
class Pending:
    """A score on its way: `result()` waits for `future` and reads it."""

    future: object
    read: object

    def result(self):
        """The Score."""
        return self.read(self.future.result())


class Scorer:
    """Scores completions. Without a judge, free-form answers and emotion words are scored by rule."""

    def __init__(self, judge=None, format_rule="strict", evaluation=False):
        self.judge, self.format_rule, self.evaluation = judge, format_rule, evaluation
        # accuracy may wait for the judge (free-form answers, synonyms), so it has threads of its own
        self._pool = ThreadPoolExecutor(judge.config.concurrency if judge else 1, thread_name_prefix="score")

    def submit(self, name, text, sample):
        """Starts scoring `text`, a completion for `sample`, by the reward `name`; returns a Pending.

        context and logic need a judge (GRPOConfig sees to it).
        """
        if name == "format":
            return self._by_rule(format_reward, text, self.format_rule)
        if name == "accuracy":
            return self._by_rule(accuracy_reward, text, sample.solution, sample.problem_type, self.judge,
                                 evaluation=self.evaluation)
        if name == "context":
            return Pending(self.judge.submit_context(text, sample.solution), _of_reply)
        return Pending(self.judge.submit_logic(text), _of_reply)

    def stats(self):
        """This rank's `judge/failure_rate` and `judge/latency` (seconds) since the last call; {} without a judge."""
        if self.judge is None:
            return {}
        stats = self.judge.stats()
        return {f"judge/{name}": stats[name] for name in ("failure_rate", "latency")}

    def note(self, samples):
        """What a reader of the log should know about how these samples are scored, or ""."""
        free = sum(sample.problem_type == "free-form" for sample in samples)
        if not free or self.judge is not None:
            return ""
        return f"no judge: {free} free-form answers are scored by their overlap (ROUGE-L)"

    def _by_rule(self, reward, *arguments, **options):
        return Pending(self._pool.submit(reward, *arguments, **options), _of_value)


def _of_value(value):
    return Score(value, missing=value is None)


def _of_reply(reply):
    return Score(reply.score, reply.raw, missing=reply.error is not None)
