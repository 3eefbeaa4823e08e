"""`pod.py babysit`: what is lost is created again, what fails is tried again, and both have a limit."""

import signal
import time

import pytest
from pod_cases import wait_for

pytestmark = pytest.mark.slow

# A run that counts its starts in a place that outlives machines.
COUNT = 'echo x >> "$0"; starts=$(wc -l < "$0"); '


class Sitting:
    """A babysitter of a shell script on a fake pod."""

    def __init__(self, cloud, script: str, *options: str, **settings):
        self.cloud, self.counter = cloud, cloud.root / "starts"
        self.pod = cloud.config(capacity="spot", **settings)
        options = ("--poll", "0.1", "--pause", "0.1", "--source", cloud.source, *options)
        command = ["bash", "-c", 'if [ "$OMNI_PROCESS" != 0 ]; then exec sleep 1; fi; ' + COUNT + script, self.counter]
        self.process = cloud.start("babysit", self.pod, "first", *options, "--", *command)

    def starts(self) -> int:
        return self.counter.read_text().count("x") if self.counter.exists() else 0

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=300)
        assert "Traceback" not in errors
        return self.process.returncode, errors


@pytest.mark.parametrize("queued", [False, True])
def test_goes_on_after_preemptions(cloud, queued):
    """Machines that were preempted twice are created again, and the run is launched on them until it has finished."""
    sitting = Sitting(cloud, '[ "$starts" = 3 ] || exec sleep 100', queued=queued)
    for times in (1, 2):
        wait_for(lambda times=times: sitting.starts() == times)
        cloud.world.preempt("mine")
    code, errors = sitting.end()
    assert code == 0 and "finished on every host" in errors and sitting.starts() == 3
    assert sum(" create " in call for call in cloud.calls()) == 3
    assert "failed" not in errors


def test_machines_that_vanish_while_they_are_asked(cloud):
    """Between being ready and not answering, machines may be preempted: that is a loss, and nothing is waited for."""
    sitting = Sitting(cloud, '[ "$starts" = 2 ] || exec sleep 100', "--pause", "1000")
    wait_for(lambda: sitting.starts() == 1)
    cloud.world.change_settings(vanishes=True)
    code, errors = sitting.end()
    assert code == 0 and "lost its machines: PREEMPTED" in errors and sitting.starts() == 2


def test_failures_are_tried_again_up_to_a_limit(cloud):
    """A run that fails is launched again on the same machines, and given up after the limit with its exit code."""
    sitting = Sitting(cloud, 'exit "4$starts"', "--failures", "2")
    code, errors = sitting.end()
    assert code == 1 and sitting.starts() == 3 and "exit 43" in errors and "giving up" in errors.splitlines()[-1]
    assert sum(" create " in call for call in cloud.calls()) == 1


def test_wrong_usage_is_not_tried_again(cloud):
    """A command that says that it is used wrongly would say so again."""
    sitting = Sitting(cloud, "exit 2")
    code, errors = sitting.end()
    assert code == 2 and "used wrongly" in errors and sitting.starts() == 1


def test_interrupted_runs_go_on(cloud):
    """A run that was told to end, and saved itself (75), is launched again; that is no failure."""
    sitting = Sitting(cloud, '[ "$starts" = 2 ] || exit 75', "--failures", "0")
    code, errors = sitting.end()
    assert code == 0 and "was interrupted" in errors and sitting.starts() == 2


def test_a_dead_host_is_named_and_replaced(cloud):
    """A host that stays silent is named; its machines are deleted and created again."""
    sitting = Sitting(cloud, '[ "$starts" = 2 ] || exec sleep 100')
    wait_for(lambda: sitting.starts() == 1)
    cloud.world.change_settings(dead=["mine/1"])
    wait_for(lambda: any(" delete " in call for call in cloud.calls()))
    cloud.world.change_settings(dead=[])
    code, errors = sitting.end()
    assert code == 0 and "host 1 of mine (10.0.0.3) does not answer" in errors


def test_silence_of_all_deletes_nothing(cloud, tmp_path):
    """Where no host answers, this machine's network or key may be at fault: the run is left to go on."""
    sitting = Sitting(cloud, f"until [ -e '{tmp_path / 'end'}' ]; do sleep 0.1; done")

    def calls(word: str) -> int:
        return sum(word in call for call in cloud.calls())

    wait_for(lambda: calls("status first"))
    cloud.world.change_settings(dead=["mine/0", "mine/1"])
    wait_for(lambda: calls("echo omni-host"))  # which of the hosts are there: none
    cloud.world.change_settings(dead=[])
    before = calls("status first")
    wait_for(lambda: calls("status first") > before)
    (tmp_path / "end").touch()
    code, errors = sitting.end()
    assert code == 0 and "none of 2 hosts answers" in errors and sitting.starts() == 1
    assert not any(" delete " in call for call in cloud.calls())


def test_waits_for_capacity_up_to_a_limit(cloud):
    """Machines that are not to be had are asked for again, so many times."""
    cloud.world.change_settings(capacity=2)
    code, errors = Sitting(cloud, "true").end()
    assert code == 0 and errors.count("no capacity") == 2
    cloud.pod("delete", cloud.config())
    cloud.world.change_settings(capacity=100)
    code, errors = Sitting(cloud, "true", "--losses", "1").end()
    assert code == 1 and "giving up" in errors.splitlines()[-1] and "no more capacity" in errors


def test_a_run_that_was_stopped_stays_stopped(cloud):
    """`stop` ends the babysitter too, with a word; launched again, the run goes on."""
    sitting = Sitting(cloud, "exec sleep 100")
    wait_for(lambda: sitting.starts() == 1)
    assert cloud.pod("stop", sitting.pod, "first").returncode == 0
    code, errors = sitting.end()
    assert code == 1 and "was stopped" in errors


def test_ctrl_c_leaves_all_as_it_is(cloud, tmp_path):
    """The babysitter ends with 130; the run goes on without it, and another babysitter finds it running."""
    until = f"until [ -e '{tmp_path / 'end'}' ]; do sleep 0.1; done"
    sitting = Sitting(cloud, until)
    wait_for(lambda: sitting.starts() == 1)
    time.sleep(0.3)
    sitting.process.send_signal(signal.SIGINT)
    code, errors = sitting.end()
    assert code == 130 and "the same command goes on" in errors
    assert cloud.words(sitting.pod, "first")[0] == "running"
    before = len(cloud.calls())
    again = Sitting(cloud, until)
    wait_for(lambda: sum(" ssh " in call for call in cloud.calls()[before:]) > 2)  # it has looked, and looks again
    (tmp_path / "end").touch()
    assert again.end()[0] == 0 and again.starts() == 1
