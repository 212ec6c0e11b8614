"""Clients of the Redis that a URL names: one server, or the primary that Sentinels know of. For API, worker and commands alike.

redis+sentinel://[[user]:password@]host[:26379][,host[:port]…]/name[/db]. Each new connection asks the Sentinels, the one that answered last
first, where the primary is; one that has become a replica is left. Where Redis wants a password, its Sentinels want the same: whoever
commands a Sentinel decides whom everybody takes for the primary, and so gets to know the password.
"""

import threading
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelConnectionPool
from redis.asyncio.sentinel import SentinelManagedConnection as AsyncSentinelManagedConnection
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelManagedConnection

SCHEME = "redis+sentinel"
PORT = 26379
KEPT = 64  # connections of asyncio that nobody uses
_ANSWER_S = 2.0  # that one Sentinel gets before the next is asked


@dataclass(frozen=True)
class Sentinels:
    """What such a URL says."""

    addresses: tuple[tuple[str, int], ...]
    name: str  # of the primary, as the Sentinels call it
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """ValueError, without the password, for a URL that is none."""
        parts = urlsplit(url)
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        name, _, db = parts.path.strip("/").partition("/")
        if not name or not (db or "0").isdecimal() or parts.query or parts.fragment:
            said = f"{parts.path}{'?' if parts.query else ''}{parts.query}"
            raise ValueError(
                f"{SCHEME}://host:port,host:port goes on with the primary's name and perhaps a database: /mymaster/0; got {said!r}"
            )
        addresses = tuple(_address(host) for host in hosts.split(","))
        return cls(addresses, unquote(name), int(db or 0), unquote(user) or None, unquote(password) or None)

    def of_the_primary(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of its connections; what the caller says comes second, where it is not None."""
        said = {"username": self.username, "password": self.password, "db": self.db}
        return {**said, **{option: value for option, value in options.items() if value is not None}}

    def of_a_sentinel(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"password": options.get("password") or self.password, "protocol": 2, "socket_timeout": _ANSWER_S}

    def silent(self) -> MasterNotFoundError:
        """Why there is no connection; redis-py's own words fill a screen."""
        asked = ", ".join(f"{host}:{port}" for host, port in self.addresses)
        return MasterNotFoundError(
            f"the Sentinels {asked} know of no primary {self.name!r} that is up, do not answer, or want another password"
        )


class _Manager(Sentinel):
    """redis-py's puts the Sentinel that answered first, in two steps; here threads do so one after the other."""

    def __init__(self, known: Sentinels, **options: Any) -> None:
        super().__init__(known.addresses, **options)
        self._known, self._one_asks = known, threading.Lock()

    def discover_master(self, service_name: str) -> Any:
        with self._one_asks:
            try:
                return super().discover_master(service_name)
            except MasterNotFoundError:
                raise self._known.silent() from None


class _AsyncManager(AsyncSentinel):
    """The same for asyncio, where nobody comes in between."""

    def __init__(self, known: Sentinels, **options: Any) -> None:
        super().__init__(known.addresses, **options)
        self._known = known

    async def discover_master(self, service_name: str) -> Any:
        try:
            return await super().discover_master(service_name)
        except AsyncMasterNotFoundError:
            raise self._known.silent() from None


class _Connection(SentinelManagedConnection):
    """Asks for the primary whenever it connects. redis-py's own does not where a call is sent again, and goes to the old one: its #3874."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self._sock:
            self.connect()
        super().send_packed_command(command, check_health)


class _AsyncConnection(AsyncSentinelManagedConnection):
    """The same for asyncio."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect()
        await super().send_packed_command(command, check_health)


class _Shrinking(ConnectionPool):
    """redis-py's own keeps as many connections as there ever were at once, in the API one for each that watched a job."""

    async def release(self, connection: AbstractConnection) -> None:
        await super().release(connection)
        if len(self._available_connections) > KEPT:
            longest_idle: Any = self._available_connections.pop(0)
            await longest_idle.disconnect()


class _SentinelPool(_Shrinking, AsyncSentinelConnectionPool):
    """Its end is also that of the connections to the Sentinels, which nobody else has."""

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def connect(url: str, **options: Any) -> Redis:
    """A client; whether anybody answers is not asked. `options` as of `Redis.from_url`. ValueError for a URL that is none."""
    if urlsplit(url).scheme != SCHEME:
        return Redis.from_url(url, **options)
    known = Sentinels.parse(url)
    once = {**known.of_a_sentinel(options), "retry": Retry(NoBackoff(), 0)}
    return _Manager(known, sentinel_kwargs=once).master_for(known.name, connection_class=_Connection, **known.of_the_primary(options))


def connect_async(url: str, **options: Any) -> AsyncRedis:
    """The same for asyncio."""
    if urlsplit(url).scheme != SCHEME:
        return AsyncRedis.from_pool(_Shrinking.from_url(url, **options))
    known = Sentinels.parse(url)
    once = {**known.of_a_sentinel(options), "retry": AsyncRetry(NoBackoff(), 0)}
    manager = _AsyncManager(known, sentinel_kwargs=once)
    classes: dict[str, Any] = {"connection_pool_class": _SentinelPool, "connection_class": _AsyncConnection}
    return manager.master_for(known.name, **classes, **known.of_the_primary(options))


def _address(host: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{host}")
        if parts.hostname and not parts.path:
            return parts.hostname, parts.port or PORT
    except ValueError:  # a port that is none
        pass
    raise ValueError(f"{host!r} is no address of a Sentinel, which reads host:port, several with commas between them")
