"""Hugging Face checkpoints with block-quantized weights, dequantized while they are read."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from shardkeep.dcp.bridge.safetensors import SafetensorsFile, target_of
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.hf_storage import HuggingFaceStorageReader
from shardkeep.errors import FormatError

__all__ = ["QuantizedHuggingFaceStorageReader"]

__getattr__ = forward_to_torch("quantized_hf_storage")

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the lower three bits of a 4-bit float (E2M1); the fourth bit is the sign."""

_BIAS = 127
"""The bias of the exponents that mxfp4 stores as scales, which are powers of two."""

_VALUES_PER_STEP = 1 << 22
"""Values that are dequantized at a time; temporary arrays take a few words for each."""

_SCALE_ENDINGS = ((".weight_scale_inv", ".weight"), ("_scales", "_blocks"))


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Reads quantized weights and dequantizes them; other tensors are read as they are.

    Two formats are recognised by the names of tensors. float8: `x.weight`, with a scale for each
    square block in `x.weight_scale_inv`. mxfp4: `x_blocks` of shape [..., G, B], whose bytes hold
    two 4-bit floats each, with the exponents of the G groups in `x_scales` of shape [..., G]; it is
    loaded as a tensor of shape [..., G * B * 2].

    Args:
        path: a folder, or a URL that fsspec supports.
        thread_count: the minimum number of threads that read, and the number of files whose tensors
            are dequantized at the same time.
        target_dtype: the dtype of dequantized tensors.
        block_size: the number of rows, and of columns, of a block of `x.weight`.

    Example:
        >>> reader = dcp.QuantizedHuggingFaceStorageReader("DeepSeek-V3")
        >>> dcp.load(state, storage_reader=reader)
    """

    def __init__(
        self,
        path: str,
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
    ) -> None:
        super().__init__(path=path, thread_count=thread_count)
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._tensor_full_shapes: dict[str, torch.Size] = {}
        self._weight_scale_mapping: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}

    def read_metadata(self) -> Metadata:
        """Return the metadata of the tensors, with shape and dtype after dequantization.

        Raises:
            NotACheckpoint: the folder has no safetensors file.
            FormatError: a file is malformed, files contradict each other, a quantized tensor is
                sharded, or its scales do not fit its shape.
        """
        metadata = super().read_metadata()
        places: Any = metadata.storage_data
        entries: Any = metadata.state_dict_metadata
        self._build_weight_scale_mapping(
            {index.fqn: PurePath(info.relative_path).name for index, info in places.items()}
        )
        self._tensor_full_shapes = {name: entry.size for name, entry in entries.items()}
        for name, scale in self._weight_scale_mapping.items():
            entry = entries[name]
            self._check(name, entry, scale, entries[scale])
            entry.properties.dtype = self.target_dtype
            if name.endswith("_blocks"):
                *outer, groups, nbytes = entry.size
                entry.size = torch.Size([*outer, groups * nbytes * 2])
                begin = torch.Size([0] * len(entry.size))
                entry.chunks = [ChunkStorageMetadata(begin, entry.size)]
                info = places.pop(MetadataIndex(name, torch.Size([0] * (len(outer) + 2))))
                places[MetadataIndex(name, begin)] = info
                self._tensor_full_shapes[name + "_quantized"] = self._tensor_full_shapes[name]
                self._tensor_full_shapes[name] = entry.size
        return metadata

    def _build_weight_scale_mapping(self, weight_map: dict[str, str]) -> None:
        """Find the scales of the quantized tensors by their names."""
        self._weight_map = weight_map
        self._weight_scale_mapping = {
            weight: scale
            for scale in weight_map
            for ending, quantized in _SCALE_ENDINGS
            if scale.endswith(ending)
            and (weight := scale.removesuffix(ending) + quantized) in weight_map
        }

    def _check(self, name: str, entry: Any, scale: str, scales: Any) -> None:
        """Refuse a tensor that would be dequantized wrongly."""
        shape = tuple(entry.size)
        for part, held in ((name, entry), (scale, scales)):
            if len(held.chunks) != 1:
                what = f"{part!r} is sharded into {len(held.chunks)} parts"
                raise FormatError(f"{what}; quantized tensors must be in one piece")
        if name.endswith("_blocks"):
            needed = shape[:-1]
            what = "one for each group"
            kind = entry.properties.dtype == scales.properties.dtype == torch.uint8
        else:
            needed = tuple(-(-size // self.block_size) for size in shape)
            what = f"one for each block of {self.block_size} x {self.block_size}"
            kind = len(shape) == 2
        if not kind or len(shape) < 2:
            raise FormatError(
                f"{name!r}: {entry.properties.dtype}{list(shape)} is not a known quantized format"
            )
        if tuple(scales.size) != needed:
            raise FormatError(
                f"{name!r} has the shape {list(shape)}: its scales should be {list(needed)}, "
                f"{what}, but {scale!r} is {list(scales.size)}"
            )

    def _is_tensor_quantized(self, tensor_fqn: str) -> bool:
        return tensor_fqn in self._weight_scale_mapping

    def _reads_alone(self, item: ReadItem) -> bool:
        default = QuantizedHuggingFaceStorageReader._process_read_request
        quantized = self._is_tensor_quantized(item.storage_index.fqn)
        return quantized or type(self)._process_read_request is not default

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Read one item from an open file that has the methods of safetensors' `safe_open`."""
        name = req.storage_index.fqn
        if not self._is_tensor_quantized(name):
            super()._process_read_request(f, req, planner)
            return
        target = target_of(req, planner)
        begin = list(req.storage_offsets)[: len(req.lengths)]
        if name.endswith("_blocks"):
            self._read_groups(f, name, begin, list(req.lengths), target)
        else:
            self._read_blocks(f, name, begin, list(req.lengths), target)
        planner.commit_tensor(req, target)

    def _scales(self, f: Any, name: str, read: Callable[[Any, str], torch.Tensor]) -> torch.Tensor:
        """Return what `read` reads from the file that has the scales of a tensor."""
        scale = self._weight_scale_mapping[name]
        file = self._weight_map.get(scale)
        if file is None:
            raise FormatError(f"{name!r}: no file has its scales, {scale!r}")
        if file == self._weight_map.get(name):
            return read(f, scale)
        if isinstance(f, SafetensorsFile):
            return read(SafetensorsFile(self._store(), file), scale)
        from safetensors import safe_open  # As the caller opened the other file.

        with safe_open(self.fs.concat_path(self.path, file), framework="pt") as opened:
            return read(opened, scale)

    def _read_blocks(
        self, f: Any, name: str, begin: list[int], sizes: list[int], target: torch.Tensor
    ) -> None:
        """Read a part of a matrix that has a scale for each of its square blocks."""
        if not target.numel():
            return
        scales = self._scales(f, name, lambda file, scale: file.get_tensor(scale))
        (top, left), (height, width), edge = begin, sizes, self.block_size
        weight = f.get_slice(name)[slice(top, top + height), slice(left, left + width)]
        columns = torch.arange(left, left + width) // edge
        rows = torch.arange(top, top + height) // edge
        step = max(1, _VALUES_PER_STEP // width)
        for row in range(0, height, step):
            band = slice(row, row + step)
            scale = scales[rows[band]].to(torch.float32)[:, columns]
            values = weight[band].to(torch.float32).mul_(scale)
            target[band].copy_(values.to(self.target_dtype))

    def _read_groups(
        self, f: Any, name: str, begin: list[int], sizes: list[int], target: torch.Tensor
    ) -> None:
        """Read a part of a tensor of 4-bit floats, scaled in groups along the last dimension."""
        if not target.numel():
            return
        each = 2 * self._tensor_full_shapes[name + "_quantized"][-1]
        outer = tuple(slice(b, b + n) for b, n in zip(begin[:-1], sizes[:-1], strict=True))
        first, end = begin[-1] // each, -(-(begin[-1] + sizes[-1]) // each)
        groups = (*outer, slice(first, end))
        inside = (*groups, slice(None))
        blocks = f.get_slice(name)[inside]
        scales = self._scales(f, name, lambda file, scale: file.get_slice(scale)[groups])
        skipped = begin[-1] - first * each
        rows = prod(sizes[:-1])
        flat = blocks.reshape(rows, end - first, each // 2)
        exponents = scales.reshape(rows, end - first).to(torch.int32) - _BIAS
        step = max(1, _VALUES_PER_STEP // ((end - first) * each))
        made = torch.empty(rows, sizes[-1], dtype=self.target_dtype)
        for row in range(0, rows, step):
            values = _from_e2m1(flat[row : row + step])
            torch.ldexp(values, exponents[row : row + step, :, None], out=values)
            whole = values.reshape(len(values), -1)
            made[row : row + step] = whole[:, skipped : skipped + sizes[-1]]
        target.copy_(made.reshape(sizes))


def _from_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return two floats for each byte along the last dimension, that of the lower bits first."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return table[pairs.flatten(-2).to(torch.int32)]
