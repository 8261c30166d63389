"""One place that scores completions, rule rewards at once, judged ones by asking; and what to do when no judge answers.

Three outcomes are kept apart: a number; *missing* (the judge was asked and gave none); and not applicable (a sample
whose solution has no context can't have a context reward).
"""

import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from hov2.distributed import gather_objects, print0, rank, world_size
from hov2.judge import FAULTS, AccuracyJudge, JudgeError, JudgeReply
from hov2.rewards import accuracy_reward, format_reward

HEARTBEAT = 5.0  # seconds between two signs of life of ranks that wait
ROUNDS = 10  # times that a step's missing scores are asked for again, each after the judge was found to be back


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1], or None when it is missing or doesn't apply."""

    value: float | None
    missing: bool = False
    raw: str | None = None  # the judge's reply, if there was one
    error: str | None = None  # why it is missing
    judged: bool = False  # it is the judge's to give, or missing

    @property
    def number(self):
        """The value as a float, NaN for None."""
        return float("nan") if self.value is None else self.value


class Pending:
    """A score on its way; `ask()` starts the scoring and returns a future of the Score."""

    def __init__(self, ask):
        self.ask, self.future = ask, ask()

    def result(self):
        """The Score; waits for it."""
        return self.future.result()


class Scorer:
    """Scores completions. Without a judge, free-form answers and emotion words are scored by rule.

    `heartbeat("judge")` is called every few seconds of a wait that is meant, for whoever watches over ranks that hang.
    """

    def __init__(self, judge=None, format_rule="strict", evaluation=False, heartbeat=lambda phase: None):
        self.judge, self.format_rule, self.evaluation, self.heartbeat = judge, format_rule, evaluation, heartbeat
        # each thread waits for one reply of the judge at a time
        self._pool = ThreadPoolExecutor(judge.config.concurrency if judge else 1, thread_name_prefix="score")
        self._window = deque(maxlen=judge.config.missing_window if judge else 1)  # of a step: why each is missing

    def submit(self, name, text, sample):
        """Starts scoring `text`, a completion for `sample`, by the reward `name`; a Pending.

        context and logic need a judge (GRPOConfig sees to it).
        """
        return Pending(lambda: self._pool.submit(self._score, name, text, sample))

    def wait_for_scores(self, scores, together=True):
        """Waits for a step's `scores` (Pending) of all ranks, then acts by `on_judge_down` if too many are missing.

        The share is that of the last `missing_window` steps and of all ranks. "continue": goes on without them. "wait":
        all ranks wait until rank 0 finds the judge back, then ask again for what this step misses. "stop", or a judge
        that is back and still gives no scores: JudgeError, the same on all ranks. Not `together`: a rank by itself.
        """
        if self.judge is None:
            return
        config, gather = self.judge.config, gather_objects if together else lambda value: [value]
        self._window.append(None)
        for rounds_left in range(ROUNDS, -1, -1):
            self._wait([score.future for score in scores], gather)
            results = [score.result() for score in scores]
            of_ranks = gather([result.error for result in results if result.judged])  # None: there is a score
            self._window[-1] = [error for of_rank in of_ranks for error in of_rank]
            window = [error for of_step in self._window for error in of_step]
            missing = [error for error in window if error]
            if (not any(self._window[-1]) or len(missing) <= config.max_missing * len(window)
                    or config.on_judge_down == "continue"):
                return
            text = (f"{len(missing)} of {len(window)} judged scores of the last {len(self._window)} steps are missing, "
                    f"more than judge.max_missing {config.max_missing:g}; the last: {missing[-1]}")
            if config.on_judge_down == "stop" or not rounds_left:
                raise JudgeError(text)
            self._wait_for_judge(rank() == 0 or not together, gather, text)
            for score, result in zip(scores, results):
                if result.missing:
                    score.future = score.ask()

    def log_stats(self, means):
        """Adds, since the last call, the share of requests without a score, `judge/failure_rate`, their mean time,
        `judge/latency` (seconds), and how often each fault occurred, `judge/faults/<kind>`, on all ranks."""
        if self.judge is not None:
            replies = self.judge.take_replies()
            means.add("judge/failure_rate", [float(reply.error is not None) for reply in replies])
            means.add("judge/latency", [reply.latency for reply in replies])
            faults = Counter(fault.kind for reply in replies for fault in reply.faults)
            for kind in FAULTS:
                means.add(f"judge/faults/{kind}", faults[kind] * world_size())  # their mean is the sum

    def note(self, samples):
        """What a reader of the log should know about how these samples are scored, or ""."""
        free = 0 if self.judge else sum(sample.problem_type == "free-form" for sample in samples)
        return f"no judge: {free} free-form answers are scored by their overlap (ROUGE-L)" if free else ""

    def _wait(self, futures, gather):
        """Waits for the futures of all ranks. Every few seconds these show each other that they are there: the process
        group's timeout and the watch are for ranks that are lost, not for a wait that is meant."""
        while any(gather(bool(wait(futures, HEARTBEAT).not_done))):
            self.heartbeat("judge")

    def _wait_for_judge(self, asks, gather, why):
        """Returns once the judge answers the rank that `asks`."""
        print0(f"waiting for the judge: {why}")
        probes = []
        while not any(gather(any(probe.result().error is None for probe in probes))):
            time.sleep(HEARTBEAT)
            self.heartbeat("judge")
            probes = [self._pool.submit(self.judge.probe)] if asks else []
            self._wait(probes, gather)
        print0("the judge is back: asking again for what is missing")
        self.judge.forgive()

    def _score(self, name, text, sample):
        if name == "format":
            return Score(format_reward(text, self.format_rule))
        if name == "accuracy":
            judge = self.judge and AccuracyJudge(self.judge)
            value = accuracy_reward(text, sample.solution, sample.problem_type, judge, evaluation=self.evaluation)
            reply = judge.reply if judge else JudgeReply(None)
        else:
            reply = self.judge.context(text, sample.solution) if name == "context" else self.judge.logic(text)
            value = reply.score
        missing = reply.error is not None
        return Score(value, missing, reply.raw, reply.error, judged=missing or reply.score is not None)
