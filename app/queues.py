"""Queues from outside: what waits in each, runs and serves it, and the gate that an operator closes. Redis, no FastAPI."""

from dataclasses import dataclass
from typing import Any

from redis import Redis

from worker import protocol
from worker.protocol import DRAINING, LEASE_S, OPEN, PAUSED, WORKER_TTL_S

SUSPENDED = "suspended"  # what `rq suspend` makes of every open queue
STATES = (OPEN, PAUSED, DRAINING)  # that an operator may choose

# → for each model that was ever served: its id, the state of its queue, jobs that wait, jobs under a lease, workers that were heard of
# within LEASE_S, those of them that cannot store pictures, 1 if it is served, the age in seconds of the next job to run.
_LOOK = f"""
local time = redis.call('TIME')
local now, told = tonumber(time[1]) + tonumber(time[2]) / 1e6, {{}}
local otherwise = redis.call('EXISTS', 'rq:suspended') == 1 and '{SUSPENDED}' or '{OPEN}'
local models = redis.call('SMEMBERS', 'dit:models')
table.sort(models)
for _, model in ipairs(models) do
  local queue, workers, troubled, oldest = 'rq:queue:dit-' .. model, 0, 0, 0
  for _, worker in ipairs(redis.call('SMEMBERS', 'rq:workers:dit-' .. model)) do
    if redis.call('TTL', worker) > {WORKER_TTL_S - LEASE_S} then
      workers = workers + 1
      if (redis.call('HGET', worker, 'trouble') or '') ~= '' then troubled = troubled + 1 end
    end
  end
  local first = redis.call('LINDEX', queue, 0)
  local created = first and tonumber(redis.call('HGET', 'dit:job:' .. first, 'created_at'))
  if created then oldest = math.max(0, now - created) end
  table.insert(told, {{
    model, redis.call('GET', 'dit:gate:' .. model) or otherwise, redis.call('LLEN', queue),
    redis.call('ZCOUNT', 'rq:wip:dit-' .. model, now, '+inf'), workers, troubled,
    redis.call('EXISTS', 'dit:model:' .. model), string.format('%.3f', oldest)
  }})
end
return told
"""
LOOK = "#!lua flags=no-writes\n" + _LOOK
# The same, of a Redis that would take a job: a script that may write is refused by one that is full, a replica, or cannot write its disk.
LOOK_FOR_ROOM = "#!lua\n" + _LOOK

# KEYS the gate, the set of models, the bell. ARGV model, state. → 0 if there is no such model. Workers that wait are told of a queue that
# opens.
_SET_GATE = f"""#!lua
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 0 then return 0 end
if ARGV[2] ~= '{OPEN}' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('DEL', KEYS[1]) end
if ARGV[2] ~= '{PAUSED}' then
  if redis.call('LLEN', KEYS[3]) == 0 then redis.call('LPUSH', KEYS[3], '1') end
  redis.call('EXPIRE', KEYS[3], {protocol.BELL_TTL_S})
end
return 1
"""


@dataclass(frozen=True)
class QueueState:
    """One model's queue at one moment."""

    model: str
    state: str  # open, paused, draining, suspended
    waiting: int
    running: int
    workers: int
    troubled: int  # of them, that cannot store pictures
    served: bool  # whether a worker keeps its record
    oldest_s: float  # age of the next job to run; 0 if none waits

    @property
    def ready(self) -> bool:
        """Whether a job that is submitted now would run."""
        return self.served and self.workers > self.troubled and self.state == OPEN


def states(told: list[Any]) -> list[QueueState]:
    """What LOOK answers."""
    return [
        QueueState(model.decode(), state.decode(), waiting, running, workers, troubled, bool(served), float(oldest))
        for model, state, waiting, running, workers, troubled, served, oldest in told
    ]


def gate_call(model: str, state: str) -> list[Any]:
    """Arguments of EVAL that put a queue into one of STATES."""
    assert state in STATES
    return [_SET_GATE, 3, protocol.gate_key(model), protocol.MODELS_KEY, protocol.bell_key(model), model, state]


def look(redis: Redis) -> list[QueueState]:
    """Of every model that was ever served, by id."""
    connection: Any = redis  # its answers are bytes here, which its types do not say
    return states(connection.eval(LOOK, 0))


def set_state(redis: Redis, model: str, state: str) -> None:
    """ValueError for a model that was never served."""
    if not redis.eval(*gate_call(model, state)):
        raise ValueError(no_such_model(model))


def no_such_model(model: str) -> str:
    return f"there is no queue of a model {model[:60]!a}: none was ever served"
