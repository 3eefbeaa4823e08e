"""Several processes as one run."""

from __future__ import annotations

import jax


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Joins the processes of a run; to be called before anything else touches jax.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: number of this one.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no meaning to accelerators
    jax.distributed.initialize(coordinator, processes, process)
