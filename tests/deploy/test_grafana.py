"""Dashboard, alerts and documentation ask for nothing but what a scrape has: each metric, each label, each value of a label."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from starlette.testclient import TestClient

from app.embedded import EmbeddedServer
from app.main import create_app
from app.settings import Settings
from worker import protocol
from worker.protocol import ModelRecord
from worker.results import JobResults
from worker.stats import Sender, Stats

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dit.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
TEXT = (ROOT / "docs/observability.md").read_text()

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
EXPRESSIONS = [*(expr for _, expr, _ in TARGETS), *(alert["expr"] for alert in ALERTS)]
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds to whatever it scrapes

Series = dict[str, list[dict[str, str]]]  # sample → the labels of each


# --- as much of PromQL as is used here ----------------------------------------------------------------------------------

TOKEN = re.compile(
    r'\s*(?:(?P<string>"[^"]*")|(?P<range>\[[^\]]*\])|(?P<word>[A-Za-z_:][\w:]*)|(?P<number>\d[\d.]*)|(?P<sign>[=!]~|[=!<>]=|.))'
)
AGGREGATIONS = {"sum", "max", "min", "avg", "count"}
FUNCTIONS = {"rate", "increase", "histogram_quantile", "absent", "scalar"}
WORDS = {"and", "or", "unless", "by"}


class Selector(NamedTuple):
    metric: str
    matchers: list[tuple[str, str, str]]  # label, operator, value
    grouped_by: set[str]  # by the aggregations around it


def tokens(expression: str) -> list[str]:
    return [found[0].strip() for found in TOKEN.finditer(expression.strip())]


def closing(words: list[str], start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(words)):
        depth += {"(": 1, ")": -1}.get(words[place], 0)
        if depth == 0:
            return place
    raise AssertionError(f"not closed: {' '.join(words)}")


def selectors(words: list[str], grouped_by: frozenset[str] = frozenset()) -> Iterator[Selector]:
    """Every metric that an expression reads. Fails on what is not understood here."""
    place = 0
    while place < len(words):
        word = words[place]
        if word in AGGREGATIONS:
            inner, labels = place + 1, set[str]()
            if words[inner] == "by":
                end = closing(words, inner + 1)
                labels, inner = set(words[inner + 2 : end]) - {","}, end + 1
            assert words[inner] == "(", words
            end = closing(words, inner)
            yield from selectors(words[inner + 1 : end], grouped_by | labels)
            place = end
        elif re.match("[A-Za-z_:]", word) and word not in FUNCTIONS | WORDS:
            matchers = []
            if words[place + 1 : place + 2] == ["{"]:
                end = words.index("}", place)
                inside = [w for w in words[place + 2 : end] if w != ","]
                matchers = [(inside[i], inside[i + 1], inside[i + 2].strip('"')) for i in range(0, len(inside), 3)]
                place = end
            yield Selector(word, matchers, set(grouped_by))
        elif word in FUNCTIONS:
            assert words[place + 1] == "(", words
        place += 1


def read(expression: str) -> list[Selector]:
    """With Grafana's variables filled in."""
    filled = expression.replace("$__rate_interval", "5m").replace("$model", ".*")
    assert "$" not in filled
    return list(selectors(tokens(filled)))


def test_the_reader_of_expressions_reads() -> None:
    assert read('sum by (a, le) (max by (b) (rate(x_total{c="1", d=~"2|3"}[5m]))) / scalar(max(y)) > 0.5 and z == 1') == [
        Selector("x_total", [("c", "=", "1"), ("d", "=~", "2|3")], {"a", "le", "b"}),
        Selector("y", [], set()),
        Selector("z", [], set()),
    ]


# --- a scrape -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Series]:
    """Of an API that was used, refused and failed, over a Redis in which workers have counted."""
    server = EmbeddedServer(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        app = create_app(Settings(_env_file=None, redis_url=server.url))
        with TestClient(app, raise_server_exceptions=False) as client, Redis.from_url(server.url, protocol=2) as redis:
            use(client, redis)
            found: Series = {}
            for family in text_string_to_metric_families(client.get("/metrics").text):
                for sample in family.samples:
                    found.setdefault(sample.name, []).append(sample.labels)
            yield found
    finally:
        server.stop()


def use(client: Any, redis: Redis) -> None:
    record = ModelRecord(
        "tiny", "c" * 64, [["cat"]], 16, 1, "flow", ["euler"], 1000, {"steps": 4, "guidance_scale": 2.0, "sampler": "euler"}
    )
    redis.set(protocol.model_key("tiny"), record.dump())
    redis.sadd(protocol.MODELS_KEY, "tiny")
    job = client.post("/generate", json={"class_label": 0}).json()["id"]
    results, stats = JobResults(redis), Stats()
    assert results.start(job, "mine") == "run" and results.succeed(job, "mine", [])
    client.get(f"/jobs/{job}/events")
    stats.count("tiny", "images")
    stats.observe("tiny", "rows", 2)
    Sender(redis, "worker", stats).send()
    client.post("/queues/tiny/drain")
    assert [client.post("/generate", json=body).status_code for body in ({"class_label": 0}, {})] == [503, 422]

    async def fail() -> None:
        raise RuntimeError("a bug")

    client.app.state.jobs.models = fail
    assert client.get("/models").status_code == 500


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_what_is_there(series: Series, expression: str) -> None:
    found = read(expression)
    assert found, "it reads nothing"
    for metric, matchers, grouped_by in found:
        assert metric in series, f"{metric} is not scraped"
        labels = set(series[metric][0])
        assert {label for label, _, _ in matchers} <= labels and grouped_by <= labels | OF_PROMETHEUS, (metric, labels)
        for label, operator, value in matchers:
            values = {labels[label] for labels in series[metric]}
            pattern = value if "~" in operator else re.escape(value)
            assert any(re.fullmatch(pattern, known) for known in values), f"{metric}: {label} is never {value}, but {sorted(values)}"


def test_rates_are_of_what_only_rises(series: Series) -> None:
    for expression in EXPRESSIONS:
        for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), name


def test_what_every_api_process_reads_from_redis_is_not_added_up_over_them() -> None:
    """The sum over two processes would be twice the truth; so the maximum is taken first."""
    own = ("dit_http_", "dit_event_streams", "process_")
    for expression in EXPRESSIONS:
        for name in {selector.metric for selector in read(expression)}:
            if not name.startswith(own):
                each = re.findall(rf"(?:max|min|absent)(?: by \([\w, ]+\))? ?\((?:(?:rate|increase)\()?{name}\b", expression)
                assert len(each) == len(re.findall(rf"\b{name}\b", expression)), f"{name} in {expression}"


# --- the dashboard ------------------------------------------------------------------------------------------------------


def test_panels_have_titles_ids_and_places_of_their_own() -> None:
    for values in ([panel["id"] for panel in DASHBOARD["panels"]], [panel["title"] for panel in PANELS]):
        assert len(set(values)) == len(values)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize(("title", "expression", "legend"), TARGETS)
def test_a_legend_names_labels_that_the_result_has(title: str, expression: str, legend: str) -> None:
    told = set(re.findall(r"\{\{(\w+)\}\}", legend))
    kept = set(re.split(r", ?", match[1])) if (match := re.search(r"\bby \(([\w, ]+)\)", expression)) else set()
    assert told <= (kept or OF_PROMETHEUS), title


def test_variables_are_asked_of_the_scrape(series: Series) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            assert label in series[metric][0]


# --- alerts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_whole(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "ticket") and set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[mh]", alert.get("for", "1m"))
    told = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
    kept = set(re.split(r", ?", match[1])) if (match := re.search(r"\bby \(([\w, ]+)\)", alert["expr"])) else OF_PROMETHEUS
    assert told <= kept


def test_no_two_alerts_have_one_name() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


# --- the documentation --------------------------------------------------------------------------------------------------


def test_every_metric_and_every_alert_is_documented_and_no_other(series: Series) -> None:
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series if name.startswith("dit_")}
    assert set(re.findall(r"^\| `(dit_\w+)", TEXT, re.M)) == stems
    assert set(re.findall(r"^\| `(Dit\w+)`", TEXT, re.M)) == {alert["alert"] for alert in ALERTS}
