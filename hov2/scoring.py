"""One place that scores completions, rule rewards at once, judged ones by asking; and what to do when no judge answers.

`submit` returns a Pending, whose `result()` is a Score once the judge has replied. Three outcomes are kept apart: a
number; *missing* (the judge was asked and gave none); and not applicable (a sample whose solution has no context can't
have a context reward).
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from hov2.distributed import Means, gather_objects, print0
from hov2.judge import CompletionJudge, Judge, JudgeReply
from hov2.judge_server import FAULTS, JudgeError
from hov2.rewards import REWARDS, Completion

HEARTBEAT = 5.0  # seconds between two signs of life of ranks that wait
ROUNDS = 10  # times that a step's missing scores are asked for again, each after the judge was found to be back


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1], or None when it is missing or doesn't apply."""

    value: float | None
    missing: bool = False
    raw: str | None = None  # the judge's reply, if there was one
    error: str | None = None  # why it is missing
    judged: bool = False  # a judge had to give it (it counts for max_missing)
    judge_is_down: bool = False  # it is missing because nobody answered
    words: str = ""  # what the judge's server said instead, if a log may show it

    @property
    def number(self) -> float:
        """The value as a float, NaN for None."""
        return float("nan") if self.value is None else self.value


class Pending:
    """A score on its way."""

    def __init__(self, start: Callable[[], Future]):
        self._start = start
        self.ask()

    def ask(self) -> None:
        """Start the scoring, once more if it was done before."""
        self.future = self._start()

    def result(self) -> Score:
        """Wait for the Score."""
        return self.future.result()


class Scorer:
    """Scores completions. Without a judge, free-form answers and emotion words are scored by rule.

    `heartbeat("judge")` is called every few seconds of a wait that is meant, for whoever watches over ranks that hang.
    """

    def __init__(
        self,
        judge: Judge | None = None,
        format_rule: str = "strict",
        evaluation: bool = False,
        heartbeat: Callable[[str], object] = lambda phase: None,
    ):
        self.judge = judge
        self.format_rule = format_rule
        self.evaluation = evaluation
        self.heartbeat = heartbeat
        threads = judge.config.concurrency if judge else 1  # each waits for one reply of the judge at a time
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
        self._window = deque(maxlen=judge.config.missing_window if judge else 1)  # of a step: its judged scores
        self._has_quoted = False

    def submit(self, name: str, text: str, sample: Any) -> Pending:
        """Start scoring `text`, a completion for `sample`, by the reward `name`.

        Rewards that need a judge can't do without (GRPOConfig sees to it).
        """
        return Pending(lambda: self._pool.submit(self._score, name, text, sample))

    def wait_for_scores(self, scores: list[Pending], together: bool = True) -> None:
        """Wait for a step's `scores` of all ranks, then act by `on_judge_down` if too many are missing.

        The share is that of the last `missing_window` steps and of all ranks. "continue": goes on without them. "wait":
        while nobody answers, all ranks wait until the judge is back, then ask again for what this step misses. "stop",
        or a judge that answers and gives no scores: JudgeError, the same on all ranks. Not `together`: a rank by
        itself.
        """
        if self.judge is None:
            return
        gather = gather_objects if together else lambda value: [value]
        what_to_do = self.judge.config.on_judge_down
        self._window.append([])
        for rounds_left in range(ROUNDS, -1, -1):
            self._wait([score.future for score in scores], gather)
            self._window[-1] = _judged([score.result() for score in scores], gather)
            self._quote_one()
            problem = self._too_many_missing()
            if problem is None or what_to_do == "continue":
                return
            if what_to_do == "wait" and self._too_many_missing(answered=True):
                problem += "; the judge answers, so that it is no use to wait for it"
                what_to_do = "stop"
            if what_to_do == "stop" or rounds_left == 0:
                raise JudgeError(problem)
            self._wait_for_judge(gather, problem)
            for score in scores:
                if score.result().judge_is_down:
                    score.ask()

    def log_stats(self, means: Means) -> None:
        """Add what came of the requests since the last call, of all ranks.

        `judge/failure_rate`: the share without a score; `judge/latency`: their mean time in seconds;
        `judge/faults/<kind>`: how often each fault occurred.
        """
        if self.judge is None:
            return
        replies = self.judge.take_replies()
        means.add("judge/failure_rate", [float(reply.error is not None) for reply in replies])
        means.add("judge/latency", [reply.latency for reply in replies])
        faults = Counter()
        for reply in replies:
            faults.update(fault.kind for fault in reply.faults)
        for kind in FAULTS:
            means.add_sum(f"judge/faults/{kind}", faults[kind])

    def note(self, samples: list) -> str:
        """Return what a reader of the log should know about how these samples are scored, or ""."""
        free = 0 if self.judge else sum(sample.problem_type == "free-form" for sample in samples)
        return f"no judge: {free} free-form answers are scored by their overlap (ROUGE-L)" if free else ""

    def _too_many_missing(self, answered: bool = False) -> str | None:
        """Return what is wrong if the last step misses scores, and the window more of them than it may.

        `answered`: only those count that are missing although the judge answered.
        """
        missing = []
        for of_step in self._window:
            in_step = [score for score in of_step if score.missing and not (answered and score.judge_is_down)]
            missing.extend(in_step)
        judged = sum(len(of_step) for of_step in self._window)
        max_missing = self.judge.config.max_missing
        if not in_step or len(missing) <= max_missing * judged:  # of the last step
            return None
        return (
            f"{len(missing)} of {judged} judged scores of the last {len(self._window)} steps are missing, "
            f"more than judge.max_missing {max_missing:g}; the last: {_with_words(missing[-1])}"
        )

    def _quote_one(self) -> None:
        """Print, once in a run, what a judge's server said where a score should be."""
        quotable = [score for score in self._window[-1] if score.words]
        if quotable and not self._has_quoted:
            self._has_quoted = True
            print0(f"a judged score is missing: {_with_words(quotable[0])}")

    def _wait(self, futures: list[Future], gather: Callable) -> None:
        """Wait for the futures of all ranks. Every few seconds these show each other that they are there: the process
        group's timeout and the watch are for ranks that are lost, not for a wait that is meant."""
        while any(gather(bool(wait(futures, HEARTBEAT).not_done))):
            self.heartbeat("judge")

    def _wait_for_judge(self, gather: Callable, why: str) -> None:
        """Return once the judge answers all ranks."""
        print0(f"waiting for the judge: {why}")
        answered = False
        while not answered:
            time.sleep(HEARTBEAT)
            self.heartbeat("judge")
            probe = self._pool.submit(self.judge.probe)
            self._wait([probe], gather)
            answered = not any(gather(probe.result().is_down))
        print0("the judge is back: asking again for what is missing")

    def _score(self, name: str, text: str, sample: Any) -> Score:
        judge = CompletionJudge(self.judge) if self.judge else None
        value = REWARDS[name].score(Completion(text, sample, judge, self.format_rule, self.evaluation))
        reply = judge.reply if judge else JudgeReply(None)
        missing = reply.error is not None
        judged = missing or reply.score is not None
        return Score(value, missing, reply.raw, reply.error, judged, reply.is_down, reply.words)


def _judged(results: list[Score], gather: Callable) -> list[Score]:
    """Return the scores of all ranks that a judge had to give, without its replies."""
    own = [replace(result, raw=None) for result in results if result.judged]
    scores = []
    for of_rank in gather(own):
        scores.extend(of_rank)
    return scores


def _with_words(score: Score) -> str:
    return f"{score.error}: {score.words}" if score.words else str(score.error)
