"""`/metrics`: what this process counted, and what Redis knows of queues and workers. docs/observability.md says what each number means.

What is read from Redis is the same in every API process, so a query takes the maximum over them, not the sum.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from app.queues import LOOK, QueueState, states
from worker import protocol
from worker.counts import COUNTERS, FAILURES, HISTOGRAMS, bucket_fields, ended_field, stats_key, sum_field
from worker.protocol import CANCELED, DRAINING, FAILED, PAUSED, SUCCEEDED

log = logging.getLogger("dit.api")

REDIS_S = 4.0  # that a scrape waits for Redis; Prometheus gives up after 10 by default
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # a request may wait 60 s for its picture
_COUNTERS = {"images": "dit_images", "bucket_rows": "dit_bucket_rows", "not_finite": "dit_not_finite", "out_of_memory": "dit_out_of_memory"}
_HISTOGRAMS = {
    "wait_s": ("dit_queue_wait_seconds", "From a job's submission to its first start."),
    "job_s": ("dit_job_seconds", "From a job's submission to its success."),
    "tick_s": ("dit_tick_seconds", "Of one round of a worker's loop that steps pictures."),
    "decode_s": ("dit_decode_seconds", "Of one batch of the decoder, until its pixels are there."),
    "rows": ("dit_forward_rows", "Rows of one forward, without padding."),
}
Stats = Mapping[bytes, bytes]  # `dit:stats:<model>`

disable_created_metrics()  # a second series for each counter, that no query asks for


class Metrics:
    """Of this process."""

    def __init__(self, queue_limit: int, image_bytes: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dit_http_requests", "Answers, by the route's template.", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dit_http_request_seconds",
            "From a request to the first byte of its answer.",
            ["route", "method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.streams = Gauge("dit_event_streams", "Event streams that are open.", registry=self.registry)
        Gauge("dit_queue_limit", "Jobs that may wait, of each model.", registry=self.registry).set(queue_limit)
        Gauge("dit_image_bytes_limit", "Bytes that the pictures of all jobs may take.", registry=self.registry).set(image_bytes)
        ProcessCollector(registry=self.registry)

    async def scrape(self, redis: Any, bytes_key: str) -> bytes:
        """The text that Prometheus reads. Where Redis is away: `dit_redis_up 0`, and what this process knows by itself.

        `bytes_key`: of the sum of what is reserved for pictures.
        """
        try:
            async with asyncio.timeout(REDIS_S):
                seen: Told | None = await look(redis, bytes_key)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            log.warning("metrics: Redis: %s", error or "it does not answer")
            seen = None
        return generate_latest(self.registry) + generate_latest(_Once(seen))


@dataclass(frozen=True)
class Told:
    """What Redis told."""

    queues: list[QueueState]
    image_bytes: int
    dead: int
    memory_bytes: int
    stats: dict[str, Stats] = field(default_factory=dict)  # by model


async def look(redis: Any, bytes_key: str) -> Told:
    """In two round trips. Raises RedisError."""
    async with redis.pipeline(transaction=False) as pipeline:
        pipeline.eval(LOOK, 0)
        pipeline.get(bytes_key)
        pipeline.zcard(protocol.DEAD_KEY)
        pipeline.info("memory")
        told, image_bytes, dead, memory = await pipeline.execute()
    queues = states(told)
    async with redis.pipeline(transaction=False) as pipeline:
        for queue in queues:
            pipeline.hgetall(stats_key(queue.model))
        stats = await pipeline.execute()
    return Told(
        queues, int(image_bytes or 0), dead, memory["used_memory"], dict(zip((queue.model for queue in queues), stats, strict=True))
    )


class _Once(Collector):
    """What one scrape saw."""

    def __init__(self, seen: Told | None) -> None:
        self.seen = seen

    def collect(self) -> Iterator[Metric]:
        yield _gauge("dit_redis_up", "1 if Redis answered this scrape.", [((), self.seen is not None)])
        if self.seen is not None:
            yield from _of_redis(self.seen)
            yield from _of_queues(self.seen.queues)
            yield from _of_stats(self.seen.stats)


def _of_redis(seen: Told) -> Iterator[Metric]:
    yield _gauge("dit_redis_memory_bytes", "Memory that Redis uses.", [((), seen.memory_bytes)])
    yield _gauge("dit_image_bytes_reserved", "The most that the pictures of all jobs may take.", [((), seen.image_bytes)])
    yield _gauge("dit_dead_jobs", "Jobs that `dit jobs dead` lists.", [((), seen.dead)])


def _of_queues(queues: Iterable[QueueState]) -> Iterator[Metric]:
    told = {
        "dit_queue_depth": ("Jobs that wait.", lambda queue: queue.waiting),
        "dit_queue_oldest_seconds": ("Age of the next job to run; 0 if none waits.", lambda queue: queue.oldest_s),
        "dit_queue_paused": ("1 while workers take no job of it.", lambda queue: queue.state == PAUSED),
        "dit_queue_draining": ("1 while no job is accepted.", lambda queue: queue.state == DRAINING),
        "dit_jobs_running": ("Jobs under a lease.", lambda queue: queue.running),
        "dit_workers": ("Workers of it that are alive.", lambda queue: queue.workers),
        "dit_workers_troubled": ("Those of them that cannot store pictures.", lambda queue: queue.troubled),
    }
    for name, (text, value) in told.items():
        yield _gauge(name, text, [((queue.model,), value(queue)) for queue in queues], ["model"])


def _gauge(name: str, text: str, values: Iterable[tuple[tuple[str, ...], float]], labels: list[str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels or [])
    for of, value in values:
        family.add_metric(of, float(value))
    return family


def _of_stats(stats: Mapping[str, Stats]) -> Iterator[Metric]:
    """Each series is there from the beginning, with 0: a rate sees the first one too."""
    for counter, name in _COUNTERS.items():
        family = CounterMetricFamily(name, f"{COUNTERS[counter][0].upper()}{COUNTERS[counter][1:]}.", labels=["model"])
        for model, counts in stats.items():
            family.add_metric([model], _number(counts, counter))
        yield family
    ended = CounterMetricFamily("dit_jobs_ended", "Jobs that ended, and why those failed that did.", labels=["model", "status", "kind"])
    for model, counts in stats.items():
        for status, kind in [(SUCCEEDED, ""), (CANCELED, ""), *((FAILED, kind) for kind in FAILURES)]:
            ended.add_metric([model, status, kind], _number(counts, ended_field(status, kind)))
    yield ended
    for histogram, (name, text) in _HISTOGRAMS.items():
        yield _histogram(histogram, HistogramMetricFamily(name, text, labels=["model"]), stats)


def _histogram(histogram: str, family: HistogramMetricFamily, stats: Mapping[str, Stats]) -> Metric:
    bounds = [*(f"{float(bound)}" for bound in HISTOGRAMS[histogram]), "+Inf"]
    for model, counts in stats.items():
        totals = accumulate(_number(counts, name) for name in bucket_fields(histogram))
        family.add_metric([model], list(zip(bounds, totals, strict=True)), _number(counts, sum_field(histogram)))
    return family


def _number(counts: Stats, name: str) -> float:
    return float(counts.get(name.encode(), 0))
