"""How fast one server may be asked, found from its refusals: what a rate limit is, no reply says."""

import threading
import time
from collections import deque

FIRST_PAUSE = 0.1  # seconds after a refusal that doesn't say how long to wait ...
LONGER = 1.3  # ... and so many times more after each one that follows ...
LONGEST_PAUSE = 5.0  # ... up to this
PATIENCE = 300.0  # seconds of nothing but refusals after which the server counts as down


class Pace:
    """The turns of all threads that ask one server.

    Nobody waits before the first refusal (HTTP 429). After one, all do, for as long as the server says, or pauses that
    grow. Then one request goes ahead alone; when it is taken, the others follow at the rate at which the server has
    taken them so far, and a little faster each time. Whoever is refused takes another turn.
    """

    def __init__(self) -> None:
        self._turns = threading.Condition()
        self._next = 0.0  # when the next request may start
        self._gap = 0.0  # seconds between the starts of two requests
        self._gap_is_known = False  # else it comes from a handful of requests, and may be far too long
        self._pause = FIRST_PAUSE
        self._refused_since = None  # None: the last request was taken
        self._taken_since = 0.0  # requests that started earlier tell nothing new
        self._hopeless = False
        self._taken = deque(maxlen=64)  # when the last ones were

    def wait_for_turn(self) -> float | None:
        """Wait until a request may start, and return when that is; None if the server has to be left alone."""
        with self._turns:
            while True:
                now = time.monotonic()
                wait = self._next - now
                if wait <= 0:
                    break
                if self._hopeless:
                    return None
                self._turns.wait(wait)
            if self._refused_since is not None:
                self._next = now + LONGEST_PAUSE  # the others wait for what this one finds
                return now
            if self._taken and now - self._taken[-1] > LONGEST_PAUSE:
                self._taken.clear()  # a time without questions says nothing about a rate
            self._next = now + self._gap
            return now

    def taken(self, started: float) -> None:
        """Note that the request which started at `started` was not refused."""
        with self._turns:
            now = time.monotonic()
            if self._refused_since is None:
                self._gap *= 0.997 if self._gap_is_known else 0.9
            elif started >= self._refused_since:
                if self._gap == 0 and self._taken:
                    self._gap_is_known = len(self._taken) >= 5
                    seconds_each = (now - self._taken[0]) / len(self._taken)
                    self._gap = seconds_each if self._gap_is_known else min(1.0, seconds_each)
                self._refused_since = None
                self._hopeless = False
                self._taken_since = now
                self._next = started + self._gap
                self._turns.notify_all()
            self._taken.append(now)

    def refused(self, started: float, after: float) -> None:
        """Note that the request which started at `started` was refused; `after`: seconds that the server asks for."""
        with self._turns:
            now = time.monotonic()
            if self._refused_since is None:
                if started < self._taken_since:
                    return
                self._refused_since = now
                self._gap_is_known = self._gap > 0
                self._gap *= 1.2
                self._pause = max(FIRST_PAUSE, self._gap / 4)
            elif started >= self._refused_since:  # it went ahead alone
                self._pause = min(LONGEST_PAUSE, self._pause * LONGER)
                self._next = now
            wait = min(PATIENCE, after or self._pause)
            self._next = max(self._next, now + wait)
            self._hopeless = max(after, now - self._refused_since) > PATIENCE
            if self._hopeless:
                self._turns.notify_all()
