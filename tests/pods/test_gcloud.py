"""`tpu_scripts/pod.py` against a gcloud that keeps state and knows no flags but those of its reference."""

import re
import subprocess
import sys

import pytest
from pod_cases import POD, wait_for


def settled(text: str) -> str:
    """Commands without what is new each time: names of temporary directories."""
    return re.sub(r"/tmp/tmp\w+", "/tmp/there", text)


def test_unknown_flags_are_refused(cloud):
    """The fake holds commands against the reference table: what gcloud does not know, it does not take."""
    gcloud = [str(cloud.root / "bin" / "gcloud"), "compute", "tpus", "tpu-vm"]
    for line in (["create", "x", "--zone=z", "--version=v", "--sp0t"], ["create", "x", "--zone=z"], ["make", "x"]):
        refused = subprocess.run([*gcloud, *line], env=cloud.environment, capture_output=True, text=True)
        assert refused.returncode == 2 and refused.stderr.startswith("ERROR: (gcloud.compute.tpus.tpu-vm.")


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({}, ["tpu-vm create mine --version=v2-alpha-tpuv5"]),
        ({"capacity": "spot"}, ["tpu-vm create", "--spot"]),
        ({"queued": True, "capacity": "reserved"}, ["queued-resources create", "--node-id=mine", "--reserved"]),
        (
            {"slices": 2, "network": "net", "service_account": "me@x", "internal_ips": True, "project": "ours"},
            [
                *("queued-resources create", "--node-count=2 --node-prefix=mine", "--runtime-version=v2-alpha-tpuv5"),
                *("--network=net", "--service-account=me@x", "--internal-ips", "--project=ours"),
            ],
        ),
    ],
)
def test_created_looked_at_and_deleted_twice(cloud, settings, flags):
    """Every kind of machine is created and deleted once, whatever it is asked for; the second time changes nothing."""
    pod = cloud.config(table='labels = { b = "2", a = "1" }', **settings)
    for _ in range(2):
        assert cloud.pod("create", pod, "--poll", "0.05").returncode == 0
    made = [call for call in cloud.calls() if " create " in call]
    assert len(made) == 1 and all(flag in made[0] for flag in [*flags, "--labels=a=1,b=2"])
    status = cloud.pod("status", pod)
    assert status.returncode == 0 and "READY" in status.stdout
    for _ in range(2):
        assert cloud.pod("delete", pod).returncode == 0
    assert sum(" delete " in call for call in cloud.calls()) == 1
    assert not list(cloud.world.root.glob("tpu-vm-*")) and cloud.pod("status", pod).returncode == 1


@pytest.mark.parametrize("queued", [False, True])
def test_what_was_preempted_is_created_again(cloud, queued):
    """`create` deletes machines that are gone for good, which hold quota, and makes new ones."""
    pod = cloud.config(queued=queued, capacity="spot")
    cloud.pod("create", pod, "--poll", "0.05")
    cloud.world.preempt("mine")
    state = "SUSPENDED" if queued else "PREEMPTED"
    assert state in cloud.pod("status", pod).stdout
    launched = cloud.pod("launch", pod, "first", "--", "true")
    assert launched.returncode == 1 and state in launched.stderr and len(launched.stderr.splitlines()) == 1
    assert cloud.pod("create", pod, "--poll", "0.05").returncode == 0
    assert "READY" in cloud.pod("status", pod).stdout


VERBS = [
    *(["create"], ["install"], ["launch", "first", "--", "bash", "-c", "echo 'a  b' \"$0\""], ["status", "first"]),
    *(["logs", "first", "--host", "1"], ["stop", "first"], ["delete"]),
]


def test_dry_run_prints_every_command_and_runs_none(cloud):
    """What a dry run of each verb prints is what the verb then does."""
    pod = cloud.config()
    for verb, *others in VERBS:
        source = ["--source", cloud.source] if verb == "install" else []
        before = len(cloud.calls())
        dry = cloud.pod(verb, pod, "--dry-run", *source, *others)
        assert dry.returncode == 0 and not dry.stderr and len(cloud.calls()) == before
        assert cloud.pod(verb, pod, *source, *others).returncode == 0
        printed = [settled(line) for line in dry.stdout.splitlines() if not line.startswith("git ")]
        assert printed and printed == [settled(line) for line in cloud.calls()[before:]]


def test_dry_run_of_babysit_shows_a_whole_round(cloud):
    """From describing what is there to deleting what is lost, in the order in which it is done."""
    dry = cloud.pod("babysit", cloud.config(), "first", "--dry-run", "--source", cloud.source, "--", "omni", "train")
    verbs = [line.split()[4] for line in dry.stdout.splitlines() if line.startswith("gcloud")]
    changes = [verb for verb in verbs if verb != "describe"]
    assert changes == ["create", "scp", "ssh", "ssh", "ssh", "delete"] and not cloud.calls() and dry.returncode == 0


def test_arguments_arrive_as_they_were_typed(cloud):
    """Spaces, quotes, dollars and new lines in a command survive three shells."""
    pod = cloud.config()
    cloud.pod("create", pod)
    cloud.pod("install", pod, "--source", cloud.source)
    strange = ["two  spaces", 'it\'s "quoted"', "$HOME `id` \\ * ; &", "a\nb", "", "--dry-run"]
    assert cloud.pod("launch", pod, "first", "--", "printf", "<%s>", *strange).returncode == 0
    expected = "".join(f"<{word}>" for word in strange)
    log = cloud.world.home("mine", 1) / "omni/runs/first/log"
    assert wait_for(lambda: expected in log.read_text())
    assert wait_for(lambda: cloud.words(pod, "first") == ["exit 0", "exit 0"])


def test_secrets_reach_the_run_and_nothing_else(cloud):
    """A listed variable has its value in the run, and stands in no command, output, log or open file."""
    secret = "it's $hushed"
    pod = cloud.config(environment=["WANDB_API_KEY"])
    cloud.pod("create", pod)
    cloud.pod("install", pod, "--source", cloud.source)
    unset = cloud.pod("launch", pod, "first", "--", "true")
    assert unset.returncode == 2 and "WANDB_API_KEY" in unset.stderr
    cloud.environment["WANDB_API_KEY"] = secret
    command = ["launch", pod, "first", "--", "bash", "-c", 'printf %s "$WANDB_API_KEY" | sha256sum > ~/seen']
    dry = cloud.pod(*command[:3], "--dry-run", *command[3:])
    assert "omni-environment.first" in dry.stdout
    outputs = [dry, cloud.pod(*command), cloud.pod("logs", pod, "first")]
    home = cloud.world.home("mine", 0)
    sum_of = subprocess.run(["sha256sum"], input=secret.encode(), capture_output=True, check=True).stdout.decode()
    assert wait_for(lambda: (home / "seen").exists() and (home / "seen").read_text() == sum_of)
    shown = "".join(output.stdout + output.stderr for output in outputs)
    assert "hushed" not in shown + "\n".join(cloud.calls()) + (home / "omni/runs/first/log").read_text()
    assert oct((home / "omni/runs/first/environment").stat().st_mode)[-3:] == "600"
    assert not (home / "omni-environment.first").exists()
    assert (cloud.world.root / "copied").read_text().splitlines()[-1] == "omni-environment.first 600"


def test_installed_and_launched_once(cloud):
    """The same commit is installed once, and a run that goes on is not started a second time."""
    pod = cloud.config(install="echo x >> ~/installed")
    cloud.pod("create", pod)
    home = cloud.world.home("mine", 0)
    (cloud.source / "uncommitted.txt").touch()
    for _ in range(2):
        installed = cloud.pod("install", pod, "--source", cloud.source)
        assert installed.returncode == 0 and "not committed" in installed.stderr
        assert (home / "installed").read_text() == "x\n"
    assert not (home / "omni/source/uncommitted.txt").exists() and (home / "omni/source/committed.txt").exists()
    cloud.git("commit", "--quiet", "--allow-empty", "--message=another")
    cloud.pod("install", pod, "--source", cloud.source)
    assert (home / "installed").read_text() == "x\nx\n"
    for _ in range(2):
        assert cloud.pod("launch", pod, "first", "--", "sleep", "100").returncode == 0
    assert (home / "omni/runs/first/log").read_text().count("sleep 100") == 1
    assert cloud.words(pod, "first") == ["running", "running"]
    assert cloud.pod("stop", pod, "first").returncode == 0
    assert wait_for(lambda: cloud.words(pod, "first") == ["stopped", "stopped"])


def test_nothing_installed_is_said(cloud):
    """Hosts on which nothing is installed yet are not taken for dead ones."""
    pod = cloud.config()
    cloud.pod("create", pod)
    launched = cloud.pod("launch", pod, "first", "--", "true")
    assert launched.returncode == 1 and "`pod.py install` comes first" in launched.stderr
    assert cloud.words(pod, "first") == ["nothing installed", "nothing installed"]


def test_failed_installation_shows_its_last_words(cloud):
    """What the install command said is shown, with the hosts that it failed on."""
    pod = cloud.config(install="echo no such wheel; false")
    cloud.pod("create", pod)
    failed = cloud.pod("install", pod, "--source", cloud.source)
    assert failed.returncode == 1 and "no such wheel" in failed.stderr and "host 1 of mine" in failed.stderr


@pytest.mark.parametrize("queued, setting", [(False, {"quota": True}), (True, {"fails": "Quota limit 'X' exceeded"})])
def test_refused_quota_is_one_clear_line(cloud, queued, setting):
    """Quota that is refused, at once or after a while in the queue, ends every verb that creates, babysit too."""
    cloud.world.change_settings(**setting)
    pod = cloud.config(queued=queued)
    for verb in (["create", pod], ["babysit", pod, "first", "--source", cloud.source, "--", "true"]):
        refused = cloud.pod(*verb[:2], "--poll", "0.05", *verb[2:])
        assert refused.returncode == 1 and "Traceback" not in refused.stderr
        assert "pod: quota refused: " in refused.stderr.splitlines()[-1] and "Quota limit" in refused.stderr
        cloud.pod("delete", pod)


def test_a_dead_host_is_named(cloud):
    """A host that does not answer is named with its address, by every verb that asks hosts."""
    pod = cloud.config()
    cloud.pod("create", pod)
    cloud.pod("install", pod, "--source", cloud.source)
    cloud.world.change_settings(dead=["mine/1"])
    again = ["install", pod, "--source", cloud.source]
    for verb in (again, ["launch", pod, "first", "--", "true"], ["stop", pod, "first"]):
        found = cloud.pod(*verb)
        assert found.returncode == 1 and "host 1 of mine (10.0.0.3) does not answer" in found.stderr
        assert "host 0 of mine" not in found.stderr
    status = cloud.pod("status", pod, "first")
    assert status.returncode == 1 and "host 1 of mine (10.0.0.3): no answer" in status.stdout
    cloud.world.change_settings(dead=["mine/0", "mine/1"])
    silence = cloud.pod("launch", pod, "first", "--", "true")
    assert silence.returncode == 1 and "none of 2 hosts answers" in silence.stderr and "[255]" in silence.stderr


def test_stopped_machines_are_left_alone(cloud):
    """Machines that somebody has stopped, with what is on their disks, are not deleted by `create`."""
    pod = cloud.config()
    cloud.pod("create", pod)
    cloud.world.write("tpu-vm-mine", cloud.world.read("tpu-vm-mine") | {"state": "STOPPED"})
    stopped = cloud.pod("create", pod)
    assert stopped.returncode == 1 and "STOPPED" in stopped.stderr
    assert not any(" delete " in call for call in cloud.calls())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["create", "nowhere.toml"], "No such file"),
        (["launch", "POD", "first"], "no command"),
        (["launch", "POD", "../first", "--", "true"], "no name of a run"),
        (["logs", "POD", "first", "--node", "other"], "--node other"),
        (["install", "POD", "--source", "/"], "no git checkout"),
        (["create"], "required"),
        (["grow", "POD"], "invalid choice"),
    ],
)
def test_wrong_usage(cloud, arguments, message):
    """Wrong arguments: exit code 2, what is wrong, nothing created."""
    pod = cloud.config()
    if arguments[0] == "install":
        cloud.pod("create", pod)
    wrong = cloud.pod(*[pod if argument == "POD" else argument for argument in arguments])
    assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slizes": 2}, "nearest is 'slices'"),
        ({"slices": "2"}, "of the type int"),
        ({"capacity": "cheap"}, "on-demand, spot, reserved"),
        ({"name": "No Good"}, "small letters"),
        ({"environment": ["KEY=value"]}, "names of variables alone"),
        ({"slices": 0}, "at least 1"),
    ],
)
def test_wrong_pod_files(cloud, settings, message):
    """A wrong key or value of a pod's file is named, and a variable's value that was written there is not shown."""
    pod = cloud.config(**settings)
    wrong = cloud.pod("create", pod)
    assert wrong.returncode == 2 and message in wrong.stderr and str(pod) in wrong.stderr
    assert "KEY=value" not in wrong.stderr and not cloud.calls()


def test_older_python():
    """A Python without tomllib is told which one it takes."""
    script = f"import sys; sys.modules['tomllib'] = None; sys.path.insert(0, {str(POD.parent)!r}); import pod"
    old = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert old.returncode == 1 and old.stderr.startswith("Python 3.11 or newer is needed")


def test_without_gcloud(cloud):
    """A machine without gcloud is told where it comes from."""
    pod = cloud.config()
    cloud.environment["PATH"] = "/nowhere"
    missing = cloud.pod("status", pod)
    assert missing.returncode == 1 and "docs/install" in missing.stderr
