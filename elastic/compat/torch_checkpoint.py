"""Private names of `torch.distributed.checkpoint`, whose import takes a fifth of a second. Read in torch 2.13."""

from __future__ import annotations

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

__all__ = ["PICKLED", "StorageInfo"]

#: Private names that the pickle in `.metadata` may use besides public classes, by module: the place of each chunk
#: (`StorageInfo`: relative_path, offset, length in bytes), and functions that pickle `TensorProperties`.
PICKLED = {
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}
