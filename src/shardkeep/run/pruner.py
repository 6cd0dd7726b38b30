"""Deletes what no policy keeps, once something newer is durable."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection

from shardkeep.engine.save_queue import Job, Line
from shardkeep.run.policies import KeepPolicy, doomed
from shardkeep.run.removal import clear, remove
from shardkeep.run.steps import Steps
from shardkeep.stores.contract import Store
from shardkeep.types import Step

__all__ = ["Pruner"]


class Pruner:
    """Keeps the steps of a run few. Only one rank may: the coordinator.

    Args:
        steps: those of the run.
        policy: what stays; None keeps all of them.
    """

    def __init__(self, steps: Steps, policy: KeepPolicy | None) -> None:
        self._steps, self._policy = steps, policy
        self._line = Line()
        self._changed = threading.Condition()
        self._removing: int | None = None
        self._busy: int | None = None
        self._touched: set[int] = set()
        """Steps that have been begun since the list of those to delete was made."""

    def begin(self, step: int) -> None:
        """A step is about to be written: it is left alone until `end`.

        Waits if it is being removed just now.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._removing != step)
            self._busy = step
            self._touched.add(step)

    def end(self) -> None:
        """It is written, or will not be."""
        self._busy = None

    def later(self, saved: int, spared: Collection[int]) -> None:
        """As `prune`, on a thread; what fails there is a warning."""
        saved_whole = {saved}  # Its commit has looked at it: no need to do so again.

        def work() -> None:
            try:
                self._prune(saved_whole, spared)
            except Exception as error:
                warnings.warn(f"{self._steps.root.url}: old steps stay: {error}", stacklevel=2)

        if self._policy is not None:
            self._line.put(Job(work, owed=False, path=self._steps.root.url))

    def finish(self) -> None:
        """Wait until all is deleted that was asked for."""
        self._line.finish()

    def prune(self, spared: Collection[int]) -> tuple[int, ...]:
        """Delete what no policy keeps; never the newest step that is whole.

        A step whose metrics can't be read now stays, with a warning.

        Args:
            spared: steps that could not be restored. Policies do not see them, and they stay: what
                was wrong with them may be looked into, or be over by then.

        Returns:
            The steps that are gone.

        Raises:
            OSError: a step could not be deleted; the others that should be are gone.
        """
        newest_first = (n for n in reversed(self._steps.numbers()) if n not in spared)
        whole = next((n for n in newest_first if self._steps.why_not_whole(n) is None), None)
        return () if whole is None else self._prune({whole}, spared)

    def _prune(self, whole: Collection[int], spared: Collection[int]) -> tuple[int, ...]:
        if self._policy is None:
            return ()
        with self._changed:
            self._touched = set() if self._busy is None else {self._busy}
        known, unread = self._known(spared)
        folders = self._steps.folders(links=False)
        gone, failed = [], []
        for number in doomed(known, self._policy, whole):
            try:
                if number in folders and self._alone(number, remove, folders[number]):
                    gone.append(number)
            except OSError as error:  # as it may fail each time, it must not keep the others
                failed.append(error)
        for number in folders.keys() - {step.number for step in known} - {*spared, *unread}:
            self._alone(number, clear, folders[number])
        if failed:
            raise failed[0]
        return tuple(gone)

    def _known(self, spared: Collection[int]) -> tuple[list[Step], set[int]]:
        """The steps that policies see, with their metrics; and those that can't be read now.

        What a policy does not see can only make it keep more of the others.
        """
        known, unread = [], set()
        for number in self._steps.numbers():
            if number in spared:
                continue
            try:
                known.append(Step(number, self._steps.metrics(number)))
            except OSError as error:
                unread.add(number)
                what = f"step {number} stays, as it can't be read: {error}"
                warnings.warn(f"{self._steps.root.url}: {what}", stacklevel=4)
        return known, unread

    def _alone(
        self, number: int, act: Callable[[Store, str], bool | None], folder: str
    ) -> bool | None:
        """Remove something of a step, unless it is being written or was, since it was listed."""
        with self._changed:
            if number in self._touched:
                return False
            self._removing = number
        try:
            return act(self._steps.root, folder)
        finally:
            with self._changed:
                self._removing = None
                self._changed.notify_all()
