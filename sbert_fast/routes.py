"""The modules that texts go through: of a model that begins with a Router, those of a route."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from sbert_fast.errors import UnsupportedModelError
from sbert_fast.pooling import is_module


def _router(model: nn.Module) -> Any:  # noqa: ANN401
    """The Router that a SentenceTransformer begins with; None if it does not."""
    first: Any = next(model.children(), None)
    return first if isinstance(model, SentenceTransformer) and is_module(first, "Router") else None


def routes(model: nn.Module) -> list[str | None]:
    """The routes of a model; [None] of one that does not begin with a Router."""
    router = _router(model)
    return [None] if router is None else list(router.sub_modules)


def route_of(model: nn.Module, task: Any) -> str | None:  # noqa: ANN401
    """The route of texts: sentence-transformers itself is asked.

    Args:
        model: see :func:`routes`.
        task: as in `SentenceTransformer.encode`.

    Raises:
        UnsupportedModelError: it refuses them, in these words.
    """
    router = _router(model)
    if router is None:
        return None
    try:
        route: str = router._resolve_route(task=task, modality="text")
    except Exception as error:
        raise UnsupportedModelError(str(error)) from error
    return route


def modules_on(model: nn.Module, route: str | None) -> dict[str, nn.Module]:
    """The modules on a route, in order, by their names in the model."""
    modules = dict(model.named_children())
    if route is None:
        return modules
    name = next(iter(modules))
    router: Any = modules.pop(name)
    # A module may come twice: a Router then calls it twice. It needs one that reads texts.
    inside = router.sub_modules[route]._modules.items()
    found = {f"{name}.sub_modules.{route}.{key}": module for key, module in inside}
    return found | modules if found else {}


def modules_off(model: nn.Module, route: str | None) -> list[nn.Module]:
    """What holds the modules of the other routes."""
    router = _router(model)
    if router is None:
        return []
    here = router.sub_modules[route]
    return [other for other in router.sub_modules.values() if other is not here]
