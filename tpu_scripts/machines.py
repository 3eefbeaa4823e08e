"""A pod: the TPU machines that one TOML file describes, created, looked at and deleted through gcloud."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcloud import Gcloud, PodError, QuotaRefused, TryLater, UsageError, is_quota

try:
    import tomllib
except ImportError:
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")

CAPACITY = {"on-demand": [], "spot": ["--spot"], "reserved": ["--reserved"]}
INSTALL = (
    "python3 -m pip install --quiet --user uv && "
    "python3 -m uv venv --quiet --allow-existing --python 3.12 ~/omni/venv && "
    "python3 -m uv pip install --quiet --python ~/omni/venv/bin/python -e '.[tpu]'"
)

# States of nodes and queued resources by what there is to do; the words are those of the TPU API, v2:
# https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.nodes#State and .../queuedResources#State
READY = {"READY", "ACTIVE"}
COMING = {
    *("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING"),
    *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
}
LEAVING = {"DELETING", "SUSPENDING", "STOPPING", "HIDING"}
GONE = {"PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED"}
ABSENT = "ABSENT"  # a word of ours


@dataclass(frozen=True)
class PodConfig:
    """What a pod's file says. `read_config` reads one."""

    name: str
    """Of the node or the queued resource; nodes of several slices are name-0, name-1, ..."""
    zone: str
    accelerator: str
    """Type and size, such as v5p-128."""
    version: str = ""
    """Software on the machines, such as v2-alpha-tpuv5; on GKE, the image has it."""
    project: str = ""
    """Empty: the one that gcloud is set to."""
    capacity: str = "on-demand"
    """on-demand, spot or reserved."""
    queued: bool = False
    """Wait in the queue of the TPU service instead of asking once; several slices always do."""
    slices: int = 1
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    service_account: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    install: str = INSTALL
    """Shell command that makes ~/omni/venv, run on every host in the copy of the checkout."""
    environment: list[str] = field(default_factory=list)
    """Names of variables that a run gets with the values they have here; the values are never shown."""
    cluster: str = ""
    """GKE cluster, for gke.py alone."""
    image: str = ""
    """Container image in which omni is installed, for gke.py alone."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            kind = type(getattr(self, entry.name)).__name__
            if kind != str(entry.type).partition("[")[0]:
                raise UsageError(f"{entry.name} is {getattr(self, entry.name)!r}; it must be of the type {entry.type}")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", self.name):
            raise UsageError(f"name is {self.name!r}; write small letters, digits and hyphens, a letter first")
        if self.capacity not in CAPACITY:
            raise UsageError(f"capacity is {self.capacity!r}; it must be one of {', '.join(CAPACITY)}")
        if self.slices < 1:
            raise UsageError(f"slices is {self.slices}; it must be at least 1")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UsageError("environment lists names of variables alone, such as WANDB_API_KEY; values stay here")

    @property
    def in_queue(self) -> bool:
        """Whether the pod is a queued resource."""
        return self.queued or self.slices > 1

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes, one for each slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{index}" for index in range(self.slices)]


def read_config(path: Path, required: tuple[str, ...] = ("name", "zone", "accelerator", "version")) -> PodConfig:
    """A pod's TOML file; `UsageError` if it cannot be read, misses a required key, or has a wrong one."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no text
        raise UsageError(f"{path}: {error}") from None
    keys = {entry.name: entry for entry in dataclasses.fields(PodConfig)}
    for key in content.keys() - keys.keys():
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
        raise UsageError(f"{path}: unknown key {key!r}; the nearest is {near!r}")
    if missing := [key for key in required if not content.get(key)]:
        raise UsageError(f"{path}: {', '.join(missing)} missing; tpu_scripts/pod.toml shows all keys")
    try:
        return PodConfig(**content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


@dataclass(frozen=True)
class State:
    """Where a pod stands: the API's word, or ABSENT; an explanation where the API gives one; hosts of ready nodes."""

    word: str
    reason: str = ""
    hosts: dict[str, list[str]] = field(default_factory=dict)
    """Addresses of the hosts by node."""

    @property
    def ready(self) -> bool:
        """All nodes are there."""
        return self.word in READY

    @property
    def coming(self) -> bool:
        """It will be ready, or ready again, by itself."""
        return self.word in COMING

    @property
    def gone(self) -> bool:
        """It will not come back, and nothing is lost by deleting it."""
        return self.word in GONE

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


class Pod:
    """The machines of a configuration."""

    def __init__(self, config: PodConfig, gcloud: Gcloud):
        self.config = config
        self.gcloud = gcloud

    def state(self, supposed: str = "READY") -> State:
        """How the pod is.

        Args:
          supposed: what a dry run takes the nodes to be, READY or ABSENT.
        """
        config, present = self.config, supposed == "READY"
        if config.in_queue:
            answer = {"state": {"state": "ACTIVE"}} if present else None
            found = self.gcloud.describe("queued-resources", config.name, answer)
            if found is None:
                return State(ABSENT)
            word = found.get("state", {}).get("state", "STATE_UNSPECIFIED")
            if word != "ACTIVE":
                return State(word, _reason(found["state"]))
        return self._state_of_nodes({"state": "READY", "networkEndpoints": [{}]} if present else None)

    def _state_of_nodes(self, supposed: dict[str, Any] | None) -> State:
        hosts = {}
        for node in self.config.nodes:
            found = self.gcloud.describe("tpu-vm", node, supposed)
            if found is None:  # of a queued resource that was granted, a node may only be lost
                return State("TERMINATED", f"{node} is missing") if self.config.in_queue else State(ABSENT)
            if found.get("state") != "READY":
                return State(found.get("state", "STATE_UNSPECIFIED"), found.get("healthDescription", ""))
            hosts[node] = [endpoint.get("ipAddress", "") for endpoint in found.get("networkEndpoints", [])]
        return State("READY", hosts=hosts)

    def require_ready(self) -> State:
        """The state of a pod that is all there; `PodError` says what it is otherwise."""
        state = self.state()
        if not state.ready:
            raise PodError(f"{self.config.name} is {state}; `pod.py create` brings it up")
        return state

    def bring_up(self, poll: float) -> State:
        """Waits until the pod is ready; creates it if it is not there, again if it was preempted or has failed.

          Args:
            poll: seconds between looks.

          Raises:
            QuotaRefused, TryLater: it cannot be created, or was lost again at once.
        PodError: somebody has stopped it, or gcloud gave another error.
        """
        state, created, told = self.state(supposed=ABSENT), False, ""
        while not state.ready:
            if str(state) != told and state.word != ABSENT:
                told = str(state)
                self.gcloud.say(f"{self.config.name} is {told}")
            if state.word == ABSENT:
                self._create()
                created = True
            elif state.gone and created:
                if is_quota(state.reason):
                    raise QuotaRefused(state.reason)
                raise TryLater(f"{self.config.name} was created, and is {state}")
            elif state.gone:
                self._delete()
            elif state.coming or state.word in LEAVING:
                time.sleep(poll)
            else:
                raise PodError(f"{self.config.name} is {state}; start it or delete it yourself")
            state = self.state()
        self.gcloud.say(f"{self.config.name} is ready: {sum(map(len, state.hosts.values()))} hosts")
        return state

    def delete(self) -> None:
        """Deletes the pod if it is there."""
        if self.state().word == ABSENT:
            self.gcloud.say(f"{self.config.name} is not there")
            return
        self._delete()
        self.gcloud.say(f"{self.config.name} is deleted")

    def _delete(self) -> None:
        if self.config.in_queue:
            self.gcloud.change("queued-resources", "delete", self.config.name, "--force")
        else:
            self.gcloud.change("tpu-vm", "delete", self.config.name)

    def _create(self) -> None:
        config = self.config
        self.gcloud.say(f"creating {config.name}: {config.slices} x {config.accelerator}, {config.capacity}")
        flags = [f"--accelerator-type={config.accelerator}", *CAPACITY[config.capacity]]
        settings = {"network": config.network, "subnetwork": config.subnetwork}
        settings["service-account"] = config.service_account
        settings["labels"] = ",".join(f"{key}={value}" for key, value in sorted(config.labels.items()))
        flags += [f"--{key}={value}" for key, value in settings.items() if value]
        flags += ["--internal-ips"] if config.internal_ips else []
        if not config.in_queue:
            self.gcloud.change("tpu-vm", "create", config.name, f"--version={config.version}", *flags)
            return
        several = [f"--node-count={config.slices}", f"--node-prefix={config.name}"]
        nodes = several if config.slices > 1 else [f"--node-id={config.name}"]
        self.gcloud.change(
            "queued-resources", "create", config.name, f"--runtime-version={config.version}", *nodes, *flags
        )


def _reason(state: dict[str, Any]) -> str:
    """Why a queued resource failed."""
    return state.get("failedData", {}).get("error", {}).get("message", "")
