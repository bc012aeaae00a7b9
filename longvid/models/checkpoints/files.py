"""Files of a model's folder: its config, and which of its files are the weights.

No file outside the folder is read. Of several weights the one with the usual name is taken; between others nobody but
the user can choose, so they are listed in an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from longvid.errors import ModelError
from longvid.models.checkpoints.messages import listing, reading, shown

__all__ = ["PICKLES", "WEIGHTS", "has_config", "inside", "pickle_of", "read_config", "safetensors_of", "single_files"]

WEIGHTS = "diffusion_pytorch_model"
"how the names of weights begin in diffusers format"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_CONFIG_BYTES = 2**20
_MAX_INDEX_BYTES = 16 * 2**20
_SHARD = re.compile(r"-\d+-of-\d+")
_SINGLE = re.compile(rf"{WEIGHTS}(?:\.(?P<variant>.+))?\.safetensors")
_INDEX = re.compile(rf"{WEIGHTS}(?:\.(?P<before>.+))?\.safetensors\.index(?:\.(?P<after>.+))?\.json")


def has_config(folder: Path) -> bool:
    """Whether the folder has a ``config.json``."""
    return (folder / "config.json").is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; ModelError if it cannot be read."""
    return _read_json(folder / "config.json", _MAX_CONFIG_BYTES)


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    with reading(path):
        with inside(path.parent, path.name).open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ModelError(f"{path} has more than {max_bytes:,} bytes; files of a model are smaller")
        document = json.loads(content.decode("utf-8"))
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a model config: it holds a {type(document).__name__}")
    return document


def inside(folder: Path, name: str) -> Path:
    """The path of a regular file in a model's folder; ModelError if there is none, or if it leads out of the folder.

    A symbolic link has to stay in the folder; in the cache of the hub's client, files are links into ``blobs``.
    """
    if name in ("", ".", "..") or any(c in "/\\:" for c in name) or not name.isprintable():
        raise ModelError(f"{folder} names the file {shown(name)}; files of a model lie in its folder")
    path, roots = folder / name, [folder.resolve()]
    if not path.exists() and not path.is_symlink():
        hint = _config_hint(folder) if name == "config.json" else ""
        raise ModelError(f"{folder} has no {name}: it holds {listing(folder)}{hint}")
    snapshot = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None:
        roots.append(snapshot.parents[1].resolve() / "blobs")
    target = path.resolve(strict=True)
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelError(f"{path} is a link that leads out of the folder; put the file itself there")
    if not target.is_file():
        raise ModelError(f"{path} is not a regular file")
    return path


def _config_hint(folder: Path) -> str:
    files = single_files(folder)
    if files:
        return f"; a model in a single file is named by that file: pass {files[0]}"
    return "; pass the folder of a diffusers VAE, or of a pipeline with a vae subfolder"


def single_files(folder: Path) -> list[Path]:
    """Files of weights without a diffusers name; those that are called a VAE first."""
    endings = (".safetensors", *PICKLES)
    files = (f for f in sorted(folder.iterdir()) if f.suffix.lower() in endings and f.name.isprintable())
    return sorted((f for f in files if not f.name.startswith(WEIGHTS)), key=lambda f: "vae" not in f.name.lower())


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files with the folder's weights: one, or the shards that an index names; empty if there are none.

    Raises:
        ModelError: there are several weights and none has the usual name, or shards have no index.
    """
    sources: dict[str, list[str]] = {}
    shards = []
    with reading(folder):
        names = sorted(file.name for file in folder.iterdir())
    for name in names:
        index, single = _INDEX.fullmatch(name), _SINGLE.fullmatch(name)
        if index is not None:
            sources.setdefault(index["before"] or index["after"] or "", []).insert(0, name)
        elif _SHARD.search(name) and name.startswith(WEIGHTS) and name.endswith(".safetensors"):
            shards.append(name)
        elif single is not None:
            sources.setdefault(single["variant"] or "", []).append(name)
    if not sources and shards:
        raise ModelError(f"{folder} holds shards ({shards[0]}) without the index that names them all")
    if not sources:
        return []
    if "" not in sources and len(sources) > 1:
        raise _several(folder, [name for names in sources.values() for name in names])
    chosen = sources[""] if "" in sources else next(iter(sources.values()))
    choices = [_shards(folder, name) if name.endswith(".json") else [name] for name in chosen]
    if any(other != choices[0] for other in choices):
        raise _several(folder, chosen)
    with reading(folder):
        return [inside(folder, name) for name in choices[0]]


def _several(folder: Path, names: list[str]) -> ModelError:
    files = [name for name in names if not name.endswith(".json")]
    advice = f"pass the file that you mean, such as {folder / files[0]}" if files else "leave one of them there"
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    found = ", ".join(name if name.isprintable() else ascii(name) for name in names[:6])
    return ModelError(f"{folder} holds several weights, of which none is the obvious choice: {found}{more}; {advice}")


def _shards(folder: Path, index: str) -> list[str]:
    path = folder / index
    shards = _read_json(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path} names no files in weight_map")
    names = sorted(set(shards.values()))
    other = [name for name in names if not name.endswith(".safetensors")]
    if other:
        raise ModelError(f"{path} names {shown(other[0])}; shards are safetensors files")
    return names


def pickle_of(folder: Path) -> Path:
    """The one pickled checkpoint in a folder without safetensors."""
    pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLES]
    if not pickles:
        files = single_files(folder)
        hint = f"; pass {files[0]} if that is the model" if files else ""
        raise ModelError(f"{folder} has a config but no {WEIGHTS}.safetensors; it holds {listing(folder)}{hint}")
    usual = [name for name in pickles if Path(name).stem == WEIGHTS] or pickles
    if len(usual) > 1:
        raise ModelError(
            f"{folder} holds several pickled files ({', '.join(usual[:5])}); leave one there, or pass the file that "
            "you mean"
        )
    with reading(folder / usual[0]):
        return inside(folder, usual[0])
