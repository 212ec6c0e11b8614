"""The Kubernetes manifests: by the schemas of Kubernetes, and by what must agree between them, with compose and with the code."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings
from tests.deploy.compose import ROOT, check_command, load, seconds
from tests.deploy.dockerfile import stages
from worker import protocol
from worker.rq_process import FAREWELL_S

FOLDER = ROOT / "deploy" / "k8s"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES = ("1.32", "1.37")  # the oldest and the newest that are looked at
BUNDLED = "fashion-mnist"


def documents() -> Iterator[dict[str, Any]]:
    for path in FILES:
        yield from yaml.safe_load_all(path.read_text())


def named(kind: str, name: str) -> dict[str, Any]:
    [found] = [d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def pod(kind: str, name: str) -> dict[str, Any]:
    return dict(named(kind, name)["spec"]["template"]["spec"])


def container(kind: str, name: str) -> dict[str, Any]:
    [only] = pod(kind, name)["containers"]
    return dict(only)


def environment(kind: str, name: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(kind, name)["env"]}


PODS = [("StatefulSet", "redis"), ("Deployment", "api"), ("Deployment", "worker")]


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_schemas_of_kubernetes_are_met(version: str) -> None:
    checked = []
    for document in documents():
        if not document["apiVersion"].startswith("keda.sh/"):
            kubernetes_validate.validate(document, version, strict=True)
            checked.append(document["kind"])
    assert {"Namespace", "StatefulSet", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PersistentVolumeClaim"} == set(
        checked
    )


def test_the_schema_would_tell_a_mistake() -> None:
    broken = named("Deployment", "api")
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES[0], strict=True)


def test_kustomize_takes_every_file_and_makes_the_secret_that_they_name() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in FILES]
    [secret] = kustomization["secretGenerator"]
    assert secret["files"] == ["password=secrets/redis-password"] and kustomization["generatorOptions"]["disableNameSuffixHash"]
    for kind, name in PODS:
        assert [v["secret"]["secretName"] for v in pod(kind, name)["volumes"] if "secret" in v] == [secret["name"]]
    assert {entry["name"] for entry in kustomization["images"]} == {container("Deployment", name)["image"] for name in ("api", "worker")}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and {entry["newTag"] for entry in kustomization["images"]} == {version[1]}


def test_the_documented_command_makes_a_password_without_a_lines_end(tmp_path: Path) -> None:
    step = re.search(r"^#\s+(mkdir .*)$", (FOLDER / "kustomization.yaml").read_text(), re.M)
    assert step
    subprocess.run(["bash", "-c", step[1]], cwd=tmp_path, check=True, timeout=60)
    assert re.fullmatch(r"[0-9a-f]{64}", (tmp_path / "secrets" / "redis-password").read_text())


def test_no_anchor_is_used_since_not_every_tool_reads_them() -> None:
    for path in FILES:
        assert not [event for event in yaml.parse(path.read_text()) if getattr(event, "anchor", None)], path


def test_selectors_find_their_pods() -> None:
    labels = {name: named(kind, name)["spec"]["template"]["metadata"]["labels"] for kind, name in PODS}
    for kind, name in PODS:
        assert named(kind, name)["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    for name in ("api", "redis"):
        assert named("Service", name)["spec"]["selector"].items() <= labels[name].items()
    for name in ("api", "worker"):
        assert named("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    guarded = named("NetworkPolicy", "redis")["spec"]
    assert guarded["podSelector"]["matchLabels"].items() <= labels["redis"].items()
    [friends] = [rule["podSelector"] for rule in guarded["ingress"][0]["from"] if "podSelector" in rule]
    [names] = [expression["values"] for expression in friends["matchExpressions"]]
    assert {labels[name]["app.kubernetes.io/name"] for name in ("api", "worker")} == set(names)


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_nobody_is_root_and_nobody_can_become_it(kind: str, name: str) -> None:
    spec = pod(kind, name)
    context = spec["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
    for part in (*spec["containers"], *spec.get("initContainers", [])):
        assert part["securityContext"]["allowPrivilegeEscalation"] is False and part["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    if name != "redis":
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == stages()[name].all("USER")[-1]
    if name != "worker":
        assert container(kind, name)["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_what_is_mounted_is_there(kind: str, name: str) -> None:
    spec = pod(kind, name)
    claimed = [claim["metadata"]["name"] for claim in named(kind, name)["spec"].get("volumeClaimTemplates", [])]
    there = {volume["name"] for volume in spec["volumes"]} | set(claimed)
    for part in (*spec["containers"], *spec.get("initContainers", [])):
        assert {mount["name"] for mount in part["volumeMounts"]} <= there
    for volume in spec["volumes"]:
        if "persistentVolumeClaim" in volume:
            named("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])


def test_redis_is_started_and_asked_as_compose_does() -> None:
    compose = load("docker-compose.yml")["services"]["redis"]

    def alike(text: str) -> str:
        return text.replace("/run/secrets/redis-password", "/run/secrets/dit/password")

    redis = container("StatefulSet", "redis")
    assert redis["command"] == [alike(word) for word in compose["command"]] and redis["image"] == compose["image"]
    for probe in ("startupProbe", "readinessProbe"):
        assert redis[probe]["exec"]["command"][-1] == alike(check_command(compose)[-1])
    context = pod("StatefulSet", "redis")["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == compose["user"]


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_settings_are_ours_and_those_of_compose(name: str) -> None:
    ours = {f"DIT_{field.upper()}" for field in Settings.model_fields} | {"DIT_ALLOW_PUBLIC"}
    told, compose = environment("Deployment", name), load("docker-compose.yml")["services"][name]["environment"]
    assert set(told) <= ours & set(compose)
    different = {key for key in told if told[key] != compose[key]}
    assert different == {"DIT_REDIS_PASSWORD_FILE"}
    assert told["DIT_REDIS_PASSWORD_FILE"].startswith(
        next(m["mountPath"] for m in container("Deployment", name)["volumeMounts"] if m["name"] == "password")
    )


def test_a_stopping_worker_gets_as_long_as_compose_gives_it() -> None:
    grace_s = pod("Deployment", "worker")["terminationGracePeriodSeconds"]
    assert grace_s >= float(environment("Deployment", "worker")["DIT_DRAIN_SECONDS"]) + FAREWELL_S + 10
    assert grace_s == seconds(load("docker-compose.yml")["services"]["worker"]["stop_grace_period"])


def test_a_redis_that_is_away_restarts_no_worker() -> None:
    worker, check = container("Deployment", "worker"), check_command(load("docker-compose.yml")["services"]["worker"])
    assert worker["livenessProbe"]["exec"]["command"] == [*check, "--alive"]
    assert worker["startupProbe"]["exec"]["command"] == worker["readinessProbe"]["exec"]["command"] == check
    assert container("Deployment", "api")["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_a_registry_without_a_model_gets_the_bundled_one_and_any_other_is_let_be(tmp_path: Path) -> None:
    [seed] = pod("Deployment", "worker")["initContainers"]
    assert (ROOT / "checkpoints" / BUNDLED).is_dir()
    image, claim = tmp_path / "checkpoints", tmp_path / "seed"
    (image / BUNDLED).mkdir(parents=True)
    (image / BUNDLED / "checkpoint.json").write_text("{}")
    claim.mkdir()
    (claim / "lost+found").mkdir()
    script = seed["command"][-1].replace("/seed", str(claim)).replace("/checkpoints", str(image))

    def begin() -> set[str]:
        subprocess.run([*seed["command"][:-1], script], env={"HOSTNAME": "worker-0", "PATH": "/usr/bin:/bin"}, check=True, timeout=60)
        return {str(path.relative_to(claim)) for path in claim.rglob("*")} - {"lost+found"}

    first = {BUNDLED, f"{BUNDLED}/checkpoint.json"}
    assert begin() == first and begin() == first
    (claim / BUNDLED).rename(claim / "birds")
    assert begin() == {"birds", "birds/checkpoint.json"}
    (claim / "birds" / "checkpoint.json").rename(claim / "birds" / "latest")
    assert begin() == {"birds", "birds/latest"}


def test_workers_follow_the_queue_and_are_never_none() -> None:
    """KEDA's resources have no schema here: what its documentation wants of them."""
    scaled, secret = named("ScaledObject", "worker"), named("TriggerAuthentication", "redis")
    spec = scaled["spec"]
    named("Deployment", spec["scaleTargetRef"]["name"])
    assert "replicas" not in named("Deployment", "worker")["spec"], "two would say how many there are"
    assert 1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"], "with none, the API would take no request and the queue stay empty"
    [trigger] = spec["triggers"]
    assert set(trigger) == {"type", "metadata", "authenticationRef"} and trigger["type"] == "redis"
    assert trigger["metadata"]["listName"] == f"rq:queue:{protocol.queue_name(BUNDLED)}"
    assert all(isinstance(value, str) for value in trigger["metadata"].values()) and int(trigger["metadata"]["listLength"]) > 0
    host, _, port = trigger["metadata"]["address"].partition(":")
    namespace = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["namespace"]
    assert host == f"redis.{namespace}.svc.cluster.local" and int(port) == named("Service", "redis")["spec"]["ports"][0]["port"]
    assert trigger["authenticationRef"]["name"] == secret["metadata"]["name"]
    assert secret["spec"]["secretTargetRef"] == [{"parameter": "password", "name": "dit-redis", "key": "password"}]
    assert {d["apiVersion"] for d in (scaled, secret)} == {"keda.sh/v1alpha1"}
