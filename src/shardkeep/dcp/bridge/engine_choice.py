"""Whether a planner, reader or writer changes anything: if not, the engine works alone."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint.default_planner as stock_planner
import torch.distributed.checkpoint.filesystem as stock_files

from shardkeep.dcp import default_planner, filesystem

__all__ = ["plain_load", "plain_save"]

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


def plain_save(planner: Any, writer: Any) -> bool:
    """Whether a save with these is one that the engine does alone, with the same outcome."""
    return (
        _same(writer, (filesystem.FileSystemWriter, stock_files.FileSystemWriter), _WRITER)
        and _plain_bytes(writer)
        and writer.single_file_per_rank
        and _same(
            planner,
            (default_planner.DefaultSavePlanner, stock_planner.DefaultSavePlanner),
            _SAVE_PLANNER,
        )
    )


def plain_load(planner: Any, reader: Any) -> bool:
    """Whether a load with these is one that the engine does alone, with the same outcome."""
    return (
        _same(reader, (filesystem.FileSystemReader, stock_files.FileSystemReader), _READER)
        and _plain_streams(reader)
        and _same(
            planner,
            (default_planner.DefaultLoadPlanner, stock_planner.DefaultLoadPlanner),
            _LOAD_PLANNER,
        )
    )


def _plain_bytes(writer: Any) -> bool:
    """Whether items are written as they are. Older releases have no other way."""
    transforms = getattr(writer, "transforms", None)
    form = getattr(writer, "serialization_format", None)
    return (
        transforms is None
        or (type(transforms) is stock_files._StorageWriterTransforms and not transforms.extensions)
    ) and (form is None or form is stock_files.SerializationFormat.TORCH_SAVE)


def _plain_streams(reader: Any) -> bool:
    """Whether items are read with torch's own extensions only, which the engine reads as well."""
    transforms = getattr(reader, "transforms", None)
    if transforms is None:
        return True
    stock = stock_files._StorageReaderTransforms
    registry = transforms.extension_registry if type(transforms) is stock else None
    own = type(stock().extension_registry)
    return type(registry) is own and registry.extensions == own().extensions


def _same(given: Any, kinds: tuple[type[Any], ...], methods: list[str]) -> bool:
    """Whether `given` behaves like one of these: an instance, with none of its methods replaced."""
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
