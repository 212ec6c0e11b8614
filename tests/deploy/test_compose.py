"""What the compose files say: by the specification's schema, and by what we promise."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.deploy.compose import CPU, ROOT, check_command, load, mounts, seconds
from tests.deploy.dockerfile import command, environment, stages
from worker.rq_process import FAREWELL_S

BASE, KEYS, PICTURES = "docker-compose.yml", "compose.keys.yml", "compose.pictures.yml"
COMBINATIONS = [(BASE,), CPU, (BASE, KEYS), (*CPU, KEYS), (*CPU, KEYS, PICTURES)]
SETTINGS = {f"DIT_{name.upper()}" for name in Settings.model_fields} | {"DIT_ALLOW_PUBLIC"}  # which comes with the API's keys


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return load(BASE)


@pytest.fixture(scope="module")
def services(plain: dict[str, Any]) -> dict[str, Any]:
    return dict(plain["services"])


def against_the_schema(folder: Path, document: Any) -> subprocess.CompletedProcess[str]:
    (folder / "compose.json").write_text(json.dumps(document))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(folder / "compose.json")]
    return subprocess.run(check, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_the_specifications_schema_is_met(tmp_path: Path, names: tuple[str, ...]) -> None:
    done = against_the_schema(tmp_path, load(*names))
    assert done.returncode == 0, done.stdout


def test_the_schema_would_tell_a_mistake(tmp_path: Path, plain: dict[str, Any]) -> None:
    redis = {**plain["services"]["redis"], "healtcheck": {}}
    assert against_the_schema(tmp_path, {**plain, "services": {"redis": redis}}).returncode == 1


def test_each_file_alone_is_yaml_of_the_specification_too(tmp_path: Path) -> None:
    for name in ("compose.cpu.yml", KEYS, PICTURES):
        text = (ROOT / name).read_text().replace("!reset ", "")
        assert against_the_schema(tmp_path, yaml.safe_load(text)).returncode == 0


def test_what_a_service_names_is_there(plain: dict[str, Any]) -> None:
    for name, service in plain["services"].items():
        assert set(service.get("secrets", [])) <= set(plain["secrets"]), name
        volumes = [volume for volume in mounts(service).values() if not volume.startswith(("./", "/"))]
        assert set(volumes) <= set(plain["volumes"]), name
        assert set(service.get("depends_on", {})) <= set(plain["services"]), name
        assert service.get("build", {}).get("target", "api") in stages(), name
    used = {volume for service in plain["services"].values() for volume in mounts(service).values()}
    assert set(plain["volumes"]) <= used


def test_redis_keeps_what_it_takes_and_is_reached_from_inside_alone(services: dict[str, Any]) -> None:
    assert "ports" not in services["redis"] and "network_mode" not in services["redis"]
    assert mounts(services["redis"]) == {"/data": "redis"}
    assert services["redis"]["image"].count(".") == 2, "pinned to a patch version"


def test_the_api_is_published_on_this_machine_unless_told_otherwise(services: dict[str, Any]) -> None:
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert load(BASE, variables={"DIT_PUBLISH": "443"})["services"]["api"]["ports"] == ["443:8000"]
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert services["api"]["read_only"] and services["api"]["tmpfs"] == ["/tmp"]


def test_without_keys_the_api_is_told_so_and_with_keys_it_reads_what_dit_key_writes(services: dict[str, Any]) -> None:
    assert services["api"]["environment"]["DIT_ALLOW_PUBLIC"] == "true"
    with_keys = load(BASE, KEYS)
    api, keys = with_keys["services"]["api"], with_keys["services"]["keys"]
    file = api["environment"]["DIT_API_KEYS_FILE"]
    assert api["environment"]["DIT_ALLOW_PUBLIC"] == "false" and keys["environment"]["DIT_API_KEYS_FILE"] == file
    assert api["volumes"] == ["keys:/keys:ro"] and keys["volumes"] == ["keys:/keys"] and "keys" in with_keys["volumes"]
    assert str(Path(file).parent) == "/keys", "a file by itself would go on showing what it was before it was replaced"
    assert any("/keys" in run.split() for run in stages()["python"].all("RUN")), "or the volume would be root's"
    assert keys["entrypoint"] == ["dit", "key"] and keys["profiles"] == ["keys"]


def test_pictures_in_a_volume_are_written_by_workers_and_read_by_the_api() -> None:
    document = load(BASE, PICTURES)
    api, worker = document["services"]["api"], document["services"]["worker"]
    assert api["environment"]["DIT_IMAGE_STORE"] == worker["environment"]["DIT_IMAGE_STORE"] == "/pictures"
    assert "pictures:/pictures:ro" in api["volumes"] and "pictures:/pictures" in worker["volumes"] and "pictures" in document["volumes"]
    assert any("/pictures" in run.split() for run in stages()["python"].all("RUN")), "or the volume would be root's"


def test_no_secret_is_in_an_environment_or_a_command(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable in service.get("environment", {}):
            assert variable.endswith("_FILE") or not any(word in variable for word in ("PASSWORD", "KEY", "SECRET", "TOKEN")), name
    assert "requirepass $(cat " in services["redis"]["command"][-1]


def test_every_variable_is_a_setting_of_ours(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert set(service.get("environment", {})) <= SETTINGS, name
    assert {name for name in environment("worker") if name.startswith("DIT_")} <= SETTINGS


def test_every_command_is_one_of_ours_but_the_trainers_which_is_to_come(services: dict[str, Any]) -> None:
    for name in ("api", "worker"):
        assert services[name].get("command", command(services[name]["build"]["target"])) == ["dit", name]
        check = subprocess.run(
            [sys.executable, "-m", "app.cli", *check_command(services[name])[1:], "--help"], capture_output=True, text=True, timeout=120
        )
        assert check.returncode == 0, check.stderr
    assert services["trainer"]["command"] == ["dit", "trainer"] and services["trainer"]["profiles"] == ["trainer"]


def test_whoever_dies_is_started_again_and_logs_do_not_fill_the_disk(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["restart"] == "unless-stopped" and service["init"] is True
        assert {"max-size", "max-file"} <= set(service["logging"]["options"])
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert all("healthcheck" in services[name] for name in ("redis", "api", "worker"))


def test_a_stopping_worker_gets_its_drain_and_time_to_give_the_rest_back(services: dict[str, Any]) -> None:
    drain_s = float(services["worker"]["environment"]["DIT_DRAIN_SECONDS"])
    assert seconds(services["worker"]["stop_grace_period"]) >= drain_s + FAREWELL_S + 10, "and the step that runs may be a long one"


def test_workers_can_be_many(services: dict[str, Any]) -> None:
    worker = services["worker"]
    assert not {"container_name", "ports", "hostname"} & set(worker), "two could not share it"
    assert mounts(worker) == {"/checkpoints": "checkpoints", "/data": "data"}
    assert {f"DIT_{name}": path for path, name in (("/checkpoints", "CHECKPOINTS"), ("/data", "DATA"))}.items() <= environment(
        "worker"
    ).items()


def test_gpus_are_reserved_and_on_a_machine_without_one_they_are_not(services: dict[str, Any]) -> None:
    for name in ("worker", "trainer"):
        [devices] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        without = load(*CPU)["services"][name]
        assert "deploy" not in without and without["environment"]["DIT_DEVICE"] == "cpu"


def test_the_checkpoints_volume_begins_with_the_bundled_one() -> None:
    assert (None, ["checkpoints/"]) in stages()["worker"].copies() and list((ROOT / "checkpoints").glob("*/checkpoint.json"))


def test_the_first_steps_are_the_same_wherever_they_are_told() -> None:
    told = re.search(r"Needs one secret:\s+(.+)", (ROOT / BASE).read_text())
    assert told and all(f"\n{told[1]}\n" in (ROOT / name).read_text() for name in ("README.md", "docs/operations.md"))


def test_the_images_have_our_version(services: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {services[name]["image"] for name in ("api", "worker", "trainer")} == {f"dit-api:{version}", f"dit-worker:{version}"}


def test_durations_are_read_as_docker_reads_them() -> None:
    assert [seconds(text) for text in ("10s", "1m30s", "1h", "500ms")] == [10, 90, 3600, 0.5]
