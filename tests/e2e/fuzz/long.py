"""python -m tests.e2e.fuzz.long, or `make fuzz`: more than 10,000 requests by Schemathesis, to a service that is open and to one with keys.

Where nothing is found, a report goes to benchmarks/reports/; the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.e2e.fuzz.run import ROOT, Outcome, asking_for_keys, fuzz, kept_going, served
from training.runlog import commit, hardware

REPORTS = ROOT / "benchmarks" / "reports"
EXAMPLES = 400  # of each operation and phase, at most, of each service
CASES = 10_000  # at least, together


def play(folder: Path, seed: int) -> dict[str, Outcome]:
    """Both services, one after the other, over one Redis and one worker."""
    options = ("--max-examples", str(EXAMPLES), "--seed", str(seed))
    with served() as service:
        with kept_going(service), asking_for_keys(service, folder) as (url, configuration):
            outcomes = {"open": fuzz(service.url, folder, *options), "with keys": fuzz(url, folder, *options, configuration=configuration)}
        assert "Traceback" not in service.stderr + (folder / "api.log").read_text(), "the log has an exception"
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    """By operation: requests and answers of both services together."""
    total: Counter[str] = Counter()
    for outcome in outcomes.values():
        total.update(outcome.counts)
    lines = ["| operation | requests | answers |", "|---|---|---|"]
    for operation in sorted({name.rpartition(" ")[0] for name in total}):
        answers = {name.rpartition(" ")[2]: count for name, count in total.items() if name.rpartition(" ")[0] == operation}
        told = ", ".join(f"{status} × {answers[status]}" for status in sorted(answers))
        lines.append(f"| `{operation}` | {sum(answers.values())} | {told} |")
    return "\n".join(lines)


def report(outcomes: dict[str, Outcome], seconds: float, seed: int, command: str) -> tuple[str, dict[str, object]]:
    """The report as Markdown, and its figures."""
    cases = {name: outcome.cases for name, outcome in outcomes.items()}
    figures: dict[str, object] = {
        "benchmark": "fuzz",
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "schemathesis": version("schemathesis"),
        "cases": cases,
        "seconds": round(seconds, 1),
    }
    text = f"""# {datetime.now(UTC).date()}: {sum(cases.values())} cases by Schemathesis

    {command}

Machine: {figures["hardware"]}; commit {figures["commit"]}; Schemathesis {figures["schemathesis"]}, seed {seed}; {seconds:.0f} s.
`dit up` on the bundled checkpoint over a redis-server, open ({cases["open"]} cases), and a second API over the same Redis that asks for
keys, called with none, with those of two users and with an operator's ({cases["with keys"]} cases). Examples, coverage, fuzzing and
sequences of calls, with every check of Schemathesis' but the one that [schemathesis.toml](../../tests/e2e/fuzz/schemathesis.toml) leaves
out and says why, and the three of [hooks.py](../../tests/e2e/fuzz/hooks.py) besides. Meanwhile queues that the fuzzer closed are opened
again and long jobs canceled.

{table(outcomes)}

No 5xx but the 503 of a queue that the fuzzer itself had closed, no answer that breaks the description, no exception in a log.
"""
    return text, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=REPORTS / f"{datetime.now(UTC).date()}-fuzz.md")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dit-fuzz-") as folder:
        outcomes = play(Path(folder), options.seed)
    for name, outcome in outcomes.items():
        print(f"--- {name}\n{outcome.report}", flush=True)
    assert all(outcome.passed for outcome in outcomes.values()), "Schemathesis has found something"
    assert sum(outcome.cases for outcome in outcomes.values()) >= CASES, "too few cases"
    command = " ".join(["python -m tests.e2e.fuzz.long", *sys.argv[1:]])
    text, figures = report(outcomes, time.monotonic() - began, options.seed, command)
    options.report.write_text(text)
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
