"""From a name, a folder, a hub id or a diffusers instance to a model. Nothing here imports diffusers.

A folder may be a stranger's. Its config is read within limits and built without memory first; then names, shapes and
dtypes of the weights are compared with it before a byte of them is read; then every value has to be finite. No file is
read that lies outside of the folder. Weights come from safetensors: a pickled checkpoint can run code when it is read,
so it is refused unless it is asked for by name, and nothing falls back from one to the other.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.models.base import CausalVAE
from longvid.models.cogvideox import CogVideoXVAE
from longvid.models.device import weights_digest
from longvid.models.tiny import TinyVAE

__all__ = ["ARCHITECTURES", "BUILT_IN", "load_model"]

Native: TypeAlias = CogVideoXVAE | TinyVAE

FAMILIES: tuple[type[Native], ...] = (CogVideoXVAE, TinyVAE)
"Model families; each reads the configs of its ``class_name``."

BUILT_IN: dict[str, Path] = {"tiny": Path(__file__).parent.with_name("weights") / "tiny"}
"Models whose weights are in the package."

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
}
"""Architectures known by name. None comes with weights. ``cogvideox-nano`` is CogVideoX at 1/16 of its width: the same
layers, for demos and tests; nobody has trained it."""

_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"by their names in safetensors"
_MAX_CONFIG_BYTES = 2**20
_MAX_INDEX_BYTES = 16 * 2**20
_MAX_NUMBER = 2**20
"in a config: widths of layers are below it, and so is everything else there"
_MAX_REPEATS = {"layers_per_block": 16, "block_out_channels": 16, "encoder_blocks": 256, "decoder_blocks": 256}
"of what a config asks for several times"
_MAX_VALUES = 1024
"of one key of a config"
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
        source: ``"tiny"``, the small model whose weights are in the package; a folder in diffusers format
            (``config.json`` and safetensors, or a pipeline folder with a ``vae`` subfolder) or one that
            ``python -m longvid.train`` wrote; a hub id such as ``"zai-org/CogVideoX-2b"`` (needs
            ``huggingface_hub``); a diffusers ``AutoencoderKLCogVideoX`` instance, whose weights are shared, not
            copied; the name of a known architecture; or a model that is a CausalVAE already, which is returned.
        random_weights: seed. Builds a known architecture with random weights, for benchmarks and tests.
        revision: branch, tag or commit of a hub id.
        allow_pickle_weights: take a folder whose only weights are a pickled ``.bin``, ``.pt``, ``.pth`` or ``.ckpt``
            file. It is read by PyTorch's restricted unpickler, which builds tensors and runs no code of the file;
            still, convert the weights of a stranger to safetensors elsewhere.

    An architecture's name without ``random_weights`` gives a model without weights (on the ``meta`` device), enough
    for :func:`longvid.make_plan`.

    Raises:
        ModelError: nothing usable is found there; the message says what is there.
    """
    if isinstance(source, (str, Path)):
        return _load_named(str(source), random_weights, revision, allow_pickle_weights)
    if random_weights is not None:
        raise ModelError("random_weights goes with the name of an architecture, such as 'cogvideox-2b'")
    if isinstance(source, CausalVAE):
        return source
    return _wrap_instance(source)


def _load_named(name: str, random_weights: int | None, revision: str | None, allow_pickle: bool) -> CausalVAE:
    if name in BUILT_IN:
        if random_weights is not None:
            raise ModelError(f"{name} has weights of its own; leave out random_weights")
        return _load_folder(BUILT_IN[name], {"name_or_path": name})
    if _is_folder(name):
        if random_weights is not None:
            raise ModelError(f"{name} is a folder with weights of its own; leave out random_weights")
        return _load_folder(Path(name), {"name_or_path": name}, allow_pickle=allow_pickle)
    if name in ARCHITECTURES:
        return _build_architecture(name, random_weights)
    if random_weights is None and _HUB_ID.fullmatch(name) and not Path(name).parent.is_dir():
        return _load_hub(name, revision)
    raise ModelError(
        f"no model {name!r}: it is neither a folder, nor a hub id (owner/name), nor one of {', '.join(BUILT_IN)} "
        f"(with weights) and {', '.join(ARCHITECTURES)} (architectures)"
    )


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long for a path
        return False


def _build_architecture(name: str, seed: int | None) -> CausalVAE:
    origin = {"name_or_path": name, "revision": None}
    if seed is None:
        with torch.device("meta"):
            return _build(ARCHITECTURES[name], origin).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(ARCHITECTURES[name], {**origin, "random_weights": seed})
    return _sealed(model)


def _load_hub(repo_id: str, revision: str | None) -> CausalVAE:
    try:
        import huggingface_hub
    except ImportError as exc:
        raise ModelError(f"{repo_id} is a hub id; install longvid[hub], or download it and pass the folder") from exc
    files = ("config.json", f"{_WEIGHTS}*.safetensors", f"{_WEIGHTS}*.safetensors.index.json")
    patterns = [*files, *(f"vae/{file}" for file in files)]
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except Exception as exc:  # the hub's client raises errors of several libraries
        raise ModelError(f"{repo_id} cannot be had from the hub: {_one_line(exc)}") from exc
    return _load_folder(Path(folder), {"name_or_path": repo_id, "revision": revision or Path(folder).name})


def _load_folder(folder: Path, origin: Mapping[str, Any], *, allow_pickle: bool = False) -> CausalVAE:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    config = _read_json(folder / "config.json", folder, _MAX_CONFIG_BYTES)
    with torch.device("meta"):
        model = _build(config, {"revision": None, **origin})
    files = _weight_files(folder)
    if files:
        weights = _read_safetensors(files, model, folder)
    else:
        weights = _read_pickle(_pickle_file(folder, allow=allow_pickle), model)
    if model.weights_dtype is not None:
        weights = {key: tensor.to(model.weights_dtype) for key, tensor in weights.items()}
    _assign(model, weights, str(folder))
    return _sealed(model)


def _wrap_instance(instance: Any) -> CausalVAE:
    config = getattr(instance, "config", None)
    if not isinstance(instance, nn.Module) or not isinstance(config, Mapping):
        raise ModelError(
            f"a {type(instance).__name__} cannot be loaded; pass a folder, a hub id, the name of an architecture, a "
            "diffusers AutoencoderKLCogVideoX or an object with the CausalVAE protocol"
        )
    name = getattr(instance, "name_or_path", None) or config.get("_name_or_path")
    with torch.device("meta"):
        model = _build(
            {"_class_name": type(instance).__name__, **config}, {"name_or_path": name or None, "revision": None}
        )
    weights = instance.state_dict()
    _require_fit(model, {name: tuple(t.shape) for name, t in weights.items()}, type(instance).__name__)
    _assign(model, weights, type(instance).__name__)
    return _sealed(model)


def _build(config: Mapping[str, Any], origin: Mapping[str, Any]) -> Native:
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if family.class_name == class_name:
            _require_sane(config)
            try:
                return family.from_config(config, origin)
            except ModelError:
                raise
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
                raise ModelError(f"the config of this {class_name} cannot be used: {_one_line(exc)}") from exc
    supported = ", ".join(family.class_name for family in FAMILIES)
    raise ModelError(f"the config names the class {_shown(class_name)}; this version can run {supported}")


def _require_sane(config: Mapping[str, Any]) -> None:
    """No number that would build modules for ever, or a model that no machine holds."""
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


def _require_fit(model: Native, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Names and shapes are those of the model, which takes no memory yet."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unknown {_shown(name)}" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        raise ModelError(
            f"the weights in {where} do not fit its config: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        )


def _require_dtype(dtypes: Mapping[str, Any], where: str) -> None:
    """All of one dtype that models run in."""
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES and dtype not in _DTYPES.values():
            raise ModelError(f"{_shown(name)} in {where} is of {dtype}; weights are {', '.join(_DTYPES)}")
    kinds = sorted({str(dtype) for dtype in dtypes.values()})
    if len(kinds) > 1:
        raise ModelError(f"the weights in {where} are of several dtypes, {', '.join(kinds)}; convert them to one")


def _assign(model: Native, weights: Mapping[str, Tensor], where: str) -> None:
    """Put the very tensors of ``weights`` into the model, if all values are finite."""
    for name, tensor in weights.items():
        # three to twenty times as fast as isfinite, and as exact: both ends are NaN if anything is
        if tensor.dtype not in _DTYPES.values() or not tensor.numel():
            continue
        if not all(math.isfinite(end) for end in torch.stack(tensor.detach().aminmax()).tolist()):
            raise ModelError(f"{name} in {where} holds values that are not finite; these weights are damaged")
    model.load_state_dict(weights, assign=True)


def _sealed(model: Native) -> Native:
    """For inference only, with the digest of the weights on record."""
    model.requires_grad_(False).eval()
    model.origin["weights_sha256"] = weights_digest(model)
    return model


def _read_json(path: Path, folder: Path, max_bytes: int) -> dict[str, Any]:
    try:
        path = _inside(folder, path.name)
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ModelError(f"{path} has more than {max_bytes:,} bytes; that is no model's")
        document = json.loads(content.decode("utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(
            f"{folder} is not a model folder: it holds {_listing(folder)} and no {path.name}; pass the folder of a "
            "diffusers VAE, or of a pipeline with a vae subfolder"
        ) from exc
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{path} cannot be read: {_one_line(exc)}") from exc
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a model config: it holds a {type(document).__name__}")
    return document


def _inside(folder: Path, name: str) -> Path:
    """The path of a regular file in a model's folder.

    A symbolic link has to stay in the folder; in the cache of the hub's client, files are links into ``blobs``.

    Raises:
        ModelError: the name or a link leads out of the folder, or something else than a file is there.
        FileNotFoundError: nothing is there.
    """
    if name in ("", ".", "..") or any(c in "/\\:" for c in name) or not name.isprintable():
        raise ModelError(f"{folder} names the file {_shown(name)}; files of a model lie in its folder")
    path, roots = folder / name, [folder.resolve()]
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
    """The folder's safetensors: one file, or the shards that an index names; empty if there are none."""
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_symlink() or index.exists():
        names = _shard_names(_read_json(index, folder, _MAX_INDEX_BYTES), index)
    else:
        single = folder / f"{_WEIGHTS}.safetensors"
        found = [single] if single.is_symlink() or single.exists() else sorted(folder.glob(f"{_WEIGHTS}*.safetensors"))
        names = [file.name for file in found[:1]]
    try:
        return [_inside(folder, name) for name in names]
    except FileNotFoundError as exc:
        missing = Path(str(exc.filename)).name
        raise ModelError(f"{folder} has no {missing}, which its index names; it holds {_listing(folder)}") from exc
    except (OSError, RuntimeError) as exc:  # a loop of links
        raise ModelError(f"the weights in {folder} cannot be read: {_one_line(exc)}") from exc


def _shard_names(index: Mapping[str, Any], path: Path) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path} names no files in weight_map")
    names = sorted(set(shards.values()))
    other = [name for name in names if not name.endswith(".safetensors")]
    if other:
        raise ModelError(f"{path} names {_shown(other[0])}; shards are safetensors files")
    return names


def _read_safetensors(files: list[Path], model: Native, folder: Path) -> dict[str, Tensor]:
    """All tensors, after their names, shapes and dtypes were compared with the model by what the headers say.

    That a header fits its file, and that no two tensors overlap, is what safetensors sees to.
    """
    with ExitStack() as opened, _safetensor_errors(files[0]):
        holders: dict[str, Any] = {}
        for file in files:
            with _safetensor_errors(file):
                handle = opened.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in holders:
                    raise ModelError(f"{_shown(name)} is in two files of {folder}")
                holders[name] = handle
        headers = {name: handle.get_slice(name) for name, handle in holders.items()}
        _require_fit(model, {name: tuple(header.get_shape()) for name, header in headers.items()}, str(folder))
        _require_dtype({name: header.get_dtype() for name, header in headers.items()}, str(folder))
        return {name: handle.get_tensor(name) for name, handle in holders.items()}


@contextmanager
def _safetensor_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError) as exc:
        raise ModelError(f"{file} cannot be read as safetensors: {_one_line(exc)}") from exc


def _pickle_file(folder: Path, *, allow: bool) -> Path:
    """The one pickled checkpoint of a folder without safetensors, if it was asked for."""
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
    try:
        return _inside(folder, usual[0])
    except (OSError, RuntimeError) as exc:
        raise ModelError(f"{folder / usual[0]} cannot be read: {_one_line(exc)}") from exc


def _read_pickle(file: Path, model: Native) -> dict[str, Tensor]:
    """Tensors of a checkpoint by PyTorch's restricted unpickler. What torch.save compresses, it does not: no bombs."""
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
    except Exception as exc:  # whatever a damaged or hostile pickle makes of the unpickler
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
