"""Servers that take only so many requests in a time: a step takes as long as the limit says, and misses no score."""

import threading
import time
from collections import deque
from email.utils import formatdate

import pytest

from hov2 import pace
from hov2.config import JudgeConfig
from hov2.judge import Judge
from hov2.prompts import load_prompts
from hov2.scoring import Scorer
from tests.test_judge import ask, chat, judged


def limited(requests, seconds, retry_after=None):
    """A step of the server's script: so many requests in each stretch of so many seconds, further ones are refused.

    `retry_after`: how the refusal says when to come again, a function of the seconds until then.
    """
    taken, lock = deque(), threading.Lock()

    def answer(handler):
        now = time.monotonic()
        with lock:
            while taken and taken[0] <= now - seconds:
                taken.popleft()
            is_free = len(taken) < requests
            if is_free:
                taken.append(now)
        if is_free:
            handler.answer(*chat("4"))
        else:
            headers = {"Retry-After": retry_after(taken[0] + seconds - now)} if retry_after else {}
            handler.answer(429, headers, '{"error": {"message": "Rate limit reached"}}')

    return answer


def whole_seconds(wait):
    return str(int(wait) + 1)


def a_date(wait):
    return formatdate(time.time() + int(wait) + 1, usegmt=True)


def seconds_of_a_step(limit, count=128, **config):
    """How long a step of `count` judged scores takes, all of which have to be there."""
    with judged(limit, max_retries=0, **config) as (judge, server):
        beats = []
        scorer = Scorer(judge, heartbeat=beats.append)
        started = time.monotonic()
        texts = [f"<context>{number}</context><think>t</think>" for number in range(count)]
        scores = [scorer.submit("logic", text, None) for text in texts]
        scorer.wait_for_scores(scores)
        seconds = time.monotonic() - started
        assert [score.result().value for score in scores] == [0.8] * count
        assert {fault.kind for reply in judge.take_replies() for fault in reply.faults} == {"http_429"}
        assert len(server.requests) < 2 * count  # the refused are few
        return seconds


def test_a_step_takes_as_long_as_the_limit_says(capfd):
    assert 0.9 < seconds_of_a_step(limited(16, 0.3), count=64) < 2.5  # 64 at 16 in 0.3 s: 0.9 s after the first 16
    said = capfd.readouterr().out
    assert said.count("\n") == 1 and 'HTTP 429 "Rate limit reached"; from now on asked as often as it allows' in said


@pytest.mark.parametrize("retry_after", [whole_seconds, a_date])
def test_the_wait_that_a_server_asks_for_is_kept(retry_after):
    assert 1.0 < seconds_of_a_step(limited(24, 1.0, retry_after), count=48) < 4.5


def test_a_limit_is_no_failure_for_any_thread_and_costs_no_try():
    with judged(*[(429, {}, "")] * 8, chat("4"), max_retries=0) as (judge, server):
        reply = ask(judge)
        assert reply.score == 0.8 and reply.error is None and len(reply.faults) == 8
        assert len(server.requests) == 9
    with judged((503, {"Retry-After": "1"}, ""), chat("4"), max_retries=0) as (judge, _):
        assert ask(judge).score == 0.8


def test_a_limit_is_learned_once_and_later_steps_keep_to_it():
    with judged(limited(10, 0.5), max_retries=0) as (judge, server):
        for number in range(60):
            assert ask(judge, str(number)).score == 0.8
        first = len(server.requests)
        for number in range(30):
            assert ask(judge, f"later {number}").score == 0.8
        assert len(server.requests) - first < 40


def test_a_server_that_takes_nothing_counts_as_down(monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE", 0.5)
    with judged((429, {}, "")) as (judge, server):
        scorer = Scorer(judge)
        started = time.monotonic()
        scores = [scorer.submit("logic", f"<context>{i}</context><think>t</think>", None) for i in range(64)]
        results = [score.result() for score in scores]
        assert time.monotonic() - started < 5
        assert all(result.missing and result.judge_is_down for result in results)
        server.script = [chat("4")]
        time.sleep(pace.LONGER)  # the pause that it was left
        assert ask(judge).score == 0.8


def test_each_url_has_its_own_pace():
    with judged(limited(8, 0.4)) as (_, slow), judged(chat("4")) as (_, fast):
        judge = Judge(JudgeConfig(urls=[slow.url, fast.url], max_retries=0), load_prompts())
        assert [ask(judge, str(number)).score for number in range(40)] == [0.8] * 40
        assert len(fast.requests) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "seconds", "retry_after", "at_most"),
    [
        (20, 1.0, None, 11),  # 128 at 20 a second: 6.4 s
        (20, 1.0, whole_seconds, 13),
        (60, 60.0, None, 150),  # 128 at 60 a minute: 120 s, as the first 60 are taken at once
        (60, 60.0, whole_seconds, 150),
    ],
)
def test_real_limits(requests, seconds, retry_after, at_most):
    took = seconds_of_a_step(limited(requests, seconds, retry_after))
    print(f"{requests} in {seconds:g} s, Retry-After {bool(retry_after)}: 128 scores in {took:.1f} s")
    assert took < at_most
