"""The judge: scores by an OpenAI-compatible server, all of a step asked at once, none of them ever guessed.

`submit` returns a future at once and a thread pool does the asking, so that HTTP overlaps with forward passes. A score
that could not be had (server down, reply without a score) is None, never 0. Parsed scores, and nothing else, are kept
in a folder of small files. Only the config is honoured: no proxies, no credentials from the environment, no redirects.
"""

import hashlib
import json
import math
import os
import random
import re
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from hov2.rewards import block_text, set_f1

_MAX_TOKENS = 32  # of a reply: room for "The score is 4 out of 5"
_MAX_DELAY = 30.0  # seconds between two tries, at most

# A number, with what it is out of: "4", "4.5", "4/5", "4 (out of 5)". Not one of "4th", "4%", "4,5", "1.2.3".
_NUMBER = re.compile(
    r"(?<![\w.,])(\d+(?:\.\d+)?)(?:\s*(?:points?\s*)?\(?(?:/|out of|of)\s*(\d+(?:\.\d+)?))?(?![\w%]|[.,]\d)",
    re.IGNORECASE | re.ASCII,
)
_NAMES_IT = re.compile(r"\b(?:score|rating|points?|pairs?|total|sum)\b", re.IGNORECASE)
_ALONE = re.compile(rf"^[^\w\n]*{_NUMBER.pattern}[^\w\n]*$", re.IGNORECASE | re.ASCII | re.MULTILINE)
_UNUSABLE = re.compile(r"[-−]\d|^[-−]|</?\w")  # negative numbers, ranges, markup
_DENIED = re.compile(r"\b(?:not|no|cannot|unable|error|than)\b[^.\n]*$|n['’]t\b[^.\n]*$", re.IGNORECASE)


class JudgeError(ValueError):
    """The judge can't be used; the message names its URL and what would be right."""


class _TryAgain(Exception):
    """A failure that another try may mend; `after` is the server's Retry-After in seconds."""

    def __init__(self, reason, after=0.0):
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class JudgeReply:
    """`score` in [0, 1], or None: missing, if `error` says why, else not applicable. `raw` is the judge's own text."""

    score: float | None
    raw: str | None = None
    error: str | None = None
    latency: float = 0.0  # seconds from the first request to the reply, all tries included


def parse_score(reply, maximum=5):
    """The number from 0 to `maximum` that `reply` states as its score, else None.

    "4", "4.5", "**4**", "Score: 4", "4/5", "score is 4 out of 5" are scores. None for a number out of range, another
    denominator, two numbers that differ, a negative number, markup, and words around it that don't call it a score.
    """
    text = re.sub(r"[*_`#]", "", reply).strip()
    numbers = list(_NUMBER.finditer(text))
    if not numbers or _UNUSABLE.search(text) or re.search(r"\d", _NUMBER.sub("", text)):
        return None
    values = {float(number[1]) for number in numbers}
    scales = {float(number[2]) for number in numbers if number[2]}
    if len(values) > 1 or max(values) > maximum or not scales <= {float(maximum)}:
        return None
    if any(_DENIED.search(text[: number.start()]) for number in numbers):
        return None
    return values.pop() if scales or _NAMES_IT.search(text) or _ALONE.search(text) else None


class Judge:
    """A client of the server that `config` (JudgeConfig) names, asking with the words of `prompts`.

    `first_delay`: seconds before the second try; it doubles from try to try, up to 30 s. Raises ValueError for a URL
    that is none, and if the environment variable of the key isn't set.
    """

    def __init__(self, config, prompts, *, first_delay=0.5):
        self.config, self.prompts, self.first_delay = config, prompts, first_delay
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(f"judge.url: expected a base like http://localhost:8000/v1, got {config.url!r}")
        self.host = parts.hostname + (f":{parts.port}" if parts.port else "")
        self._shown_url = f"{parts.scheme}://{self.host}{parts.path}"  # without user:password@
        self._headers = _headers(config.api_key_env)
        self._cache = Path(config.cache) if config.cache else None
        if self._cache:
            self._cache.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="judge")
        self._local, self._lock, self._closed = threading.local(), threading.Lock(), threading.Event()
        self._sessions, self._replies = [], []

    def __repr__(self):
        return f"Judge({self._shown_url}, {self.config.model})"

    # ---- asking ----

    def submit(self, kind, **fields):
        """Asks `prompts.judge_messages(kind, **fields)` in the background; a future of JudgeReply."""
        maximum = fields["most"] if kind == "synonyms" else 5
        messages = self.prompts.judge_messages(kind, **fields)
        return self._pool.submit(self._score, messages, maximum)

    def submit_context(self, completion, solution):
        """The context reward of a completion: how far its context covers the solution's.

        0 without a request if the completion has no context; None without an error if the solution has none.
        """
        reference, candidate = block_text(solution, "context"), block_text(completion, "context")
        if not reference:
            return _ready(JudgeReply(None))
        if not candidate:
            return _ready(JudgeReply(0.0))
        return self.submit("context", reference=reference, candidate=candidate)

    def submit_logic(self, completion):
        """The logic reward of a completion; 0 without a request if it has no context or no think block."""
        context, think = block_text(completion, "context"), block_text(completion, "think")
        return self.submit("logic", context=context, think=think) if context and think else _ready(JudgeReply(0.0))

    def check(self):
        """Asks one small question; raises JudgeError if the server doesn't answer as one should."""
        reply = self._ask([{"role": "user", "content": "Reply with the number 5."}], parse=len)
        if reply.error:
            raise JudgeError(
                f"no judge at {self._shown_url}: {reply.error}; judge.url is what /chat/completions is appended to, "
                "such as http://localhost:8000/v1, and judge.model the model's name there"
            )

    def stats(self):
        """Since the last call: requests (cache hits are none), failures, failure_rate, latency (mean seconds)."""
        with self._lock:
            replies, self._replies = self._replies, []
        failures = sum(reply.error is not None for reply in replies)
        count = max(1, len(replies))
        latency = sum(reply.latency for reply in replies) / count
        return {"requests": len(replies), "failures": failures, "failure_rate": failures / count, "latency": latency}

    def close(self):
        """Gives up what is still being asked and closes the connections."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        for session in self._sessions:
            session.close()

    # ---- one score ----

    def _score(self, messages, maximum):
        path = self._cache and self._cache / f"{_digest(self.config.model, messages)}.json"
        score = _read_score(path) if path else None
        if score is not None:
            return JudgeReply(score)
        reply = self._ask(messages, parse=lambda text: _share(parse_score(text, maximum), maximum))
        if path and reply.score is not None:
            _write_score(path, reply.score)
        with self._lock:
            self._replies.append(reply)
        return reply

    def _ask(self, messages, parse):
        """Tries until `parse` makes a score of the reply, or the tries are used up."""
        started, raw = time.monotonic(), None
        jitter = random.Random(_digest(self.config.model, messages))  # the same waits in every run
        for attempt in range(self.config.max_retries + 1):
            try:
                raw = self._post(messages)
                score = parse(raw)
                if score is not None:
                    return JudgeReply(score, raw, None, time.monotonic() - started)
                raise _TryAgain("the reply states no score")
            except _TryAgain as failure:
                error = f"{self.host}: {failure}"
                delay = min(_MAX_DELAY, max(failure.after, self.first_delay * 2**attempt * jitter.uniform(0.5, 1)))
            except JudgeError as failure:
                error = f"{self.host}: {failure}"
                break
            if attempt == self.config.max_retries or self._closed.wait(delay):
                break
        return JudgeReply(None, raw, error, time.monotonic() - started)

    def _post(self, messages):
        """One request: the reply's text. _TryAgain or JudgeError otherwise, with words of ours only, since those of an
        exception or a server may repeat the request."""
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        url = self.config.url.rstrip("/") + "/chat/completions"
        try:
            response = self._session().post(url, json=body, timeout=self.config.timeout, allow_redirects=False)
        except requests.Timeout:
            raise _TryAgain(f"no reply within {self.config.timeout:g} s") from None
        except requests.exceptions.SSLError:
            raise JudgeError("the TLS handshake failed") from None
        except requests.ConnectionError as failure:
            raise _TryAgain(_connection_reason(str(failure))) from None
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
            raise _TryAgain("the reply broke off") from None
        except requests.exceptions.InvalidURL:
            raise JudgeError("not a valid URL") from None
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _TryAgain(f"HTTP {status}", _seconds(response.headers.get("Retry-After", "")))
        if status != 200:
            raise JudgeError(f"HTTP {status}")
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (requests.JSONDecodeError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _TryAgain("the reply is no chat completion")
        return text

    def _session(self):
        """This thread's session."""
        if not hasattr(self._local, "session"):
            session = requests.Session()
            session.trust_env = False
            session.headers.update(self._headers)
            self._local.session = session
            with self._lock:
                self._sessions.append(session)
        return self._local.session


class AccuracyJudge:
    """The judge as `rewards.accuracy_reward` uses it, for one answer; `reply` keeps what the server said. It waits."""

    def __init__(self, judge):
        self.judge, self.reply = judge, None

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
        self.reply = self.judge.submit(kind, **fields).result()
        return self.reply.score


def _headers(api_key_env):
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise JudgeError(f"judge.api_key_env: the environment variable {api_key_env} isn't set")
    if not key.isascii() or not key.isprintable():
        raise JudgeError(f"judge.api_key_env: {api_key_env} holds characters that no HTTP header can carry")
    return {"Authorization": f"Bearer {key}"}


def _connection_reason(text):
    reasons = {"refused": "connection refused", "resolve": "no such host", "reset": "connection reset"}
    return next((reason for word, reason in reasons.items() if word in text), "the connection failed")


def _ready(reply):
    future = Future()
    future.set_result(reply)
    return future


def _share(value, maximum):
    return None if value is None else value / maximum


def _seconds(retry_after):
    return float(retry_after) if re.fullmatch(r"\d{1,6}", retry_after) else 0.0


def _digest(model, messages):
    return hashlib.sha256(json.dumps([model, messages], sort_keys=True).encode()).hexdigest()


def _read_score(path):
    """The score in a cache file; None if there is none or it can't be one (it is then asked for and written anew)."""
    try:
        score = json.loads(path.read_text())["score"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return score if isinstance(score, float) and 0 <= score <= 1 and math.isfinite(score) else None


def _write_score(path, score):
    """Atomically: other threads and processes see the whole file or none."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"score": float(score)}, file)
    os.replace(file.name, path)
