"""The front door and the queue's vocabulary start without torch: seconds and hundreds of megabytes less."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["app.main", "app.cli", "worker.protocol", "worker.connect", "worker.scheduler"])
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'diffusers', 'model', 'training') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
