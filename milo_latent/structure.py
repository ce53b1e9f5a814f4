"""Structure of files that come from outside, checked before a library takes them at their word."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from milo_latent.checks import check_file, shortened

DTYPES = {  # as the safetensors format names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_JSON = 16 * 2**20  # bytes; the largest of real models, tables of their shards, have below one million
MAX_DEPTH, MAX_NUMBER, MAX_LIST, MAX_TEXT = 8, 1e6, 10_000, 1000  # of what a configuration holds
REPEATED = re.compile("layers|blocks|levels|depth")  # in the names of settings that say how often a part is repeated
ANY_REPEATS = 64  # are allowed whatever the weights hold
# settings by which diffusers or transformers fetch code, or choose classes of other libraries to unpack weights
CODE_SETTINGS = frozenset({"auto_map", "attn_implementation", "_attn_implementation", "quantization_config"})
Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def refusing_damage(expected: str) -> Iterator[None]:
    """Turn what a library raises at damaged content into a ValueError that begins with `expected`.

    Decoders raise errors of every kind at content that they were not written for, so none is named here. The block is
    to hold the library's call alone. A lack of memory and missing files keep their own errors.
    """
    try:
        yield
    except (MemoryError, FileNotFoundError):
        raise
    except Exception as error:
        raise ValueError(f"{expected}: {shortened(error) or type(error).__name__}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, or holds anything but an object.
    """
    check_file(path, "a JSON file")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"Expected at most {MAX_JSON} bytes of JSON in {path}, got {path.stat().st_size}.")
    with refusing_damage(f"Expected JSON in {path}"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}.")
    return content


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file as `safe_open` does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds dtypes that PyTorch does not have.
    """
    with refusing_damage(f"Expected a complete safetensors file, got {path}"):
        file = safe_open(path, framework="pt")
    with file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            kind = file.get_slice(name).get_dtype()
            if kind not in DTYPES.values():
                raise ValueError(f"Expected dtypes of {', '.join(DTYPES.values())} in {path}, got {kind}.")
        yield file


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, by name; the errors are those of `open_safetensors`."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check_no_code(folder: Path) -> None:
    for path in folder.glob("*"):
        if path.suffix.lower() == ".py":
            raise ValueError(
                f"Expected a model without code, got {path}. Nothing of it was run. Remove it if the model needs none."
            )
    for path in folder.glob("*config.json"):
        found = CODE_SETTINGS & _names(path)
        if found:
            raise ValueError(f"Expected a model without code, got the settings {sorted(found)} in {path}. Remove them.")


def _names(path: Path) -> set[str]:
    """Return the names in the object in a JSON file, at any depth."""
    read_json(path)  # refuses anything but an object
    names: set[str] = set()
    text = path.read_text(encoding="utf-8")
    json.loads(text, object_pairs_hook=lambda pairs: names.update(name for name, _ in pairs))
    return names


def open_network(network: type[Network], folder: Path) -> Network:
    """Open a network of diffusers from its folder, in float32: nothing in it runs, and weights are safetensors.

    Args:
        network: its class, which the folder must name.
        folder: with `config.json`.

    Raises:
        FileNotFoundError: if there is no configuration.
        ValueError: if the folder is of another class, holds code, is damaged, or lacks weights.
    """
    check_model_folder(folder)
    name = read_json(folder / "config.json").get("_class_name")
    if name != network.__name__:
        raise ValueError(f"Expected a network of the class {network.__name__} in {folder}, got {shortened(name)}.")
    with refusing_damage(f"Expected the weights of {network.__name__} in {folder}"):
        found, info = network.from_pretrained(  # type: ignore[attr-defined]
            folder, output_loading_info=True, torch_dtype=torch.float32, use_safetensors=True
        )
    if info["missing_keys"]:
        raise ValueError(f"Expected every weight in {folder}, missing: {', '.join(info['missing_keys'][:4])}.")
    return found


def check_model_folder(folder: Path) -> None:
    """Check that the folder of a model is whole and holds no code, before diffusers or transformers open it.

    A configuration may ask for no more repetitions of a part than there are tensors in the weights, since each has one
    at least; what it asks for beyond that would only take time and memory.

    Raises:
        FileNotFoundError: if a shard of the weights is missing.
        ValueError: if a file is damaged, the configuration asks for what the weights cannot fill, there are no weights
            in safetensors, or the folder holds Python files or settings that would run code.
    """
    _check_no_code(folder)
    tensors: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_safetensors(path) as file:
            tensors[path.name] = set(file.keys())
    if not tensors and (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        raise ValueError(f"Expected weights in safetensors in {folder}, got none. Other files of weights can run code.")
    for path in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(path, tensors)
    for path in sorted(folder.glob("*config.json")):
        if path.name in ("config.json", "scheduler_config.json"):
            _check_configuration(path, most=max(ANY_REPEATS, sum(map(len, tensors.values()))) if tensors else MAX_LIST)


def _check_index(path: Path, tensors: dict[str, set[str]]) -> None:
    """Check a table that says which shard holds which tensor."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"Expected a `weight_map` from tensors to files in {path}, got {shortened(shards)}.")
    for name, file in shards.items():
        if file not in tensors if isinstance(file, str) else True:
            raise ValueError(f"Expected the shards that {path} names, found no {shortened(file)} beside it.")
        if name not in tensors[file]:
            raise ValueError(f"Expected the tensor {shortened(name)} in {path.parent / file}, as {path.name} says.")


def _check_configuration(path: Path, *, most: int) -> None:
    """Check that the values of a configuration are small and that it repeats parts at most `most` times."""
    repeats = 1.0
    for name, value in read_json(path).items():
        numbers = list(_numbers({name: value}, path))
        length = len(value) if isinstance(value, list) else 1
        if max(map(abs, numbers), default=0) > MAX_NUMBER:
            given = f"{shortened(value)} as {name}"
            raise ValueError(f"Expected numbers of at most {MAX_NUMBER:g} in {path}, got {given}.")
        repeats *= max(*numbers, length, 1) if REPEATED.search(name) else 1
        if max(length, repeats) > most:
            asked = f"{max(length, repeats):g} with {name}"
            raise ValueError(f"Expected at most {most} layers in {path}, which its weights can fill, got {asked}.")


def _numbers(value: Any, path: Path, depth: int = 0) -> Iterator[float]:
    """Yield the numbers in a value of a configuration, NaN as infinity; refuse long texts and deep lists."""
    if depth > MAX_DEPTH or (isinstance(value, str) and len(value) > MAX_TEXT):
        raise ValueError(f"Expected at most {MAX_DEPTH} levels of lists and {MAX_TEXT} characters in {path}, got more.")
    if isinstance(value, list | dict):
        for each in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _numbers(each, path, depth + 1)
    elif isinstance(value, int | float):
        yield math.inf if value != value else value
