"""The worker's Lua scripts: each change of a job's state that two processes could race for is one step of the server.

Names of keys that a script finds in a record are put together inside it, so there is one server, not a cluster. A script that gives memory
back, or keeps a promise, runs also where memory has run out (`allow-oom`, which needs Redis 7). Time is the server's, so that workers whose
clocks differ agree on when a lease ends.

After a lost answer a command is sent again (worker/patience.py), so each of these may run twice with the same arguments; what makes that
harmless is said at each.
"""

from worker.counts import COUNT, STATS_TTL_S, WORKER_DIED
from worker.protocol import (
    ALONE_FROM,
    BELL_RINGS,
    BELL_TTL_S,
    CLAIM_S,
    FORGET,
    LEASE_S,
    LIFETIME,
    MAX_ATTEMPTS,
    MODEL_TTL_S,
    PAUSED,
    SENT_TTL_S,
)

_ALSO_WHEN_FULL = "#!lua flags=allow-oom\n"

_RING = f"""
local function ring(bell)
  if redis.call('LLEN', bell) < {BELL_RINGS} then redis.call('LPUSH', bell, '1') end
  redis.call('EXPIRE', bell, {BELL_TTL_S})
end
"""

_PUSH = (
    _RING
    + """
-- The job waits, once, at the front of its model's queue.
local function push(model, id)
  local queue, entry = 'rq:queue:dit-' .. model, 'rq:job:' .. id
  redis.call('LREM', queue .. ':intermediate', 0, id)
  if not redis.call('LPOS', queue, id) then redis.call('LPUSH', queue, id) end
  if redis.call('EXISTS', entry) == 1 then redis.call('HSET', entry, 'status', 'queued') end
  ring('dit:bell:' .. model)
end
"""
)

_BURY = """
-- Put a job that has failed for good on the list of the dead, which forgets those whose record has expired.
local function bury(id, now, ttl)
  redis.call('ZREMRANGEBYSCORE', 'dit:dead', '-inf', now - ttl)
  redis.call('ZADD', 'dit:dead', now, id)
  redis.call('EXPIRE', 'dit:dead', ttl)
end
"""

# KEYS rq's mark of suspension; then for each model its queue, the queue's intermediate list, its bell, its gate. ARGV 'idle' or 'busy',
# worker. Pops the next job of the first model that has one, and is not paused, into the intermediate list. A job at its ALONE_FROM-th
# attempt, or a later one, goes to an idle worker; one busy worker claims it and takes nothing until its own jobs have ended; the other busy
# ones look behind it.
# → {}, {'suspended'}, {'wait', model's number}, {'job', model's number, job id}.
# An idle worker answers for every ring so far: it takes them away and looks at the queues in the same step, so a job queued later rings
# again. Who leaves jobs waiting rings for another worker. Twice: the first job stays in the intermediate list, from where UNSTICK takes it.
TAKE = (
    "#!lua\n"
    + _RING
    + f"""
if redis.call('EXISTS', KEYS[1]) == 1 then return {{'suspended'}} end
local idle = ARGV[1] == 'idle'
for k = 2, #KEYS, 4 do
  local queue, intermediate, bell = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local number, paused = (k - 2) / 4, redis.call('GET', KEYS[k + 3]) == '{PAUSED}'
  if idle then redis.call('DEL', bell) end
  for _, id in ipairs(paused and {{}} or redis.call('LRANGE', queue, 0, 7)) do
    local status, attempts = unpack(redis.call('HMGET', 'dit:job:' .. id, 'status', 'attempts'))
    local alone = (status == 'queued' or status == 'running') and (tonumber(attempts) or 0) >= {ALONE_FROM - 1}
    local claim = 'dit:alone:' .. id
    if idle or not alone then
      redis.call('LREM', queue, 1, id)
      redis.call('RPUSH', intermediate, id)
      if alone then redis.call('DEL', claim) end
      if redis.call('EXISTS', queue) == 1 and redis.call('EXISTS', bell) == 0 then ring(bell) end
      return {{'job', number, id}}
    end
    if (redis.call('GET', claim) or ARGV[2]) == ARGV[2] then
      redis.call('SET', claim, ARGV[2], 'EX', {CLAIM_S})
      return {{'wait', number}}
    end
  end
end
return {{}}
"""
)

# KEYS job, events. ARGV job id, execution, now, events kept. A start is told as progress: 0 of the request's steps.
# → "run"; "alone", from the ALONE_FROM-th attempt; "drop" if it has ended (canceled while queued, or by another execution); "cancel" if
# that was asked while no worker had it; "exhausted" if it was tried too often; "elsewhere" if it runs under another lease that is alive.
# Twice: the execution that has it is told the same and not counted again.
START = (
    COUNT
    + f"""
local status, owner, model, attempts, request = unpack(redis.call('HMGET', KEYS[1], 'status', 'execution', 'model', 'attempts', 'request'))
if not status or status == 'succeeded' or status == 'failed' or status == 'canceled' then return 'drop' end
local wip, now = 'rq:wip:dit-' .. (model or ''), tonumber(redis.call('TIME')[1])
if owner and owner ~= '' and owner ~= ARGV[2] then
  local lease = redis.call('ZSCORE', wip, ARGV[1] .. ':' .. owner)
  if lease and tonumber(lease) > now then return 'elsewhere' end
end
redis.call('HSET', KEYS[1], 'execution', ARGV[2])
redis.call('ZADD', wip, 'XX', now + {LEASE_S}, ARGV[1] .. ':' .. ARGV[2])
if status == 'canceling' then return 'cancel' end
local first = status ~= 'running' or owner ~= ARGV[2]
if first then
  attempts = math.floor(tonumber(attempts) or 0) + 1 -- of a damaged record too, which HINCRBY would refuse
  redis.call('HSET', KEYS[1], 'attempts', attempts)
end
if tonumber(attempts) > {MAX_ATTEMPTS} then return 'exhausted' end
redis.call('HSET', KEYS[1], 'status', 'running', 'step', '0')
if redis.call('HSETNX', KEYS[1], 'started_at', ARGV[3]) == 1 then
  observe(model, 'wait_s', redis.call('HGET', KEYS[1], 'created_at'), ARGV[3])
end
local read, asked = pcall(cjson.decode, request)
if first and read and type(asked) == 'table' and type(asked.steps) == 'number' then
  local data = string.format('{{"step": 0, "steps": %d}}', asked.steps)
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'event', 'progress', 'data', data)
end
return tonumber(attempts) >= {ALONE_FROM} and 'alone' or 'run'
"""
)

# KEYS job, events. ARGV execution, step, event, data, events kept.
# → 0 if another execution owns the job, 2 if it shall be canceled, else 1. Twice: the same event is told twice.
PROGRESS = """
if redis.call('HGET', KEYS[1], 'execution') ~= ARGV[1] then return 0 end
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'canceling' then return 2 end
if status ~= 'running' then return 0 end
if ARGV[3] ~= '' then
  if ARGV[2] ~= '' then redis.call('HSET', KEYS[1], 'step', ARGV[2]) end
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'event', ARGV[3], 'data', ARGV[4])
end
return 1
"""

# KEYS job, events. ARGV job id, execution, status, now, images, error, done event, 'dead' or '', kind of a failure. A cancel that came in
# time wins over a result. → 0 if another execution owns the job, else 1. Twice: the end that this execution has written is confirmed.
FINISH = (
    _ALSO_WHEN_FULL
    + LIFETIME
    + _BURY
    + COUNT
    + """
local status, owner, ttl, model, created =
  unpack(redis.call('HMGET', KEYS[1], 'status', 'execution', 'result_ttl_s', 'model', 'created_at'))
if owner ~= ARGV[2] then return 0 end
if status == ARGV[3] or status == 'canceled' then return 1 end
if status ~= 'running' and status ~= 'canceling' and status ~= 'queued' then return 0 end
ttl = lifetime(ttl)
local ended, images, reason, done = ARGV[3], ARGV[5], ARGV[6], ARGV[7]
if status == 'canceling' then ended, images, reason, done = 'canceled', '[]', '', '{"status": "canceled"}' end
redis.call('HSET', KEYS[1], 'status', ended, 'finished_at', ARGV[4], 'images', images, 'error', reason)
redis.call('XADD', KEYS[2], '*', 'event', 'done', 'data', done)
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('EXPIRE', KEYS[2], ttl)
if ended == 'failed' and ARGV[8] == 'dead' then bury(ARGV[1], ARGV[4], ttl) end
count(model, 'ended|' .. ended .. '|' .. (ended == 'failed' and ARGV[9] or ''))
if ended == 'succeeded' then observe(model, 'job_s', created, ARGV[4]) end
return 1
"""
)

# KEYS job, events. ARGV job id, execution, data of the event.
# Its owner gives the job back: it waits again, first in its queue, and has lost no attempt; one being canceled stays so. → 0 if another
# owns it. Twice: nobody owns it any more, which is told as if it were lost; it ends here just as well.
GIVE_BACK = (
    _ALSO_WHEN_FULL
    + _PUSH
    + """
local status, owner, model, attempts = unpack(redis.call('HMGET', KEYS[1], 'status', 'execution', 'model', 'attempts'))
if owner ~= ARGV[2] or (status ~= 'running' and status ~= 'canceling') then return 0 end
redis.call('ZREM', 'rq:wip:dit-' .. model, ARGV[1] .. ':' .. ARGV[2])
redis.call('HSET', KEYS[1], 'execution', '')
redis.call('HSET', KEYS[1], 'attempts', math.max(0, math.floor(tonumber(attempts) or 1) - 1))
if status == 'running' then
  redis.call('HSET', KEYS[1], 'status', 'queued', 'step', '0')
  redis.call('XADD', KEYS[2], '*', 'event', 'queued', 'data', ARGV[3])
end
push(model, ARGV[1])
return 1
"""
)

# ARGV model, why (a job that was tried too often), event of one that waits again, event of one that is dead.
# Jobs whose lease has run out wait again, or fail after their last attempt. → {'again' or 'dead', job id, …}.
# Twice, or by two workers at once: a lease is taken away once, and only whoever takes it away acts.
REAP = (
    _ALSO_WHEN_FULL
    + LIFETIME
    + _PUSH
    + _BURY
    + COUNT
    + f"""
local model, now, told = ARGV[1], tonumber(redis.call('TIME')[1]), {{}}
local wip = 'rq:wip:dit-' .. model

local function fail(id, job, ttl)
  redis.call('HSET', job, 'status', 'failed', 'finished_at', now, 'images', '[]', 'error', ARGV[2])
  redis.call('XADD', job .. ':events', '*', 'event', 'done', 'data', ARGV[4])
  redis.call('EXPIRE', job, ttl)
  redis.call('EXPIRE', job .. ':events', ttl)
  bury(id, now, ttl)
  count(model, 'ended|failed|{WORKER_DIED}')
  redis.call('LREM', 'rq:queue:dit-' .. model .. ':intermediate', 0, id)
  if redis.call('EXISTS', 'rq:job:' .. id) == 1 then  -- as rq books a failure
    redis.call('HSET', 'rq:job:' .. id, 'status', 'failed')
    redis.call('EXPIRE', 'rq:job:' .. id, ttl)
    redis.call('ZADD', 'rq:failed:dit-' .. model, now + ttl, id)
  end
end

for _, lease in ipairs(redis.call('ZRANGEBYSCORE', wip, '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', wip, lease)
  local id, execution = string.match(lease, '^([^:]*):?(.*)$')
  redis.call('DEL', 'rq:execution:' .. lease)
  redis.call('ZREM', 'rq:executions:' .. id, execution)
  local job = 'dit:job:' .. id
  local status, owner, attempts, ttl = unpack(redis.call('HMGET', job, 'status', 'execution', 'attempts', 'result_ttl_s'))
  local other = owner and owner ~= execution and redis.call('ZSCORE', wip, id .. ':' .. owner)
  if status == 'running' and owner == execution and (tonumber(attempts) or 0) >= {MAX_ATTEMPTS} then
    fail(id, job, lifetime(ttl))
    table.insert(told, 'dead')
    table.insert(told, id)
  elseif not (other and tonumber(other) > now) then
    if status == 'running' or status == 'canceling' then redis.call('HSET', job, 'execution', '') end
    if status == 'running' then
      redis.call('HSET', job, 'status', 'queued', 'step', '0')
      redis.call('XADD', job .. ':events', '*', 'event', 'queued', 'data', ARGV[3])
    end
    push(model, id)
    table.insert(told, 'again')
    table.insert(told, id)
  end
end
return told
"""
)

# KEYS a queue's intermediate list, its leases. → ids of the jobs that were popped and are not leased. Each job's own lease is asked for:
# a thousand workers may hold ten thousand leases, and each of them looks.
UNLEASED = """#!lua flags=no-writes
local found = {}
for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  local owner = redis.call('HGET', 'dit:job:' .. id, 'execution')
  if not owner or not redis.call('ZSCORE', KEYS[2], id .. ':' .. owner) then table.insert(found, id) end
end
return found
"""

# ARGV model, job id. A job that was popped and never leased waits again, also where rq has lost its record: whoever takes it ends it.
# → 0 if it is not there any more; so twice is harmless.
UNSTICK = (
    _ALSO_WHEN_FULL
    + _PUSH
    + """
if redis.call('LREM', 'rq:queue:dit-' .. ARGV[1] .. ':intermediate', 0, ARGV[2]) == 0 then return 0 end
if redis.call('EXISTS', 'rq:job:' .. ARGV[2], 'dit:job:' .. ARGV[2]) > 0 then push(ARGV[1], ARGV[2]) end
return 1
"""
)

# KEYS the worker's hash, its set of executions, the set of models; each model's record; for each lease its registry, and the keys of its
# execution, of the job's executions and of rq's job. ARGV seconds that the worker lives, its state, now (text), now (seconds), what keeps
# it from taking jobs ('' for nothing), number of models; for each model id and record; for each lease job id and execution.
# Renews what is still there: a lease that was taken away, or a job that has ended, is not brought back. → 0 if the worker is not known.
BEAT = (
    _ALSO_WHEN_FULL
    + f"""
local now, models = tonumber(redis.call('TIME')[1]), tonumber(ARGV[6])
local known = redis.call('HEXISTS', KEYS[1], 'pid') -- a state alone, set late, would make a key of a worker that is forgotten
if known == 1 then
  redis.call('HSET', KEYS[1], 'state', ARGV[2], 'last_heartbeat', ARGV[3], 'trouble', ARGV[5])
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[1])
end
for i = 1, models do
  redis.call('SADD', KEYS[3], ARGV[5 + 2 * i])
  redis.call('SET', KEYS[3 + i], ARGV[6 + 2 * i], 'EX', {MODEL_TTL_S})
end
local k, a = 4 + models, 7 + 2 * models
while KEYS[k] do
  local lease = ARGV[a] .. ':' .. ARGV[a + 1]
  if redis.call('ZSCORE', KEYS[k], lease) then
    redis.call('ZADD', KEYS[k], now + {LEASE_S}, lease)
    if redis.call('EXPIRE', KEYS[k + 1], {LEASE_S}) == 1 then redis.call('HSET', KEYS[k + 1], 'last_heartbeat', ARGV[4]) end
    redis.call('ZADD', KEYS[k + 2], 'XX', now + {LEASE_S} + 60, ARGV[a + 1])
    redis.call('EXPIRE', KEYS[k + 2], {LEASE_S} + 60)
    if redis.call('EXISTS', KEYS[k + 3]) == 1 then redis.call('HSET', KEYS[k + 3], 'last_heartbeat', ARGV[3]) end
  end
  k, a = k + 4, a + 2
end
return known
"""
)

# What has expired leaves the lists of jobs. Twice: nothing is left to forget.
TIDY = _ALSO_WHEN_FULL + FORGET + "forget(tonumber(redis.call('TIME')[1]), 1000)"

# KEYS jobs whose pictures are in a store. ARGV how many at most. → entries of those that have expired; the others are looked at later.
EXPIRED = (
    _ALSO_WHEN_FULL
    + """
local now, expired = tonumber(redis.call('TIME')[1]), {}
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local ttl = redis.call('TTL', 'dit:job:' .. string.match(entry, '^[^|]*'))
  if ttl == -2 then
    table.insert(expired, entry)
  else
    redis.call('ZADD', KEYS[1], now + (ttl == -1 and 60 or math.max(ttl, 1)), entry)
  end
end
return expired
"""
)

# KEYS jobs whose pictures are in a store, the sum of their bytes. ARGV an entry, whose pictures are deleted. Twice: its bytes are given
# back once.
DELETED = (
    _ALSO_WHEN_FULL
    + """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return end
if redis.call('DECRBY', KEYS[2], string.match(ARGV[1], '%d+$')) <= 0 then redis.call('DEL', KEYS[2]) end
"""
)

# KEYS number of what this worker sent last, then models' counts. ARGV the number of this; for each of KEYS from the second on the number of
# its fields, and for each of these its name and what is added. → 0 if it was counted before; so twice is harmless.
ADD = (
    _ALSO_WHEN_FULL
    + f"""
if redis.call('GET', KEYS[1]) == ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', {SENT_TTL_S})
local a = 2
for k = 2, #KEYS do
  local last = a + 2 * tonumber(ARGV[a])
  for i = a + 1, last, 2 do redis.call('HINCRBYFLOAT', KEYS[k], ARGV[i], ARGV[i + 1]) end
  redis.call('EXPIRE', KEYS[k], {STATS_TTL_S})
  a = last + 1
end
return 1
"""
)
