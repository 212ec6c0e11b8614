"""A job's record in Redis → the document that the API shows."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from worker import protocol
from worker.protocol import GenerationRequest


def iso(seconds: bytes | None) -> str | None:
    """Unix seconds → RFC 3339 in UTC."""
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="milliseconds") if seconds else None


def job_view(job_id: str, record: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The job as `GET /jobs/{id}` shows it, but for its place in the queue, which the record does not tell.

    ValueError for a record that is damaged, or that JSON cannot say.
    """
    try:
        view = _job_view(job_id, record)
        json.dumps(view, ensure_ascii=False, allow_nan=False).encode()
    except (KeyError, TypeError, ValueError, OverflowError, OSError, RecursionError) as error:  # OSError: of a time beyond all calendars
        raise ValueError(f"the record of job {job_id} is damaged: {ascii(error)[:300]}") from error
    return view


def _job_view(job_id: str, record: Mapping[bytes, bytes]) -> dict[str, Any]:
    status = record[b"status"].decode()
    if status not in protocol.STATUSES:
        raise ValueError("its status is none")
    request = GenerationRequest.parse(record[b"request"].decode())
    step = request.steps if status == protocol.SUCCEEDED else int(record.get(b"step", 0))
    images = [(int(entry["index"]), int(entry["seed"]), str(entry["sha256"])) for entry in json.loads(record.get(b"images") or "[]")]
    here = f"/jobs/{job_id}"
    return {
        "id": job_id,
        "status": status,
        "queue_position": None,
        "estimated_wait_s": None,
        "progress": {"step": step, "steps": request.steps},
        "request": public_request(request),
        "images": [{"url": f"{here}/images/{index}", "seed": seed, "sha256": sha256} for index, seed, sha256 in images],
        "checkpoint": record[b"checkpoint"].decode(),
        "error": record.get(b"error", b"").decode() or None,
        "created_at": iso(record[b"created_at"]),
        "started_at": iso(record.get(b"started_at")),
        "finished_at": iso(record.get(b"finished_at")),
        "links": {"self": here, "events": f"{here}/events", "grid": f"{here}/grid"},
    }


def public_request(request: GenerationRequest) -> dict[str, Any]:
    """The resolved request in the words of `POST /generate`, so that it can be posted again."""
    labels = list(request.class_labels)
    alike = len(set(labels)) == 1
    times = {"shift": request.shift} if request.spacing is None else {"spacing": request.spacing, "eta": request.eta}
    return {
        "class_label": labels[0] if alike else labels,
        **({"num_images": len(labels)} if alike else {}),
        "guidance_scale": request.guidance_scale,
        "guidance_interval": list(request.guidance_interval),
        "guidance_channels": request.guidance_channels,
        "guidance_rescale": request.guidance_rescale,
        **({"block_cache": request.block_cache} if request.block_cache > 1 else {}),
        "steps": request.steps,
        "sampler": request.sampler,
        **times,
        "seed": request.seed,
        "model": request.model,
    }


def work(request: GenerationRequest) -> int:
    """Row evaluations that a request takes, about: a guided picture takes two rows while t/T is in its interval."""
    low, high = request.guidance_interval
    guided = 0.0 if request.guidance_scale == 1 else high - low
    rows = sum(1 if label is None else 1 + guided for label in request.class_labels)
    return max(1, round(rows * request.steps))
