"""What is committed below the root of a run. Always looked up, never noted down."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.metrics import metrics_in
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.format.manifest.read import read_header
from shardkeep.run.policies import Mode, best_first
from shardkeep.run.step_names import StepNames
from shardkeep.stores import store_at
from shardkeep.stores.contract import Store
from shardkeep.stores.folders import below, folders_of
from shardkeep.types import Step

__all__ = ["Steps"]


class Steps:
    """The committed steps of a run.

    Args:
        root: the folder that the folders of the steps are in, or a store.
        names: how those are called.
    """

    def __init__(self, root: str | PathLike[str] | Store, names: StepNames | None = None) -> None:
        self.root = store_at(root)
        self.names = names or StepNames()
        self._metrics: dict[tuple[int, str], Mapping[str, float]] = {}

    def folders(self, *, links: bool = True) -> dict[int, str]:
        """Step -> its folder, of all that have exactly a step's name, ascending; committed or not.

        Args:
            links: those, too, that lie elsewhere and have a link here.
        """
        found = folders_of(self.root, links=links)
        steps = {step: name for name in found if (step := self.names.step(name)) is not None}
        return dict(sorted(steps.items()))

    def numbers(self) -> list[int]:
        """The committed steps, ascending. Whether their bytes are whole, reading them tells."""
        return [step for step in self.folders() if _committed(self.store(step))]

    def latest(self) -> int | None:
        """The newest committed step; None if there is none."""
        return max(self.numbers(), default=None)

    def all(self) -> list[Step]:
        """The committed steps with their metrics, ascending."""
        return [Step(number, self.metrics(number)) for number in self.numbers()]

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """The step with the best value of a metric, of equal ones the later; None without any.

        Args:
            mode: "min" if less is better, or "max".
        """
        found = best_first(self.all(), metric, mode)
        return found[0].number if found else None

    def metrics(self, step: int) -> Mapping[str, float]:
        """What was saved with a step; nothing if that is broken, or stock torch saved it.

        Raises:
            OSError: it can't be read now: who deletes must not take it for a step without any.
        """
        store = self.store(step)
        try:
            found = commit.find(store)
            if found.trailer is None:
                return {}
            key = step, found.trailer.save_id
            if key not in self._metrics:
                header = read_header(
                    lambda offset, length: store.read(found.file, offset, length),
                    found.trailer.manifest_length,
                    file=found.file,
                    save_id=found.trailer.save_id,
                )
                self._metrics[key] = metrics_in(header)
        except (ShardkeepError, FileNotFoundError):
            return {}
        return self._metrics[key]

    def store(self, step: int) -> Store:
        """The folder of a step, which may not exist."""
        return below(self.root, self.names.name(step))

    def why_not_whole(self, step: int) -> str | None:
        """What is missing of a committed step, as far as sizes of files tell; None if nothing is.

        Bytes that changed in place are not found by this: `verify` reads them all.
        """
        return why_not_whole(self.store(step))


def _committed(store: Store) -> bool:
    try:
        return commit.exists(store, commit.METADATA)
    except OSError:
        return True  # Something is there that can't be looked at. Who restores it is told so.


def why_not_whole(store: Store) -> str | None:
    """As `Steps.why_not_whole`, of one checkpoint."""
    try:
        index = commit.find(store).index()
    except NotACheckpoint:
        return "it is not committed"
    except (ShardkeepError, OSError) as error:
        return str(error)
    chunks, objects = index.chunks, index.objects
    ends = [0] * len(index.files)
    for table in (chunks, objects):
        for file, end in zip(
            table.file.tolist(), (table.item + table.length).tolist(), strict=True
        ):
            ends[file] = max(ends[file], end)
    for file, end in zip(index.files, ends, strict=True):
        try:
            size = store.size(file)
        except OSError as error:
            return f"{file}: {error.strerror or error}"
        if size < end:
            return f"{file} has {size} bytes, and not the {end} that belong there"
    return None
