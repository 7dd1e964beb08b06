"""deploy/kubernetes, built as `kubectl kustomize` would, and its pods as the services that `containers.Stack` runs.

There is no `kubectl` where the tests run. The builder knows what our files use, and refuses anything else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from containers import ROOT, Service

FOLDER = ROOT / "deploy" / "kubernetes"
KNOWN_KEYS = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "generatorOptions"}
NOT_IN_A_NAMESPACE = {"Namespace"}

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """The objects that the folder's kustomization.yaml makes."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization.keys() <= KNOWN_KEYS, f"{folder}: the builder does not know {kustomization.keys()}"
    assert kustomization.get("generatorOptions", {"disableNameSuffixHash": True}) == {"disableNameSuffixHash": True}
    objects: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        # As kustomize, which reads no file outside of the folder.
        assert path.resolve().is_relative_to(folder.resolve()), resource
        objects += build(path) if path.is_dir() else read(path)
    for generator in kustomization.get("configMapGenerator", []):
        assert generator.keys() == {"name", "files"}
        data = {Path(file).name: (folder / file).read_text(encoding="utf-8") for file in generator["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data})
    for one in objects:
        if one["kind"] not in NOT_IN_A_NAMESPACE:
            one["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        assert image.keys() == {"name", "newName"}
        for container in (container for one in objects for container in containers_of(one)):
            name, colon, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = image["newName"] + colon + tag
    return objects


def read(path: Path) -> list[Manifest]:
    """The objects of one file."""
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]


def pod(manifest: Manifest) -> Manifest:
    """The specification of the pods that an object starts; empty if it starts none."""
    specification: Manifest = manifest.get("spec", {}).get("template", {}).get("spec", {})
    return specification


def containers_of(manifest: Manifest) -> Iterator[Manifest]:
    """The containers of an object's pods."""
    yield from pod(manifest).get("containers", [])


@dataclass(frozen=True)
class Cluster:
    """Objects, and the secrets and other files that their pods mount."""

    objects: Sequence[Manifest]
    secrets: Path  # the folder that the secret `passwords` was made from
    files: Path  # an empty folder, for the files of config maps

    def service(self, name: str) -> Service:
        """The pods of one object, for `containers.Stack`."""
        manifest = next(one for one in self.objects if pod(one) and one["metadata"]["name"] == name)
        specification = pod(manifest)
        (container,) = containers_of(manifest)
        volumes = {volume["name"]: volume for volume in specification.get("volumes", [])}
        volumes |= {
            claim["metadata"]["name"]: {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
            for claim in manifest["spec"].get("volumeClaimTemplates", [])
        }
        files: dict[str, Path] = {}
        shared: dict[str, str] = {}
        for mount in container["volumeMounts"]:
            volume, at = volumes[mount["name"]], mount["mountPath"]
            if "persistentVolumeClaim" in volume:
                shared[at] = volume["persistentVolumeClaim"]["claimName"]
            elif "secret" in volume:
                files |= {f"{at}/{item['path']}": self.secrets / item["key"] for item in volume["secret"]["items"]}
            elif "configMap" in volume:
                for file, text in self._config(volume["configMap"]["name"]).items():
                    (self.files / file).write_text(text, encoding="utf-8")
                    files[f"{at}/{file}"] = self.files / file
            else:
                assert "emptyDir" in volume, volume
        environment = {
            key: value
            for source in container.get("envFrom", [])
            if not source.get("secretRef", {}).get("optional")  # nobody has made it
            for key, value in self._config(source["configMapRef"]["name"]).items()
        }
        environment |= {variable["name"]: variable["value"] for variable in container.get("env", [])}
        probe = container.get("readinessProbe", container.get("livenessProbe"))
        return Service(
            name=name,
            image=container["image"],
            command=tuple(container.get("command", [])),
            environment=environment,
            secrets=files,
            volumes=shared,
            ports=tuple((str(port["containerPort"]), port["containerPort"]) for port in container.get("ports", [])),
            waits_for={},
            health=("CMD", *probe["exec"]["command"]) if probe else (),
            grace=float(specification.get("terminationGracePeriodSeconds", 30)),
            stop_signal="SIGTERM",
            profiles=(),
        )

    def _config(self, name: str) -> dict[str, str]:
        (found,) = [one for one in self.objects if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", name)]
        data: dict[str, str] = found["data"]
        return data
