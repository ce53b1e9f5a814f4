"""Write safetensors one tensor at a time, so that no second copy of a model is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from milo_latent.convert.mapping import convert_dtype
from milo_latent.files import write_atomically

DTYPES = {  # as the format names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, completely or not at all.

    The library's own `save_file` needs all tensors in memory, in the file's dtype and contiguous; this needs one.

    Args:
        path: the file.
        tensors: tensors by name.
        dtype: of the floating-point tensors in the file; None keeps theirs.

    Raises:
        OSError: if the disk is full; nothing is left behind.

    Source: the safetensors format: length of the header (8 bytes, little endian), header in JSON, values.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        start, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # values begin aligned

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in tensors.values():
                values = convert_dtype(tensor.detach(), dtype).contiguous()
                values.reshape(-1).view(torch.uint8).numpy().tofile(file)

    write_atomically(path, write)
