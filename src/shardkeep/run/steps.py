"""The committed steps of a run. They are always looked up in the storage, never remembered."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.metrics import metrics_in
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.format.manifest.read import read_header
from shardkeep.run.policies import Mode, by_metric
from shardkeep.run.step_names import StepNames
from shardkeep.stores import open_store
from shardkeep.stores.contract import Store
from shardkeep.stores.folders import list_folders, subfolder
from shardkeep.types import Step

__all__ = ["Steps"]


class Steps:
    """The committed steps of a run.

    Args:
        root: the folder that contains the step folders, or a store.
        names: the names of the step folders.
    """

    def __init__(self, root: str | PathLike[str] | Store, names: StepNames | None = None) -> None:
        self.root = open_store(root)
        self.names = names or StepNames()
        self._metrics: dict[tuple[int, str], Mapping[str, float]] = {}

    def folders(self, *, links: bool = True) -> dict[int, str]:
        """Return step -> folder name of all step folders, committed or not, in ascending order.

        Args:
            links: include folders that are links to other places.
        """
        found = list_folders(self.root, links=links)
        steps = {step: name for name in found if (step := self.names.step(name)) is not None}
        return dict(sorted(steps.items()))

    def numbers(self) -> list[int]:
        """Return the committed steps in ascending order. Their data is not checked."""
        return [step for step in self.folders() if _committed(self.store(step))]

    def latest(self) -> int | None:
        """Return the newest committed step, or None if there is none."""
        return max(self.numbers(), default=None)

    def all(self) -> list[Step]:
        """Return the committed steps with their metrics, in ascending order."""
        return [Step(number, self.metrics(number)) for number in self.numbers()]

    def best(self, metric: str, mode: Mode = "min") -> int | None:
        """Return the step with the best value of a metric, or None if no step has the metric.

        Args:
            metric: the name of the metric.
            mode: "min" if lower values are better, "max" if higher values are. Of several steps
                with the same value, the newest is the best.
        """
        found = by_metric(self.all(), metric, mode)
        return found[0].number if found else None

    def metrics(self, step: int) -> Mapping[str, float]:
        """Return the metrics of a step; empty if stock torch saved it or its manifest is broken.

        Raises:
            OSError: they cannot be read now. Whoever deletes steps must not take this for a step
                without metrics.
        """
        store = self.store(step)
        try:
            found = commit.find(store)
            if found.trailer is None:
                return {}
            key = step, found.trailer.save_id
            if key not in self._metrics:
                header = read_header(
                    lambda offset, length: store.get_range(found.file, offset, length),
                    found.trailer.manifest_length,
                    file=found.file,
                    save_id=found.trailer.save_id,
                )
                self._metrics[key] = metrics_in(header)
        except (ShardkeepError, FileNotFoundError):
            return {}
        return self._metrics[key]

    def store(self, step: int) -> Store:
        """Return the folder of a step, which may not exist."""
        return subfolder(self.root, self.names.name(step))

    def why_not_whole(self, step: int) -> str | None:
        """Return what is missing of a committed step by the sizes of its files, or None.

        Bytes that changed in place are not found by this: `verify` reads them all.
        """
        return why_not_whole(self.store(step))


def _committed(store: Store) -> bool:
    try:
        return commit.exists(store, commit.METADATA)
    except OSError:
        return True  # It exists, but cannot be read: restoring it raises the reason.


def why_not_whole(store: Store) -> str | None:
    """Return what is missing of a checkpoint by the sizes of its files, or None."""
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
            size = store.head(file).size
        except OSError as error:
            return f"{file}: {error.strerror or error}"
        if size < end:
            return f"{file} has {size} bytes, but the checkpoint needs {end} bytes of it"
    return None
