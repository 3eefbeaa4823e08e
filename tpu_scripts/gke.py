#!/usr/bin/env python3
"""Runs on a GKE cluster, through xpk: the cluster has the machines, xpk starts a run on them and starts it again.

Takes the pod's file of pod.py, with its keys cluster and image. Needs Python 3.11 and xpk (pip install xpk).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from gcloud import EXIT_INTERRUPTED, PodError, UsageError, start
from machines import PodConfig, read_config

REQUIRED = ("name", "zone", "accelerator", "cluster", "image")
GRACE = 300  # seconds in which a run that is told to end saves itself


def main() -> None:
    """Runs a verb and exits: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line on stderr."""
    arguments = sys.argv[1:]
    place = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser().parse_args(arguments[:place])
    try:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
            raise UsageError(f"{options.name!r} is no name of a workload: small letters, digits, hyphens, at most 40")
        config = read_config(options.pod, REQUIRED)
        {"launch": _launch, "status": _status, "delete": _delete}[options.verb](config, options, arguments[place + 1 :])
    except PodError as error:
        print(f"gke: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    example = "python3 tpu_scripts/gke.py launch my.toml first -- omni train experiments/mine.py"
    parser = argparse.ArgumentParser(
        prog="gke.py",
        description=__doc__,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=("launch", "status", "delete"))
    parser.add_argument("pod", type=Path, metavar="POD.toml")
    parser.add_argument("name", metavar="RUN")
    parser.add_argument("--restarts", type=int, default=100, help="times that the run is started again (default: 100)")
    parser.add_argument("--dry-run", action="store_true", help="print every command, run none")
    return parser


def _launch(config: PodConfig, options: argparse.Namespace, command: list[str]) -> None:
    if not command:
        raise UsageError("no command; it stands behind --, as in: -- omni train experiments/mine.py")
    if missing := [name for name in config.environment if name not in os.environ]:
        raise UsageError(f"{', '.join(missing)}: not set here, and the pod's file lists it under environment")
    with tempfile.TemporaryDirectory() as temporary:
        flags = [f"--tpu-type={config.accelerator}", f"--num-slices={config.slices}", f"--docker-image={config.image}"]
        flags += [f"--max-restarts={options.restarts}", f"--termination-grace-period-seconds={GRACE}"]
        # A run that is told to stop ends with 75, which is a failure to the cluster.
        flags += ["--restart-on-user-code-failure"]
        if config.environment:
            file = Path(temporary) / "environment"
            file.write_text("".join(f"{name}\n" for name in config.environment))  # xpk takes the values from here
            flags.append(f"--env-file={file}")
        flags.append(f"--command={shlex.join(['env', 'OMNI_DISTRIBUTED=1', *command])}")
        _xpk(config, options, "create", f"--workload={options.name}", *flags)


def _status(config: PodConfig, options: argparse.Namespace, command: list[str]) -> None:
    _xpk(config, options, "list", f"--filter-by-job={options.name}")


def _delete(config: PodConfig, options: argparse.Namespace, command: list[str]) -> None:
    _xpk(config, options, "delete", f"--workload={options.name}", "--force")


def _xpk(config: PodConfig, options: argparse.Namespace, verb: str, *flags: str) -> None:
    place = [f"--zone={config.zone}", *([f"--project={config.project}"] if config.project else [])]
    line = ["xpk", "workload", verb, f"--cluster={config.cluster}", *flags, *place]
    if options.dry_run:
        print(shlex.join(line))
    elif (code := start(line).wait()) != 0:
        raise PodError(f"xpk workload {verb} ended with {code}; what it says is above")


if __name__ == "__main__":
    main()
