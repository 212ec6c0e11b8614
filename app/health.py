"""Whether the API of this machine answers, for a container's health check: its image has no curl."""

import http.client
import urllib.request

TIMEOUT_S = 4.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where one that listens everywhere is asked


def ailment(host: str, port: int) -> str | None:
    """What is wrong, or None. Asked directly, whatever proxy the environment names."""
    host = _LOOPBACK.get(host, host)
    url = f"http://[{host}]:{port}/healthz" if ":" in host else f"http://{host}:{port}/healthz"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=TIMEOUT_S) as answer:
            return None if answer.status == 200 else f"{url} answers with status {answer.status}"
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        return f"{url} does not answer: {error}"
