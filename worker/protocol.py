"""What the API and the workers say to each other through Redis. Standard library only; the one list of keys.

| key                              | written by  | holds                                                  | lives                |
|----------------------------------|-------------|--------------------------------------------------------|----------------------|
| `rq:queue:dit-<model>`, `rq:…`   | rq, worker  | the queue and the leases; an rq job names only its id  | until the job ended  |
| `dit:job:<id>`                   | API, worker | hash, see JOB_FIELDS                                   | TTL after the end    |
| `dit:job:<id>:events`            | API, worker | stream of {event, data}: queued, progress, preview,    | TTL after the end    |
|                                  |             | image, done                                            |                      |
| `dit:image:<id>:<execution>:<i>` | worker      | PNG bytes, of a job whose pictures are kept in Redis   | TTL                  |
| `dit:model:<model>`              | worker      | JSON of ModelRecord                                    | MODEL_TTL_S, renewed |
| `dit:models`                     | worker      | set of model ids that were ever served                 | always               |
| `dit:bell:<model>`               | API, worker | list, rung when a job waits; idle workers listen to it | BELL_TTL_S           |
| `dit:alone:<id>`                 | worker      | the busy worker that will run this job alone           | CLAIM_S, renewed     |
| `dit:dead`                       | worker      | sorted set of job ids, by the Unix seconds of the end: | TTL after the last   |
|                                  |             | those whose every attempt ended with its worker        |                      |
| `dit:jobs`, `dit:jobs:<owner>`   | API         | sorted sets of job ids, all with score 0: their order  | with their jobs      |
|                                  |             | is that of the ids, which is that of time              |                      |
| `dit:active:<owner>`             | API         | set of ids, of an owner whose jobs in flight are       | with their jobs      |
|                                  |             | bounded; those that have ended are found out later     |                      |
| `dit:books`                      | API         | sorted set of `<job>|<owner>|<bytes>`, by the Unix     | with their jobs      |
|                                  |             | seconds at which the job may have expired; see FORGET  |                      |
| `dit:bytes`                      | API         | sum of the bytes in `dit:books`: the most that the     | with their jobs      |
|                                  |             | pictures of all jobs may take in Redis                 |                      |
| `dit:kept:<store>`               | API         | sorted set of `<job>|<bytes>`, by the Unix seconds at  | until its pictures   |
|                                  |             | which the job may have expired: whose pictures are in  | are deleted there    |
|                                  |             | this image store                                       |                      |
| `dit:kept:<store>:bytes`         | API, worker | sum of the bytes in it                                 | the same             |
| `dit:sweep:<store>:<what>`       | worker      | the worker that deletes there what has expired         | until the next may   |
| `dit:idempotency:<owner>:<hash>` | API         | hash {body, job} of an Idempotency-Key                 | TTL                  |
| `dit:gate:<model>`               | API, CLI    | PAUSED or DRAINING; none where the queue is open       | until it is resumed  |
| `dit:stats:<model>`              | API, worker | hash of counts since ever, see worker/counts.py        | STATS_TTL_S, renewed |
| `dit:sent:<worker>`              | worker      | number of the last counts it sent, which a second      | SENT_TTL_S, renewed  |
|                                  |             | sending does not count again                           |                      |
| `dit:rate:<key>`                 | API         | µs of Unix time at which this key's calls for a minute | until then           |
|                                  |             | may come at once again                                 |                      |

TTL is the job's own `result_ttl_s`. State changes that two processes could race for are Lua scripts, so that each is one step: CANCEL is
below, a submission is in app/admission.py, the worker's own are in worker/scripts.py.
"""

from worker.counts import COUNT
from worker.payloads import ALL_CHANNELS as ALL_CHANNELS  # said anew, so that others find all of the protocol here
from worker.payloads import FIRST_THREE_CHANNELS as FIRST_THREE_CHANNELS
from worker.payloads import LARGEST_SEED as LARGEST_SEED
from worker.payloads import MAX_BLOCK_CACHE as MAX_BLOCK_CACHE
from worker.payloads import MAX_SHIFT as MAX_SHIFT
from worker.payloads import GenerationRequest as GenerationRequest
from worker.payloads import ModelRecord as ModelRecord

VERSION = 3  # of the job payload; a worker takes this version and the one before
OPERATION = "dit.generate"  # the only thing an rq job of ours may ask for; it is compared, never imported
MAX_ATTEMPTS = 5
ALONE_FROM = 3  # the attempt from which a job runs alone, so that one that kills its worker takes no neighbours along
MODEL_TTL_S = 20
WORKER_TTL_S = 30  # that rq knows a worker after its last heartbeat
LEASE_S = 15  # a worker that renews nothing for this long has lost its jobs
CLAIM_S = 5
EVENTS_KEPT = 2000  # events of one job, about
BELL_RINGS = 64  # that a bell keeps: as many idle workers wake at once
BELL_TTL_S = 60
SENT_TTL_S = 60

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELING, CANCELED = "queued", "running", "succeeded", "failed", "canceling", "canceled"
FINAL = (SUCCEEDED, FAILED, CANCELED)
STATUSES = (QUEUED, RUNNING, CANCELING, *FINAL)
OPEN, PAUSED, DRAINING = "open", "paused", "draining"  # a queue; paused: workers take nothing; draining: no job is accepted
MAX_RESULT_TTL_S = 1_000_000_000

JOB_FIELDS = {
    "version": "payload version",
    "status": "queued, running, succeeded, failed, canceling, canceled",
    "model": "model id",
    "request": "JSON of GenerationRequest, every default resolved",
    "checkpoint": "hash of the checkpoint it was resolved against",
    "result_ttl_s": "seconds that record, events and images live after the end",
    "owner": "id of the API key that submitted it; empty where there are none",
    "request_id": "X-Request-Id of the HTTP request that submitted it",
    "previews": "1 if it shall be shown while it is made",
    "store": "mark of the image store that its pictures go to (worker/stores); none for Redis",
    "work": "row evaluations that it takes, about",
    "execution": "id of the execution that may write; results of any other are dropped",
    "attempts": "how often it was started",
    "step": "sampling steps done, averaged over its pictures",
    "images": "JSON list of {index, seed, sha256, bytes}, of the execution that ended it",
    "error": "why it failed",
    "created_at": "Unix seconds, as started_at and finished_at",
    "started_at": "",
    "finished_at": "",
}


def queue_name(model: str) -> str:
    return f"dit-{model}"


def job_key(job_id: str) -> str:
    return f"dit:job:{job_id}"


def events_key(job_id: str) -> str:
    return f"dit:job:{job_id}:events"


def image_key(job_id: str, execution: str, index: int) -> str:
    return f"dit:image:{job_id}:{execution}:{index}"


MODEL_KEYS = "dit:model:*"
MODELS_KEY = "dit:models"
DEAD_KEY = "dit:dead"
JOBS_KEY = "dit:jobs"
BOOKS_KEY = "dit:books"
BYTES_KEY = "dit:bytes"


def model_key(model: str) -> str:
    return f"dit:model:{model}"


def kept_key(store: str) -> str:
    return f"dit:kept:{store}"


def kept_bytes_key(store: str) -> str:
    return f"dit:kept:{store}:bytes"


def sweep_key(store: str, what: str) -> str:
    return f"dit:sweep:{store}:{what}"


def rate_key(key_id: str) -> str:
    return f"dit:rate:{key_id}"


def bell_key(model: str) -> str:
    return f"dit:bell:{model}"


def gate_key(model: str) -> str:
    return f"dit:gate:{model}"


def sent_key(worker: str) -> str:
    return f"dit:sent:{worker}"


def owned_jobs_key(owner: str) -> str:
    """Of the owner's jobs; of everybody's for nobody in particular."""
    return f"{JOBS_KEY}:{owner}" if owner else JOBS_KEY


def active_key(owner: str) -> str:
    return f"dit:active:{owner}"


def idempotency_key(owner: str, digest: str) -> str:
    return f"dit:idempotency:{owner}:{digest}"


# A Lua function for scripts: the seconds that a job's results live, also of a damaged record, which EXPIRE would refuse.
LIFETIME = """
local function lifetime(text)
  local ttl = math.floor(tonumber(text) or 0)
  return ttl >= 1 and ttl <= 1000000000 and ttl or 86400
end
"""

# KEYS job, events, rq queue, rq job. ARGV job id, now, done event.
# → the status it had: 'queued' was canceled at once, 'running' shall stop at its next step. Also where memory has run out: it frees some.
CANCEL = (
    "#!lua flags=allow-oom\n"
    + LIFETIME
    + COUNT
    + """
local status, model = unpack(redis.call('HMGET', KEYS[1], 'status', 'model'))
if status == 'queued' then
  local ttl = lifetime(redis.call('HGET', KEYS[1], 'result_ttl_s'))
  redis.call('HSET', KEYS[1], 'status', 'canceled', 'finished_at', ARGV[2])
  redis.call('XADD', KEYS[2], '*', 'event', 'done', 'data', ARGV[3])
  redis.call('EXPIRE', KEYS[1], ttl)
  redis.call('EXPIRE', KEYS[2], ttl)
  if redis.call('LREM', KEYS[3], 1, ARGV[1]) == 1 then redis.call('DEL', KEYS[4]) end
  count(model, 'ended|canceled|')
elseif status == 'running' then
  redis.call('HSET', KEYS[1], 'status', 'canceling')
end
return status
"""
)

# A Lua function for scripts: forget(now, most) takes up to `most` jobs that may have expired out of the lists of jobs, and gives back their
# bytes. Nobody is told when a key expires, so whoever submits, and every worker's maintenance, looks at those that are due.
FORGET = """
local function forget(now, most)
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', 'dit:books', '-inf', now, 'LIMIT', 0, most)) do
    local id, owner, bytes = string.match(entry, '^([^|]*)|([^|]*)|(%d+)$')
    local ttl = redis.call('TTL', 'dit:job:' .. id)
    if ttl == -2 then
      redis.call('ZREM', 'dit:books', entry)
      redis.call('ZREM', 'dit:jobs', id)
      if owner ~= '' then
        redis.call('ZREM', 'dit:jobs:' .. owner, id)
        redis.call('SREM', 'dit:active:' .. owner, id)
      end
      if redis.call('DECRBY', 'dit:bytes', bytes) <= 0 then redis.call('DEL', 'dit:bytes') end
    else
      redis.call('ZADD', 'dit:books', now + (ttl == -1 and 60 or math.max(ttl, 1)), entry)
    end
  end
end
"""
