"""The judge: scores by an OpenAI-compatible server, none of them ever guessed.

Every call waits for its reply; the threads of scoring.py ask for all of a step at once, beside the forward passes. A
score that could not be had (server down, reply without a score) is None, never 0. Parsed scores, and nothing else, are
kept in a folder of small files. Only the config is honoured: no proxies, no credentials from the environment or a URL,
no redirects.

What can go wrong is one of FAULTS, and counted. A server that fails again and again is left alone for a while
(`_Server`); scores are then missing at once. What a run does about missing scores is in scoring.py.
"""

import functools
import hashlib
import itertools
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from hov2.answers import block_text, set_f1
from hov2.distributed import atomic_write, print0

FAULTS = ("timeout", "refused", "reset", "connection", "broken_off", "http_429", "http_5xx", "http_other",
          "no_completion", "no_score", "breaker")  # breaker: not even asked
_KINDS = {TimeoutError: "timeout", ConnectionRefusedError: "refused", ConnectionError: "reset",
          HTTPException: "broken_off"}  # the first that fits; any other error is "connection"
_MAX_TOKENS = 32  # of a reply: room for "The score is 4 out of 5"
_MAX_DELAY = 30.0  # seconds between two tries, at most
_URL = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?(/[!$->A-~]*)?", re.ASCII | re.IGNORECASE)

# A number, with what it is out of: "4", "4.5", "4/5", "4 (out of 5)". Not one of "4th", "4%", "4,5", "1.2.3".
_NUMBER = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)(?:\s*(?:points?\s*)?\(?(?:/|out of|of)\s*(\d+(?:\.\d+)?))?"
                     r"(?![\w%]|[.,]\d)", re.IGNORECASE | re.ASCII)
_NAMES_IT = re.compile(r"\b(?:score|rating|points?|pairs?|total|sum)\b", re.IGNORECASE)
_ALONE = re.compile(rf"^[^\w\n]*{_NUMBER.pattern}[^\w\n]*$", re.IGNORECASE | re.ASCII | re.MULTILINE)
_UNUSABLE = re.compile(r"[-−]\d|^[-−]|</?\w")  # negative numbers, ranges, markup
_DENIED = re.compile(r"\b(?:not|no|cannot|unable|error|than)\b[^.\n]*$|n['’]t\b[^.\n]*$", re.IGNORECASE)


class JudgeError(ValueError):
    """The judge can't be used; the message names its URL and what would be right."""


class _Fault(Exception):
    """A request without a score: its kind, one of FAULTS; whether another try may mend it; Retry-After in seconds."""

    def __init__(self, kind, reason, again=True, after=0.0):
        super().__init__(reason)
        self.kind, self.again, self.after = kind, again, after


@dataclass(frozen=True)
class JudgeReply:
    """`score` in [0, 1], or None: missing, if `error` says why, else not applicable. `raw` is the judge's own text."""

    score: float | None
    raw: str | None = None
    error: str | None = None
    latency: float = 0.0  # seconds from the first request to the reply, all tries included
    faults: tuple = ()  # the _Fault of each try that failed


def parse_score(reply, maximum=5):
    """The number from 0 to `maximum` that `reply` states as its score, else None.

    "4", "4.5", "**4**", "Score: 4", "4/5", "score is 4 out of 5" are scores. None for a number out of range, another
    denominator, two numbers that differ, a negative number, markup, and words around it that don't call it a score.
    """
    text = re.sub(r"[*_`#]", "", reply).strip()
    numbers = list(_NUMBER.finditer(text))
    values, scales = ({float(number[part]) for number in numbers if number[part]} for part in (1, 2))
    if len(values) != 1 or max(values) > maximum or not scales <= {float(maximum)}:
        return None
    denied = any(_DENIED.search(text[: number.start()]) for number in numbers)
    if denied or _UNUSABLE.search(text) or re.search(r"\d", _NUMBER.sub("", text)):
        return None
    return values.pop() if scales or _NAMES_IT.search(text) or _ALONE.search(text) else None


class _Server:
    """One URL and its circuit breaker. Raises JudgeError for a URL that is none.

    After `breaker_failures` requests in a row without a score, whoever asked, it is left alone: every `breaker_seconds`
    one request finds out whether it is back, and no other is made. Each URL has its own breaker, so that a dead server
    costs nothing to those beside it. Every request has a connection of its own: none is stale after a restart.
    """

    def __init__(self, url, config, headers):
        if not _URL.fullmatch(url):  # what isn't shown of it may be a password
            raise JudgeError("judge.url: expected a base like http://localhost:8000/v1, with no user, password or "
                             f"query, got {re.sub('.*@|[?].*', '', url)!r}")
        parts = urlsplit(url)
        self.config, self.url, self.host = config, url, parts.netloc
        self._path, self._headers = parts.path.rstrip("/") + "/chat/completions", headers
        tls = {"context": ssl.create_default_context()} if parts.scheme == "https" else {}
        self._connect = functools.partial(HTTPSConnection if tls else HTTPConnection, self.host, **tls)
        self.failures, self.last, self._rests_until, self._lock = 0, None, 0.0, threading.Lock()

    def may_be_asked(self):
        """Whether to ask it now; while the breaker is open, a yes is for one request."""
        with self._lock:
            now = time.monotonic()
            if self.failures >= self.config.breaker_failures and now < self._rests_until:
                return False
            self._rests_until = now + self.config.breaker_seconds
            return True

    def note(self, fault=None):
        """What came of a request; one line when the breaker opens, and one when it closes."""
        limit = self.config.breaker_failures
        with self._lock:
            before, self.failures, self.last = self.failures, self.failures + 1 if fault else 0, fault
            if self.failures == limit:
                print0(f"judge {self.url}: {limit} failures in a row, the last: {fault}; left alone, but for one try in "
                    f"{self.config.breaker_seconds:g} s")
            elif not fault and before >= limit:
                print0(f"judge {self.url}: answers again")

    def post(self, body):
        """The text of the chat completion that `body` asks for, else _Fault. `config.timeout` counts for all of it."""
        started, fault = time.monotonic(), None
        with closing(self._connect(timeout=self.config.timeout)) as connection:
            try:
                connection.connect()
                # a socket's timeout is one for each read: a server that drips a byte a second would never meet it
                deadline = threading.Timer(started + self.config.timeout - time.monotonic(), _cut, [connection.sock])
                deadline.start()
                try:
                    connection.request("POST", self._path, body, self._headers)
                    response = connection.getresponse()
                    data = response.read()
                finally:
                    deadline.cancel()
            except (OSError, HTTPException, UnicodeError) as failure:
                kind = next((kind for error, kind in _KINDS.items() if isinstance(failure, error)), "connection")
                fault = _Fault(kind, type(failure).__name__)  # its own words may repeat the request
        if time.monotonic() - started >= self.config.timeout:
            raise _Fault("timeout", f"no reply within {self.config.timeout:g} s")
        if fault:
            raise fault
        return _text_of(response, data)


class Judge:
    """A client of the servers that `config` (JudgeConfig) names, asking with the words of `prompts`.

    `first_delay`: seconds before the second try; it doubles from try to try, up to 30 s. Raises ValueError for a URL
    that is none, and if the environment variable of the key isn't set.
    """

    def __init__(self, config, prompts, *, first_delay=0.5):
        self.config, self.prompts, self.first_delay = config, prompts, first_delay
        headers = {"Content-Type": "application/json", "Connection": "close"} | _authorization(config.api_key_env)
        self._servers = [_Server(url, config, headers) for url in config.urls or [config.url]]
        self._cache = Path(config.cache) if config.cache else None
        if self._cache:
            self._cache.mkdir(parents=True, exist_ok=True)
        self._turns, self._replies = itertools.count(), []

    # ---- asking ----

    def score(self, kind, **fields):
        """The JudgeReply to `prompts.judge_messages(kind, **fields)`; from the cache, if the same was asked before."""
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

    def context(self, completion, solution):
        """The context reward of a completion: how far its context covers the solution's.

        0 without a request if the completion has no context; None without an error if the solution has none.
        """
        reference, candidate = block_text(solution, "context"), block_text(completion, "context")
        if not reference or not candidate:
            return JudgeReply(0.0 if reference else None)
        return self.score("context", reference=reference, candidate=candidate)

    def logic(self, completion):
        """The logic reward of a completion; 0 without a request if it has no context or no think block."""
        blocks = {tag: block_text(completion, tag) for tag in ("context", "think")}
        return self.score("logic", **blocks) if all(blocks.values()) else JudgeReply(0.0)

    def probe(self):
        """The JudgeReply to one small question, whose `error` says why if there was none; open breakers don't count."""
        return self._ask([{"role": "user", "content": "Reply with the number 5."}])

    def check(self):
        """Asks one small question; raises JudgeError if no server answers as one should."""
        reply = self.probe()
        if reply.error:
            urls = ", ".join(server.url for server in self._servers)
            raise JudgeError(f"no judge at {urls}: {reply.error}; judge.url is what /chat/completions is appended to, "
                             "such as http://localhost:8000/v1, and judge.model the model's name there")

    def forgive(self):
        """Forgets the servers' failures, so that all may be asked again: the judge is known to be back."""
        for server in self._servers:
            server.failures = 0

    def take_replies(self):
        """The replies to all that was asked since the last call; what the cache answered is not among them."""
        replies, self._replies = self._replies, []
        return replies

    # ---- one score ----

    def _ask(self, messages, maximum=None):
        """Asks the servers in turn until a reply states a score up to `maximum`, or the tries are used up. A try is a
        request to each whose breaker is closed. Without a maximum any reply will do, and all servers are asked."""
        started, raw, faults = time.monotonic(), None, []
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        jitter = random.Random(_digest(self.config.model, messages))  # the same waits in every run
        turn = next(self._turns) % len(self._servers)
        servers = self._servers[turn:] + self._servers[:turn]
        for attempt in range(self.config.max_retries + 1):
            for server in servers:
                try:
                    if maximum and not server.may_be_asked():
                        raise _Fault("breaker", f"left alone after failures, the last: {server.last}", again=False)
                    raw = server.post(json.dumps(body))
                    points = parse_score(raw, maximum) if maximum else 0
                    if points is None:
                        raise _Fault("no_score", "the reply states no score")
                    server.note()
                    return JudgeReply(points / (maximum or 1), raw, None, time.monotonic() - started, faults)
                except _Fault as fault:
                    faults.append(fault.with_traceback(None))  # whose frames would keep the request
                    if fault.kind != "breaker":
                        server.note(fault)
            latest = faults[-len(servers):]
            servers = [server for server, fault in zip(servers, latest) if fault.again]
            delay = max(self.first_delay * 2**attempt * jitter.uniform(0.5, 1), *(fault.after for fault in latest))
            if not servers or attempt == self.config.max_retries:
                break
            time.sleep(min(_MAX_DELAY, delay))
        return JudgeReply(None, raw, f"{server.host}: {latest[-1]}", time.monotonic() - started, faults)


class AccuracyJudge:
    """The judge as `rewards.accuracy_reward` uses it, for one answer; `reply` keeps what the server said. It waits."""

    def __init__(self, judge):
        self.judge, self.reply = judge, JudgeReply(None)

    def consistency(self, answer, reference):
        """How well two free-form answers agree, in [0, 1], or None."""
        return self._ask("consistency", answer=answer, reference=reference)

    def synonyms(self, answer, reference):
        """F1 between two sets of emotion words with synonyms counted as one, or None.

        Words in both sets are paired without asking; the judge says how many of the others are synonyms.
        """
        first, second = sorted(answer - reference), sorted(reference - answer)
        if not first or not second:
            return set_f1(answer, reference)
        most = min(len(first), len(second))
        score = self._ask("synonyms", first="\n".join(first), second="\n".join(second), most=most)
        return None if score is None else set_f1(answer, reference, synonyms=score * most)

    def _ask(self, kind, **fields):
        self.reply = self.judge.score(kind, **fields)
        return self.reply.score


def _authorization(api_key_env):
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise JudgeError(f"judge.api_key_env: the environment variable {api_key_env} isn't set, or holds what no HTTP "
                         "header can carry")
    return {"Authorization": f"Bearer {key}"}


def _cut(sock):
    """Ends what another thread reads from a socket, as if the server had."""
    with suppress(OSError):  # it is closed by now
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own would pull TLS from under the reader


def _text_of(response, data):
    """The text of a chat completion, or _Fault."""
    status, after = response.status, response.getheader("Retry-After", "")
    if status != 200:
        kind = "http_429" if status == 429 else "http_5xx" if status >= 500 else "http_other"
        seconds = float(after) if re.fullmatch("[0-9]{1,6}", after) else 0.0  # a date isn't understood
        raise _Fault(kind, f"HTTP {status}", status in (408, 429) or status >= 500, seconds)
    with suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = json.loads(data)["choices"][0]["message"]["content"]
        if isinstance(text, str):
            return text
    raise _Fault("no_completion", "the reply is no chat completion")


def _digest(model, messages):
    return hashlib.sha256(json.dumps([model, messages], sort_keys=True).encode()).hexdigest()


def _read_score(path):
    """The score in a cache file; None if there is none or it can't be one (it is then asked for and written anew)."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        score = json.loads(path.read_text())["score"]
        return score if isinstance(score, float) and 0 <= score <= 1 else None
