"""SharedLock: many clean or cut-only runs at once, or one hooked section alone.

Hooks are module state: while any hook is open, a clean run in another thread would come back hooked. So a hooked
section takes the lock alone, every other run shares it. Re-entrant per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lab.errors import RunError


class SharedLock:
    """Readers-writer lock; a waiting writer holds back new readers."""

    def __init__(self) -> None:
        self._cond = threading.Condition()
        self._readers: dict[int, int] = {}
        self._owner: int | None = None
        self._depth = 0
        self._waiting = 0
        self._claims = 0

    @property
    def claimed(self) -> bool:
        """Whether this thread holds the lock for code that changes modules in its own way (nnsight, captum)."""
        return self._claims > 0 and self._owner == threading.get_ident()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock beside other shared holders."""
        me = threading.get_ident()
        with self._cond:
            self._cond.wait_for(lambda: self._may_share(me))
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._cond:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._cond.notify_all()

    @contextmanager
    def alone(self, claim: bool = False) -> Iterator[None]:
        """Hold the lock with nobody beside. Raises RunError if this thread is in the middle of a shared run.

        claim  say so in `claimed` meanwhile
        """
        me = threading.get_ident()
        with self._cond:
            if self._owner != me and me in self._readers:
                raise RunError(
                    "hooks cannot be opened in the middle of a run; open them before the run starts"
                )
            self._waiting += 1
            try:
                self._cond.wait_for(lambda: self._owner in (None, me) and not self._others(me))
            finally:
                self._waiting -= 1
            self._owner = me
            self._depth += 1
            self._claims += claim
        try:
            yield
        finally:
            with self._cond:
                self._depth -= 1
                self._claims -= claim
                if not self._depth:
                    self._owner = None
                self._cond.notify_all()

    def _may_share(self, me: int) -> bool:
        if self._owner == me or me in self._readers:
            return True
        return self._owner is None and not self._waiting

    def _others(self, me: int) -> bool:
        return any(reader != me for reader in self._readers)
