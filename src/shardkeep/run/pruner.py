"""Deletion of the steps that the keep policy does not include, once a newer one is durable."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection

from shardkeep.coordination.events import EventSender, StepRemoved
from shardkeep.engine.save_queue import SaveQueue
from shardkeep.run.policies import KeepPolicy, steps_to_delete
from shardkeep.run.removal import clear, remove
from shardkeep.run.steps import Steps
from shardkeep.stores.contract import Store
from shardkeep.types import Step

__all__ = ["Pruner"]


class Pruner:
    """Deletes old steps of a run. Only one rank may do this: the coordinator.

    Args:
        steps: the steps of the run.
        policy: which steps to keep; None keeps all of them.
        events: receives a `StepRemoved` for each deleted step; None only logs it.
    """

    def __init__(
        self, steps: Steps, policy: KeepPolicy | None, events: EventSender | None = None
    ) -> None:
        self._steps, self._policy = steps, policy
        self._events = events or EventSender(None, path=steps.root.url, rank=0)
        self._queue = SaveQueue()
        self._changed = threading.Condition()
        self._removing: int | None = None
        self._saving: int | None = None
        self._began: set[int] = set()
        """Steps whose save has begun since the list of steps to delete was made."""

    def begin(self, step: int) -> None:
        """Protect a step that is about to be written, until `end` is called.

        Waits if the step is being deleted at the moment.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._removing != step)
            self._saving = step
            self._began.add(step)

    def end(self) -> None:
        """End the protection: the step is written, or its save has failed."""
        self._saving = None

    def prune_later(self, saved: int, unreadable: Collection[int]) -> None:
        """Delete old steps on another thread. An error is a warning.

        Args:
            saved: the step that has just been committed.
            unreadable: steps that stay; see `prune`.
        """
        newest_whole = {saved}  # Its commit has checked it, so it is not checked again.

        def work() -> None:
            try:
                self._prune(newest_whole, unreadable)
            except Exception as error:
                warnings.warn(f"{self._steps.root.url}: old steps stay: {error}", stacklevel=2)

        if self._policy is not None:
            self._queue.submit(work, self._steps.root.url, report_failure=False)

    def finish(self) -> None:
        """Wait until everything that was to be deleted is gone."""
        self._queue.wait()

    def prune(self, unreadable: Collection[int]) -> tuple[int, ...]:
        """Delete the steps that the policy does not include, but never the newest whole one.

        A step whose metrics cannot be read now stays, with a warning.

        Args:
            unreadable: steps that could not be restored. They stay, and the policy does not see
                them: somebody may want to find out what is wrong, or it may pass.

        Returns:
            The deleted steps.

        Raises:
            OSError: a step could not be deleted. All others that had to be deleted are gone.
        """
        newest_first = (n for n in reversed(self._steps.numbers()) if n not in unreadable)
        whole = next((n for n in newest_first if self._steps.why_not_whole(n) is None), None)
        return () if whole is None else self._prune({whole}, unreadable)

    def _prune(self, newest_whole: Collection[int], unreadable: Collection[int]) -> tuple[int, ...]:
        if self._policy is None:
            return ()
        with self._changed:
            self._began = set() if self._saving is None else {self._saving}
        readable, without_metrics = self._with_metrics(unreadable)
        folders = self._steps.folders(links=False)
        deleted, errors = [], []
        for number in steps_to_delete(readable, self._policy, newest_whole):
            try:
                if number in folders and self._unless_saving(number, remove, folders[number]):
                    deleted.append(number)
                    self._events(StepRemoved(path=self._steps.store(number).url, step=number))
            except OSError as error:  # It may fail each time, so it must not stop the others.
                errors.append(error)
        committed = {step.number for step in readable} | {*unreadable, *without_metrics}
        for number in folders.keys() - committed:
            self._unless_saving(number, clear, folders[number])
        if errors:
            raise errors[0]
        return tuple(deleted)

    def _with_metrics(self, unreadable: Collection[int]) -> tuple[list[Step], set[int]]:
        """Return the steps that policies see, and those whose metrics cannot be read now.

        If a policy does not see a step, it can only keep more of the others.
        """
        readable, failed = [], set()
        for number in self._steps.numbers():
            if number in unreadable:
                continue
            try:
                readable.append(Step(number, self._steps.metrics(number)))
            except OSError as error:
                failed.add(number)
                message = f"step {number} stays, as it cannot be read: {error}"
                warnings.warn(f"{self._steps.root.url}: {message}", stacklevel=4)
        return readable, failed

    def _unless_saving(
        self, number: int, act: Callable[[Store, str], bool | None], folder: str
    ) -> bool | None:
        """Remove files of a step, unless its save has begun since the steps were listed."""
        with self._changed:
            if number in self._began:
                return False
            self._removing = number
        try:
            return act(self._steps.root, folder)
        finally:
            with self._changed:
                self._removing = None
                self._changed.notify_all()
