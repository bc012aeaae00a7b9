"""Loading: a model from a name, a folder, a hub id or a diffusers instance. Nothing here imports diffusers.

A folder may come from anyone. Its config is read within limits, and the model is built without memory first. Then
names, shapes and dtypes of the weights are compared with it before any weight is read, and every value has to be
finite. No file outside the folder is read. Weights come from safetensors: a pickled checkpoint can run code when it is
read, so it is refused unless the caller allows it, and nothing falls back from one format to the other.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.models.base import CausalVAE, NativeVAE
from longvid.models.cogvideox import CogVideoXVAE
from longvid.models.device import weights_digest
from longvid.models.tiny import TinyVAE
from longvid.models.wan import WanVAE

__all__ = ["ARCHITECTURES", "BUILT_IN", "load_architecture", "load_model"]

FAMILIES: tuple[type[NativeVAE], ...] = (CogVideoXVAE, WanVAE, TinyVAE)
"Model families; each one reads the configs that name its ``class_name``."

BUILT_IN: dict[str, Path] = {"tiny": Path(__file__).parent.with_name("weights") / "tiny"}
"Models whose weights come with the package."

_WAN_21: dict[str, Any] = {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16}
_WAN_22: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 1.15258426},
    "cogvideox-5b": {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7},
    "cogvideox1.5-5b": {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7, "invert_scale_latents": True},
    "cogvideox-nano": {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": [8, 16, 16, 32],
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
    "wan2.1": _WAN_21,
    "wan2.2": _WAN_22,
    "wan2.1-nano": {**_WAN_21, "base_dim": 8, "num_res_blocks": 1},
    "wan2.2-nano": {**_WAN_22, "base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1},
}
"""Architectures known by name; none has weights. Those called nano have a small part of the width, for demos and tests,
and were never trained."""

_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_MAX_CONFIG_BYTES = 2**20
_MAX_INDEX_BYTES = 16 * 2**20
_MAX_NUMBER = 2**20
"the largest number in a config; real ones stay far below it"
_MAX_REPEATS = {"layers_per_block": 16, "block_out_channels": 16, "encoder_blocks": 256, "decoder_blocks": 256}
"the most layers or blocks that a config may ask for"
_MAX_VALUES = 1024
"the most values that one key of a config may have"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_model(
    source: Any = "tiny",
    *,
    random_weights: int | None = None,
    revision: str | None = None,
    allow_pickle_weights: bool = False,
) -> CausalVAE:
    """Load a causal video VAE. The dtype is that of the weights; the device is the CPU.

    Args:
        source: ``"tiny"``, the small model whose weights come with the package; a folder in diffusers format
            (``config.json`` and safetensors, or a pipeline folder with a ``vae`` subfolder) or one that
            ``python -m longvid.train`` wrote; a hub id such as ``"zai-org/CogVideoX-2b"`` (needs
            ``huggingface_hub``); a diffusers ``AutoencoderKLCogVideoX`` instance, whose weights are shared, not
            copied; the name of a known architecture; or a model that is a CausalVAE already, which is returned.
        random_weights: seed. Builds a known architecture with random weights, for benchmarks and tests.
        revision: branch, tag or commit of a hub id.
        allow_pickle_weights: accept a folder whose only weights are a pickled ``.bin``, ``.pt``, ``.pth`` or ``.ckpt``
            file. PyTorch's restricted unpickler reads it: it builds tensors and runs no code of the file. It is still
            safer to convert untrusted weights to safetensors elsewhere.

    An architecture's name without ``random_weights`` gives a model without weights (on the ``meta`` device), enough
    for :func:`longvid.make_plan`.

    Raises:
        ModelError: no usable model is found there; the message says what was found.
    """
    if not isinstance(source, (str, Path)):
        if random_weights is not None:
            raise ModelError("random_weights needs the name of an architecture, such as 'cogvideox-2b'")
        return source if isinstance(source, CausalVAE) else _wrap_instance(source)
    name = str(source)
    if name in ARCHITECTURES and not _exists(name):
        return _build_architecture(name, random_weights)
    if random_weights is not None:
        raise ModelError(f"{name!r} cannot have random_weights; they need one of {', '.join(ARCHITECTURES)}")
    return _load_folder(*_find_folder(name, revision, weights=True), allow_pickle=allow_pickle_weights)


def load_architecture(source: Any = "tiny", *, revision: str | None = None) -> CausalVAE:
    """Build a model without weights (on the ``meta`` device) from its config alone; enough for a plan.

    Args:
        source: as for :func:`load_model`. Of a hub id only ``config.json`` is downloaded; an object is loaded as it is.
        revision: branch, tag or commit of a hub id.
    """
    if not isinstance(source, (str, Path)) or (str(source) in ARCHITECTURES and not _exists(str(source))):
        return load_model(source)
    return _read_architecture(*_find_folder(str(source), revision, weights=False))[0]


def _find_folder(name: str, revision: str | None, *, weights: bool) -> tuple[Path, dict[str, Any]]:
    """The local folder of a named model and its origin for the record. A hub id is downloaded, or its config alone."""
    if name in BUILT_IN:
        return BUILT_IN[name], {"name_or_path": name}
    if _exists(name):
        if not Path(name).is_dir():
            raise ModelError(f"{name} is a file; pass the folder that holds a model's config.json and weights")
        return Path(name), {"name_or_path": name}
    if not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        raise ModelError(
            f"no model {_shown(name)}: there is no such folder, and it is neither a hub id (owner/name) nor one of "
            f"{', '.join(BUILT_IN)} (with weights) and {', '.join(ARCHITECTURES)} (architectures)"
        )
    try:
        import huggingface_hub
    except ImportError as exc:
        raise ModelError(f"{name} is a hub id; install longvid[hub], or download it and pass the folder") from exc
    files = ["config.json", f"{_WEIGHTS}*.safetensors", f"{_WEIGHTS}*.safetensors.index.json"][: 3 if weights else 1]
    patterns = [*files, *(f"vae/{file}" for file in files)]  # of a pipeline, the VAE has a folder of its own
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as exc:  # the hub's client raises errors of several libraries
        raise ModelError(
            f"there is no local folder {name}, and it could not be downloaded from the hub: {_one_line(exc)}"
        ) from exc
    return folder, {"name_or_path": name, "revision": revision or folder.name}


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or not one
        return False


def _build_architecture(name: str, seed: int | None) -> CausalVAE:
    origin = {"name_or_path": name, "revision": None}
    if seed is None:
        return _build(ARCHITECTURES[name], origin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(ARCHITECTURES[name], {**origin, "random_weights": seed}, device="cpu")
    names = model.checkpoint_names()
    return _assign(model, {names[key]: tensor for key, tensor in model.state_dict().items()}, name)


def _load_folder(folder: Path, origin: Mapping[str, Any], *, allow_pickle: bool) -> CausalVAE:
    model, folder = _read_architecture(folder, origin)
    files = _weight_files(folder)
    weights = _read_safetensors(files, model, folder) if files else _read_pickle(folder, model, allow=allow_pickle)
    if model.weights_dtype is not None:
        weights = {key: tensor.to(model.weights_dtype) for key, tensor in weights.items()}
    return _assign(model, weights, str(folder))


def _read_architecture(folder: Path, origin: Mapping[str, Any]) -> tuple[NativeVAE, Path]:
    """The model that a folder's config describes, without weights, and the folder that holds the config."""
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    config = _read_json(folder / "config.json", _MAX_CONFIG_BYTES)
    return _build(config, {"revision": None, **origin}), folder


def _wrap_instance(instance: Any) -> CausalVAE:
    config = getattr(instance, "config", None)
    if not isinstance(instance, nn.Module) or not isinstance(config, Mapping):
        raise ModelError(
            f"a {type(instance).__name__} cannot be loaded; pass a folder, a hub id, the name of an architecture, a "
            "diffusers AutoencoderKLCogVideoX or an object with the CausalVAE protocol"
        )
    where, name = type(instance).__name__, getattr(instance, "name_or_path", None) or config.get("_name_or_path")
    model = _build({"_class_name": where, **config}, {"name_or_path": name or None, "revision": None})
    weights = instance.state_dict()
    _require_fit(model, {name: tuple(t.shape) for name, t in weights.items()}, where)
    return _assign(model, weights, where)


def _build(config: Mapping[str, Any], origin: Mapping[str, Any], *, device: str = "meta") -> NativeVAE:
    """The model that a config describes; without weights on ``meta``, which takes no memory."""
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if class_name in (family.class_name, *family.other_names):
            _require_sane(config)
            try:
                with torch.device(device):
                    return family.from_config(config, origin).eval()
            except ModelError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
                raise ModelError(f"the config of this {class_name} cannot be used: {_one_line(exc)}") from exc
    supported = ", ".join(family.class_name for family in FAMILIES)
    raise ModelError(f"the config names the class {_shown(class_name)}; this version can run {supported}")


def _require_sane(config: Mapping[str, Any]) -> None:
    """Refuse numbers that would build modules without end, or a model too large for any machine."""
    for key, value in config.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        repeats = _MAX_REPEATS.get(key, _MAX_VALUES)
        if len(numbers) > repeats:
            raise ModelError(
                f"the config gives {len(numbers):,} values for {_shown(key)}; at most {repeats} make sense"
            )
        most = _MAX_NUMBER if numbers is value else _MAX_REPEATS.get(key, _MAX_NUMBER)
        for number in numbers:
            if isinstance(number, (int, float)) and not abs(number) <= most:
                raise ModelError(f"the config gives {_shown(key)} = {_shown(number)}; at most {most:,} makes sense")


def _require_fit(model: NativeVAE, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ModelError unless names and shapes are those of the model, which takes no memory yet."""
    names = model.checkpoint_names()
    expected = {names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"{name} is {shapes[name]} instead of {shape}" if name in shapes else f"missing {name}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    problems += [f"unknown {_shown(name)}" for name in shapes if name not in expected]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"the weights in {where} do not fit its config: {'; '.join(problems[:3])}{more}")


def _require_dtype(dtypes: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless all weights have one dtype, and models run in it."""
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES and dtype not in _DTYPES.values():
            raise ModelError(f"{_shown(name)} in {where} has dtype {dtype}; weights are {', '.join(_DTYPES)}")
    kinds = sorted({str(dtype) for dtype in dtypes.values()})
    if len(kinds) > 1:
        raise ModelError(f"the weights in {where} have several dtypes ({', '.join(kinds)}); convert them to one")


def _assign(model: NativeVAE, weights: Mapping[str, Tensor], where: str) -> NativeVAE:
    """Put the tensors of ``weights`` into the model without a copy, if all values are finite; record their digest."""
    for name, tensor in weights.items():
        # Three to twenty times as fast as isfinite and as exact: both ends are NaN if any value is.
        if tensor.dtype not in _DTYPES.values() or not tensor.numel():
            continue
        if not all(math.isfinite(end) for end in torch.stack(tensor.detach().aminmax()).tolist()):
            raise ModelError(f"{name} in {where} holds values that are not finite; these weights are damaged")
    model.load_state_dict({name: weights[theirs] for name, theirs in model.checkpoint_names().items()}, assign=True)
    model.requires_grad_(False)
    model.origin["weights_sha256"] = weights_digest(model)
    return model


@contextmanager
def _broken_files(path: Path, kind: str = "") -> Iterator[None]:
    """Turn what damaged files and links raise when they are read into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as exc:
        raise ModelError(f"{path} cannot be read{kind}: {_one_line(exc)}") from exc


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    with _broken_files(path):
        with _inside(path.parent, path.name).open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ModelError(f"{path} has more than {max_bytes:,} bytes; files of a model are smaller")
        document = json.loads(content.decode("utf-8"))
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a model config: it holds a {type(document).__name__}")
    return document


def _inside(folder: Path, name: str) -> Path:
    """The path of a regular file in a model's folder; ModelError if there is none, or if it leads out of the folder.

    A symbolic link has to stay in the folder; in the cache of the hub's client, files are links into ``blobs``.
    """
    if name in ("", ".", "..") or any(c in "/\\:" for c in name) or not name.isprintable():
        raise ModelError(f"{folder} names the file {_shown(name)}; files of a model lie in its folder")
    path, roots = folder / name, [folder.resolve()]
    if not path.exists() and not path.is_symlink():
        hint = "; pass the folder of a diffusers VAE, or of a pipeline with a vae subfolder"
        raise ModelError(f"{folder} has no {name}: it holds {_listing(folder)}{hint if name == 'config.json' else ''}")
    snapshot = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None:
        roots.append(snapshot.parents[1].resolve() / "blobs")
    target = path.resolve(strict=True)
    if not any(target.is_relative_to(root) for root in roots):
        raise ModelError(f"{path} is a link that leads out of the folder; put the file itself there")
    if not target.is_file():
        raise ModelError(f"{path} is not a regular file")
    return path


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder: one, or the shards that its index names; empty if there are none."""
    index, single = folder / f"{_WEIGHTS}.safetensors.index.json", f"{_WEIGHTS}.safetensors"
    if os.path.lexists(index):
        shards = _read_json(index, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(f"{index} names no files in weight_map")
        names = sorted(set(shards.values()))
        other = [name for name in names if not name.endswith(".safetensors")]
        if other:
            raise ModelError(f"{index} names {_shown(other[0])}; shards are safetensors files")
    else:  # the usual name, or else the first variant, such as fp16
        found = (file.name for file in folder.glob(f"{_WEIGHTS}*.safetensors"))
        names = sorted(found, key=lambda name: (name != single, name))[:1]
    with _broken_files(folder):
        return [_inside(folder, name) for name in names]


def _read_safetensors(files: list[Path], model: NativeVAE, folder: Path) -> dict[str, Tensor]:
    """All tensors, once the names, shapes and dtypes in the headers have been compared with the model.

    safetensors itself checks that a header fits its file and that no two tensors overlap.
    """
    with ExitStack() as opened, _broken_files(folder, " as safetensors"):
        holders: dict[str, Any] = {}
        for file in files:
            with _broken_files(file, " as safetensors"):
                handle = opened.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in holders:
                    raise ModelError(f"{_shown(name)} is in two files of {folder}")
                holders[name] = handle
        headers = {name: handle.get_slice(name) for name, handle in holders.items()}
        _require_fit(model, {name: tuple(header.get_shape()) for name, header in headers.items()}, str(folder))
        _require_dtype({name: header.get_dtype() for name, header in headers.items()}, str(folder))
        return {name: handle.get_tensor(name) for name, handle in holders.items()}


def _read_pickle(folder: Path, model: NativeVAE, *, allow: bool) -> dict[str, Tensor]:
    """Tensors of the one checkpoint in a folder without safetensors, if the caller allows it.

    PyTorch's restricted unpickler reads it. Compressed archives are refused as zip bombs.
    """
    pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in _PICKLES]
    if not pickles:
        raise ModelError(f"{folder} has a config but no {_WEIGHTS}.safetensors; it holds {_listing(folder)}")
    if not allow:
        raise ModelError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when read and are refused; convert "
            "them to safetensors (save_pretrained(..., safe_serialization=True) does), or pass "
            "allow_pickle_weights=True"
        )
    usual = [name for name in pickles if Path(name).stem == _WEIGHTS] or pickles
    if len(usual) > 1:
        raise ModelError(f"{folder} holds several pickled files ({', '.join(usual[:5])}); leave one there")
    with _broken_files(folder / usual[0]):
        file = _inside(folder, usual[0])
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            with zipfile.ZipFile(file) as archive:
                packed = [e.filename for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise ModelError(f"{file} is compressed inside ({_shown(packed[0])}); torch.save writes no such file")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except ModelError:
        raise
    except pickle.UnpicklingError as exc:
        raise ModelError(f"{file} holds more than tensors and was not read: {_one_line(exc)}") from exc
    except Exception as exc:  # a damaged or hostile pickle can raise anything
        raise ModelError(f"{file} cannot be read as a checkpoint: {_one_line(exc)}") from exc
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        for k, t in content.items()
    ):
        raise ModelError(f"{file} is not a state dict: tensors by name were expected")
    _require_fit(model, {name: tuple(tensor.shape) for name, tensor in content.items()}, str(file))
    _require_dtype({name: tensor.dtype for name, tensor in content.items()}, str(file))
    return {name: tensor.detach().contiguous() for name, tensor in content.items()}


def _listing(folder: Path) -> str:
    names = sorted(f.name if f.name.isprintable() else ascii(f.name) for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shown(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else f"{value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
