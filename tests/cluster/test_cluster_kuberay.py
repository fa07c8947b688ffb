"""KubeRay's manifests, against a strict model of the fields that they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.kuberay import KINDS, Container, PodSpec, RayCluster, RayClusterSpec, RayJob, ServiceAccount

import milp_ray

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")
UNITS = {"Mi": 2**20, "Gi": 2**30}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def objects(name: str) -> list[Any]:
    return [KINDS[each["kind"]].model_validate(each) for each in documents(name)]


def cluster_of(name: str) -> RayClusterSpec:
    found = objects(name)[-1]
    return found.spec if isinstance(found, RayCluster) else found.spec.rayClusterSpec


def pods(name: str) -> list[PodSpec]:
    spec = cluster_of(name)
    return [group.template.spec for group in (spec.headGroupSpec, *spec.workerGroupSpecs)]


def container(pod: PodSpec) -> Container:
    (only,) = pod.containers
    return only


def in_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_every_manifest_is_looked_at() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(MANIFESTS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_one_that_the_api_knows(name: str) -> None:
    account, workload = objects(name)
    assert isinstance(account, ServiceAccount)
    assert isinstance(workload, RayCluster | RayJob)


def test_a_misspelt_field_would_be_refused() -> None:
    job = documents("rayjob.yaml")[-1]
    job["spec"]["shutdownAfterJobFinished"] = job["spec"].pop("shutdownAfterJobFinishes")
    with pytest.raises(ValidationError, match="shutdownAfterJobFinished"):
        RayJob.model_validate(job)


def test_a_number_among_ray_start_params_would_be_refused() -> None:
    cluster = documents("raycluster.yaml")[-1]
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] = 0
    with pytest.raises(ValidationError, match="num-gpus"):
        RayCluster.model_validate(cluster)


def test_both_bring_up_the_same_cluster() -> None:
    assert cluster_of("raycluster.yaml") == cluster_of("rayjob.yaml")


def test_the_token_comes_from_a_secret() -> None:
    auth = cluster_of("rayjob.yaml").authOptions
    assert (auth.mode, auth.secretName) == ("token", "milp-ray-auth")
    for name in MANIFESTS:
        text = (FOLDER / name).read_text("utf-8")
        assert f"kubectl create secret generic {auth.secretName} --from-file=auth_token=" in text
        for pod in pods(name):
            for variable in container(pod).env:
                assert (variable.valueFrom is not None) == variable.name.endswith("TOKEN")


def test_nothing_is_reachable_from_outside_the_cluster() -> None:
    assert cluster_of("rayjob.yaml").headGroupSpec.serviceType == "ClusterIP"


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_no_rights(name: str) -> None:
    account = objects(name)[0]
    assert account.automountServiceAccountToken is False
    for pod in pods(name):
        assert pod.serviceAccountName == account.metadata.name
        assert pod.automountServiceAccountToken is False
        assert pod.securityContext.runAsNonRoot
        assert container(pod).securityContext.allowPrivilegeEscalation is False
        assert container(pod).securityContext.capabilities.drop == ["ALL"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_mounts_and_volumes_agree(name: str) -> None:
    for pod in pods(name):
        paths = {mount.name: mount.mountPath for mount in container(pod).volumeMounts}
        assert paths == {"shm": "/dev/shm", "shared": "/mnt/milp"}
        assert {volume.name for volume in pod.volumes} == set(paths)


@pytest.mark.parametrize("name", MANIFESTS)
def test_shared_memory_holds_the_object_store_and_memory_holds_both(name: str) -> None:
    spec = cluster_of(name)
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        pod = group.template.spec
        (shm,) = (volume.emptyDir for volume in pod.volumes if volume.emptyDir)
        assert shm.medium == "Memory"
        store = int(group.rayStartParams["object-store-memory"])
        assert store + 2 * 2**30 <= in_bytes(shm.sizeLimit)
        # Shared memory counts towards the memory of the pod; half of that is for the processes.
        assert 2 * in_bytes(shm.sizeLimit) <= in_bytes(container(pod).resources.limits["memory"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_get_what_they_ask_for_and_workers_four_gpus(name: str) -> None:
    head, worker = pods(name)
    for pod in (head, worker):
        assert container(pod).resources.requests == container(pod).resources.limits
    assert "nvidia.com/gpu" not in container(head).resources.limits
    assert container(worker).resources.limits["nvidia.com/gpu"] == "4"
    (group,) = cluster_of(name).workerGroupSpecs
    assert 1 <= group.minReplicas <= group.replicas <= group.maxReplicas


@pytest.mark.parametrize("name", MANIFESTS)
def test_versions_are_the_packages(name: str) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    )
    assert cluster_of(name).rayVersion == pins["ray"]
    assert {container(pod).image for pod in pods(name)} == {f"milp-ray:{milp_ray.__version__}"}


def test_stopping_a_job_lets_the_study_save() -> None:
    variables = {each.name: each.value for each in container(pods("rayjob.yaml")[0]).env}
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"] or 0) == 60
    assert all(pod.terminationGracePeriodSeconds > 60 for pod in pods("rayjob.yaml"))


def test_the_job_runs_the_pipeline_and_takes_its_cluster_down() -> None:
    spec = objects("rayjob.yaml")[-1].spec
    assert spec.entrypoint == "milp-ray run /mnt/milp/config.yaml"
    assert spec.submissionMode == "K8sJobMode"
    assert spec.shutdownAfterJobFinishes
    assert spec.activeDeadlineSeconds <= 3 * 24 * 3600
