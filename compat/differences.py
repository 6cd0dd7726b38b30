"""What is better than torch's, what takes other parameters, and what is missing, by name.

Names are those of the places in `shardkeep.dcp` where the objects are defined. An entry that no
public name needs is an error.
"""

from __future__ import annotations

BETTER: dict[str, str] = {
    # The two lives.
    "state_dict_saver.save": "an overwritten checkpoint stays whole until the new one is; one "
    "rank's error is raised on all ranks; no collective is called",
    "state_dict_saver.save_state_dict": "as `save`",
    "state_dict_saver.async_save": "objects are copied as well as tensors; no process group for "
    "the CPU is needed; saves to one path follow each other",
    "state_dict_loader.load": "what Shardkeep wrote is checked; only the bytes that are needed are "
    "read; nothing is executed; all that does not match is in one message; casts are told",
    "state_dict_loader.load_state_dict": "as `load`",
    # Planners.
    "default_planner.DefaultSavePlanner": "replicas are balanced by the bytes of their shards",
    "default_planner.DefaultSavePlanner.transform_object": "names the object that can't be pickled",
    "default_planner.DefaultLoadPlanner": "integer keys and objects that are not flattened come "
    "back",
    "default_planner.DefaultLoadPlanner.load_bytes": "builds only objects of classes that are "
    "known to be safe, or trusted",
    # Storage.
    "filesystem.FileSystemWriter": "files have names that were never used before, a manifest has "
    "checksums of all bytes",
    "filesystem.FileSystemWriter.write_data": "a thread's failure is raised; all files are synced",
    "filesystem.FileSystemWriter.finish": "commits by one replace, then removes what it replaced",
    "filesystem.FileSystemReader": "reads only the bytes that are needed, and checks them",
    "filesystem.FileSystemReader.read_metadata": "unpickles nothing",
    "filesystem.FileSystemReader.read_data": "reads what an item needs of its chunk, not all of it",
    "fsspec_filesystem.FsspecWriter": "as `FileSystemWriter`",
    "fsspec_filesystem.FsspecReader": "as `FileSystemReader`",
    "hf_storage.HuggingFaceStorageWriter": "files appear when they are complete, the index last; "
    "two shards of one tensor in one file are both kept",
    "hf_storage.HuggingFaceStorageReader": "reads only the bytes that are needed",
    "quantized_hf_storage.QuantizedHuggingFaceStorageReader": "reads only the blocks that are "
    "needed",
    "_consolidate_hf_safetensors.consolidate_safetensors_files": "integers, booleans and float8 "
    "too; no tensor needs to fit into memory",
    "_consolidate_hf_safetensors.consolidate_safetensors_files_on_every_rank": "the files are "
    "shared out evenly; no collective is called",
    # Between formats.
    "format_utils.dcp_to_torch_save": "what Shardkeep wrote is checked; the file appears when it "
    "is complete; integer keys come back",
    "format_utils.torch_save_to_dcp": "nothing in the file is executed",
    "format_utils.BroadcastingTorchSaveReader": "what is wrong is raised on all ranks before "
    "anything is sent",
    "optimizer.load_sharded_optimizer_state_dict": "reads only the bytes that each rank needs",
}
"""One short sentence each."""

EXPLAINED: dict[str, str] = {
    "fsspec_filesystem.FsspecWriter": "takes what torch's takes in the installed release "
    "(`cache_staged_state_dict` since 2.15)",
}
"""Why a signature differs from that of some release."""

MISSING: dict[str, str] = {}
"""Why it is missing: by module and name."""
