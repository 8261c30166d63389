"""The toy's judge: rules that count words, behind a real HTTP server, so that the real client asks as it would a model.

It is no language model, and its scores say nothing about how good one's would be.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hov2.toy.world import DATA, FACES, VOICES, WALLS

CUES = (set(FACES), set(VOICES), set(WALLS))  # by kind
CLAIMS = set(DATA["judge"]["claims"])
SYNONYMS = [set(group) for group in DATA["judge"]["synonyms"]]
FULL_SCORE = 5

# A text in a judge's message, between its marks (prompts.py): [NAME], the text, [End of NAME].
MARKED_TEXT = re.compile(r"^\[([^\]]+)\]\n(.*?)\n\[End of ", re.DOTALL | re.MULTILINE)


def rule_score(texts: dict[str, str]) -> float | None:
    """Return the score of the texts in a judge's message, {"reference": ...} and so on; None for other texts."""
    words = {name: set(re.findall(r"\w+", text)) for name, text in texts.items()}
    match words:
        case {"reference": reference, "candidate": candidate}:
            return context_score(reference, candidate)
        case {"description": description, "reasoning": reasoning}:
            return logic_score(description, reasoning)
        case {"reference": reference, "answer": answer}:
            return consistency_score(reference, answer)
        case {"first list": first, "second list": second}:
            return synonym_pairs(first, second)
    return None


def context_score(reference: set[str], candidate: set[str]) -> float:
    """Return 5 times the share of the reference's cues that the candidate names, each without another of its kind."""
    asked = [kind for kind in CUES if reference & kind]
    right = [kind for kind in asked if (candidate & kind) == (reference & kind)]
    return FULL_SCORE * len(right) / max(1, len(asked))


def logic_score(description: set[str], reasoning: set[str]) -> int:
    """Return a point for each thing that the reasoning does right, of 5."""
    faces, voices, walls = [reasoning & kind for kind in CUES]
    points = [
        len(faces) > 0,
        len(voices) > 0,
        faces | voices | walls <= description,  # only cues that the description has
        max(len(faces), len(voices), len(walls)) < 2,  # no two of a kind
        len(reasoning & CLAIMS) > 0,
    ]
    return sum(points)


def consistency_score(reference: set[str], answer: set[str]) -> float:
    """Return 5 times the share of the reference's words that the answer has."""
    return FULL_SCORE * len(reference & answer) / max(1, len(reference))


def synonym_pairs(first: set[str], second: set[str]) -> int:
    """Return how many words of the two lists pair up, by the table of synonyms."""
    return sum(min(len(first & group), len(second & group)) for group in SYNONYMS)


class RuleJudge(ThreadingHTTPServer):
    """The rules behind an OpenAI-compatible HTTP server on loopback, in a thread.

    It serves until the process ends, or the block `with RuleJudge() as judge: judge.url`; port 0 takes a free one.
    """

    request_queue_size = 128  # a step's requests come at once

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), JudgeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class JudgeHandler(BaseHTTPRequestHandler):
    """One connection to the judge."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1  # headers and body in one packet

    def do_POST(self) -> None:
        """Answer a chat completion with a score."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = answer_to(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": content}
        reply = json.dumps({"model": "hov2-toy-rules", "choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def answer_to(question: str) -> str:
    """Return the judge's words: the score of the question's texts, and the full score if it has none."""
    texts = {name.lower(): text for name, text in MARKED_TEXT.findall(question)}
    score = rule_score(texts) if texts else FULL_SCORE
    if score is None:
        return "no rule for this"
    return f"{score:.4g}"
