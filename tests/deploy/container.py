"""A service of a compose file as a process here. Command, environment, secrets, volumes, health check and stop are the file's."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.deploy.compose import check_command, mounts, seconds
from tests.deploy.dockerfile import command, environment

WAIT_S = 240.0  # a loaded machine is slow; on an idle one it is seconds


class Host:
    """What the containers have in common: the volumes, the secrets, and the ports that stand for their network."""

    def __init__(self, folder: Path, compose: Mapping[str, Any], redis_port: int, api_port: int) -> None:
        self.folder, self.compose, self.redis_port, self.api_port = folder, compose, redis_port, api_port

    def volume(self, name: str) -> Path:
        path = self.folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def secret(self, name: str) -> Path:
        return self.folder / self.compose["secrets"][name]["file"]

    def here(self, text: str, service: Mapping[str, Any]) -> str:
        """A path of the container, the host `redis` and its port → what they are on this machine."""
        paths = {target: str(self.volume(source)) for target, source in mounts(service).items()}
        paths |= {f"/run/secrets/{name}": str(self.secret(name)) for name in service.get("secrets", [])}
        places = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))

        def place(match: re.Match[str]) -> str:
            if match["path"]:
                return paths[match["path"]]
            return f"127.0.0.1:{self.redis_port}" if match["host"] else str(self.redis_port)

        return re.sub(rf"(?P<path>(?<![\w/.-])(?:{places})(?![\w-]))|(?P<host>\bredis:6379\b)|\b6379\b", place, text)


class Container:
    """`Container(host, "worker", DIT_COMPILE="false")`: one replica; `variables` go before the file's."""

    def __init__(self, host: Host, name: str, **variables: str) -> None:
        self.host, self.name = host, name
        self.service = host.compose["services"][name]
        target = self.service.get("build", {}).get("target")
        words = self.service.get("command") or command(target)
        self.command = [host.here(word, self.service) for word in words]
        image = environment(target) if target else {}
        inside = {**image, **self.service.get("environment", {})}
        # As in a container: nothing of this shell's environment but where programs are.
        self.environment = {
            **{key: host.here(value, self.service) for key, value in inside.items()},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(host.folder),
            **variables,
        }
        self.log = host.folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Container":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=self.host.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def is_healthy(self) -> bool:
        """One run of its health check, in the time that the file gives it."""
        words = [self.host.here(word, self.service) for word in check_command(self.service)]
        try:
            limit_s = seconds(self.service["healthcheck"]["timeout"])
            check = subprocess.run(words, env=self.environment, cwd=self.host.folder, capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return False
        return check.returncode == 0

    def healthy(self) -> "Container":
        """Return once it is."""
        deadline = time.monotonic() + WAIT_S
        while not self.is_healthy():
            assert self.process and self.process.poll() is None, f"{self.name} ended\n{self.said}"
            assert time.monotonic() < deadline, f"{self.name} is not healthy\n{self.said}"
            time.sleep(0.2)
        return self

    def stop(self) -> int:
        """As `docker stop` does; its exit status, and it must not take longer than the file gives it."""
        assert self.process
        self.process.send_signal(getattr(signal, self.service.get("stop_signal", "SIGTERM")))
        return self.process.wait(seconds(self.service["stop_grace_period"]))

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def visible(self) -> bytes:
        """What every user of the machine, or whoever may inspect the container, can read of it."""
        assert self.process
        process = Path(f"/proc/{self.process.pid}")
        return (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
