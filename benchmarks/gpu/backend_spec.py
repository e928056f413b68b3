"""A backend as the suite's command line names it: a registry name, or that with ``:no-graph`` behind it."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_rt import Bundle
from dflash_rt.backends import BACKEND_NAMES, create_backend
from dflash_rt.backends.base import Backend
from dflash_rt.errors import BackendUnavailableError

__all__ = ["NO_GRAPH", "BackendSpec"]

NO_GRAPH = ":no-graph"


@dataclass(frozen=True)
class BackendSpec:
    """``graph`` false: steps are enqueued operation by operation, for what can't be captured."""

    name: str
    graph: bool = True

    @classmethod
    def parse(cls, text: str) -> BackendSpec:
        """Read one. Raises BackendUnavailableError for a name that isn't registered."""
        name = text.removesuffix(NO_GRAPH)
        if name not in BACKEND_NAMES:
            raise BackendUnavailableError(
                "unknown backend",
                found=repr(text),
                expected=f"one of {', '.join(BACKEND_NAMES)}, with or without {NO_GRAPH}",
                todo="check the spelling",
            )
        return cls(name, name == text)

    def __str__(self) -> str:
        return self.name + ("" if self.graph else NO_GRAPH)

    def open(self, bundle: Bundle) -> Backend:
        """Load it. Raises what :func:`dflash_rt.backends.create_backend` does."""
        return create_backend(self.name, bundle, options=None if self.graph else {"cuda_graph": False})
