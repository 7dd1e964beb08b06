"""The objects of deploy/kubernetes obey Kubernetes' own schemas, and fit each other, the image and the page about them.

`tests/test_compose.py` runs their commands.
"""

import re
import shlex
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import manifests
import pytest
import typer.main
import yaml
from containers import ROOT, Image
from manifests import FOLDER, Manifest

from search import worker
from search.cli import app
from storage.settings import Settings
from studies import definition as definitions

VERSIONS = ("1.30.0", "1.33.0")
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))
LEAST_STOP = Settings().stop_seconds + worker.EXIT_SECONDS
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def _all() -> list[Manifest]:
    """Every object once, as it is in the cluster when all folders are applied."""
    objects = [one for folder in KUSTOMIZATIONS for one in manifests.build(folder)]
    return list({(one["kind"], one["metadata"]["name"]): one for one in objects}.values())


OBJECTS = _all()
PODS = [pytest.param(one, id=one["metadata"]["name"]) for one in OBJECTS if manifests.pod(one)]


def _names(kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in OBJECTS if one["kind"] == kind}


def _container(manifest: Manifest) -> Any:
    (container,) = manifests.containers_of(manifest)
    return container


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_obeys_the_schema(version: str) -> None:
    for one in OBJECTS:
        kubernetes_validate.validate(one, version, strict=True)


def test_the_schema_refuses_what_is_wrong() -> None:
    (deployment,) = [one for one in manifests.build(FOLDER / "workers") if one["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_every_file_is_applied() -> None:
    files = {path for path in FOLDER.rglob("*") if path.is_file() and path.name != "kustomization.yaml"}
    named = set()
    for folder in KUSTOMIZATIONS:
        read = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        generated = [file for one in read.get("configMapGenerator", []) for file in one["files"]]
        named |= {folder / name for name in [*read["resources"], *generated]}
    assert files <= named
    assert {one["metadata"].get("namespace") for one in OBJECTS if one["kind"] != "Namespace"} == {"trialyard"}


@pytest.mark.parametrize("manifest", PODS)
def test_a_pod_may_do_only_what_it_must(manifest: Manifest) -> None:
    pod, container = manifests.pod(manifest), _container(manifest)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["fsGroup"] == (999 if "postgres" in container["image"] else 1000)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert "memory" in container["resources"]["limits"]
    for variable in container.get("env", []):
        assert "PASSWORD" not in variable["name"] or variable["value"].startswith("/run/secrets/")


@pytest.mark.parametrize("manifest", PODS)
def test_what_a_pod_names_exists(manifest: Manifest) -> None:
    pod, container = manifests.pod(manifest), _container(manifest)
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/part-of"] == "trialyard"  # the database's network policy asks for it
    if "selector" in manifest["spec"]:
        assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claimed = {one["metadata"]["name"] for one in manifest["spec"].get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys() | claimed
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in _names("PersistentVolumeClaim")
        if "configMap" in volume:
            assert volume["configMap"]["name"] in _names("ConfigMap")
        if "secret" in volume:
            assert volume["secret"]["secretName"] == "passwords"
    sources = container.get("envFrom", [])
    for source in sources:
        assert "secretRef" in source or source["configMapRef"]["name"] in _names("ConfigMap")
    # Whoever reads or writes trials' files can have them in an object store; its URL replaces the image's folder.
    store = {"secretRef": {"name": "store", "optional": True}}
    assert (store in sources) == ("artifacts" in volumes)


def _parse(command: str, *arguments: str) -> None:
    """Parses a command of trialyard; nothing is run."""
    program: Any = typer.main.get_command(app)
    commands = program.commands[command]
    if hasattr(commands, "commands"):
        command, *arguments = arguments  # type: ignore[assignment]
        commands = commands.commands[command]
    commands.make_context(command, [*arguments])


@pytest.mark.parametrize("manifest", [pod for pod in PODS if "trialyard" in _container(pod.values[0])["image"]])
def test_the_image_finds_its_folders_and_its_command(manifest: Manifest) -> None:
    container = _container(manifest)
    name, _, target = container["image"].partition(":")
    assert (name, target) in {("trialyard", "cpu"), ("trialyard", "gpu")}
    image = Image(target, ROOT)
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    # Its root cannot be written to: the home folder and temporary files need volumes.
    assert mounts[image.environment["TRIALYARD_HOME"]] is mounts["/tmp"] is False
    artifacts, data = (mounts.get(image.environment[f"TRIALYARD_{name}"]) for name in ("ARTIFACTS", "DATA"))
    if container["command"][0] == "trialyard":
        _parse(*container["command"][1:])
        if container["command"][1] in ("work", "run"):
            assert (artifacts, data) == (False, True)
    else:  # for commands, and files that come in and go out
        assert manifest["metadata"]["name"] == "tools"
        assert artifacts is data is False
    (settings,) = [one for one in OBJECTS if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", "settings")]
    for variable in {*settings["data"], *(variable["name"] for variable in container.get("env", []))} - {"HOME"}:
        assert variable.removeprefix("TRIALYARD_").lower() in Settings.model_fields
    file = PurePosixPath(settings["data"]["TRIALYARD_STORAGE_FILE"])
    (secret,) = [volume["secret"] for volume in manifests.pod(manifest)["volumes"] if "secret" in volume]
    assert str(file.parent) in mounts
    assert file.name in {item["path"] for item in secret["items"]}


def test_workers_have_longer_to_stop_than_they_take_and_survive_a_database_that_is_away() -> None:
    workers = [
        one for one in OBJECTS if manifests.pod(one) and _container(one).get("command", [])[1:2] in (["work"], ["run"])
    ]
    assert {one["metadata"]["name"] for one in workers} == {"worker", "worker-cpu", "study"}
    for one in workers:
        assert manifests.pod(one)["terminationGracePeriodSeconds"] > LEAST_STOP + 20
        limits = _container(one)["resources"]["limits"]
        gpus = limits.get("nvidia.com/gpu", 0)
        assert _container(one)["image"].endswith(":gpu" if gpus else ":cpu")
        # Without a limit of cores, a worker on the processor takes all of the node's.
        assert gpus or "cpu" in limits
        if one["kind"] == "Deployment":
            probe = _container(one)["livenessProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] > Settings().patience_seconds + 120


def test_a_drained_node_s_workers_leave_one_after_the_other() -> None:
    budgets = [one["spec"] for one in OBJECTS if one["kind"] == "PodDisruptionBudget"]
    chosen = {budget["selector"]["matchLabels"]["app.kubernetes.io/name"] for budget in budgets}
    assert chosen == {name for name in _names("Deployment") if name.startswith("worker")}
    assert all(budget["maxUnavailable"] == 1 for budget in budgets)


def test_services_lead_to_pods_that_listen() -> None:
    for service in (one for one in OBJECTS if one["kind"] == "Service"):
        (target,) = [
            one
            for one in OBJECTS
            if manifests.pod(one)
            and service["spec"]["selector"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
        ]
        ports = {port["name"]: port["containerPort"] for port in _container(target)["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


def test_it_is_the_same_database_and_dashboard_as_in_compose() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    by_name = {one["metadata"]["name"]: _container(one) for one in OBJECTS if manifests.pod(one)}
    assert by_name["database"]["image"] == compose["database"]["image"]
    for name in ("database", "dashboard"):
        assert ["CMD", *by_name[name]["readinessProbe"]["exec"]["command"]] == compose[name]["healthcheck"]["test"]
    for name in ("storage", "dashboard"):
        assert by_name[name]["command"] == compose[name]["command"]
    assert by_name["worker"]["command"] == compose["worker-gpu"]["command"]


def test_the_study_of_the_job_is_right() -> None:
    assert definitions.load(str(FOLDER / "study" / "study.toml")).trials > 0


def test_a_second_study_with_other_names_shares_no_object_with_the_first(tmp_path: Path) -> None:
    """As the comment in its folder says: pods of the first job that start again must find its definition."""
    copy = shutil.copytree(FOLDER / "study", tmp_path / "second")
    for name in ("kustomization.yaml", "study.yaml"):
        text = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(re.sub(r"\bname: study$", "name: second", text, flags=re.MULTILINE), encoding="utf-8")
    objects = manifests.build(copy)
    assert {(one["kind"], one["metadata"]["name"]) for one in objects} == {("Job", "second"), ("ConfigMap", "second")}
    (job,) = (one for one in objects if one["kind"] == "Job")
    (volume,) = (volume for volume in manifests.pod(job)["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == "second"


def test_one_change_gives_what_is_applied_by_itself_another_registry(tmp_path: Path) -> None:
    applied = {FOLDER, *(ROOT / path for path in re.findall(r"kubectl apply --kustomize (\S+)", DEPLOYMENT))}
    assert len(applied) == 4
    for folder in applied:
        copy = shutil.copytree(folder, tmp_path / folder.name)
        file = copy / "kustomization.yaml"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("newName: trialyard", "newName: registry.example/trialyard"), encoding="utf-8")
        images = {one["image"] for part in manifests.build(copy) for one in manifests.containers_of(part)}
        ours = {image for image in images if "trialyard" in image}
        assert ours
        assert all(image.startswith("registry.example/trialyard:") for image in ours)


def _page_commands() -> list[list[str]]:
    """The words of each command on the page that is kubectl's."""
    page = DEPLOYMENT.partition("## Kubernetes")[2].partition("\n## ")[0]
    return [shlex.split(line, comments=True) for line in re.findall(r"^kubectl .*", page, re.MULTILINE)]


def test_an_update_ends_all_pods_that_use_the_database_and_starts_them_with_the_new_image() -> None:
    deployments = [one for one in OBJECTS if one["kind"] == "Deployment"]
    names = {one["metadata"]["name"] for one in deployments}
    lines = _page_commands()
    upgrade = lines.index(["kubectl", "apply", "--kustomize", "deploy/kubernetes/upgrade"])
    # A job that has ended does not run again.
    (job,) = (one["metadata"]["name"] for one in manifests.build(FOLDER / "upgrade") if one["kind"] == "Job")
    assert lines[upgrade - 3][:2] == ["kubectl", "delete"]
    assert lines[upgrade - 3][4:] == ["--ignore-not-found", "job", job]
    assert lines[upgrade - 2][4:] == ["deployment", "--all", "--replicas=0"]
    ended = lines[upgrade - 1]
    assert ended[1:5] == ["wait", "--namespace", "trialyard", "--for=delete"]
    selected = re.fullmatch(r"app\.kubernetes\.io/name in \((.*)\)", ended[ended.index("--selector") + 1])
    assert selected is not None
    assert set(selected[1].split(", ")) == names
    started = {word for words in lines[upgrade + 2 :] for word in words if word.startswith("deployment/")}
    assert started == {f"deployment/{name}" for name in names - {"worker-cpu"}}
    for one in (one for one in OBJECTS if manifests.pod(one) and "trialyard" in _container(one)["image"]):
        assert _container(one)["imagePullPolicy"] == "Always", "a node would keep the image that it has"
    # Otherwise the next `kubectl apply` would undo `kubectl scale`.
    assert not [one for one in deployments if "worker" in one["metadata"]["name"] and "replicas" in one["spec"]]


def test_the_commands_of_the_page_name_what_exists() -> None:
    lines = _page_commands()
    assert len(lines) > 8
    for words in lines:
        for at, word in enumerate(words):
            if word in ("--kustomize", "--filename"):
                assert (ROOT / words[at + 1]).exists(), words
            if re.match(r"(deployment|job|service)/", word):
                kind, _, name = word.partition("/")
                assert name in _names(kind.capitalize()), words
            if word == "--namespace":
                assert words[at + 1] == "trialyard"
    # The dashboard's pod could not remove a file of a study that is deleted.
    typed = [words[words.index("--") + 1 :] for words in lines if words[1] == "exec"]
    assert typed
    assert all("deployment/tools" in words for words in lines if words[1] == "exec")
    for words in typed:
        if words[0] == "trialyard":
            _parse(*words[1:])
    secret, store = (words for words in lines if words[1:4] == ["create", "secret", "generic"])
    assert (secret[4], store[4]) == ("passwords", "store")
    assert store[store.index("--from-env-file") + 1] == "store.env"
    keys = {
        item["key"]
        for one in OBJECTS
        for volume in manifests.pod(one).get("volumes", [])
        for item in volume.get("secret", {}).get("items", [])
    }
    written = set(re.findall(r"> secrets/(\w+)", DEPLOYMENT))
    assert keys == written
    assert secret[secret.index("--from-file") + 1] == "secrets"
