"""Whether a planner, a reader or a writer customises anything; if not, the engine works alone."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint.default_planner as stock_planner
import torch.distributed.checkpoint.filesystem as stock_files

from shardkeep.dcp import default_planner, filesystem

__all__ = ["engine_loads", "engine_saves"]

# Methods that a subclass may override, and so change what is saved or loaded.

_SAVE_PLANNER = """
    set_up_planner create_local_plan create_global_plan finish_plan resolve_data lookup_object
    transform_object _create_global_plan _dedup_save_plans _create_global_plan_with_caching
    _finish_plan_with_caching
""".split()
_LOAD_PLANNER = """
    set_up_planner create_local_plan create_global_plan finish_plan load_bytes resolve_bytes
    resolve_tensor commit_tensor lookup_tensor transform_tensor
""".split()
_WRITER = """
    set_up_storage_writer prepare_local_plan prepare_global_plan write_data _write_data finish
    storage_meta _get_metadata_path _metadata_exists
""".split()
_READER = """
    set_up_storage_reader prepare_local_plan prepare_global_plan read_data read_metadata _slice_file
    _get_metadata_path
""".split()


def engine_saves(planner: Any, writer: Any) -> bool:
    """Return whether the engine alone saves the same as this planner and this writer would."""
    return (
        _is_unchanged(writer, (filesystem.FileSystemWriter, stock_files.FileSystemWriter), _WRITER)
        and _writes_plain_items(writer)
        and writer.single_file_per_rank
        and _is_unchanged(
            planner,
            (default_planner.DefaultSavePlanner, stock_planner.DefaultSavePlanner),
            _SAVE_PLANNER,
        )
    )


def engine_loads(planner: Any, reader: Any) -> bool:
    """Return whether the engine alone loads the same as this planner and this reader would."""
    return (
        _is_unchanged(reader, (filesystem.FileSystemReader, stock_files.FileSystemReader), _READER)
        and _reads_known_streams(reader)
        and _is_unchanged(
            planner,
            (default_planner.DefaultLoadPlanner, stock_planner.DefaultLoadPlanner),
            _LOAD_PLANNER,
        )
    )


def _writes_plain_items(writer: Any) -> bool:
    """Return whether items are written without transforms, in torch's own format.

    Writers of older releases have no attributes that say otherwise.
    """
    transforms = getattr(writer, "transforms", None)
    form = getattr(writer, "serialization_format", None)
    return (
        transforms is None
        or (type(transforms) is stock_files._StorageWriterTransforms and not transforms.extensions)
    ) and (form is None or form is stock_files.SerializationFormat.TORCH_SAVE)


def _reads_known_streams(reader: Any) -> bool:
    """Return whether items are read with no extensions but torch's own, which the engine knows."""
    transforms = getattr(reader, "transforms", None)
    if transforms is None:
        return True
    stock = stock_files._StorageReaderTransforms
    registry = transforms.extension_registry if type(transforms) is stock else None
    own = type(stock().extension_registry)
    return type(registry) is own and registry.extensions == own().extensions


def _is_unchanged(given: Any, kinds: tuple[type[Any], ...], methods: list[str]) -> bool:
    """Return whether `given` is an instance of one of these classes with its own methods.

    Args:
        given: a planner, reader or writer; None stands for the default one.
        kinds: Shardkeep's class and torch's.
        methods: names of the methods that have to be those of one of the classes.
    """
    if given is None:
        return True
    if not isinstance(given, kinds):
        return False
    replaced = vars(given).keys()
    return all(
        name not in replaced
        and any(getattr(type(given), name, None) is getattr(kind, name, None) for kind in kinds)
        for name in methods
    )
