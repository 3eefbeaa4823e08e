"""Routing: asked in words alone, does the model produce the asked parts, in the asked order, of one class?"""

from __future__ import annotations

from collections.abc import Mapping

from omni.bundle import Model
from omni.evaluate.data import EvaluationData, WordRequest
from omni.evaluate.judges import Judge
from omni.evaluate.replies import Progress, ask, formed
from omni.evaluate.settings import EvaluationSettings
from omni.parts import Text
from omni.reply import Reply


def draw_requests(data: EvaluationData, count: int) -> list[WordRequest]:
    """The first `count` held-out requests, from the beginning again where there are fewer."""
    return [data.requests[i % len(data.requests)] for i in range(count)]


def measure_routing(
    model: Model, data: EvaluationData, judges: Mapping[str, Judge], settings: EvaluationSettings, progress: Progress
) -> tuple[dict, list[WordRequest], list[Reply]]:
    """Shares of all replies: exactly the asked parts in order; every asked part there and of the asked class."""
    requests = draw_requests(data, settings.requests)
    replies = ask(model, [[Text(request.text)] for request in requests], None, settings, "requests", progress)
    pairs = list(zip(replies, requests, strict=True))
    order = [tuple(part.modality for part in reply.parts) == request.order for reply, request in pairs]
    agreement = [_agrees(judges, reply, request) for reply, request in pairs]
    result = {"order": sum(order) / len(pairs), "agreement": sum(agreement) / len(pairs), "n": len(pairs)}
    return result, requests, replies


def measure_unconstrained(
    model: Model, data: EvaluationData, settings: EvaluationSettings, progress: Progress
) -> list[int]:
    """[well-formed, all] of free replies that no constraint holds: the same requests, further seeds."""
    requests = draw_requests(data, settings.unconstrained)
    prompts = [[Text(request.text)] for request in requests]
    return formed(ask(model, prompts, None, settings, "unconstrained", progress, constrained=False))


def _agrees(judges: Mapping[str, Judge], reply: Reply, request: WordRequest) -> bool:
    asked, there = sorted(request.order), sorted(part.modality for part in reply.parts)
    return asked == there and all(judges[part.modality].labels([part])[0] == request.label for part in reply.parts)
