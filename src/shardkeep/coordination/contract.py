"""How the ranks of one save or load coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

__all__ = ["Ranks", "Session", "StopAgreement"]


class Session(Protocol):
    """One save or load that all ranks take part in. Rank 0 is the coordinator.

    Every call is made by every rank, in the same order. If any rank raises inside the session, all
    others raise `RankFailed` from their next or current call.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def phase(self, name: str) -> None:
        """From now on, errors say that they happened in this phase. Waits for nobody."""
        ...

    def set_path(self, path: str) -> None:
        """Name this path in errors from now on: for ranks that agree on the path in the session."""
        ...

    def check(self) -> None:
        """Raise `RankFailed` if another rank is known to have failed.

        For long work between two calls: it costs next to nothing, and waits for nobody.
        """
        ...

    def host(self, rank: int) -> str:
        """The name of the host that a rank of this session runs on."""
        ...

    def ranks_on_this_host(self) -> int:
        """The number of ranks of this session, this one included, that run on this rank's host.

        Costs no message of its own, but waits until all ranks have entered the session. Call it
        inside the `with` block, on any rank, as often as needed.
        """
        ...

    def gather(self, message: bytes) -> list[bytes] | None:
        """Every rank's message, in rank order, on the coordinator; None elsewhere."""
        ...

    def scatter(self, messages: Sequence[bytes] | None) -> bytes:
        """The message that the coordinator has for this rank (None elsewhere than there)."""
        ...

    def broadcast(self, message: bytes | None) -> bytes:
        """The coordinator's message, everywhere (None elsewhere than there)."""
        ...

    def conclude(self) -> None:
        """Say that the work has ended with a gather and a broadcast that were the last messages.

        Every rank calls this right after them, and then leaves the session. Leaving costs no
        further exchange, as all ranks are known to have come this far. An error of a rank between
        this call and the end of the session is not raised on the others.
        """
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the others of an error; without one, leave when all ranks have come this far."""
        ...


@runtime_checkable
class Ranks(Protocol):
    """Who takes part. `rank` counts from 0 among those who do."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def session(self, work: str, path: str) -> Session:
        """Begin `work` ("save" or "load") on `path` with all the others.

        A rank enters its sessions of the same work and path one after another. It may enter the
        next one before the last one has ended, in another thread.
        """
        ...

    def meeting(self, path: str) -> StopAgreement | None:
        """A meeting of all ranks, about `path`; None where they have no way to agree on a step."""
        ...


class StopAgreement(Protocol):
    """Ranks that go from step to step agree on one at which all of them stop."""

    def request(self) -> None:
        """Ask for it, on any rank. Does no more than set a flag: safe in a signal handler."""
        ...

    def at(self, step: int) -> bool:
        """Whether this is the step; every rank asks at the same steps, again and again if it likes.

        Waits only once someone has asked, for the others' answers, not for their training.

        Raises:
            RankFailed: a rank does not answer.
        """
        ...

    def close(self) -> None:
        """Leave: no step can be agreed on any more."""
        ...
