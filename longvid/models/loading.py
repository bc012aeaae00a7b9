"""From a name, a folder, a hub id or a diffusers instance to a model. Nothing here imports diffusers.

Weights come from safetensors only. A pickled checkpoint can run code when it is read, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longvid.errors import ModelError
from longvid.models.base import CausalVAE
from longvid.models.cogvideox import CogVideoXVAE
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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_model(source: Any = "tiny", *, random_weights: int | None = None, revision: str | None = None) -> CausalVAE:
    """Load a causal video VAE. The dtype is that of the weights; the device is the CPU.

    Args:
        source: ``"tiny"``, the small model whose weights are in the package; a folder in diffusers format
            (``config.json`` and safetensors, or a pipeline folder with a ``vae`` subfolder) or one that
            ``python -m longvid.train`` wrote; a hub id such as ``"zai-org/CogVideoX-2b"`` (needs
            ``huggingface_hub``); a diffusers ``AutoencoderKLCogVideoX`` instance, whose weights are shared, not
            copied; the name of a known architecture; or a model that is a CausalVAE already, which is returned.
        random_weights: seed. Builds a known architecture with random weights, for benchmarks and tests.
        revision: branch, tag or commit of a hub id.

    An architecture's name without ``random_weights`` gives a model without weights (on the ``meta`` device), enough
    for :func:`longvid.make_plan`.

    Raises:
        ModelError: nothing usable is found there; the message says what is there.
    """
    if isinstance(source, (str, Path)):
        return _load_named(str(source), random_weights, revision)
    if random_weights is not None:
        raise ModelError("random_weights goes with the name of an architecture, such as 'cogvideox-2b'")
    if isinstance(source, CausalVAE):
        return source
    return _wrap_instance(source)


def _load_named(name: str, random_weights: int | None, revision: str | None) -> CausalVAE:
    if name in BUILT_IN:
        if random_weights is not None:
            raise ModelError(f"{name} has weights of its own; leave out random_weights")
        return _load_folder(BUILT_IN[name], {"name_or_path": name})
    if Path(name).is_dir():
        if random_weights is not None:
            raise ModelError(f"{name} is a folder with weights of its own; leave out random_weights")
        return _load_folder(Path(name), {"name_or_path": name})
    if name in ARCHITECTURES:
        return _build_architecture(name, random_weights)
    if random_weights is None and _HUB_ID.fullmatch(name) and not Path(name).parent.is_dir():
        return _load_hub(name, revision)
    raise ModelError(
        f"no model {name!r}: it is neither a folder, nor a hub id (owner/name), nor one of {', '.join(BUILT_IN)} "
        f"(with weights) and {', '.join(ARCHITECTURES)} (architectures)"
    )


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


def _load_folder(folder: Path, origin: Mapping[str, Any]) -> CausalVAE:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    config = _read_json(folder / "config.json", folder)
    with torch.device("meta"):
        model = _build(config, {"revision": None, **origin})
    weights = _read_weights(folder)
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
    _assign(model, instance.state_dict(), type(instance).__name__)
    return _sealed(model)


def _build(config: Mapping[str, Any], origin: Mapping[str, Any]) -> Native:
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if family.class_name == class_name:
            return family.from_config(config, origin)
    supported = ", ".join(family.class_name for family in FAMILIES)
    raise ModelError(f"the config names the class {class_name!r}; this version can run {supported}")


def _assign(model: Native, weights: Mapping[str, Tensor], where: str) -> None:
    """Put the very tensors of ``weights`` into the model, after comparing names and shapes."""
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(t.shape)}"
        for name, t in expected.items()
        if name in weights and weights[name].shape != t.shape
    ]
    if problems:
        raise ModelError(
            f"the weights in {where} do not fit its config: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        )
    model.load_state_dict(weights, assign=True)


def _sealed(model: Native) -> Native:
    """For inference only, with the digest of the weights on record."""
    model.requires_grad_(False).eval()
    model.origin["weights_sha256"] = _digest(model)
    return model


def _digest(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in order of the names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(
            f"{folder} is not a model folder: it holds {_listing(folder)} and no config.json; pass the folder of a "
            "diffusers VAE, or of a pipeline with a vae subfolder"
        ) from exc
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read: {_one_line(exc)}") from exc
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a model config: it holds a {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors: one file, or the shards that an index names."""
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, folder).get("weight_map", {}).values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = [f for f in (folder / f"{_WEIGHTS}.safetensors",) if f.is_file()] or sorted(
            folder.glob(f"{_WEIGHTS}*.safetensors")
        )[:1]
    if not files:
        pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in _PICKLES]
        if pickles:
            raise ModelError(
                f"{folder} holds pickled weights ({pickles[0]}), which can run code when read and are refused; "
                "convert them to safetensors (save_pretrained(..., safe_serialization=True) does)"
            )
        raise ModelError(f"{folder} has a config but no {_WEIGHTS}.safetensors; it holds {_listing(folder)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(safetensors.torch.load_file(file))
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{file} cannot be read as safetensors: {_one_line(exc)}") from exc
    return weights


def _listing(folder: Path) -> str:
    names = sorted(f.name for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _one_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
