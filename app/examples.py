"""What the OpenAPI document shows: requests and answers of the bundled model, and commands that make them, which tests run."""

from typing import Any

Example = dict[str, Any]

MODEL_ID = "fashion-mnist"
JOB_ID = "01a21205-192e-7f3b-a352-1d718243d4fb"
CHECKPOINT = "e4af14fef8096c15af00195e1b182b28858f2ed229a22353b30e6ba37ee9b23f"
EVENT_ID = "1795598653859-0"
_JOB, _SHA256 = f"/jobs/{JOB_ID}", "2c495f71198a2e0fd9e8e835265136e8a9d881a3aa72ab9852fd38b332f38b41"
ETAG = f'"{_SHA256}"'


def _example(summary: str, value: Any) -> Example:
    return {"summary": summary, "value": value}


REQUESTS = {
    "name": _example("One picture, at the model's defaults", {"class_label": "Sneaker"}),
    "settings": _example("With settings", {"class_label": "Sneaker", "guidance_scale": 2.0, "steps": 30, "seed": 7}),
    "several": _example("Several of one class", {"class_label": "Bag", "num_images": 4, "quality": "draft", "seed": 40}),
    "list": _example("One of each: a name, an index, an unconditional picture", {"class_label": ["Bag", 3, None]}),
    "interval": _example(
        "Guided in the middle of the way alone", {"class_label": 0, "guidance_scale": 4, "guidance_interval": [0.15, 0.8]}
    ),
}


def _job(status: str, step: int, **changes: Any) -> dict[str, Any]:
    started = None if status == "queued" else "2026-11-25T09:24:13.748+00:00"
    return {
        "id": JOB_ID,
        "status": status,
        "queue_position": None,
        "estimated_wait_s": None,
        "progress": {"step": step, "steps": 30},
        "request": {
            "class_label": 7,
            "num_images": 1,
            "guidance_scale": 2.0,
            "guidance_interval": [0.15, 0.8],
            "guidance_channels": "all",
            "guidance_rescale": 0.0,
            "steps": 30,
            "sampler": "ab2",
            "shift": 1.0,
            "seed": 7,
            "model": MODEL_ID,
        },
        "images": [],
        "checkpoint": CHECKPOINT,
        "error": None,
        "created_at": "2026-11-25T09:24:13.742+00:00",
        "started_at": started,
        "finished_at": None,
        "links": {"self": _JOB, "events": f"{_JOB}/events", "grid": f"{_JOB}/grid"},
        **changes,
    }


_ENDED = "2026-11-25T09:24:14.131+00:00"
_PICTURE = {"url": f"{_JOB}/images/0", "seed": 7, "sha256": _SHA256}
_SUCCEEDED = _job("succeeded", 30, images=[_PICTURE], finished_at=_ENDED)

_MODEL = {
    "id": MODEL_ID,
    "labels": [
        ["T-shirt/top"],
        ["Trouser"],
        ["Pullover"],
        ["Dress"],
        ["Coat"],
        ["Sandal"],
        ["Shirt"],
        ["Sneaker"],
        ["Bag"],
        ["Ankle boot"],
    ],
    "image_size": 32,
    "image_channels": 1,
    "objective": "flow",
    "samplers": ["euler", "heun", "ab2"],
    "spacings": [],
    "default_spacings": {},
    "max_steps": 1000,
    "defaults": {"steps": 13, "guidance_scale": 2.0, "guidance_interval": [0.15, 0.8], "sampler": "ab2"},
    "quality": {"draft": {"steps": 6, "guidance_scale": 2.5, "guidance_interval": [0.15, 0.8], "sampler": "ab2"}},
    "metrics": {"class_consistency": 0.9296, "frechet_distance": 1.0774},
    "checkpoint": CHECKPOINT,
    "device": "cpu",
    "dtype": "bfloat16",
    "block_cache": False,
    "max_rows": 32,
    "rows_per_s": 999.569,
}
_METRICS = (
    "# HELP dit_http_requests_total Answers, by the route's template.\n# TYPE dit_http_requests_total counter\n"
    'dit_http_requests_total{method="POST",route="/generate",status="202"} 1.0\n'
)


def _queue(state: str) -> dict[str, Any]:
    counts = {"waiting": 3, "running": 2, "workers": 1, "troubled": 0}
    return {"model": MODEL_ID, "state": state, **counts, "served": True, "oldest_s": 1.4}


ANSWERS = {
    "queued": _example("It waits", _job("queued", 0, queue_position=3, estimated_wait_s=1.2)),
    "running": _example("It runs", _job("running", 13)),
    "succeeded": _example("It has succeeded", _SUCCEEDED),
    "failed": _example("It has failed", _job("failed", 0, error="picture 0 left the finite numbers, also alone", finished_at=_ENDED)),
    "canceling": _example("It stops at its next step", _job("canceling", 13)),
    "canceled": _example("It was canceled", _job("canceled", 0, started_at=None, finished_at=_ENDED)),
    "jobs": _example("A page, and where the next begins", {"jobs": [_SUCCEEDED], "next": JOB_ID}),
    "event": _example("A step", {"id": EVENT_ID, "event": "progress", "data": '{"step": 6, "steps": 30}'}),
    "model": _example("The bundled one, shortened", _MODEL),
    "models": _example("One is served", {"models": [_MODEL]}),
    "queue-paused": _example("Nothing more begins", _queue("paused")),
    "queue-draining": _example("Nothing more is accepted", _queue("draining")),
    "queue-open": _example("It is open", _queue("open")),
    "queues": _example("One model was ever served", {"queues": [_queue("open")]}),
    "healthy": _example("It answers", {"status": "ok"}),
    "ready": _example("A picture could be made now", {"status": "ready", "models": [MODEL_ID]}),
    "metrics": _example("The beginning", _METRICS),
}

# By operation: what it does, and the command. $URL and $JOB are set by the first.
COMMANDS: dict[str, list[tuple[str, str]]] = {
    "generate": [
        (
            "Queue a job, and keep its address",
            "URL=http://127.0.0.1:8000\n"
            "JOB=$(curl -s -X POST $URL/generate -H 'Content-Type: application/json' -d '{\"class_label\": \"Sneaker\"}' \\\n"
            "    -o /dev/null -w '%header{location}')",
        ),
        (
            "Wait for the picture itself",
            "curl -s -X POST $URL/generate -H 'Prefer: wait=30' -H 'Accept: image/png' -H 'Content-Type: application/json' \\\n"
            '    -d \'{"class_label": "Sneaker", "guidance_scale": 2.0, "steps": 30, "seed": 7}\' -o sneaker.png',
        ),
        (
            "Four pictures, and the job when they are done; asked twice, it is made once",
            "for attempt in 1 2; do\n"
            "    curl -s -X POST $URL/generate -H 'Prefer: wait=30' -H 'Idempotency-Key: four-bags' \\\n"
            "        -H 'Content-Type: application/json' \\\n"
            '        -d \'{"class_label": "Bag", "num_images": 4, "quality": "draft"}\'\n'
            "done",
        ),
    ],
    "list_jobs": [("The newest two", 'curl -s "$URL/jobs?limit=2"')],
    "get_job": [("The job", "curl -s $URL$JOB")],
    "cancel_job": [
        (
            "Begin a long job, and cancel it",
            "LONG=$(curl -s -X POST $URL/generate -H 'Content-Type: application/json' \\\n"
            '    -d \'{"class_label": "Bag", "steps": 1000, "num_images": 64}\' -o /dev/null -w \'%header{location}\')\n'
            "curl -s -X DELETE $URL$LONG",
        )
    ],
    "get_image": [
        (
            "Its first picture; and again, if it were another one",
            "curl -s $URL$JOB/images/0 -o picture.png --etag-save picture.etag\n"
            "curl -s $URL$JOB/images/0 -o picture.png --etag-compare picture.etag",
        )
    ],
    "get_grid": [("All its pictures as one", "curl -s $URL$JOB/grid -o grid.png")],
    "get_events": [
        ("From its beginning to its end, as it happens", "curl -sN $URL$JOB/events"),
        ("After an event that is known", "curl -sN $URL$JOB/events -H 'Last-Event-ID: 0'"),
    ],
    "list_models": [("What is served", "curl -s $URL/models")],
    "get_model": [("One model", f"curl -s $URL/models/{MODEL_ID}")],
    "list_queues": [("All of them", "curl -s $URL/queues")],
    "pause": [("Let nothing more begin", f"curl -s -X POST $URL/queues/{MODEL_ID}/pause")],
    "drain": [("Accept nothing more", f"curl -s -X POST $URL/queues/{MODEL_ID}/drain")],
    "resume": [("Open it again", f"curl -s -X POST $URL/queues/{MODEL_ID}/resume")],
    "healthz": [("Whether the process answers", "curl -s $URL/healthz")],
    "readyz": [("Whether a picture could be made now", "curl -s $URL/readyz")],
    "metrics": [("What Prometheus reads", "curl -s $URL/metrics")],
}
