"""What an HTTP reply of a judge holds: an answer, or what is wrong with it."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime

import requests

_STATUSES = {408: "timeout", 429: "http_429"}
_NOT_ENDED = ("length", "max_tokens", "model_length", "content_filter", "abort", "error")  # finish reasons


@dataclass(frozen=True)
class Answer:
    """The text of a chat completion that the server ended by itself."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Fault:
    """Why a request brought no score. `reason` never quotes the request or the reply."""

    kind: str  # one of judge_server.FAULTS
    reason: str
    after: float = 0.0  # seconds that the server wants to be left in peace
    words: str = field(default="", repr=False)  # the server's own; they may repeat the prompt

    @property
    def asks_for_patience(self) -> bool:
        """Whether the server is there and was only asked too often."""
        return self.kind == "http_429" or (self.kind == "http_5xx" and self.after > 0)


def read_reply(response: requests.Response, content: bytes) -> Answer | Fault:
    """Return the answer that a whole HTTP reply holds, or why it holds none."""
    status = response.status_code
    if status != 200:
        kind = _STATUSES.get(status, "http_5xx" if status >= 500 else "http_other")
        return Fault(kind, f"HTTP {status}", _retry_after(response), _error_words(content))
    try:
        choice = json.loads(content)["choices"][0]
        finish_reason = choice.get("finish_reason")
        text = _text(choice["message"]["content"])
        reasoning = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Fault("no_completion", "the reply is no chat completion", words=_error_words(content))
    said = text or str(reasoning or "")
    if str(finish_reason).lower() in _NOT_ENDED:
        reason = f"the reply was cut off (finish_reason {finish_reason!r}); judge.max_tokens is its limit"
        return Fault("cut_off", reason, words=said)
    if text is None and reasoning:
        reason = f"all reasoning, no content (finish_reason {finish_reason!r}); judge.max_tokens is the limit of both"
        return Fault("no_score", reason, words=said)
    if text is None:
        return Fault("no_completion", "the reply is no chat completion", words=_error_words(content))
    return Answer(text, finish_reason)


def _text(content: object) -> str | None:
    """The text of a message, which some servers send in parts, reasoning among them; None if there is none."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if part["type"] == "text"]
        content = "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def _retry_after(response: requests.Response) -> float:
    """The seconds that a server asks for; 0 if it doesn't say, or in no known way."""
    after = response.headers.get("Retry-After", "")
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", after):
        return float(after)
    with suppress(ValueError, TypeError):
        now = response.headers.get("Date") or formatdate(usegmt=True)  # the server's clock, if it says
        return max(0.0, (parsedate_to_datetime(after) - parsedate_to_datetime(now)).total_seconds())
    return 0.0


def _error_words(content: bytes) -> str:
    """What an error's body says in words: the message in its JSON, or its text without markup."""
    text = content.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        said = json.loads(text)
        while isinstance(said, dict):
            said = said.get("error") or said.get("message") or said.get("detail")
        if said is not None:
            text = str(said)
    return re.sub(r"<[^>]*>", " ", text)


def quoted(words: str, private: list[str], most: int = 200) -> str:
    """Return a server's words in quotes, on one line and shortened; "" if they repeat 20 letters of a `private` text.

    A private text of less than 20 letters is looked for as a whole, from 8 letters on.
    """
    said = _letters(words)
    for text in private:
        letters = _letters(text)
        size = min(20, len(letters))
        pieces = [letters[start : start + size] for start in range(len(letters) - size + 1)]
        if size >= 8 and any(piece in said for piece in pieces):
            return ""
    line = " ".join(words.split())
    if len(line) > most:
        line = line[:most] + "..."
    return json.dumps(line, ensure_ascii=False) if line else ""


def _letters(text: str) -> str:
    """The letters and digits of a text alone, so that it is known again behind JSON's escapes."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), text)
    text = re.sub(r"\\[nrt]", " ", text)
    return re.sub(r"[\W_]+", "", text).casefold()
