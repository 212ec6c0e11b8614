"""The API's end of each connection: a client that is silent, has vanished or takes nothing does not keep it."""

import asyncio
import resource
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

GONE_S = 30  # after which a client that acknowledges nothing, or leaves no room for more, is taken for gone


class Door(H11Protocol):
    """HTTP/1.1, as uvicorn speaks it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _give_up_the_vanished(transport.get_extra_info("socket"))
        self.timeout_keep_alive_task = self.loop.call_later(GONE_S, self.timeout_keep_alive_handler)  # until the first byte comes


def _give_up_the_vanished(connection: socket.socket) -> None:
    """Else the kernel tries for a quarter of an hour to reach a host that is gone, and for ever to hand over what a client never reads.

    Where there is no such option (macOS), that is so.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for those of whom something is awaited, a body say
    for name, value in {"TCP_KEEPIDLE": GONE_S, "TCP_KEEPINTVL": max(1, GONE_S // 3), "TCP_USER_TIMEOUT": 1000 * GONE_S}.items():
        if option := getattr(socket, name, None):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def raise_file_limit() -> None:
    """To what the system allows: a stream takes two files, its connection and one to Redis, and many systems begin at 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
