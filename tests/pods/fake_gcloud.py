"""A gcloud that keeps its TPUs in a directory, and whose hosts are directories and processes of this machine.

FAKE_GCLOUD names the directory; `settings.json` in it says how the world is (see SETTINGS). Flags that
gcloud_flags.json does not list are refused. A host has a home directory, an environment of its own, and a curl that
knows the metadata server; its processes carry a tag in their environment, by which they die with it.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

SETTINGS = {
    "hosts": 2,  # of a node
    "quota": False,  # refuse to create anything: the project has none
    "capacity": 0,  # times that there are no machines to create, before there are
    "dead": [],  # hosts that do not answer, as node/number
    "queue": ["WAITING_FOR_RESOURCES", "PROVISIONING"],  # states of a queued resource before it is active
    "vanishes": False,  # preempted after it was described as ready, when its hosts are next asked for a run's status
    "fails": "",  # why queued resources fail instead of becoming active
}
TABLE = json.loads(Path(__file__).with_name("gcloud_flags.json").read_text())
# Words of errors as users have reported them:
# https://github.com/marin-community/marin/pull/1612 (quota), https://github.com/marin-community/marin/issues/3404 (not
# found), https://github.com/thevasudevgupta/gsoc-wav2vec2/issues/11 (capacity); those of ssh are in gcloud's source.
NO_QUOTA = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
NO_CAPACITY = 'There is no more capacity in the zone "here-a"; you can try in another zone'


class Refused(Exception):
    """An error of gcloud's, with its exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class World:
    """The resources in a directory."""

    def __init__(self, root: Path):
        self.root = root
        self.settings = SETTINGS | self.read("settings", {})

    def read(self, name: str, default=None):
        file = self.root / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else default

    def write(self, name: str, content) -> None:
        partial = self.root / f"{name}.partial"
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self.root / f"{name}.json")

    def change_settings(self, **settings) -> None:
        """For tests: how the world is from now on."""
        self.settings |= settings
        self.write("settings", self.settings)

    @contextmanager
    def locked(self):
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def found(self, kind: str, name: str) -> dict:
        if (resource := self.read(f"{kind}-{name}")) is None:
            where = "nodes" if kind == "tpu-vm" else "queuedResources"
            raise Refused(f"NOT_FOUND: Resource 'projects/fake/locations/here-a/{where}/{name}' was not found.")
        return resource

    def create_nodes(self, names: list[str], queued_resource: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        hosts = self.settings["hosts"]
        for index, name in enumerate(names):
            generation = self.read("generation", 0) + 1
            self.write("generation", generation)
            addresses = [{"ipAddress": f"10.0.{index}.{host + 2}", "port": 8470} for host in range(hosts)]
            places = {"first": index * hosts, "processes": len(names) * hosts, "coordinator": coordinator}
            node = {"name": name, "state": "READY", "networkEndpoints": addresses, "queuedResource": queued_resource}
            self.write(f"tpu-vm-{name}", node | {"fake": places | {"generation": generation}})
            for host in range(hosts):
                shutil.rmtree(self.home(name, host), ignore_errors=True)
                self.home(name, host).mkdir(parents=True)

    def home(self, node: str, host: int) -> Path:
        return self.root / "hosts" / f"{node} {host}"  # with a space, as any path may have one

    def tag(self, node: dict, host: int) -> str:
        return f"{self.root}/{node['fake']['generation']}/{host}"

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signals all processes of a node's hosts."""
        node = self.found("tpu-vm", name)
        tags = {f"FAKE_HOST={self.tag(node, host)}".encode() for host in range(len(node["networkEndpoints"]))}
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and tags & set(_environment(process)):
                try:
                    os.kill(int(process.name), number)
                except ProcessLookupError:
                    continue

    def preempt(self, name: str) -> None:
        """For tests: a node's processes die at once, and it is gone, with the queued resource that it belongs to."""
        with self.locked():
            node = self.found("tpu-vm", name)
            self.kill(name)
            self.write(f"tpu-vm-{name}", node | {"state": "PREEMPTED"})
            if queued := node["queuedResource"]:
                resource = self.found("queued-resources", queued)
                self.write(f"queued-resources-{queued}", resource | {"state": {"state": "SUSPENDED"}})

    def remove_node(self, name: str) -> None:
        self.kill(name)
        for host in range(len(self.found("tpu-vm", name)["networkEndpoints"])):
            shutil.rmtree(self.home(name, host), ignore_errors=True)
        (self.root / f"tpu-vm-{name}.json").unlink()


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours
        return []


def main() -> None:
    world = World(Path(os.environ["FAKE_GCLOUD"]))
    words = sys.argv[1:]
    with (world.root / "calls").open("a") as calls:
        calls.write(json.dumps(shlex.join(["gcloud", *words])) + "\n")
    command = " ".join(words[:4])
    try:
        if command not in TABLE["commands"]:
            raise Refused(f"Invalid choice: {command!r}.", 2)
        positional, flags = parse(TABLE["commands"][command], words[4:])
        kind, verb = words[2:4]
        if verb in ("ssh", "scp"):
            code = {"ssh": ssh, "scp": scp}[verb](world, positional, flags)
        else:
            with world.locked():
                code = VERBS[verb](world, kind, *positional, flags)
        sys.exit(code)
    except Refused as error:
        print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {error}", file=sys.stderr)
        sys.exit(error.code)


def parse(allowed: dict, words: list[str]) -> tuple[list[str], dict]:
    positional, flags = [], {}
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif equals and name in (*allowed["values"], *TABLE["wide"]["values"]):
            flags[name] = value
        elif not equals and name in (*allowed["switches"], *TABLE["wide"]["switches"]):
            flags[name] = True
        else:
            raise Refused(f"unrecognized arguments: {word}", 2)
    if missing := [name for name in (*allowed["required"], "--zone") if name not in flags]:
        raise Refused(f"argument {missing[0]}: Must be specified.", 2)
    return positional, flags


def create(world: World, kind: str, name: str, flags: dict) -> int:
    if world.read(f"{kind}-{name}") is not None:
        raise Refused(f"ALREADY_EXISTS: Resource '{name}' already exists.")
    if world.settings["quota"]:
        raise Refused(NO_QUOTA)
    if world.settings["capacity"]:
        world.change_settings(capacity=world.settings["capacity"] - 1)
        raise Refused(NO_CAPACITY)
    if kind == "tpu-vm":
        world.create_nodes([name], "")
    elif ("--node-id" in flags) == ("--node-count" in flags):
        raise Refused("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.", 2)
    else:
        prefix, count = flags.get("--node-prefix", name), int(flags.get("--node-count", 0))
        nodes = [f"{prefix}-{index}" for index in range(count)] if count else [flags["--node-id"]]
        fake = {"nodes": nodes, "queue": world.settings["queue"]}
        world.write(f"{kind}-{name}", {"name": name, "state": {"state": "CREATING"}, "fake": fake})
    return 0


def describe(world: World, kind: str, name: str, flags: dict) -> int:
    resource = world.found(kind, name)
    shown = {key: value for key, value in resource.items() if key != "fake"}
    print(json.dumps(shown) if flags.get("--format") == "json" else shown)
    if kind == "queued-resources":
        advance(world, name, resource)
    return 0


def advance(world: World, name: str, resource: dict) -> None:
    """A queued resource takes a step whenever it has been looked at."""
    state, fake = resource["state"]["state"], resource["fake"]
    if state in ("ACTIVE", "SUSPENDED", "FAILED"):
        return
    if fake["queue"]:
        resource["state"]["state"] = fake["queue"].pop(0)
    elif why := world.settings["fails"]:
        resource["state"] = {"state": "FAILED", "failedData": {"error": {"message": why}}}
    else:
        world.create_nodes(fake["nodes"], name)
        resource["state"]["state"] = "ACTIVE"
    world.write(f"queued-resources-{name}", resource)


def delete(world: World, kind: str, name: str, flags: dict) -> int:
    resource = world.found(kind, name)
    if kind == "tpu-vm":
        world.remove_node(name)
        return 0
    nodes = [node for node in resource["fake"]["nodes"] if world.read(f"tpu-vm-{node}") is not None]
    if nodes and "--force" not in flags:
        raise Refused(f"FAILED_PRECONDITION: queued resource {name} has nodes.")
    for node in nodes:
        world.remove_node(node)
    (world.root / f"{kind}-{name}.json").unlink()
    return 0


VERBS = {"create": create, "describe": describe, "delete": delete}


def workers(world: World, node: dict, flags: dict) -> list[int]:
    if node["state"] in ("PREEMPTED", "TERMINATED"):
        raise Refused(f'This TPU has terminal state "{node["state"]}", so it cannot be used anymore.')
    count, wanted = len(node["networkEndpoints"]), flags.get("--worker", "0")
    if wanted != "all" and not 0 <= int(wanted) < count:
        raise Refused(f"Invalid value for [--worker]: worker index {wanted} is larger than the valid worker indexes")
    return list(range(count)) if wanted == "all" else [int(wanted)]


def dead(world: World, node: dict, host: int) -> bool:
    if f"{node['name']}/{host}" not in world.settings["dead"]:
        return False
    print(
        "Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].",
        "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].",
        sep="\n",
        file=sys.stderr,
    )
    return True


def ssh(world: World, positional: list[str], flags: dict) -> int:
    if world.settings["vanishes"] and " status " in flags["--command"]:
        world.change_settings(vanishes=False)
        world.preempt(*positional)
    node = world.found("tpu-vm", *positional)
    codes, processes = [], []
    for host in workers(world, node, flags):
        print(f"SSH: Attempting to connect to worker {host}...", file=sys.stderr)
        if dead(world, node, host):
            codes.append(255)
        else:
            place = {"cwd": world.home(node["name"], host), "env": environment_of(world, node, host)}
            processes.append(subprocess.Popen(["bash", "-c", flags["--command"]], stdin=subprocess.DEVNULL, **place))
    codes += [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def environment_of(world: World, node: dict, host: int) -> dict[str, str]:
    """A host's own: nothing of the caller's comes along, as over ssh. OMNI_* stand for what TPU hosts know of a pod."""
    fake = node["fake"]
    return {
        "PATH": f"{world.root / 'host-bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(world.home(node["name"], host)),
        "FAKE_HOST": world.tag(node, host),
        "FAKE_WORKER": str(host),
        "OMNI_COORDINATOR": fake["coordinator"],
        "OMNI_PROCESSES": str(fake["processes"]),
        "OMNI_PROCESS": str(fake["first"] + host),
    }


def scp(world: World, positional: list[str], flags: dict) -> int:
    *files, (name, _, place) = *positional[:-1], positional[-1].partition(":")
    node = world.found("tpu-vm", name)
    codes = []
    for host in workers(world, node, flags):
        codes.append(255 if dead(world, node, host) else 0)
        for file in map(Path, files if not codes[-1] else []):
            shutil.copy(file, world.home(name, host) / place)  # with its mode, as scp does
            with (world.root / "copied").open("a") as copied:
                copied.write(f"{file.name} {file.stat().st_mode & 0o777:o}\n")
    return max(codes)


if __name__ == "__main__":
    main()
