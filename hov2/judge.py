"""The judge: scores by an OpenAI-compatible server, none of them ever guessed.

Every call waits for its reply; the threads of scoring.py ask for all of a step at once, beside the forward passes. A
score that could not be had is None, never 0; what a run does about it is in scoring.py. Parsed scores, and nothing
else, are kept in a folder of small files. The requests themselves are in judge_server.py.
"""

import hashlib
import itertools
import json
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hov2.answers import set_f1
from hov2.config import JudgeConfig
from hov2.distributed import atomic_write
from hov2.judge_server import Fault, JudgeError, Server
from hov2.prompts import Prompts

_MAX_TOKENS = 32  # of a reply: room for "The score is 4 out of 5"
_MAX_DELAY = 30.0  # seconds between two tries, at most

# A number, with what it is out of: "4", "4.5", "4/5", "4 (out of 5)". Not one of "4th", "4%", "4,5", "1.2.3".
_NUMBER = re.compile(
    r"(?<![\w.,])(\d+(?:\.\d+)?)(?:\s*(?:points?\s*)?\(?(?:/|out of|of)\s*(\d+(?:\.\d+)?))?"
    r"(?![\w%]|[.,]\d)",
    re.IGNORECASE | re.ASCII,
)
_NAMES_IT = re.compile(r"\b(?:score|rating|points?|pairs?|total|sum)\b", re.IGNORECASE)
_ALONE = re.compile(rf"^[^\w\n]*{_NUMBER.pattern}[^\w\n]*$", re.IGNORECASE | re.ASCII | re.MULTILINE)
_UNUSABLE = re.compile(r"[-−]\d|^[-−]|</?\w")  # negative numbers, ranges, markup
_DENIED = re.compile(r"\b(?:not|no|cannot|unable|error|than)\b[^.\n]*$|n['’]t\b[^.\n]*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgeReply:
    """`score` in [0, 1], or None: missing, if `error` says why, else not applicable. `raw` is the judge's own text."""

    score: float | None
    raw: str | None = None
    error: str | None = None
    latency: float = 0.0  # seconds from the first request to the reply, all tries included
    faults: tuple[Fault, ...] = ()  # one for each request that failed


def parse_score(reply: str, maximum: int = 5) -> float | None:
    """Return the number from 0 to `maximum` that `reply` states as its score, else None.

    "4", "4.5", "**4**", "Score: 4", "4/5", "score is 4 out of 5" are scores. None for a number out of range, another
    denominator, two numbers that differ, a negative number, markup, and words around it that don't call it a score.
    """
    text = re.sub(r"[*_`#]", "", reply).strip()
    numbers = list(_NUMBER.finditer(text))
    values = {float(number[1]) for number in numbers}
    scales = {float(number[2]) for number in numbers if number[2]}
    if len(values) != 1 or max(values) > maximum or not scales <= {float(maximum)}:
        return None
    denied = any(_DENIED.search(text[: number.start()]) for number in numbers)
    if denied or _UNUSABLE.search(text) or re.search(r"\d", _NUMBER.sub("", text)):
        return None
    is_a_score = scales or _NAMES_IT.search(text) or _ALONE.search(text)
    return values.pop() if is_a_score else None


class Judge:
    """A client of the servers that `config` names, asking with the words of `prompts`.

    `first_delay`: seconds before the second try; it doubles from try to try, up to 30 s. Raises JudgeError for a URL
    that is none, and if the environment variable of the key isn't set.
    """

    def __init__(self, config: JudgeConfig, prompts: Prompts, *, first_delay: float = 0.5):
        self.config, self.prompts, self.first_delay = config, prompts, first_delay
        self._servers = [Server(url, config) for url in config.urls or [config.url]]
        self._turns = itertools.count()
        self._cache = Path(config.cache) if config.cache else None
        if self._cache:
            self._cache.mkdir(parents=True, exist_ok=True)
        self._replies = []

    def score(self, kind: str, **fields: Any) -> JudgeReply:
        """Ask with `prompts.judge_messages(kind, **fields)`, unless the cache has the score."""
        maximum = fields["most"] if kind == "synonyms" else 5
        messages = self.prompts.judge_messages(kind, **fields)
        path = self._cache and self._cache / f"{_digest(self.config.model, messages)}.json"
        score = _read_score(path) if path else None
        if score is not None:
            return JudgeReply(score)
        reply = self._ask(messages, maximum)
        if path and reply.score is not None:
            atomic_write(path, json.dumps({"score": reply.score}))
        self._replies.append(reply)
        return reply

    def probe(self) -> JudgeReply:
        """Ask one small question, also of servers that are left alone; the reply's `error` says why none answered."""
        return self._ask([{"role": "user", "content": "Reply with the number 5."}])

    def check(self) -> None:
        """Ask one small question; raises JudgeError if no server answers as one should."""
        reply = self.probe()
        if reply.error:
            urls = ", ".join(server.url for server in self._servers)
            raise JudgeError(
                f"no judge at {urls}: {reply.error}; judge.url is what /chat/completions is appended to, "
                "such as http://localhost:8000/v1, and judge.model the model's name there (judge=null: no judge)"
            )

    def take_replies(self) -> list[JudgeReply]:
        """Return the replies to all that was asked since the last call; the cache's are not among them."""
        replies, self._replies = self._replies, []
        return replies

    def _ask(self, messages: list[dict], maximum: int | None = None) -> JudgeReply:
        """Ask the servers in turn until a reply states a score up to `maximum`, or the tries are used up.

        Without a maximum any reply will do, and all servers are asked.
        """
        started = time.monotonic()
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        jitter = random.Random(_digest(self.config.model, messages))  # the same waits in every run
        turn = next(self._turns) % len(self._servers)
        servers = self._servers[turn:] + self._servers[:turn]
        raw, faults = None, []
        for attempt in range(self.config.max_retries + 1):
            wait = self.first_delay * 2**attempt * jitter.uniform(0.5, 1)
            ask_again = []
            for server in servers:
                if maximum and server.is_left_alone():
                    error = f"{server.host}: left alone, nobody was there"
                    continue
                reply = server.ask(body)
                if isinstance(reply, str):
                    raw = reply
                    points = parse_score(raw, maximum) if maximum else 1
                    if points is not None:
                        return JudgeReply(points / (maximum or 1), raw, None, time.monotonic() - started, tuple(faults))
                    reply = Fault("no_score", "the reply states no score")
                faults.append(reply)
                error = f"{server.host}: {reply.reason}"
                wait = max(wait, reply.after)
                if reply.kind != "http_other":
                    ask_again.append(server)
            servers = ask_again
            if not servers or attempt == self.config.max_retries:
                break
            time.sleep(min(_MAX_DELAY, wait))
        return JudgeReply(None, raw, error, time.monotonic() - started, tuple(faults))


class CompletionJudge:
    """The judge as the rewards use it, for one completion; `reply` keeps what the server said last. It waits."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self.reply = JudgeReply(None)

    def ask(self, kind: str, **fields: Any) -> float | None:
        """Return the score in [0, 1] of the rubric `kind`, filled with `fields`, or None."""
        self.reply = self.judge.score(kind, **fields)
        return self.reply.score

    def consistency(self, answer: str, reference: str) -> float | None:
        """Return how well two free-form answers agree, in [0, 1], or None."""
        return self.ask("consistency", answer=answer, reference=reference)

    def synonyms(self, answer: set[str], reference: set[str]) -> float | None:
        """Return F1 between two sets of emotion words with synonyms counted as one, or None.

        Words in both sets are paired without asking; the judge says how many of the others are synonyms.
        """
        first, second = sorted(answer - reference), sorted(reference - answer)
        if not first or not second:
            return set_f1(answer, reference)
        most = min(len(first), len(second))
        score = self.ask("synonyms", first="\n".join(first), second="\n".join(second), most=most)
        return None if score is None else set_f1(answer, reference, synonyms=score * most)


def _digest(model: str, messages: list[dict]) -> str:
    return hashlib.sha256(json.dumps([model, messages], sort_keys=True).encode()).hexdigest()


def _read_score(path: Path) -> float | None:
    """Return the score in a cache file; None if there is none or it can't be one: it is then asked for again."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        score = json.loads(path.read_text())["score"]
        return score if isinstance(score, float) and 0 <= score <= 1 else None
