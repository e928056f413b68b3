"""A backend as the command line names it: a registry name, with ``:fused`` or ``:no-graph`` behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dflash_rt.backends import BACKEND_NAMES, create_backend
from dflash_rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from dflash_rt.backends.base import Backend
    from dflash_rt.bundle.folder import Bundle

__all__ = ["FUSED", "NO_GRAPH", "BackendSpec"]

FUSED, NO_GRAPH = ":fused", ":no-graph"


@dataclass(frozen=True)
class BackendSpec:
    """``graph`` false: steps are enqueued operation by operation, for what can't be captured.

    ``fused`` runs the bundle's fused target.
    """

    name: str
    graph: bool = True
    fused: bool = False

    @classmethod
    def parse(cls, text: str) -> BackendSpec:
        """Read one. Raises BackendUnavailableError for a name that isn't registered."""
        rest = text.removesuffix(NO_GRAPH)
        name = rest.removesuffix(FUSED)
        if name not in BACKEND_NAMES:
            raise BackendUnavailableError(
                "unknown backend",
                found=repr(text),
                expected=f"one of {', '.join(BACKEND_NAMES)}, with or without {FUSED} and then {NO_GRAPH}",
                remedy="check the spelling",
            )
        return cls(name, graph=rest == text, fused=name != rest)

    def __str__(self) -> str:
        return self.name + (FUSED if self.fused else "") + ("" if self.graph else NO_GRAPH)

    def open(self, bundle: Bundle) -> Backend:
        """Load it. Raises what :func:`dflash_rt.backends.create_backend` does."""
        options: dict[str, Any] = {} if self.graph else {"cuda_graph": False}
        if self.fused:
            options["fused"] = True
        return create_backend(self.name, bundle, options=options)
