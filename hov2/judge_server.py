"""One server of the judge's: a question by HTTP, its answer, or which of FAULTS kept it away.

No credentials from the URL or a .netrc file, and no redirects. Proxies and certificates are as requests finds them in
the environment, but there is no proxy to this machine itself. A Fault's `reason` quotes neither the request, which
holds the prompt and the key, nor the reply, which may repeat them.
"""

import logging
import os
import queue
import re
import ssl
import threading
import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ProxyError

from hov2.config import JudgeConfig
from hov2.distributed import print0
from hov2.judge_reply import Answer, Fault, quoted, read_reply
from hov2.pace import Pace

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
    "cut_off",
    "no_score",
)
ANSWERED = ("http_other", "cut_off", "no_score")  # the server is there, and would reply the same again
DOWN_AFTER = 16  # requests in a row that found nobody (_NOBODY): the server is then left alone ...
DOWN_SECONDS = 10.0  # ... for so long, and after the next such request again
_NOBODY = ("timeout", "refused", "connection")
_KINDS = {
    TimeoutError: "timeout",
    ConnectionRefusedError: "refused",
    ConnectionError: "reset",
    HTTPException: "broken_off",
}  # the first that fits; any other error is "connection"
_URL = re.compile(r"https?://([\w.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?(/[!$->A-~]*)?", re.ASCII | re.IGNORECASE)
_THIS_MACHINE = re.compile(r"localhost|127\.[\d.]+|::1")

logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote replies


class JudgeError(ValueError):
    """The judge can't be used; the message names its URL and what would be right."""


class Server:
    """One URL, with a pool of connections. Raises JudgeError for a URL that is none."""

    def __init__(self, url: str, config: JudgeConfig):
        if not _URL.fullmatch(url):
            shown = re.sub(".*@|[?].*", "", url)  # the rest may be a password
            raise JudgeError(
                f"judge.url: expected a base like http://localhost:8000/v1, with no user, password or query, "
                f"got {shown!r}"
            )
        self.url, self.host, self.config = url, urlsplit(url).netloc, config
        adapter = HTTPAdapter()
        # the system's certificates count beside those that requests brings along
        adapter.init_poolmanager(1, config.concurrency, ssl_context=ssl.create_default_context())
        self._session = requests.Session()
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._key = _key(config.api_key_env)
        self._session.auth = self._authorize  # without one, requests would look for a password in ~/.netrc
        hostname = urlsplit(url).hostname
        self._proxies = {"no_proxy": hostname} if _THIS_MACHINE.fullmatch(hostname) else None
        self._pace = Pace()
        self._lock = threading.Lock()
        self._unanswered = 0  # requests in a row that found nobody
        self._left_alone_until = 0.0
        self._limits = False  # how often it may be asked

    def is_left_alone(self) -> bool:
        """Whether so many requests found nobody that others would only wait for their timeouts."""
        return time.monotonic() < self._left_alone_until

    def ask(self, messages: list[dict], refusals: list[Fault]) -> Answer | Fault:
        """Return the answer to `messages`, or why there is none.

        A server that was only asked too often (HTTP 429, or 503 with Retry-After) is asked again, at a pace that it
        takes, and each of these faults is added to `refusals`. The last one is returned if it takes nothing at all.
        """
        body = self.request(messages)
        while True:
            started = self._pace.wait_for_turn()
            if started is None:
                return refusals.pop() if refusals else Fault("http_429", "left alone, it takes no requests")
            reply = self._post(body)
            if isinstance(reply, Answer) or not reply.asks_for_patience:
                break
            refusals.append(reply)
            self._pace.refused(started, reply.after)
            self._note_limits(reply, messages)
        self._pace.taken(started)
        self._count_unanswered(reply)
        return reply

    def request(self, messages: list[dict]) -> dict[str, Any]:
        """Return the JSON object of a request."""
        config = self.config
        body = {"model": config.model, "messages": messages, "temperature": 0, "max_tokens": config.max_tokens}
        body |= config.extra_body
        return {name: value for name, value in body.items() if value is not None}

    def _note_limits(self, refusal: Fault, messages: list[dict]) -> None:
        """Say once that the server limits, so that a run which waits for it doesn't look like one that hangs."""
        with self._lock:
            is_known, self._limits = self._limits, True
        if not is_known:
            words = quoted(refusal.words, [message["content"] for message in messages])
            print0(f"judge {self.url}: {refusal.reason} {words}".rstrip() + "; from now on asked as often as it allows")

    def _count_unanswered(self, reply: Answer | Fault) -> None:
        """Leave a server alone that is not there."""
        with self._lock:
            if isinstance(reply, Answer) or reply.kind not in _NOBODY:
                self._unanswered, self._left_alone_until = 0, 0.0
                return
            self._unanswered += 1
            if self._unanswered >= DOWN_AFTER:
                self._left_alone_until = time.monotonic() + DOWN_SECONDS
            if self._unanswered == DOWN_AFTER:
                print0(
                    f"judge {self.url}: nobody there {DOWN_AFTER} times in a row, the last: {reply.reason}; "
                    f"left alone for {DOWN_SECONDS:g} s at a time"
                )

    def _post(self, body: dict) -> Answer | Fault:
        """Ask in another thread, and wait no longer than `judge.timeout`, from connecting to the reply's last byte.

        The timeout that requests knows is one for each read: a server that drips a byte a second would never meet it.
        """
        reply = queue.SimpleQueue()
        threading.Thread(target=lambda: reply.put(self._send(body)), daemon=True).start()
        try:
            return reply.get(timeout=self.config.timeout)
        except queue.Empty:
            return Fault("timeout", f"no reply within {self.config.timeout:g} s")

    def _send(self, body: dict) -> Answer | Fault:
        url = self.url.rstrip("/") + "/chat/completions"
        longer = self.config.timeout + 1  # so that it is always _post that gives up
        deadline = time.monotonic() + longer
        options = {"timeout": longer, "allow_redirects": False, "stream": True, "proxies": self._proxies}
        try:
            with self._session.post(url, json=body, **options) as response:
                content = bytearray()
                for part in response.iter_content(64):
                    content += part
                    if time.monotonic() > deadline:
                        raise TimeoutError  # nobody waits any more: the connection ends
            if self._key:
                content = content.replace(self._key.encode(), b"***")
            return read_reply(response, bytes(content))
        except Exception as error:  # noqa: BLE001, requests wraps most, but not all, that can go wrong
            return _fault_of(error)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _fault_of(error: BaseException) -> Fault:
    """Return the Fault of a request that ended with `error`; of its cause only what can't repeat the request."""
    where = "at the proxy that the environment names: " if isinstance(error, ProxyError) else ""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    name = type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = "REQUESTS_CA_BUNDLE can name a file of certificates to trust"
        return Fault("connection", f"its certificate is not trusted ({error.verify_message}); {advice}")
    if isinstance(error, ssl.SSLError):
        return Fault("connection", f"{where}no TLS there ({error.reason or name})")
    if "TLS CA certificate bundle" in str(error):
        return Fault("connection", "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names no file")
    status = re.match(r"Tunnel connection failed: (\d{3})", str(error))
    if status:
        return Fault("connection", f"{where}HTTP {status[1]}")
    for error_type, kind in _KINDS.items():
        if isinstance(error, error_type):
            return Fault(kind, where + name)
    return Fault("connection", where + name)


def _key(api_key_env: str | None) -> str | None:
    """Return the key, if there is one."""
    if api_key_env is None:
        return None
    key = os.environ.get(api_key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise JudgeError(
            f"judge.api_key_env: the environment variable {api_key_env} isn't set, or holds what no HTTP "
            "header can carry"
        )
    return key
