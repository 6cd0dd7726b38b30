"""How the ranks of one save or load coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

from shardkeep.coordination.events import EventSender

__all__ = ["Ranks", "Session", "StopAgreement"]


class Session(Protocol):
    """A save or load that all ranks take part in. Rank 0 is the coordinator.

    A context manager: ranks use it inside a `with` block. Every rank makes the same calls in the
    same order. If one rank raises an exception inside the block, all others raise `RankFailed` from
    their current or next call.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def phase(self, name: str) -> None:
        """Name the phase that this rank is in from now on, for errors. Waits for no other rank."""
        ...

    def set_path(self, path: str) -> None:
        """Name this path in errors from now on: for ranks that agree on the path in the session."""
        ...

    def check(self) -> None:
        """Raise `RankFailed` if another rank is known to have failed.

        Call it at intervals during long work between two messages. It costs next to nothing, and
        waits for no other rank.
        """
        ...

    def host(self, rank: int) -> str:
        """Return the name of the host that a rank of this session runs on."""
        ...

    def ranks_on_this_host(self) -> int:
        """Return how many ranks of this session, this one included, run on this rank's host.

        Costs no message of its own, but waits until all ranks have entered the session. Call it
        inside the `with` block, on any rank, as often as needed.
        """
        ...

    def gather(self, message: bytes) -> list[bytes] | None:
        """Return every rank's message, in rank order, on the coordinator; None on other ranks."""
        ...

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        """Return the coordinator's message for this rank. Other ranks pass None."""
        ...

    def broadcast(self, message: bytes | None) -> bytes:
        """Return the coordinator's message for all ranks. Other ranks pass None."""
        ...

    def conclude(self) -> None:
        """Declare that the last messages of the work were a gather and then a broadcast.

        Every rank calls this right after them, and then leaves the session. Leaving costs no
        further exchange, as all ranks are known to have come this far. If a rank raises an
        exception after this call, the other ranks do not raise it.
        """
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Report an exception to the other ranks; without one, leave once all ranks are here."""
        ...


@runtime_checkable
class Ranks(Protocol):
    """The ranks that take part. `rank` counts from 0 among them.

    Example:
        >>> shardkeep.save(state, "run/step_100", ranks=[0, 1])  # of a job of four ranks
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def session(self, work: str, path: str, *, events: EventSender | None = None) -> Session:
        """Return a new session of all ranks, which is entered by `with`.

        A rank enters its sessions of the same work and path one after another. It may enter the
        next one before the last one has ended, in another thread.

        Args:
            work: what the ranks do, such as "save" or "load".
            path: the path that they do it to.
            events: receives the events of the session: `WaitingForRanks`, if this rank waits for
                others for long. None logs them.
        """
        ...

    def stop_agreement(self, path: str) -> StopAgreement | None:
        """Return an agreement of all ranks on a step to stop at, None if they cannot have one."""
        ...


class StopAgreement(Protocol):
    """Ranks that go from step to step agree on one at which all of them stop."""

    def request(self) -> None:
        """Request a stop, on any rank. Only sets a flag, so it is safe in a signal handler."""
        ...

    def stops_at(self, step: int) -> bool:
        """Return whether all ranks stop at this step.

        Every rank calls it at the same steps; at one step, it may do so several times. It waits
        only after a request, for answers of the other ranks' threads, not for their training.

        Raises:
            RankFailed: a rank does not answer.
        """
        ...

    def close(self) -> None:
        """Leave: from now on, the ranks cannot agree on a step."""
        ...
