"""The page of a run in its directory: what the net makes of held-out examples as it learns, beside the losses."""

from __future__ import annotations

import numpy as np
from etils import epath

from omni.pages import curves, described, write_page
from omni.parts import Part
from omni.train.metrics import FILE as LOG
from omni.train.run_directory import read_json, write_json, writing
from omni.train.task import Gallery

PAGE, MADE = "page.html", "made"
_KEPT = 5  # rows on the page: the newest


class Page:
    """The page of the run in `directory`, which is rewritten whenever something is added."""

    def __init__(self, directory: epath.Path, gallery: Gallery, *, averaged: bool):
        self.directory, self.gallery, self.averaged = directory, gallery, averaged

    def add(self, step: int, made: np.ndarray) -> None:
        """Shows what was made of the gallery's batch after a step; later steps, of a run that was cut, are dropped.

        Raises:
          OmniError: the disk does not take it.
        """
        folder = self.directory / MADE
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{step}.json", cells(self.gallery.exhibits(made)))
        steps = sorted(int(path.stem) for path in folder.glob("*.json"))
        kept = [other for other in steps if other <= step][-_KEPT:]
        for other in set(steps) - set(kept):
            (folder / f"{other}.json").unlink()
        rows = [{"title": "original", "cells": cells(self.gallery.originals)}]
        rows += [{"title": f"step {other}", "cells": read_json(folder / f"{other}.json")} for other in kept]
        losses = curves.read_losses(self.directory / LOG)
        critic = {name: losses.pop(name) for name in list(losses) if name.startswith("critic/")}
        boundaries = curves.read_boundaries(self.directory / LOG)
        charts = [curves.chart(title, lines, boundaries) for title, lines in (("net", losses), ("critic", critic))]
        values = {"title": self.directory.name, "step": step, "averaged": self.averaged, "rows": rows}
        with writing(self.directory / PAGE):
            values |= {"charts": [chart for chart in charts if chart]}
            write_page(self.directory / PAGE, "omni.train", "page.html.j2", values)


def cells(exhibits: list[list[Part]]) -> list[list[dict[str, str]]]:
    """Parts as the template and JSON take them."""
    return [[described(part) for part in parts] for parts in exhibits]
