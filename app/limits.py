"""How often a caller may call: the generic cell rate algorithm in Redis, one script a call, on the server's clock.

Of N calls a minute, N may come at once; one more is allowed every 60/N s. All that is kept is the time at which N may come at once again.
"""

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis as AsyncRedis

from worker import protocol

# KEYS rate. ARGV calls a minute. Times are whole µs, which a double holds exactly.
# → whether this call is allowed, how many more are, seconds until one more than that is. Also where memory has run out: it expires.
TAKE = """#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local step = math.floor(60000000 / ARGV[1])
local window = step * ARGV[1]
local full = tonumber(redis.call('GET', KEYS[1])) or now
full = math.min(math.max(full, now), now + window) -- a clock that was put back locks nobody out
local allowed = full + step <= now + window
if allowed then
  full = full + step
  redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
end
local left = now + window - full
local remaining = math.floor(left / step)
return {allowed and 1 or 0, remaining, math.ceil(((remaining + 1) * step - left) / 1000000)}
"""


@dataclass(frozen=True)
class Rate:
    """Where a caller stands after a call."""

    allowed: bool
    per_minute: int
    remaining: int
    next_s: int  # until `remaining` grows by one

    @property
    def headers(self) -> dict[str, str]:
        """draft-ietf-httpapi-ratelimit-headers-10: q calls in w seconds; r remain, and t seconds to the next."""
        return {
            "RateLimit-Policy": f'"default";q={self.per_minute};w=60',
            "RateLimit": f'"default";r={self.remaining};t={self.next_s}',
        }


class RateLimiter:
    """Shared by every API over one Redis."""

    def __init__(self, connection: AsyncRedis) -> None:
        self._take: Any = connection.register_script(TAKE)

    async def take(self, key_id: str, per_minute: int) -> Rate:
        """Count one call with this key, unless it is one too many. Raises RedisError."""
        allowed, remaining, next_s = await self._take([protocol.rate_key(key_id)], [per_minute])
        return Rate(bool(allowed), per_minute, remaining, next_s)
