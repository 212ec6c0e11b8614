"""A Redis, its replica and three Sentinels, configured as docs/operations.md says, as processes on this machine."""

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tests.deploy.compose import ROOT
from tests.deploy.container import WAIT_S

PAGE = (ROOT / "docs" / "operations.md").read_text()
PASSWORD = "not much of a secret"
PATIENCE_MS = 2000  # in place of what the page says, so that a test need not wait for long


def wait(holds: Callable[[], Any], what: str) -> Any:
    """The first true answer; of a server that is not there yet, or does not know it yet, there is none."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if answer := holds():
                return answer
        except (RedisError, KeyError):
            pass
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S:g} s"
        time.sleep(0.05)


def blocks() -> dict[str, str]:
    """The page's files by name: redis.conf, sentinel.conf."""
    return dict(re.findall(r"```conf\n# ([a-z]+\.conf)[^\n]*\n(.*?)```", PAGE, re.DOTALL))


class Group:
    """`with Group(folder, ports) as group:`; ports of the primary, the replica and the Sentinels."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.folder, self.ports = folder, ports
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports[2:])
        self.url = f"redis+sentinel://{hosts}/mymaster/0"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.primary, self.replica = (Redis(port=port, password=PASSWORD, protocol=2) for port in ports[:2])

    def __enter__(self) -> "Group":
        """The replica first: a Sentinel asks the primary for its replicas when it comes, and then only every ten seconds."""
        for number in (0, 1):
            self._start(number)
        wait(lambda: Redis.info(self.primary, "replication")["slave0"]["state"] == "online", "the replica")
        for number in (2, 3, 4):
            self._start(number)
        return self

    def meet(self) -> None:
        """Return when all Sentinels know each other and the replica."""
        for port in self.ports[2:]:
            with Redis(port=port, password=PASSWORD, protocol=2) as sentinel:
                wait(lambda sentinel=sentinel: self._sees_all(sentinel), "that the Sentinels know each other")

    def _start(self, number: int) -> None:
        kind = "redis.conf" if number < 2 else "sentinel.conf"
        folder = self.folder / str(number)
        folder.mkdir()
        text = blocks()[kind].replace("PASSWORD", f'"{PASSWORD}"').replace("10.0.0.1 6379", f"127.0.0.1 {self.ports[0]}")
        text = re.sub(r"(down-after-milliseconds mymaster) \d+", rf"\1 {PATIENCE_MS}", text)
        lines = [text, f"port {self.ports[number]}", "bind 127.0.0.1", f"dir {folder}", f"logfile {folder}/log"]
        lines += ["repl-diskless-sync-delay 0"] if number < 2 else []
        lines += [f"replicaof 127.0.0.1 {self.ports[0]}"] if number == 1 else []
        (folder / kind).write_text("\n".join(lines))
        mode = [] if number < 2 else ["--sentinel"]
        self.processes.append(subprocess.Popen(["redis-server", str(folder / kind), *mode], stdin=subprocess.DEVNULL))

    def _sees_all(self, sentinel: Any) -> bool:
        state = sentinel.sentinel_master("mymaster")
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)

    def follow(self) -> None:
        """Return when the replica has all that was written so far."""
        primary: Any = self.primary
        written = primary.info("replication")["master_repl_offset"]
        wait(lambda: int(primary.info("replication")["slave0"]["offset"]) >= written, "what the replica lacks")

    def kill_primary(self) -> None:
        self.processes[0].kill()
        self.processes[0].wait()

    def __exit__(self, *_: object) -> None:
        for client in (self.primary, self.replica):
            client.close()
        for process in self.processes:
            process.kill()
            process.wait()
