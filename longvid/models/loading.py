"""Loading: a model from a name, a folder, one file, a hub id or a diffusers instance. Nothing here imports diffusers.

Files may come from anyone. A config is read within limits, and the model is built without memory first. Then names,
shapes and dtypes of the weights are compared with it before any weight is read, and every value has to be finite.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longvid.errors import ModelError
from longvid.models.base import CausalVAE, NativeVAE
from longvid.models.checkpoints.files import (
    WEIGHTS,
    has_config,
    pickle_of,
    read_config,
    safetensors_of,
    single_files,
)
from longvid.models.checkpoints.fit import assign, fill, require_dtype, require_fit
from longvid.models.checkpoints.instance import instance_weights, unwrapped, warn_of_settings
from longvid.models.checkpoints.messages import one_line, shown
from longvid.models.checkpoints.recognition import Recognised, recognise
from longvid.models.checkpoints.tensors import Checkpoint, open_file, open_pickle, open_safetensors
from longvid.models.cogvideox import CogVideoXVAE
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

_MAX_NUMBER = 2**20
"the largest number in a config; real ones stay far below it"
_MAX_REPEATS = {
    **dict.fromkeys(
        ("layers_per_block", "block_out_channels", "num_res_blocks", "dim_mult", "temperal_downsample"), 16
    ),
    **dict.fromkeys(("encoder_blocks", "decoder_blocks"), 256),
}
"the most layers or blocks that a config may ask for"
_MAX_VALUES = 1024
"the most values that one key of a config may have"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
            ``python -m longvid.train`` wrote; one file of weights of CogVideoX or Wan, with the names of diffusers or
            the original ones, such as ``wan_2.1_vae.safetensors`` or ``Wan2.2_VAE.pth``; a hub id such as
            ``"zai-org/CogVideoX-2b"`` (needs ``huggingface_hub``); a diffusers ``AutoencoderKLCogVideoX``,
            ``AutoencoderKLWan`` or ``AutoencoderKLQwenImage`` instance, whose weights are shared, not copied; the name
            of a known architecture; or a model that is a CausalVAE already, which is returned.
        random_weights: seed. Builds a known architecture with random weights, for benchmarks and tests.
        revision: branch, tag or commit of a hub id.
        allow_pickle_weights: accept a pickled ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file, as the source or as the
            only weights of a folder. PyTorch's restricted unpickler reads it: it builds tensors and runs no code of
            the file. It is still safer to convert untrusted weights to safetensors elsewhere.

    The architecture of a single file is recognised by its names and shapes, or read from a ``config.json`` of the
    family beside it. An architecture's name without ``random_weights`` gives a model without weights (on the ``meta``
    device), enough for :func:`longvid.make_plan`.

    Raises:
        ModelError: no usable model is found there; the message says what was found.

    Warns:
        UserWarning: an instance has tiling enabled or chunks of its own, which longvid does not follow.
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
    place, origin = _find(name, revision, weights=True)
    if place.is_dir():
        return _load_folder(place, origin, allow_pickle=allow_pickle_weights)
    with _opened(place, origin, allow_pickle=allow_pickle_weights) as (model, checkpoint, found):
        return fill(model, checkpoint, found.names, str(place))


def load_architecture(
    source: Any = "tiny", *, revision: str | None = None, allow_pickle_weights: bool = False
) -> CausalVAE:
    """Build a model without weights (on the ``meta`` device) from its config alone; enough for a plan.

    Args:
        source: as for :func:`load_model`. Of a hub id only ``config.json`` is downloaded, and of a file only names and
            shapes are read; an object is loaded as it is.
        revision: branch, tag or commit of a hub id.
        allow_pickle_weights: as for :func:`load_model`.
    """
    if not isinstance(source, (str, Path)) or (str(source) in ARCHITECTURES and not _exists(str(source))):
        return load_model(source)
    place, origin = _find(str(source), revision, weights=False)
    if place.is_dir():
        return _read_architecture(place, origin)[0]
    with _opened(place, origin, allow_pickle=allow_pickle_weights) as (model, checkpoint, found):
        shapes = {name: checkpoint.shapes[theirs] for name, theirs in found.names.items()}
        require_fit(model, shapes, str(place))
        return model


def _find(name: str, revision: str | None, *, weights: bool) -> tuple[Path, dict[str, Any]]:
    """The folder or file of a named model, and its origin for the record. Of a hub id it is downloaded."""
    if name in BUILT_IN:
        return BUILT_IN[name], {"name_or_path": name}
    if _exists(name):
        return Path(name), {"name_or_path": name}
    if not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        raise ModelError(
            f"no model {shown(name)}: there is no such file or folder, and it is neither a hub id (owner/name) nor one "
            f"of {', '.join(BUILT_IN)} (with weights) and {', '.join(ARCHITECTURES)} (architectures)"
        )
    folder = _download(name, revision, ["config.json", "vae/config.json"])  # of a pipeline, the VAE has its own folder
    origin = {"name_or_path": name, "revision": revision or folder.name}
    try:
        place = _read_architecture(folder, origin)[1]  # whose weights are they? those of another model may be huge
    except ModelError as exc:
        raise ModelError(f"{exc}. If {name} holds its VAE as one file, download that file and pass it") from exc
    if weights:
        commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
        within = "" if place == folder else f"{place.name}/"
        _download(name, commit, [f"{within}{WEIGHTS}.safetensors", f"{within}{WEIGHTS}*.json"])
        if not (place / f"{WEIGHTS}.safetensors").exists():
            _download(name, commit, [f"{within}{WEIGHTS}*.safetensors"])
    return folder, origin


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder with the files of a hub id that fit the patterns, which is the same in every call."""
    try:
        import huggingface_hub
    except ImportError as exc:
        raise ModelError(f"{name} is a hub id; install longvid[hub], or download it and pass the folder") from exc
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as exc:  # the hub's client raises errors of several libraries
        raise ModelError(
            f"there is no local folder {name}, and it could not be downloaded from the hub: {one_line(exc)}"
        ) from exc


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
    return assign(model, {names[key]: tensor for key, tensor in model.state_dict().items()}, name)


def _load_folder(folder: Path, origin: Mapping[str, Any], *, allow_pickle: bool) -> CausalVAE:
    model, folder = _read_architecture(folder, origin)
    files = safetensors_of(folder)
    if not files:
        checkpoint = open_pickle(pickle_of(folder), allow=allow_pickle)
        return fill(model, checkpoint, {name: name for name in checkpoint.shapes}, str(checkpoint.where))
    with open_safetensors(files, folder) as checkpoint:
        return fill(model, checkpoint, {name: name for name in checkpoint.shapes}, str(folder))


def _read_architecture(folder: Path, origin: Mapping[str, Any]) -> tuple[NativeVAE, Path]:
    """The model that a folder's config describes, without weights, and the folder that holds the config."""
    if not has_config(folder) and has_config(folder / "vae"):
        folder = folder / "vae"
    config = read_config(folder)
    if _family(config) is None:
        files = [file for file in single_files(folder) if "vae" in file.name.lower()]
        hint = f"; if {files[0]} is a VAE, pass that file" if files else ""
        raise ModelError(f"{folder}: {_unknown(config)}{hint}")
    return _build(config, {"revision": None, **origin}), folder


@contextmanager
def _opened(
    file: Path, origin: Mapping[str, Any], *, allow_pickle: bool
) -> Iterator[tuple[NativeVAE, Checkpoint, Recognised]]:
    """The model in one file, without weights, and what is known of the file."""
    config = None
    if has_config(file.parent):
        beside = read_config(file.parent)
        config = beside if _family(beside) is not None else None  # originals lie beside the config of another model
    with open_file(file, allow_pickle=allow_pickle) as checkpoint:
        found = recognise(checkpoint, config)
        yield _build(found.config, {"revision": None, **origin}), checkpoint, found


def _wrap_instance(instance: Any) -> CausalVAE:
    instance = unwrapped(instance)
    config = getattr(instance, "config", None)
    where = type(instance).__name__
    if not isinstance(instance, nn.Module) or not isinstance(config, Mapping):
        hint = ", here its vae," if isinstance(getattr(instance, "vae", None), nn.Module) else ""
        raise ModelError(
            f"a {where} cannot be loaded; pass a folder, a file of weights, a hub id, the name of an architecture, a "
            f"diffusers instance such as AutoencoderKLWan{hint} or an object with the CausalVAE protocol"
        )
    name = getattr(instance, "name_or_path", None) or config.get("_name_or_path")
    config = {**config, "_class_name": where}
    if _family(config) is None:
        bases = (base.__name__ for base in type(instance).__mro__[1:])
        base = next((base for base in bases if _family({"_class_name": base}) is not None), None)
        hint = "" if base is None else f". It is a subclass of {base} and may compute something else; pass a {base}"
        raise ModelError(f"{_unknown(config)}{hint}")
    model = _build(config, {"name_or_path": name or None, "revision": None})
    weights = instance_weights(instance)
    require_fit(model, {name: tuple(t.shape) for name, t in weights.items()}, where)
    require_dtype({name: t.dtype for name, t in weights.items()}, where)
    warn_of_settings(instance, model)
    return assign(model, weights, where)


def _family(config: Mapping[str, Any]) -> type[NativeVAE] | None:
    """The family that reads this config, by the class that it names."""
    name = config.get("_class_name")
    return next((family for family in FAMILIES if name in (family.class_name, *family.other_names)), None)


def _unknown(config: Mapping[str, Any]) -> str:
    supported = ", ".join(name for family in FAMILIES for name in (family.class_name, *family.other_names))
    return f"the config names the class {shown(config.get('_class_name'))}; this version can run {supported}"


def _build(config: Mapping[str, Any], origin: Mapping[str, Any], *, device: str = "meta") -> NativeVAE:
    """The model that a config describes; without weights on ``meta``, which takes no memory."""
    family, class_name = _family(config), config.get("_class_name")
    if family is None:
        raise ModelError(_unknown(config))
    _require_sane(config)
    if class_name != family.class_name:
        origin = {**origin, "source_class": class_name}
    try:
        with torch.device(device):
            model = family.from_config(config, origin).eval()
        _require_computed(config, model)
    except ModelError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        raise ModelError(f"the config of this {class_name} cannot be used: {one_line(exc)}") from exc
    return model


def _require_computed(config: Mapping[str, Any], model: NativeVAE) -> None:
    """Raise ModelError for what a config asks for and no family of this package computes."""
    for key in ("act_fn", "non_linearity"):
        value = config.get(key, "silu")
        if not isinstance(value, str) or value.lower() not in ("silu", "swish"):
            raise ModelError(f"the config gives {key} = {shown(value)}; this family is computed with silu only")
    ratios = {
        "temporal_compression_ratio": model.geometry.frames_per_latent,
        "spatial_compression_ratio": model.geometry.pixels_per_latent,
    }
    for key, actual in ratios.items():
        if config.get(key) not in (None, actual):
            raise ModelError(f"the config gives {key} = {shown(config[key])}; these modules compress by {actual}")


def _require_sane(config: Mapping[str, Any]) -> None:
    """Refuse numbers that would build modules without end, or a model too large for any machine."""
    for key, value in config.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        repeats = _MAX_REPEATS.get(key, _MAX_VALUES)
        if len(numbers) > repeats:
            raise ModelError(f"the config gives {len(numbers):,} values for {shown(key)}; at most {repeats} make sense")
        most = _MAX_NUMBER if numbers is value else _MAX_REPEATS.get(key, _MAX_NUMBER)
        for number in numbers:
            if isinstance(number, (int, float)) and not abs(number) <= most:
                raise ModelError(f"the config gives {shown(key)} = {shown(number)}; at most {most:,} makes sense")
