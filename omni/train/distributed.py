"""Several processes as one run."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from omni_tokenizers.errors import OmniError, UsageError

HEARTBEAT = 60
"""Seconds without a sign of life after which jax takes a process for lost and ends the others."""

VARIABLES = {"coordinator": "OMNI_COORDINATOR", "processes": "OMNI_PROCESSES", "process": "OMNI_PROCESS"}
DETECT = "OMNI_DISTRIBUTED"


def join(
    detect: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes of a run, if this one is told of any; to be called before anything else touches jax.

    What is not said is looked for in the environment: OMNI_COORDINATOR, OMNI_PROCESSES and OMNI_PROCESS, and
    OMNI_DISTRIBUTED (anything) for `detect`.

    Args:
      detect: let jax find the others, as it can on TPU pods, in Slurm jobs and on Kubernetes.
      coordinator: host:port of process 0.
      processes: how many there are.
      process: number of this one.

    Raises:
      UsageError: coordinator, processes and process do not fit together, or `detect` finds nothing.
      OmniError: the others could not be joined.
    """
    said = {"coordinator": coordinator, "processes": processes, "process": process}
    said = {name: environment.get(VARIABLES[name]) if value is None else value for name, value in said.items()}
    if all(value is None for value in said.values()):
        if detect or environment.get(DETECT):
            _started(None, None, None)
        return
    if missing := [name for name, value in said.items() if value is None]:
        names = ", ".join(f"--{name} ({VARIABLES[name]})" for name in missing)
        raise UsageError(f"{names} missing: a process of several needs its coordinator, their number and its own")
    count, number = _numbers(said["processes"], said["process"])
    host, _, port = said["coordinator"].rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"coordinator {said['coordinator']}: write host:port")
    _started(said["coordinator"], count, number)


def share(detect: bool = False, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """How many processes divide a work between them, and which of them this is; (1, 0) for one alone.

    Such processes need to hear nothing of one another. So OMNI_PROCESSES and OMNI_PROCESS are enough, and where jax has
    to find the numbers (`detect`, or OMNI_DISTRIBUTED), it parts with the others at once: whoever is done can end, and
    none is ended because another is lost. To be called before anything else touches jax.

    Raises:
      UsageError: one of the two is missing, they are no numbers of processes, or `detect` finds nothing.
      OmniError: the others could not be joined.
    """
    names = [VARIABLES["processes"], VARIABLES["process"]]
    said = [environment[name] for name in names if name in environment]
    if len(said) == 1:
        raise UsageError(
            f"of {' and '.join(names)} one is missing: a process of several needs their number and its own"
        )
    if said:
        return _numbers(*said)
    if not (detect or environment.get(DETECT)):
        return 1, 0
    _started(None, None, None)
    found = jax.process_count(), jax.process_index()
    jax.distributed.shutdown()
    return found


def _numbers(processes: int | str, process: int | str) -> tuple[int, int]:
    """Number of processes and of one of them; `UsageError` for what cannot be these."""
    try:
        count, number = int(processes), int(process)
    except ValueError:
        raise UsageError(f"{VARIABLES['processes']} and {VARIABLES['process']} must be whole numbers") from None
    if not 0 <= number < count:
        raise UsageError(f"process {number} of {count}: they are numbered from 0 to {count - 1}")
    return count, number


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run; what is None is found by jax. To be called before anything else touches jax.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: number of this one.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no meaning to accelerators
    if hasattr(jax.config, "jax_enable_preemption_service"):
        # It takes SIGTERM for itself, from here to the train loop's own handler: a process that compiles would stay.
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)


def _started(coordinator: str | None, processes: int | None, process: int | None) -> None:
    try:
        initialize(coordinator, processes, process)
    except ValueError as error:
        raise UsageError(
            f"no TPU pod, Slurm job or other cluster was found ({error}); say --coordinator, --processes and --process"
        ) from error
    except RuntimeError as error:
        who = "the run's other processes" if process is None else f"process {process} of {processes}: {coordinator}"
        raise OmniError(f"{who} could not be joined: {str(error).strip().splitlines()[0]}") from error
