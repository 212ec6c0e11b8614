"""What a programmer reads first: the text at the head of the OpenAPI document, of `/docs` and of docs/api.md. Tests run its examples."""

DESCRIPTION = """\
A request for pictures becomes a *job*: `POST /generate` queues it and answers at once, or waits with it when asked to. The job is then
looked at (`GET /jobs/{job_id}`), watched as it happens (`/events`), fetched (`/images/{index}`, `/grid`) or canceled (`DELETE`). Jobs and
pictures are kept for a day after their end, or as long as the server is set to.

### What goes over the wire

Requests and answers are JSON. What is not said has a default, of the model or of the server, and the answer tells which it was, the seed
too: a job's `request` can be posted again as it is, and gives the same pictures. What is said must be right: an unknown field, a field
that is there twice, a number in quotes, a boolean in place of a number, 7.0 in place of 7: all of these are refused, and nothing is
guessed at. A body has at most 64 KiB. Times are RFC 3339 in UTC. An id is text.

A field that a later version tells besides may come at any time: leave aside what you do not know.

### Keys

A server with a key file asks for one in every call but `/`, `/docs`, `/openapi.json`, `/healthz` and `/readyz`:

```sh
curl -s http://127.0.0.1:8000/models -H "Authorization: Bearer $DIT_API_KEY"
```

A key has a scope: `generate` asks for pictures and sees its own jobs; `admin` may all, and sees all. It may have a rate, told in every
answer by the headers `RateLimit` and `RateLimit-Policy`, and a number of jobs that it may have at once. A server without a key file asks
for none, and whoever calls may all.

### Errors

Every error is a problem document (RFC 9457), `application/problem+json`. Tell them apart by `status` and `type`; `detail` is a sentence
for people, and a 422 names in `errors` every field that is wrong and what is allowed there. Any call may be answered with 500
(`internal`), any path with 404, and any method that a path has not with 405 and `Allow`.

### Trying again

429 and 503 mean *not now*: try again after `Retry-After` seconds. Every `GET` and `DELETE` can be sent again. A `POST /generate` can be
with an `Idempotency-Key`: the same key and the same request are answered with the same job, however often they come, for as long as the
job is kept; the same key with another request is 422. Use a new random key for each request that is meant.

### From Python

`app.client` is a typed client: it waits and tries again as above, checks each picture against its hash, and goes on with a stream of
events that broke off.

```python
from app.client import ApiError, Client, ImageEvent, ProgressEvent

with Client("http://127.0.0.1:8000") as client:  # a key is the second argument
    job = client.generate("Sneaker", num_images=2)
    for event in client.events(job.id):
        match event:
            case ProgressEvent(step=step, steps=steps):
                print(f"step {step} of {steps}")
            case ImageEvent(index=index, sha256=sha256):
                png = client.image(job.id, index, sha256=sha256)
                print(f"picture {index}: {len(png)} bytes")
    try:
        client.generate("Sneeker", num_images=2)
    except ApiError as error:
        for wrong in error.errors:
            print(f"{error.status} {wrong.field}: {wrong.detail}")
```
"""
