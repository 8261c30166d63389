"""A judge's server on a bad day: the toy's rule-based judge, with every fault of FAULTY, at a seeded rate or as told.

What it sends beside scores repeats the request and its key wherever it can, so that a client that quotes it is seen.
"""

import hashlib
import io
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import ThreadingHTTPServer

from hov2 import toy

DRIP = 0.05  # seconds between two bytes


def stats(judge):
    """What the replies since the last call add up to: requests, failures and faults by kind."""
    replies = judge.take_replies()
    return {
        "requests": len(replies),
        "failures": sum(reply.error is not None for reply in replies),
        "faults": Counter(fault.kind for reply in replies for fault in reply.faults),
    }


class Handler(toy.JudgeHandler):
    """One request: a fault, or the rule-based judge's answer."""

    def do_POST(self):
        judge = self.server.judge
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.secret = f"{self.headers['Authorization']} {body.decode()}".replace("\n", " ")
        kind = judge.fault_for(body)
        if kind:
            FAULTY[kind](self)
            self.close_connection = True
            return
        connection, self.rfile = self.rfile, io.BytesIO(body)
        super().do_POST()
        self.rfile = connection

    def say(self, status, content, length=None, **headers):
        """A whole reply, or one that claims another length; the key is in the reason and in a header too."""
        content = content.encode()
        self.send_response(status, f"Reason {self.secret[:200]}")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("X-Echo", self.secret[:200])
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def chat(self, text):
        self.say(200, json.dumps({"choices": [{"message": {"content": text}}]}))

    def reset(self):
        """Ends the connection with a reset instead of an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def drip(self):
        """A byte now and then, for half a minute or until the client has gone."""
        for _ in range(round(30 / DRIP)):
            self.connection.sendall(b"x")
            time.sleep(DRIP)

    def drip_headers(self):
        self.connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip()

    def drip_body(self):
        self.say(200, "{", length=10**6)
        self.drip()

    def half(self):
        content = json.dumps({"choices": [{"message": {"content": "0"}}], "echo": self.secret})
        self.say(200, content[: len(content) // 2], length=len(content))

    def restart(self):
        threading.Thread(target=self.server.judge.restart).start()
        self.server.judge.stopped.wait(30)  # until the restart resets this connection too

    def outage(self):
        threading.Thread(target=self.server.judge.outage).start()
        self.server.judge.stopped.wait(30)


FAULTY = {
    "429": lambda h: h.say(429, h.secret, Retry_After="1"),
    "429 with a date": lambda h: h.say(429, h.secret, Retry_After=formatdate(time.time() + 1, usegmt=True)),
    "500": lambda h: h.say(500, h.secret),
    "503": lambda h: h.say(503, h.secret, Retry_After=h.secret[:200]),
    "404": lambda h: h.say(404, h.secret),
    "reset": Handler.reset,
    "hang": lambda h: h.connection.recv(1),  # until the client has gone
    "drip in the headers": Handler.drip_headers,
    "drip in the body": Handler.drip_body,
    "half": Handler.half,
    "html": lambda h: h.say(200, f"<html><body>Score: 0. {h.secret}</body></html>", Content_Type="text/html"),
    "deep": lambda h: h.say(200, "[" * 10**5),
    "not http": lambda h: h.connection.sendall(f"{h.secret[:1000]}\r\n\r\n".encode()),
    "no score": lambda h: h.chat("I would say 0 or 1"),
    "restart": Handler.restart,
    "outage": Handler.outage,  # until somebody calls up()
}
# what the client counts them as
KIND = {
    "429": "http_429",
    "429 with a date": "http_429",
    "500": "http_5xx",
    "503": "http_5xx",
    "404": "http_other",
    "reset": "reset",
    "hang": "timeout",
    "drip in the headers": "timeout",
    "drip in the body": "timeout",
    "half": "broken_off",
    "html": "no_completion",
    "deep": "no_completion",
    "not http": "broken_off",
    "no score": "no_score",
    "restart": "reset",
    "outage": "reset",
}


class Server(ThreadingHTTPServer):
    """Knows its connections."""

    request_queue_size = 128
    daemon_threads = True
    block_on_close = False

    def __init__(self, judge, port):
        self.judge, self.open = judge, set()
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that went away."""


class FaultyJudge:
    """Answers as `toy.RuleJudge` does, but for faults: first those of `script` in turn (None: an answer), then each of
    `rates` ({fault: share of the tries}), drawn from the seed, the question and how often it came; an outage at request
    number `outage_at`."""

    def __init__(self, script=(), rates=None, seed=0, outage_at=None):
        self.script, self.rates, self.seed, self.outage_at = list(script), rates or {}, seed, outage_at
        self.seen, self.injected, self.asked = Counter(), Counter(), 0
        self.lock, self.stopped, self.changing = threading.Lock(), threading.Event(), threading.Lock()
        self.port, self.server = 0, None
        self.up()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def fault_for(self, body):
        """The fault of this request, or None; the client's first small question has none of the rates'."""
        with self.lock:
            self.asked += 1
            self.seen[body] += 1
            if self.script:
                kind = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            elif self.asked == self.outage_at:
                kind = "outage"
            elif b"the number 5" in body:
                kind = None
            else:
                digest = hashlib.sha256(body + f" {self.seed} {self.seen[body]}".encode()).digest()
                names = [*self.rates, None]
                shares = [*self.rates.values(), 1 - sum(self.rates.values())]
                kind = random.Random(digest).choices(names, shares)[0]
            if kind:
                self.injected[kind] += 1
            return kind

    def up(self):
        """Starts serving, on the same port as before."""
        self.stopped.clear()
        self.server = Server(self, self.port)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def down(self):
        """Resets all connections and refuses new ones."""
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in tuple(self.server.open):
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RD)
                connection.close()
            except OSError:
                pass  # it ended by itself

    def restart(self):
        """Down, and up again on the same port."""
        if self.changing.acquire(blocking=False):
            self.down()
            time.sleep(0.1)
            self.up()
            self.changing.release()

    def outage(self):
        """Down until somebody calls up()."""
        with self.changing:
            self.down()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.changing:
            self.down()
