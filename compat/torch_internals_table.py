"""The reason for each private name of torch that is used, and the effect of its absence."""

from __future__ import annotations

_DCP = "torch.distributed.checkpoint"
_SHARD = "torch.distributed._shard"
_PLANNER = f"{_DCP}.default_planner.DefaultSavePlanner"
_WRITER = f"{_DCP}.filesystem._FileSystemWriter"
_QUANTIZED = f"{_DCP}.quantized_hf_storage.QuantizedHuggingFaceStorageReader"

_OVERRIDDEN = "a subclass of the user's own may override it; then the engine must not bypass it"
_IGNORED = "an override in a subclass would be ignored"
_FSDP1 = "`load_sharded_optimizer_state_dict` fails"
_CACHING = "`enable_plan_caching=True` returns wrong or stale plans"

TABLE: dict[str, tuple[str, str]] = {
    # What a rank holds.
    "torch._neg_view": (
        "restores the negative bit of a tensor in an object",
        "tensors that were saved as a lazy negative are read with the wrong sign bit",
    ),
    "torch._utils._rebuild_qtensor": (
        "builds quantized tensors; there is no public constructor for all kinds",
        "quantized tensors can't be loaded",
    ),
    "torch._subclasses.fake_tensor": (
        "recognises fake tensors, which have no data",
        "a fake tensor is not refused by its name",
    ),
    "torch.distributed._functional_collectives": (
        "recognises `AsyncCollectiveTensor`, whose data may still be in transfer",
        "such a tensor is not waited for",
    ),
    f"{_SHARD}.sharded_tensor": (
        "recognises `ShardedTensor` (FSDP1)",
        "a ShardedTensor is not recognised as sharded",
    ),
    "torch.distributed._tensor": (
        "the home of `DTensor` in releases up to 2.4",
        "a DTensor of those releases is not recognised as sharded",
    ),
    # The job.
    "torch.distributed.distributed_c10d._get_default_store": (
        "the job's store in releases without `get_group_store`",
        "distributed jobs fail on those releases",
    ),
    "torch.distributed.distributed_c10d._get_default_group": (
        "the group of a ShardedTensor that is created without one",
        _FSDP1,
    ),
    "torch.distributed.distributed_c10d._get_pg_default_device": (
        "the device on which the group's backend sends and receives",
        "`BroadcastingTorchSaveReader` and `load_sharded_optimizer_state_dict` fail in a job",
    ),
    # The optimizer of FSDP1.
    "torch._utils._get_device_module": (
        "the module of a device type (`torch.cuda`, ...)",
        _FSDP1,
    ),
    f"{_SHARD}.sharded_tensor.api.ShardedTensor": ("the type that FSDP1 expects", _FSDP1),
    f"{_SHARD}.sharded_tensor.api.ShardedTensor._init_from_local_shards_and_global_metadata": (
        "creates a ShardedTensor without a collective",
        _FSDP1,
    ),
    f"{_SHARD}.sharded_tensor.shard.Shard": ("part of a ShardedTensor", _FSDP1),
    f"{_SHARD}.sharding_spec.ChunkShardingSpec": ("part of a ShardedTensor", _FSDP1),
    "torch.distributed.fsdp._shard_utils._create_chunk_sharded_tensor": (
        "creates a ShardedTensor with the layout of FSDP1",
        _FSDP1,
    ),
    f"{_DCP}.optimizer._ReaderWithOffset": (
        "the planner for models with tensor parallelism",
        _FSDP1,
    ),
    f"{_DCP}.optimizer._create_colwise_spec": ("the layout over the data-parallel group", _FSDP1),
    f"{_DCP}.optimizer._get_state_dict_2d_layout": (
        "each rank's slice of a parameter with tensor parallelism",
        _FSDP1,
    ),
    f"{_DCP}._nested_dict.unflatten_state_dict": ("nests the loaded state again", _FSDP1),
    # Metadata.
    f"{_SHARD}.sharded_tensor.metadata.TensorProperties": (
        "the class of tensor properties in checkpoints of early releases",
        "their metadata can't be read as torch's classes",
    ),
    f"{_DCP}.filesystem._StorageInfo": (
        "the class of locations in `.metadata`, by which torch reads them",
        "the metadata that planners and readers are given can't be built",
    ),
    f"{_DCP}._hf_utils._HFStorageInfo": (
        "the class of locations in the metadata of a Hugging Face folder",
        "an equal class of Shardkeep's is used; readers of the user's own may not accept it",
    ),
    f"{_DCP}._hf_utils._gen_file_name": (
        "provided under its name, as other packages import it",
        "nothing breaks: Shardkeep has its own",
    ),
    # Planners and storage of the user's own.
    f"{_DCP}._nested_dict.flatten_state_dict": (
        "the flat names that planners of the user's own see",
        "the names of `DefaultLoadPlanner.state_dict` would have to be computed anew",
    ),
    f"{_DCP}._sharded_tensor_utils._flatten_sharded_tensors": (
        "the option `flatten_sharded_tensors` of load planners",
        "nested ShardedTensors can't be loaded through a planner",
    ),
    f"{_DCP}._traverse.set_element": (
        "fills an empty state by paths, as torch does",
        "loading through a planner without a template fails",
    ),
    f"{_DCP}.planner_helpers._create_chunk_list": (
        "the chunks of a tensor of any kind",
        "`DynamicMetaLoadPlanner` fails",
    ),
    f"{_DCP}.planner_helpers._init_state_dict": (
        "allocates a tensor of any kind that is on the meta device",
        "templates on the meta device can't be filled in a distributed job",
    ),
    f"{_PLANNER}._cached_plans_key": ("finds the plans that were kept", _CACHING),
    f"{_DCP}.planner.SavePlanner._cached_all_plans": ("checks the plans that were kept", _CACHING),
    f"{_DCP}.planner.SavePlanner._cached_save_plan": ("checks the plan that was kept", _CACHING),
    f"{_PLANNER}._create_global_plan": (_OVERRIDDEN, _IGNORED),
    f"{_PLANNER}._create_global_plan_with_caching": (
        f"overridden: it would combine plans of different jobs; {_OVERRIDDEN}",
        _CACHING,
    ),
    f"{_PLANNER}._dedup_save_plans": (
        f"overridden: balances replicas by the bytes of their shards; {_OVERRIDDEN}",
        "replicas are balanced by the sizes of whole tensors",
    ),
    f"{_PLANNER}._finish_plan_with_caching": (
        f"overridden: the writer's part of a kept plan is out of date; {_OVERRIDDEN}",
        _CACHING,
    ),
    f"{_WRITER}._get_metadata_path": (
        f"where the commit record is; {_OVERRIDDEN}",
        "Shardkeep's own takes its place; early releases have none",
    ),
    f"{_WRITER}._metadata_exists": (_OVERRIDDEN, _IGNORED),
    f"{_WRITER}._write_data": (_OVERRIDDEN, _IGNORED),
    f"{_DCP}.filesystem.FileSystemReader._slice_file": (_OVERRIDDEN, _IGNORED),
    f"{_DCP}.filesystem._StoragePrefix": (
        "the base class of what a plan says of file names, which writers of the user's own read",
        "plans can't tell the ranks what their files are called",
    ),
    f"{_DCP}.filesystem._StorageReaderTransforms": (
        "tells torch's own stream extensions from the user's",
        "checkpoints with streams are read item by item",
    ),
    f"{_DCP}.filesystem._StorageWriterTransforms": (
        "tells torch's own stream extensions from the user's",
        "every save with a writer goes through its plans",
    ),
    f"{_DCP}.hf_storage.HuggingFaceStorageReader._process_read_request": (_OVERRIDDEN, _IGNORED),
    f"{_QUANTIZED}._build_weight_scale_mapping": (_OVERRIDDEN, _IGNORED),
    f"{_QUANTIZED}._is_tensor_quantized": (_OVERRIDDEN, _IGNORED),
    f"{_QUANTIZED}._tensor_full_shapes": ("an attribute that subclasses read", _IGNORED),
    f"{_QUANTIZED}._weight_map": ("an attribute that subclasses read", _IGNORED),
    f"{_QUANTIZED}._weight_scale_mapping": ("an attribute that subclasses read", _IGNORED),
    # Public functions.
    f"{_DCP}.logger._dcp_method_logger": (
        "logs calls to torch's own logger, which monitoring reads",
        "the drop-in can't be imported",
    ),
    f"{_DCP}.utils._api_bc_check": (
        "accepts storage as a positional argument, as torch does",
        "the drop-in can't be imported",
    ),
}
"""Full name -> the reason for its use, and the effect of its absence."""

OTHER_RELEASES: dict[str, str] = {
    f"{_DCP}._fsspec_filesystem._FileSystem": "the class of fsspec file systems where it is not "
    "called `FileSystem`",
}
"""Names that are missing in the release that this table is checked with."""
