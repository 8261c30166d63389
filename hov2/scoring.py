"""One place that scores a completion: rule rewards at once, judged ones by asking the judge.

Three outcomes are kept apart: a number; *missing* (the judge was asked and gave none); and not applicable (a sample
whose solution has no context can't have a context reward).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hov2.judge import AccuracyJudge, JudgeReply
from hov2.rewards import accuracy_reward, format_reward


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1], or None when it is missing or doesn't apply."""

    value: float | None
    missing: bool = False
    raw: str | None = None  # the judge's reply, if there was one
    error: str | None = None  # why it is missing

    @property
    def number(self):
        """The value as a float, NaN for None."""
        return float("nan") if self.value is None else self.value


class Scorer:
    """Scores completions. Without a judge, free-form answers and emotion words are scored by rule."""

    def __init__(self, judge=None, format_rule="strict", evaluation=False):
        self.judge, self.format_rule, self.evaluation = judge, format_rule, evaluation
        # accuracy may wait for the judge (free-form answers, synonyms), so it has threads of its own
        self._pool = ThreadPoolExecutor(judge.config.concurrency if judge else 1, thread_name_prefix="score")

    def submit(self, name, text, sample):
        """Starts scoring `text`, a completion for `sample`, by the reward `name`.

        What it returns has a `result()`, a Score. context and logic need a judge (GRPOConfig sees to it).
        """
        if name == "format":
            return self._pool.submit(lambda: Score(format_reward(text, self.format_rule)))
        if name == "accuracy":
            return self._pool.submit(self._accuracy, text, sample)
        if name == "context":
            return _Judged(self.judge.submit_context(text, sample.solution))
        return _Judged(self.judge.submit_logic(text))

    def log_stats(self, means):
        """Adds `judge/failure_rate` and `judge/latency` (seconds) since the last call, weighted by requests."""
        if self.judge is not None:
            stats = self.judge.stats()
            for name in ("failure_rate", "latency"):
                means.add(f"judge/{name}", stats[name], stats["requests"])

    def note(self, samples):
        """What a reader of the log should know about how these samples are scored, or ""."""
        free = sum(sample.problem_type == "free-form" for sample in samples)
        if not free or self.judge is not None:
            return ""
        return f"no judge: {free} free-form answers are scored by their overlap (ROUGE-L)"

    def _accuracy(self, text, sample):
        judge = None if self.judge is None else AccuracyJudge(self.judge)
        value = accuracy_reward(text, sample.solution, sample.problem_type, judge, evaluation=self.evaluation)
        reply = judge.reply if judge and judge.reply else JudgeReply(None)
        return Score(value, value is None, reply.raw, reply.error)


@dataclass(frozen=True)
class _Judged:
    """A judged score on its way."""

    future: object

    def result(self):
        reply = self.future.result()
        return Score(reply.score, reply.error is not None, reply.raw, reply.error)
