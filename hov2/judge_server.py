"""One server of the judge's: a question by HTTP, its answer's text, or which of FAULTS kept it away.

Only the config is honoured: no proxies and no credentials from the environment or a URL, no redirects. A Fault never
quotes the request, which holds the prompt and the key, nor the reply, which may repeat them.
"""

import json
import logging
import os
import queue
import re
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from hov2.config import JudgeConfig
from hov2.distributed import print0

FAULTS = (
    "timeout",
    "refused",
    "reset",
    "connection",
    "broken_off",
    "http_429",
    "http_5xx",
    "http_other",
    "no_completion",
    "no_score",
)
DOWN_AFTER = 16  # requests in a row that found nobody (_NOBODY): the server is then left alone ...
DOWN_SECONDS = 10.0  # ... for so long, and after the next such request again
_NOBODY = ("timeout", "refused", "connection")
_KINDS = {
    TimeoutError: "timeout",
    ConnectionRefusedError: "refused",
    ConnectionError: "reset",
    HTTPException: "broken_off",
}  # the first that fits; any other error is "connection"
_STATUSES = {408: "timeout", 429: "http_429"}
_URL = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?(/[!$->A-~]*)?", re.ASCII | re.IGNORECASE)

logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote replies


class JudgeError(ValueError):
    """The judge can't be used; the message names its URL and what would be right."""


@dataclass(frozen=True)
class Fault:
    """Why a request brought no score. `reason` never quotes the request or the reply."""

    kind: str  # one of FAULTS
    reason: str
    after: float = 0.0  # seconds that the server wants to be left in peace


class Server:
    """One URL, with a pool of connections. Raises JudgeError for a URL that is none."""

    def __init__(self, url: str, config: JudgeConfig):
        if not _URL.fullmatch(url):
            shown = re.sub(".*@|[?].*", "", url)  # the rest may be a password
            raise JudgeError(
                f"judge.url: expected a base like http://localhost:8000/v1, with no user, password or query, "
                f"got {shown!r}"
            )
        self.url, self.host, self.timeout = url, urlsplit(url).netloc, config.timeout
        adapter = HTTPAdapter()
        # the system's certificates count beside those that requests brings along
        adapter.init_poolmanager(1, config.concurrency, ssl_context=ssl.create_default_context())
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update(_authorization(config.api_key_env))
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._lock = threading.Lock()
        self._unanswered = 0  # requests in a row that found nobody
        self._left_alone_until = 0.0

    def is_left_alone(self) -> bool:
        """Whether so many requests found nobody that others would only wait for their timeouts."""
        return time.monotonic() < self._left_alone_until

    def ask(self, body: dict) -> str | Fault:
        """Return the text of the chat completion that `body` asks for, or why there is none."""
        reply = self._post(body)
        with self._lock:
            if isinstance(reply, str) or reply.kind not in _NOBODY:
                self._unanswered, self._left_alone_until = 0, 0.0
                return reply
            self._unanswered += 1
            if self._unanswered >= DOWN_AFTER:
                self._left_alone_until = time.monotonic() + DOWN_SECONDS
            if self._unanswered == DOWN_AFTER:
                print0(
                    f"judge {self.url}: nobody there {DOWN_AFTER} times in a row, the last: {reply.reason}; "
                    f"left alone for {DOWN_SECONDS:g} s at a time"
                )
        return reply

    def _post(self, body: dict) -> str | Fault:
        """Ask in another thread, and wait no longer than `judge.timeout`, from connecting to the reply's last byte.

        The timeout that requests knows is one for each read: a server that drips a byte a second would never meet it.
        A thread that nobody waits for any more ends with its connection.
        """
        reply = queue.SimpleQueue()
        threading.Thread(target=lambda: reply.put(self._send(body)), daemon=True).start()
        try:
            return reply.get(timeout=self.timeout)
        except queue.Empty:
            return Fault("timeout", f"no reply within {self.timeout:g} s")

    def _send(self, body: dict) -> str | Fault:
        url = self.url.rstrip("/") + "/chat/completions"
        longer = self.timeout + 1  # so that it is always _post that gives up
        try:
            return _text_of(self._session.post(url, json=body, timeout=longer, allow_redirects=False))
        except Exception as error:  # noqa: BLE001, requests wraps most, but not all, that can go wrong
            return _fault_of(error)


def _fault_of(error: BaseException) -> Fault:
    """Return the Fault of a request that ended with `error`; only the type of its cause is told, not its words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    for error_type, kind in _KINDS.items():
        if isinstance(error, error_type):
            return Fault(kind, type(error).__name__)
    return Fault("connection", type(error).__name__)


def _text_of(response: requests.Response) -> str | Fault:
    """Return the text of a chat completion, or why there is none."""
    status = response.status_code
    if status != 200:
        kind = _STATUSES.get(status, "http_5xx" if status >= 500 else "http_other")
        after = response.headers.get("Retry-After", "")
        seconds = float(after) if re.fullmatch("[0-9]{1,6}", after) else 0.0  # a date isn't understood
        return Fault(kind, f"HTTP {status}", seconds)
    with suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
        text = json.loads(response.content)["choices"][0]["message"]["content"]
        if isinstance(text, str):
            return text
    return Fault("no_completion", "the reply is no chat completion")


def _authorization(api_key_env: str | None) -> dict[str, str]:
    """Return the header that carries the key, if there is one."""
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise JudgeError(
            f"judge.api_key_env: the environment variable {api_key_env} isn't set, or holds what no HTTP "
            "header can carry"
        )
    return {"Authorization": f"Bearer {key}"}
