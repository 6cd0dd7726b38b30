"""Names that improve on torch's, that have other parameters, or that are missing.

Keys are the places in `shardkeep.dcp` where the objects are defined. An entry that no public name
needs is an error.
"""

from __future__ import annotations

BETTER: dict[str, str] = {
    # Functions.
    "state_dict_saver.save": "a checkpoint that is replaced can be loaded until the new one is "
    "durable; an error on one rank is raised on all ranks; no collective is called",
    "state_dict_saver.save_state_dict": "like `save`",
    "state_dict_saver.async_save": "copies objects as well as tensors; needs no process group for "
    "the CPU; saves to the same path run one after another",
    "state_dict_loader.load": "reads only the bytes that are needed, and checks them; executes "
    "nothing; lists all mismatches in one message; warns of casts",
    "state_dict_loader.load_state_dict": "like `load`",
    # Planners.
    "default_planner.DefaultSavePlanner": "balances replicas by the bytes of their shards",
    "default_planner.DefaultSavePlanner.transform_object": "names an object that can't be pickled",
    "default_planner.DefaultLoadPlanner": "restores integer keys, and objects that were not "
    "flattened",
    "default_planner.DefaultLoadPlanner.load_bytes": "builds only objects of classes that are "
    "safe or trusted",
    # Storage.
    "filesystem.FileSystemWriter": "file names are never used again; a manifest has checksums of "
    "all bytes",
    "filesystem.FileSystemWriter.write_data": "raises errors of its threads; syncs all files",
    "filesystem.FileSystemWriter.finish": "commits in one atomic step, then removes the files that "
    "were replaced",
    "filesystem.FileSystemReader": "reads only the bytes that are needed, and checks them",
    "filesystem.FileSystemReader.read_metadata": "executes nothing",
    "filesystem.FileSystemReader.read_data": "reads only the part of a chunk that an item needs",
    "fsspec_filesystem.FsspecWriter": "like `FileSystemWriter`",
    "fsspec_filesystem.FsspecReader": "like `FileSystemReader`",
    "hf_storage.HuggingFaceStorageWriter": "files appear when they are complete, the index last; "
    "keeps both of two shards of a tensor in one file",
    "hf_storage.HuggingFaceStorageReader": "reads only the bytes that are needed",
    "quantized_hf_storage.QuantizedHuggingFaceStorageReader": "reads only the blocks that are "
    "needed",
    "_consolidate_hf_safetensors.consolidate_safetensors_files": "supports integers, booleans and "
    "float8; tensors need not fit into memory",
    "_consolidate_hf_safetensors.consolidate_safetensors_files_on_every_rank": "balances the files "
    "over the ranks; no collective is called",
    # Conversion.
    "format_utils.dcp_to_torch_save": "checks what Shardkeep wrote; the file appears when it is "
    "complete; restores integer keys",
    "format_utils.torch_save_to_dcp": "executes nothing",
    "format_utils.BroadcastingTorchSaveReader": "raises errors on all ranks before anything is "
    "sent",
    "optimizer.load_sharded_optimizer_state_dict": "reads only the bytes that each rank needs",
}
"""Name -> its improvement in a few words."""

EXPLAINED: dict[str, str] = {
    "fsspec_filesystem.FsspecWriter": "has the parameters of torch's class in the installed "
    "release (`cache_staged_state_dict` since 2.15)",
}
"""Name -> why its signature differs from that of a release."""

MISSING: dict[str, str] = {}
"""(module, name) -> why the name is missing."""
