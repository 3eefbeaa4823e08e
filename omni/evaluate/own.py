"""The evaluation of any model on a user's own documents: `evaluate_documents` measures direction after direction."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

from etils import epath

from omni.bundle import Model
from omni.data.sources import Source
from omni.evaluate.cells import Cells, model_hash, plain, write_json
from omni.evaluate.contexts import measure_contexts
from omni.evaluate.continuations import measure_continuations
from omni.evaluate.documents import Documents, read_documents
from omni.evaluate.run import RESULTS
from omni.evaluate.settings import DocumentSettings
from omni.evaluate.signature import as_line, model_fields
from omni.train.run_directory import to_json

VERSION = 1  # of the measurements: results of another version are not comparable


def evaluate_documents(
    model: Model,
    source: Source,
    directory: epath.PathLike,
    settings: DocumentSettings | None = None,
    *,
    directions: Sequence[str] | None = None,
    command: str = "",
) -> tuple[dict, dict[str, list[dict]]]:
    """Measures a model on documents; writes `directory`/results.json and returns it, and examples of each direction.

    What an evaluation of the same model, documents and settings measured there before is read, not measured again.

    Args:
      source: the documents, none of which should have been trained on.
      directions: as `omni.evaluate.documents` names them; None measures all in which contexts can be shuffled.
      command: the command that does it, put into the results.

    Raises:
      UsageError, OmniError: as `read_documents`.
    """
    start, settings, directory = time.monotonic(), settings or DocumentSettings(), epath.Path(directory)
    documents = read_documents(model, source, settings, directions)
    weights = model_hash(model)
    fields = {"task": f"documents.{VERSION}", "data": documents.hash}
    fields |= {name: getattr(settings, name) for name in ("candidates", "limit", "seed")}
    fields |= model_fields(model, model.generation, weights)
    counted = dataclasses.asdict(settings) | {"batch": None}  # the batch changes no reply
    directory.mkdir(parents=True, exist_ok=True)
    cells = Cells(directory / "cells", fields | {"settings": counted})
    measured = _measured(model, documents, settings, cells)
    names = [direction.name for direction in documents.directions]
    samples = {name: measured[f"replies {name}"].pop("samples") for name in names}
    results = plain(
        {
            "directions": {name: measured[f"contexts {name}"] | measured[f"replies {name}"] for name in names},
            "data": {
                "source": to_json(source),
                "hash": documents.hash,
                "documents": len(documents.samples),
                "left_out": documents.left_out,
                "samples": documents.samples.description,
            },
            "model": {"hash": weights, "context_length": model.context_length},
            "settings": dataclasses.asdict(settings),
            "command": command,
            "seconds": round(time.monotonic() - start + cells.seconds_before, 1),
            "signature": as_line(fields),
        }
    )
    write_json(directory / RESULTS, results)
    return results, samples


def _measured(model: Model, documents: Documents, settings: DocumentSettings, cells: Cells) -> dict[str, dict]:
    """All cells: `contexts` and `replies` of each direction."""
    plan = {}
    for direction in documents.directions:
        count, contexts = len(direction.documents), 1 + direction.wrong.shape[1]
        compute = functools.partial(measure_contexts, model, direction, settings)
        plan[f"contexts {direction.name}"] = count * contexts, compute
        compute = functools.partial(measure_continuations, model, documents.samples, direction, settings)
        plan[f"replies {direction.name}"] = 2 * min(count, settings.limit), compute
    return cells.measure_all(plan, unit="document")
