#!/usr/bin/env python3
"""From nothing to a running pod job, and back, through gcloud; docs/pods.md walks through it.

A pod is described by one TOML file (pod.toml here shows all keys); every verb takes it. Needs Python 3.11 and gcloud.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import runs
from babysit import Limits, babysit
from gcloud import EXIT_FAILED, EXIT_INTERRUPTED, Gcloud, PodError, UsageError
from machines import Pod, read_config


def main() -> None:
    """Runs a verb and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line on stderr."""
    options = make_parser().parse_args(*_split(sys.argv[1:]))
    try:
        config = read_config(options.pod)
        options.run(Pod(config, Gcloud(config.project, config.zone, options.dry_run)), options)
    except PodError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; machines and runs stay as they are, and the same command goes on", EXIT_INTERRUPTED)
    except BrokenPipeError:  # as of `pod.py logs ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    print(f"pod: {message}", file=sys.stderr)
    sys.exit(code)


def _split(arguments: list[str]) -> tuple[list[str], argparse.Namespace]:
    """What stands behind `--` is the run's command, none of it ours."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    ours, command = arguments[:place], arguments[place + 1 :]
    # argparse takes a last argument that may be left out as left out when a switch stands before it.
    switches = [word for word in ours[1:] if word in ("--dry-run", "--json")]
    others = [word for word in ours[1:] if word not in switches]
    return [*ours[:1], *switches, *others], argparse.Namespace(command=command)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `run`."""
    parser = argparse.ArgumentParser(prog="pod.py", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  python3 tpu_scripts/pod.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        made.add_argument("pod", type=Path, metavar="POD.toml")
        made.add_argument("--dry-run", action="store_true", help="print every command, run none")
        return made

    def polling(made: argparse.ArgumentParser) -> None:
        made.add_argument("--poll", type=float, default=Limits.poll, help="seconds between looks (default: 30)")

    def sourced(made: argparse.ArgumentParser) -> None:
        checkout = Path(__file__).resolve().parents[1]
        made.add_argument("--source", type=Path, default=checkout, help="checkout to install (default: this one)")

    summary = "Bring the machines up; what was preempted or has failed is created again."
    polling(verb("create", do_create, summary, "my.toml"))
    summary = "Copy the checkout's committed files to every host and install them, unless they are installed."
    sourced(verb("install", do_install, summary, "my.toml"))
    summary = "Start a command on every host under a run's name, unless it runs already."
    launch = verb("launch", do_launch, summary, "my.toml first -- omni train experiments/mine.py")
    launch.add_argument("name", metavar="RUN")
    status = verb("status", do_status, "Say how the machines are, and a run on every host.", "my.toml first")
    status.add_argument("name", metavar="RUN", nargs="?")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    logs = verb("logs", do_logs, "Print the end of a run's log.", "my.toml first --host all --lines 5")
    logs.add_argument("name", metavar="RUN")
    logs.add_argument("--node", help="which, of several slices (default: the first)")
    logs.add_argument("--host", default="0", help="number of the host, or all (default: 0)")
    logs.add_argument("--lines", type=int, default=50)
    logs.add_argument("--follow", action="store_true", help="go on printing")
    stop = verb("stop", do_stop, "Let a run save itself and end, on every host.", "my.toml first")
    stop.add_argument("name", metavar="RUN")
    summary = "Create, install, launch and watch until the run has finished; go on after preemptions and failures."
    sits = verb("babysit", do_babysit, summary, "my.toml first -- omni train experiments/mine.py")
    sits.add_argument("name", metavar="RUN")
    polling(sits)
    sourced(sits)
    text = "times that {} before it gives up (default: {})"
    failures, losses = text.format("the run may fail", Limits.failures), text.format("machines may be lost", 100)
    sits.add_argument("--failures", type=int, default=Limits.failures, help=failures)
    sits.add_argument("--losses", type=int, default=Limits.losses, help=losses)
    text = "seconds before machines are asked for again where there were none (default: 300)"
    sits.add_argument("--pause", type=float, default=Limits.pause, help=text)
    verb("delete", do_delete, "Delete the machines, and what is on their disks.", "my.toml")
    return parser


def do_create(pod: Pod, options: argparse.Namespace) -> None:
    pod.bring_up(options.poll)


def do_install(pod: Pod, options: argparse.Namespace) -> None:
    runs.install(pod, options.source)


def do_launch(pod: Pod, options: argparse.Namespace) -> None:
    runs.launch(pod, options.name, _command(options))


def do_status(pod: Pod, options: argparse.Namespace) -> None:
    state = pod.state()
    hosts = runs.status(pod, options.name, state) if options.name and state.ready else []
    if pod.gcloud.dry_run:
        return
    if options.json:
        answers = [{"node": host.node, "host": host.number, "state": host.word} for host in hosts]
        print(json.dumps({"pod": state.word, "reason": state.reason, "hosts": answers}))
    else:
        print(f"{pod.config.name}: {state}")
        for host in hosts:
            print(f"{host}: {host.word}")
    well = ("running", "stopped", "exit 0")
    if not (state.ready and all(host.word in well for host in hosts)):
        sys.exit(EXIT_FAILED)


def do_logs(pod: Pod, options: argparse.Namespace) -> None:
    node = options.node or pod.config.nodes[0]
    if node not in pod.config.nodes:
        raise UsageError(f"--node {node}: {pod.config.name} has {', '.join(pod.config.nodes)}")
    runs.check_name(options.name)
    arguments = ["logs", options.name, str(options.lines), *(["follow"] if options.follow else [])]
    if pod.gcloud.follow(node, runs.on_host(arguments), options.host) != 0:
        raise PodError(f"host {options.host} of {node} shows no log of {options.name}; `pod.py status` says how it is")


def do_stop(pod: Pod, options: argparse.Namespace) -> None:
    runs.check_name(options.name)
    hosts = runs.stop(pod, options.name)
    if pod.gcloud.dry_run:
        return
    for host in hosts:
        print(f"{host}: {host.word}")
    runs.require_answers(hosts)


def do_babysit(pod: Pod, options: argparse.Namespace) -> None:
    runs.check_name(options.name)
    limits = Limits(options.failures, options.losses, options.poll, pause=options.pause)
    babysit(pod, options.name, _command(options), options.source, limits)


def do_delete(pod: Pod, options: argparse.Namespace) -> None:
    pod.delete()


def _command(options: argparse.Namespace) -> list[str]:
    if not options.command:
        raise UsageError("no command; it stands behind --, as in: -- omni train experiments/mine.py")
    return options.command


if __name__ == "__main__":
    main()
