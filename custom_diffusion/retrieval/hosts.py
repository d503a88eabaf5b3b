"""Whose turn it is: candidates that wait for their host, at most a few of a host at a time, none of one that is silent."""

import heapq
import time
from collections import deque
from dataclasses import dataclass, field

from custom_diffusion.retrieval.candidates import Candidate

MAX_PER_HOST = 6  # as browsers do
MAX_SILENT = 3  # requests without an answer, after which a host that never gave one is given up
MAX_SILENT_AFTER_ANSWERS = 12  # and one that did: two rounds of `MAX_PER_HOST`
HOPE_SECONDS = 1  # after its first request in which a host is expected to answer


@dataclass
class _Host:
    waiting: deque = field(default_factory=deque)  # (number, candidate)
    num_running: int = 0
    num_silent: int = 0  # requests without an answer since the last answer
    has_answered: bool = False
    is_found: bool = False  # its name has been looked up
    is_queued: bool = False  # among those whose turn it is
    asked_at: float | None = None
    given_up: str = ""  # why

    def is_hopeful(self, now):
        early = self.asked_at is None or now < self.asked_at + HOPE_SECONDS
        return self.num_silent == 0 and (self.has_answered or early)


class Hosts:
    """Candidates by host, handed out in the order of their numbers as far as their hosts are free.

    Attributes:
        num_waiting: candidates not handed out yet.
    """

    def __init__(self):
        self.num_waiting = 0
        self._hosts = {}
        self._turns = []  # heap of (number of a host's first candidate, host)

    @property
    def num_free(self) -> int:
        """Hosts that can be asked now."""
        return len(self._turns)

    def num_expected(self) -> int:
        """Waiting candidates whose hosts answer, as far as is known."""
        now = time.monotonic()
        return sum(len(host.waiting) for host in self._hosts.values() if host.waiting and host.is_hopeful(now))

    def add(self, host: str, number: int, candidate: Candidate) -> bool:
        """Let a candidate wait for its host. Whether the host is a new one, whose name must be looked up."""
        is_new = host not in self._hosts
        self._hosts.setdefault(host, _Host()).waiting.append((number, candidate))
        self.num_waiting += 1
        self._queue(host)
        return is_new

    def is_found(self, host: str):
        """Note that a host's name has been looked up."""
        self._hosts[host].is_found = True
        self._queue(host)

    def next(self) -> tuple[str, int, Candidate] | None:
        """(host, number, candidate) to fetch now; `ended` must follow."""
        if not self._turns:
            return None
        _, name = heapq.heappop(self._turns)
        host = self._hosts[name]
        host.is_queued = False
        number, candidate = host.waiting.popleft()
        host.asked_at = host.asked_at or time.monotonic()
        host.num_running += 1
        self.num_waiting -= 1
        self._queue(name)
        return name, number, candidate

    def ended(self, name: str, has_answered: bool):
        """Note that a request is over, and whether the host answered it at all."""
        host = self._hosts[name]
        host.num_running -= 1
        host.has_answered |= has_answered
        host.num_silent = 0 if has_answered else host.num_silent + 1
        if host.num_silent >= (MAX_SILENT_AFTER_ANSWERS if host.has_answered else MAX_SILENT):
            host.given_up = "host that does not answer"
        self._queue(name)

    def give_up(self, name: str, reason: str):
        """Ask a host for nothing more."""
        self._hosts[name].given_up = reason

    def take_given_up(self, name: str) -> tuple[str, list[tuple[int, Candidate]]]:
        """(why, the candidates that waited for it) of a host that was given up; ("", []) of another."""
        host = self._hosts[name]
        if not host.given_up:
            return "", []
        rows = list(host.waiting)
        host.waiting.clear()
        self.num_waiting -= len(rows)
        if host.is_queued:
            self._turns = [turn for turn in self._turns if turn[1] != name]
            heapq.heapify(self._turns)
            host.is_queued = False
        return host.given_up, rows

    def _queue(self, name):
        host = self._hosts[name]
        num_open = host.num_running if host.has_answered else host.num_running + host.num_silent
        if host.is_found and host.waiting and num_open < MAX_PER_HOST and not (host.is_queued or host.given_up):
            heapq.heappush(self._turns, (host.waiting[0][0], name))
            host.is_queued = True
