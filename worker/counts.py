"""What is counted of each model, over all workers and their restarts: the fields of `dit:stats:<model>`. Standard library only.

What happens to jobs is counted by the scripts in which it happens (COUNT); of the rest, worker/stats.py sends sums every two seconds.
The hash lives STATS_TTL_S after its last change.
"""

STATS_TTL_S = 30 * 86_400  # a model that nobody used for so long counts from 0 again

# Why a job failed, for whoever counts.
REFUSED, STEP, DECODER, NOT_FINITE, ENCODER, STORE, WORKER_DIED = (
    "refused",
    "step",
    "decoder",
    "not-finite",
    "encoder",
    "store",
    "worker-died",
)
FAILURES = {
    REFUSED: "no worker can do it: its checkpoint, its request or its record",
    STEP: "the forward threw, also for it alone",
    DECODER: "the decoder threw, also for it alone",
    NOT_FINITE: "a picture left the finite numbers twice",
    ENCODER: "a PNG could not be made",
    STORE: "the image store took others, and one of its pictures never",
    WORKER_DIED: "every attempt ended with its worker",
}

# Each is a field.
COUNTERS = {
    "images": "pictures that were stored",
    "bucket_rows": "rows that forwards did, padding among them",
    "not_finite": "pictures that left the finite numbers",
    "out_of_memory": "how often a forward or a decode was too large, and is smaller since",
}
# Of each, `<name>|<bound>` counts what is not larger than this bound and larger than the one before, `<name>|inf` the rest, and
# `<name>|sum` adds up.
_WAITS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "wait_s": _WAITS_S,  # from a job's submission to its first start
    "job_s": _WAITS_S,  # from a job's submission to its success
    "tick_s": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
    "decode_s": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),  # of one batch
    "rows": (1, 2, 4, 8, 16, 32, 64, 128, 256),  # of one forward, without padding
}


def stats_key(model: str) -> str:
    return f"dit:stats:{model}"


def ended_field(status: str, kind: str = "") -> str:
    """Field of the jobs that ended so; of those that failed, for this reason."""
    return f"ended|{status}|{kind}"


def bucket_fields(histogram: str) -> list[str]:
    """One for each bound, and the last."""
    return [*(f"{histogram}|{bound:g}" for bound in HISTOGRAMS[histogram]), f"{histogram}|inf"]


def sum_field(histogram: str) -> str:
    return f"{histogram}|sum"


_BOUNDS = {name: ", ".join(f"'{bound:g}'" for bound in bounds) for name, bounds in HISTOGRAMS.items()}
# Lua functions for scripts: what happens to jobs is counted in the step in which it happens, so that nothing is missed or counted twice.
COUNT = f"""
local bounds = {{wait_s = {{{_BOUNDS["wait_s"]}}}, job_s = {{{_BOUNDS["job_s"]}}}}}

local function count(model, field)
  if not model then return end -- of a damaged record
  redis.call('HINCRBY', 'dit:stats:' .. model, field, 1)
  redis.call('EXPIRE', 'dit:stats:' .. model, {STATS_TTL_S})
end

local function observe(model, name, from, to)
  from, to = tonumber(from), tonumber(to)
  if not (model and from and to) then return end
  local value, bucket = math.max(0, to - from), 'inf' -- clocks of two machines may differ
  for _, bound in ipairs(bounds[name]) do
    if value <= tonumber(bound) then bucket = bound break end
  end
  count(model, name .. '|' .. bucket)
  redis.call('HINCRBYFLOAT', 'dit:stats:' .. model, name .. '|sum', string.format('%.6f', value))
end
"""
