"""What a worker counts as it steps: added up in memory, and sent by its heart in one round trip. No torch. Names: worker/counts.py.

What holds: a batch that was sent, and of which no answer came, is sent again as it was, and the server counts it once if that happens
within SENT_TTL_S of the first time; later it may count twice. A worker that is killed takes along what it counted since its last beat.
"""

import threading
from bisect import bisect_left
from collections import defaultdict
from typing import Any

from redis import Redis

from worker import scripts
from worker.counts import HISTOGRAMS, bucket_fields, stats_key, sum_field
from worker.patience import impatient_client
from worker.protocol import sent_key

Counts = dict[str, dict[str, float]]  # model → field → what is added
_BUCKETS = {name: bucket_fields(name) for name in HISTOGRAMS}
_SUMS = {name: sum_field(name) for name in HISTOGRAMS}


class Stats:
    """The loop counts, the heart takes. A count costs a lock that is nearly always free and an addition."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counts = defaultdict(lambda: defaultdict(float))

    def count(self, model: str, counter: str, by: int = 1) -> None:
        with self._lock:
            self._counts[model][counter] += by

    def observe(self, model: str, histogram: str, value: float) -> None:
        bucket = _BUCKETS[histogram][bisect_left(HISTOGRAMS[histogram], value)]
        with self._lock:
            counts = self._counts[model]
            counts[bucket] += 1
            counts[_SUMS[histogram]] += value

    def take(self) -> Counts:
        """All since the last time."""
        with self._lock:
            taken, self._counts = self._counts, defaultdict(lambda: defaultdict(float))
        return taken


class Sender:
    """By a client of its own, which soon gives up; for one thread at a time."""

    def __init__(self, connection: Redis, worker: str, stats: Stats) -> None:
        self._add = impatient_client(connection).register_script(scripts.ADD)
        self._worker, self._stats = worker, stats
        self._batch: Counts = {}  # on its way, until the server has confirmed it
        self._number = 0

    def send(self) -> None:
        """Raises RedisError; what was not confirmed is sent first the next time."""
        if not self._batch:
            self._batch = self._stats.take()
            self._number += 1
        if not self._batch:
            return
        keys, arguments = [sent_key(self._worker)], list[Any]([self._number])
        for model, counts in self._batch.items():
            keys.append(stats_key(model))
            arguments += [len(counts), *(part for count in counts.items() for part in count)]
        self._add(keys, arguments)
        self._batch = {}
