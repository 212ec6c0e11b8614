"""The API's connections to Redis."""

from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool

KEPT = 64  # connections that nobody uses


class Pool(ConnectionPool):
    """One that shrinks again: redis-py's own keeps as many connections as there ever were at once, here one for each that watched."""

    async def release(self, connection: AbstractConnection) -> None:
        await super().release(connection)
        if len(self._available_connections) > KEPT:
            longest_idle: Any = self._available_connections.pop(0)
            await longest_idle.disconnect()
