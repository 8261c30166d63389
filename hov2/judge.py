"""The judge: scores by an OpenAI-compatible server, none of them ever guessed.

Every call waits for its reply; the threads of scoring.py ask for all of a step at once, beside the forward passes. A
score that could not be had is None, never 0; what a run does about it is in scoring.py. Parsed scores, and nothing
else, are kept in a folder of small files. The requests themselves are in judge_server.py.
"""

import hashlib
import itertools
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hov2.answers import set_f1
from hov2.config import JudgeConfig
from hov2.distributed import WriteError, atomic_write, print0, writing
from hov2.judge_reply import Answer, Fault, quoted
from hov2.judge_score import parse_score
from hov2.judge_server import ANSWERED, JudgeError, Server
from hov2.prompts import Prompts

_MAX_DELAY = 30.0  # seconds between two tries, at most
_ABOUT_SCORES = ("cut_off", "no_score")  # faults of the reply's words: the same words get the same reply
_CLIP = "A woman in a red shirt holds up a sheet with the number 5 on it and laughs."  # for the first question


@dataclass(frozen=True)
class JudgeReply:
    """`score` in [0, 1], or None: missing, if `error` says why, else not applicable. `raw` is the judge's own text."""

    score: float | None
    raw: str | None = None
    error: str | None = None
    latency: float = 0.0  # seconds from the first request to the reply, all tries included
    faults: tuple[Fault, ...] = ()  # one for each request that failed
    words: str = ""  # what the server said instead, in quotes; nothing of the prompt or the key

    @property
    def reason(self) -> str:
        """`error` with the server's words."""
        return f"{self.error}: {self.words}" if self.words else str(self.error)

    @property
    def is_down(self) -> bool:
        """Whether there is no score because nobody answered, so that it may help to wait."""
        return self.error is not None and not (self.faults and self.faults[-1].kind in ANSWERED)


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
            with writing(self._cache):
                self._cache.mkdir(parents=True, exist_ok=True)
        self._cache_fails = False
        self._replies = []

    def score(self, kind: str, **fields: Any) -> JudgeReply:
        """Ask with `prompts.judge_messages(kind, **fields)`, unless the cache has the score."""
        maximum = fields["most"] if kind == "synonyms" else 5
        messages = self.prompts.judge_messages(kind, **fields)
        path = self._cache and self._cache / f"{self._digest(messages)}.json"
        score = _read_score(path) if path else None
        if score is not None:
            return JudgeReply(score)
        reply = self._ask(messages, maximum, private=[str(text) for text in fields.values()])
        if path and reply.score is not None:
            self._keep(path, reply.score)
        self._replies.append(reply)
        return reply

    def probe(self) -> JudgeReply:
        """Ask a rubric's question about an invented clip, also servers that are left alone; not cached or counted."""
        messages = self.prompts.judge_messages("context", reference=_CLIP, candidate=_CLIP)
        return self._ask(messages, 5, private=[], leave_alone=False)

    def check(self) -> None:
        """Ask one question; raises JudgeError, with the server's words, if no server gives a score."""
        reply = self.probe()
        if reply.error is None:
            return
        urls = ", ".join(server.url for server in self._servers)
        kind = reply.faults[-1].kind
        if kind in _ABOUT_SCORES:
            advice = (
                "a judge has to state the score that it is asked for, a number from 0 to 5; one that reasons first "
                f"needs a higher judge.max_tokens (now {self.config.max_tokens}), or its reasoning turned off by "
                "judge.extra_body"
            )
        elif reply.faults[-1].reason in ("HTTP 400", "HTTP 422"):
            advice = 'fields of the request are changed by judge.extra_body, and left out by null: {"max_tokens": null}'
        else:
            advice = (
                "judge.url is what /chat/completions is appended to, such as http://localhost:8000/v1, and "
                "judge.model the model's name there (judge=null: no judge)"
            )
        raise JudgeError(f"no judge at {urls}: {reply.reason}; {advice}")

    def take_replies(self) -> list[JudgeReply]:
        """Return the replies to all that was asked since the last call; the cache's are not among them."""
        replies, self._replies = self._replies, []
        return replies

    def _ask(self, messages: list[dict], maximum: int, private: list[str], leave_alone: bool = True) -> JudgeReply:
        """Ask the servers in turn until a reply states a score up to `maximum`, or the tries are used up.

        `private`: texts that no log may show. `leave_alone`: not the servers where nobody was.
        """
        started = time.monotonic()
        jitter = random.Random(messages[0]["content"])  # the same waits in every run
        turn = next(self._turns) % len(self._servers)
        servers = self._servers[turn:] + self._servers[:turn]
        raw, faults, words = None, [], ""
        for attempt in range(self.config.max_retries + 1):
            wait = self.first_delay * 2**attempt * jitter.uniform(0.5, 1)
            ask_again = []
            for server in servers:
                if leave_alone and server.is_left_alone():
                    error, words = f"{server.host}: left alone, nobody was there", ""
                    continue
                reply = server.ask(messages, faults)
                if isinstance(reply, Answer):
                    raw = reply.text
                    points = parse_score(raw, maximum)
                    if points is not None:
                        return JudgeReply(points / maximum, raw, None, time.monotonic() - started, tuple(faults))
                    reply = Fault("no_score", "the reply states no score", words=raw or "(empty)")
                if reply.kind in _ABOUT_SCORES:
                    raw = reply.words
                faults.append(reply)
                error, words = f"{server.host}: {reply.reason}", quoted(reply.words, private)
                wait = max(wait, reply.after)
                if reply.kind not in ANSWERED and not reply.asks_for_patience:
                    ask_again.append(server)
            servers = ask_again
            if not servers or attempt == self.config.max_retries:
                break
            time.sleep(min(_MAX_DELAY, wait))
        return JudgeReply(None, raw, error, time.monotonic() - started, tuple(faults), words)

    def _keep(self, path: Path, score: float) -> None:
        """Write a score to the cache. Where that fails, as on a full disk, say so once: the score itself is there."""
        try:
            atomic_write(path, json.dumps({"score": score}))
        except WriteError as error:
            if not self._cache_fails:
                print0(f"warning: judge.cache: {error}; scores that are not kept are asked for again")
            self._cache_fails = True

    def _digest(self, messages: list[dict]) -> str:
        """What a score depends on, as a file's name: another server may have another model of the same name."""
        config = self.config
        parts = [config.model, sorted(server.url for server in self._servers), config.extra_body, messages]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


def _read_score(path: Path) -> float | None:
    """Return the score in a cache file; None if there is none or it can't be one: it is then asked for again."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        score = json.loads(path.read_text())["score"]
        return score if isinstance(score, float) and 0 <= score <= 1 else None
