"""Tensors by name in files: what their headers say, and then their values.

Weights come from safetensors: a pickled checkpoint can run code when it is read, so it is refused unless the caller
allows it, and nothing falls back from one format to the other.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longvid.errors import ModelError
from longvid.models.checkpoints.files import PICKLES
from longvid.models.checkpoints.messages import one_line, reading, shown

__all__ = ["Checkpoint", "open_file", "open_pickle", "open_safetensors", "without_wrappers"]

_NESTED = ("state_dict", "model_state", "model", "module")
"names under which trainers put the weights of a model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is known of tensors in files before a value is read.

    ``dtypes`` are torch dtypes, or the names that safetensors has for them. A name has no ``_orig_mod``.
    """

    where: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Any]
    read: Callable[[str], Tensor]


def without_wrappers(names: list[str], where: Any) -> dict[str, str]:
    """Names as they were before ``torch.compile``, each with its name now; ModelError if two become the same."""
    plain: dict[str, str] = {}
    for name in names:
        before = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if before in plain:
            raise ModelError(f"{where} holds both {shown(plain[before])} and {shown(name)}, which are the same weight")
        plain[before] = name
    return plain


@contextmanager
def open_file(path: Path, *, allow_pickle: bool) -> Iterator[Checkpoint]:
    """The tensors of one file, in the format of its suffix."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file")
    if suffix in (".safetensors", ".sft"):
        with open_safetensors([path], path) as checkpoint:
            yield checkpoint
    elif suffix in PICKLES:
        yield open_pickle(path, allow=allow_pickle)
    else:
        what = (
            "pass the folder that holds it" if suffix == ".json" else f"weights are .safetensors, {', '.join(PICKLES)}"
        )
        raise ModelError(f"{path} is a file without weights that longvid can read; {what}")


@contextmanager
def open_safetensors(files: list[Path], where: Path) -> Iterator[Checkpoint]:
    """The tensors of all ``files``.

    safetensors itself checks that a header fits its file and that no two tensors overlap.
    """
    with ExitStack() as opened:
        holders: dict[str, Any] = {}
        for file in files:
            with reading(file, " as safetensors"):
                handle = opened.enter_context(safe_open(file, framework="pt"))
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    if name in holders:
                        raise ModelError(f"{shown(name)} is in two files of {where}")
                    holders[name] = handle
        plain = without_wrappers(list(holders), where)
        with reading(where, " as safetensors"):
            headers = {name: holders[theirs].get_slice(theirs) for name, theirs in plain.items()}
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            dtypes = {name: header.get_dtype() for name, header in headers.items()}

        def read(name: str) -> Tensor:
            with reading(where, " as safetensors"):
                tensor: Tensor = holders[plain[name]].get_tensor(plain[name])
                return tensor

        yield Checkpoint(where=where, shapes=shapes, dtypes=dtypes, read=read)


def open_pickle(file: Path, *, allow: bool) -> Checkpoint:
    """The tensors of a pickled checkpoint, if the caller allows it.

    PyTorch's restricted unpickler reads it. Compressed archives are refused as zip bombs.
    """
    if not allow:
        raise ModelError(
            f"{file} holds pickled weights ({file.name}), which can run code when read and are refused; convert "
            "them to safetensors, or accept this file with allow_pickle_weights=True (--allow-pickle-weights)"
        )
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                packed = [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise ModelError(f"{file} is compressed inside ({shown(packed[0])}); torch.save writes no such file")
        content = _unwrapped(torch.load(file, map_location="cpu", weights_only=True, mmap=zipped), file)
    except ModelError:
        raise
    except pickle.UnpicklingError as exc:
        raise ModelError(f"{file} holds more than tensors and was not read: {one_line(exc)}") from exc
    except Exception as exc:  # a damaged or hostile pickle can raise anything
        raise ModelError(f"{file} cannot be read as a checkpoint: {one_line(exc)}") from exc
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        for k, t in content.items()
    ):
        raise ModelError(f"{file} is not a state dict: tensors by name were expected")
    tensors = {name: content[theirs] for name, theirs in without_wrappers(list(content), file).items()}
    return Checkpoint(
        where=file,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read=lambda name: tensors[name].detach().contiguous(),
    )


def _unwrapped(content: Any, file: Path) -> Any:
    """The weights in what a trainer saved; ModelError if it saved those of several models."""
    for _ in range(3):
        nested = [name for name in _NESTED if isinstance(content, dict) and isinstance(content.get(name), dict)]
        if not nested:
            return content
        inner = content[nested[0]]
        same = [shown(k) for k, v in content.items() if isinstance(v, dict) and v.keys() & inner.keys()]
        if len(same) > 1:
            raise ModelError(f"{file} holds several sets of the same weights ({', '.join(same[:5])}); save one of them")
        content = inner
    return content
