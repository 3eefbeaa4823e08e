"""Pages of HTML that hold all they show: what the report of an evaluation and the page of a training have in common."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from etils import epath

from omni.pages import curves
from omni.parts import Part


def write_page(
    path: epath.Path,
    package: str,
    template: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable] | None = None,
) -> epath.Path:
    """Writes a page from a template of a package, which may include those here; returns its path.

    It appears only when it is whole. Charts and parts are drawn by charts.html.j2 and parts.html.j2.
    """
    loaders = [jinja2.PackageLoader(package), jinja2.PackageLoader("omni.pages")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= filters or {}
    page = environment.get_template(template).render(drawing=curves, **values)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(page)
    return partial.replace(path)


def described(part: Part) -> dict[str, str]:
    """A part as JSON that parts.html.j2 shows; others as data URIs."""
    match part.modality:
        case "text":
            return {"modality": "text", "text": part.text}
        case "image":
            return {"modality": "image", "source": _data_uri("image/png", part.to_png_bytes())}
        case "video":
            kind, content = part.playable()
            return {"modality": "video", "kind": kind, "source": _data_uri(kind, content)}
    return {"modality": "audio", "source": _data_uri("audio/wav", part.to_wav_bytes())}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
