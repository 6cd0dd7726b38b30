"""A session that is entered on one thread and used on another one.

The ranks of a run agree on a save on the thread of the caller. The save itself, which may run in
the background, continues in the same session: entering a second one would cost as many messages as
the agreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from types import TracebackType

from shardkeep.coordination.contract import Ranks, Session, StopAgreement
from shardkeep.coordination.events import EventSender

__all__ = ["EnteredRanks"]


class EnteredRanks(Ranks):
    """Ranks that have entered a session, and continue in it when they begin the next work.

    A context manager. On exit it leaves the session, unless work has begun in it: then the session
    ends with that work.

    Args:
        ranks: the ranks that take part.
        work: the work of the session; see `Ranks.session`.
        path: the path that the ranks meet at.
        events: receives the events of the session; None logs them.
    """

    def __init__(
        self, ranks: Ranks, work: str, path: str, *, events: EventSender | None = None
    ) -> None:
        self._ranks = ranks
        self.entered = ranks.session(work, path, events=events)
        """The session itself, for messages before the work begins."""
        self._lock = Lock()
        self._handed_over = self._left = False

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def size(self) -> int:
        return self._ranks.size

    def session(self, work: str, path: str, *, events: EventSender | None = None) -> Session:
        """Return the session that was entered, which names `path` in errors from now on.

        Its events go on to the sender that it was entered with.

        Raises:
            RuntimeError: the session has been left, or is in use.
        """
        with self._lock:
            if self._left or self._handed_over:
                raise RuntimeError(f"the session of the {work} of {path} has ended before it began")
            self._handed_over = True
        self.entered.set_path(path)
        return _Continued(self.entered)

    def stop_agreement(self, path: str) -> StopAgreement | None:
        return self._ranks.stop_agreement(path)

    def __enter__(self) -> EnteredRanks:
        self.entered.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._handed_over or self._left:
                return
            self._left = True
        self.entered.__exit__(kind, error, trace)

    def fail(self, error: BaseException) -> None:
        """Leave the session with an error, which the other ranks raise, unless work has begun."""
        self.__exit__(type(error), error, error.__traceback__)


class _Continued(Session):
    """A session that is entered already: `with` only leaves it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> Session:
        return self._session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.__exit__(kind, error, trace)

    @property
    def rank(self) -> int:
        return self._session.rank

    @property
    def size(self) -> int:
        return self._session.size

    def ranks_on_this_host(self) -> int:
        return self._session.ranks_on_this_host()

    def phase(self, name: str) -> None:
        self._session.phase(name)

    def set_path(self, path: str) -> None:
        self._session.set_path(path)

    def check(self) -> None:
        self._session.check()

    def host(self, rank: int) -> str:
        return self._session.host(rank)

    def gather(self, message: bytes) -> list[bytes] | None:
        return self._session.gather(message)

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        return self._session.scatter(messages)

    def broadcast(self, message: bytes | None) -> bytes:
        return self._session.broadcast(message)

    def conclude(self) -> None:
        self._session.conclude()
