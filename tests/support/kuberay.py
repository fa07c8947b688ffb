"""The fields of KubeRay's and Kubernetes' objects that our manifests use, and no others.

The API server drops a field that it does not know, so a misspelt one is lost silently; here it is refused.
Names and types are those of KubeRay 1.6.2's API reference (ray.io/v1) and of Kubernetes' core/v1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti|m)?$")]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Unknown fields and converted types are errors, as in an API server with strict field validation."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name


class ServiceAccount(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["ServiceAccount"]
    metadata: Metadata
    automountServiceAccountToken: bool


class SecretKeyRef(Strict):
    name: Name
    key: str
    optional: bool = False


class ValueFrom(Strict):
    secretKeyRef: SecretKeyRef


class EnvVar(Strict):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]
    value: str | None = None
    valueFrom: ValueFrom | None = None


class ContainerPort(Strict):
    name: Annotated[str, StringConstraints(max_length=15)]
    containerPort: Annotated[int, Field(gt=0, lt=65536)]


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class SeccompProfile(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    runAsNonRoot: bool
    runAsUser: Annotated[int, Field(gt=0)]
    runAsGroup: Annotated[int, Field(gt=0)]
    fsGroup: Annotated[int, Field(gt=0)]
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"]
    seccompProfile: SeccompProfile


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities


class VolumeMount(Strict):
    name: Name
    mountPath: str


class Container(Strict):
    name: Name
    image: str
    env: list[EnvVar]
    ports: list[ContainerPort] = []
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: list[VolumeMount]


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Claim(Strict):
    claimName: Name


class Volume(Strict):
    name: Name
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: Claim | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    serviceAccountName: Name
    automountServiceAccountToken: bool
    terminationGracePeriodSeconds: Count
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: list[Container]
    volumes: list[Volume]


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    rayStartParams: dict[str, str]  # numbers too are strings
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: Name


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJobSpec(Strict):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    entrypoint: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    backoffLimit: Count
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


KINDS: dict[str, type[Strict]] = {kind.__name__: kind for kind in (ServiceAccount, RayCluster, RayJob)}
