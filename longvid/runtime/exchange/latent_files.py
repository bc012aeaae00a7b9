"""Reads latents from files of other programs: safetensors, npy, and what ``torch.save`` wrote.

A file may come from anyone. Nothing in it is run: pickled objects are refused in npy files, and PyTorch's restricted
unpickler, which builds tensors only, reads the others.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from longvid.errors import SourceError
from longvid.files import LATENT_SUFFIXES

__all__ = ["read_latents"]

_USUAL_NAMES = ("latents", "latent", "latent_tensor", "samples", "encoded_video")
"what programs call the latents in a file with several tensors; musubi-tuner adds the size: ``latents_21x60x104_bf16``"


def read_latents(path: Path, tensor: str | None = None) -> Any:
    """The latents in a file, a numpy array or a tensor on the CPU.

    Args:
        path: a ``.safetensors``, ``.npy``, ``.pt`` or ``.pth`` file.
        tensor: the name of the tensor, in a file with several ones; None for the only one, or for the only one with a
            usual name such as ``latents``.

    Raises:
        SourceError: kind ``"missing"``, ``"refused"`` for pickled objects, ``"damaged"``, or ``"layout"`` if it is not
            known which tensor is meant.
    """
    if not path.is_file():
        raise SourceError(f"there is no file of latents {path}", kind="missing")
    if path.suffix not in LATENT_SUFFIXES:
        raise SourceError(f"{path} is not a file of latents; names end in {', '.join(LATENT_SUFFIXES)}", kind="layout")
    if path.suffix == ".npy" and tensor is not None:
        raise SourceError(f"{path} holds one array without a name; {tensor!r} was asked for", kind="layout")
    try:
        if path.suffix == ".safetensors":
            return _from_safetensors(path, tensor).clone()  # of a mapped file, which others may change
        if path.suffix == ".npy":
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # mapped: a header may claim any size
        return _from_pickle(path, tensor).clone()
    except SourceError:
        raise
    except pickle.UnpicklingError as exc:
        raise SourceError(
            f"{path} holds more than tensors, which could run code, and was not read; save the tensor alone, or as "
            f"safetensors ({_one_line(exc)})",
            kind="refused",
        ) from exc
    except Exception as exc:  # a damaged or hostile file can raise anything
        if path.suffix == ".npy" and any(word in str(exc) for word in ("allow_pickle", "Python objects")):
            raise SourceError(
                f"{path} holds pickled objects, which could run code, and was not read", kind="refused"
            ) from exc
        raise SourceError(f"{path} cannot be read as latents: {_one_line(exc)}", kind="damaged") from exc


def _from_safetensors(path: Path, tensor: str | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(_chosen(list(file.keys()), tensor, path))
        return found


def _from_pickle(path: Path, tensor: str | None) -> Tensor:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise SourceError(f"{path} is compressed inside; torch.save writes no such file", kind="refused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on protocols of pickle that the restricted unpickler may not know
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if isinstance(content, (list, tuple)) and len(content) == 1:
        content = content[0]
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        content = tensors[_chosen(list(tensors), tensor, path)]
    if not isinstance(content, Tensor):
        raise SourceError(f"{path} holds a {type(content).__name__}; a tensor is expected", kind="layout")
    return content


def _chosen(names: list[str], tensor: str | None, path: Path) -> str:
    usual = [name for name in names if name in _USUAL_NAMES or name.startswith("latents_")]
    fitting = [tensor] if tensor is not None else names if len(names) == 1 else usual
    if len(fitting) == 1 and fitting[0] in names:
        return fitting[0]
    shown = ", ".join(ascii(name)[1:-1][:60] for name in sorted(names)[:8]) or "none"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    missing = "" if tensor is None else f"no tensor {tensor!r}: "
    raise SourceError(
        f"{path} holds {missing}{len(names)} tensors ({shown}{more}); name that of the latents with tensor= (--tensor)",
        kind="layout",
    )


def _one_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
