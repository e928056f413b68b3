"""One request at a time uses a generator's backend."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from dflash_rt.errors import GeneratorStateError

__all__ = ["RequestLock"]


class _Closable(Protocol):
    def close(self) -> None: ...


class RequestLock:
    """A lock held by a request, not by a thread: a stream may end in another thread than it began in.

    Requests of other threads wait, in no promised order. A second request of the same thread would wait for
    itself, so it is refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._ended = False
        # The thread that advanced the running request last. Only compared with the current thread.
        self._thread: threading.Thread | None = None
        # Weak: a stream dropped without close() must be collected, which releases the lock.
        self._request: weakref.ref[_Closable] | None = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def require_open(self) -> None:
        """Raise GeneratorStateError after :meth:`close`."""
        if self._closed:
            raise GeneratorStateError(
                "the generator is closed",
                found="a request after close()",
                expected="requests before it",
                remedy="make a new Generator, or keep this one open for longer",
            )

    def take(self, request: _Closable) -> None:
        """Wait until ``request`` may run. Call :meth:`release` later, from any thread.

        Raises:
            GeneratorStateError: the generator is closed, or this thread has another request under way.
        """
        self.require_open()
        if self._held_by_this_thread():
            raise GeneratorStateError(
                "this thread has an open stream on this generator",
                found="another request before the end of the stream",
                expected="one request at a time: this one would wait for itself",
                remedy="finish the stream, leave its loop, or call its close() first",
            )
        self._lock.acquire()
        self._thread, self._request = threading.current_thread(), weakref.ref(request)
        if self._closed:  # while waiting
            self.release()
            self.require_open()

    def advance(self) -> None:
        """Record that the current thread drives the running request."""
        self._thread = threading.current_thread()

    def release(self) -> None:
        """Let the next request run."""
        self._thread = self._request = None
        self._lock.release()

    def close(self, end: Callable[[], None]) -> None:
        """Refuse new requests, wait for the running one, and call ``end`` once.

        Closes an open stream of this thread; waits for the end of another thread's.

        Raises:
            GeneratorStateError: called from inside a step of this thread's own request.
        """
        if self._held_by_this_thread():
            request = self._request() if self._request is not None else None
            if request is not None:
                request.close()
            if self._held_by_this_thread():
                raise GeneratorStateError(
                    "the generator was closed from inside one of its own steps",
                    found="close() called by a function that the backend called",
                    expected="close() called between two steps",
                    remedy="close the stream there, and the generator after it",
                )
        self._closed = True
        with self._lock:
            if not self._ended:
                self._ended = True
                end()

    def _held_by_this_thread(self) -> bool:
        return self._thread is threading.current_thread()
