"""Finds a VAE among the names in one file: which family, in whose spelling, behind which prefix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from longvid.errors import ModelError
from longvid.models.checkpoints import cogvideox, wan
from longvid.models.checkpoints.messages import one_line, shown
from longvid.models.checkpoints.tensors import Checkpoint

__all__ = ["Recognised", "recognise"]

_PREFIXES = ("model", "vae", "first_stage_model", "module")
"what other programs put in front of the names of a VAE"
_Names = Callable[[Collection[str]], dict[str, str]]
_Config = Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """A VAE in a file."""

    config: Mapping[str, Any]
    names: Mapping[str, str]
    "the name of each tensor in the file by its name in diffusers format"


def _as_they_are(names: Collection[str]) -> dict[str, str]:
    return {name: name for name in names}


_SPELLINGS: tuple[tuple[str, _Names, _Config], ...] = (
    (wan.ORIGINAL_MARK, wan.diffusers_names, wan.config_of),
    (wan.DIFFUSERS_MARK, _as_they_are, wan.config_of),
    (cogvideox.ORIGINAL_MARK, cogvideox.diffusers_names, cogvideox.config_of),
    (cogvideox.DIFFUSERS_MARK, _as_they_are, cogvideox.config_of),
)


def recognise(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Recognised:
    """The VAE in a file, by names and shapes. Whether all of its weights are there remains to be checked.

    Args:
        checkpoint: names and shapes of the file.
        config: what is known of the architecture from elsewhere, or None. The metadata in a file are not read.

    Raises:
        ModelError: the file holds no VAE of a family that is known, or several.
    """
    where, names = checkpoint.where, checkpoint.shapes.keys()
    found = [
        (name.removesuffix(mark), spelling, config_of)
        for mark, spelling, config_of in _SPELLINGS
        for name in names
        if name == mark or name.endswith(f".{mark}")
    ]
    if not found and config is not None:
        return Recognised(config=config, names=_as_they_are(names))
    if len(found) != 1 or not set(found[0][0].split(".")) <= {*_PREFIXES, ""}:
        raise _not_one([prefix for prefix, _, _ in found], checkpoint)
    prefix, spelling, config_of = found[0]
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    plain: dict[str, str] = {}
    for name, theirs in spelling(own).items():
        if theirs in plain:
            raise ModelError(f"{where} holds both {shown(plain[theirs])} and {shown(prefix + name)}: the same weight")
        plain[theirs] = prefix + name
    try:
        config = config or config_of({name: checkpoint.shapes[theirs] for name, theirs in plain.items()})
    except ModelError as exc:
        raise ModelError(f"{where}: {exc}") from exc
    except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
        raise ModelError(f"{where} holds part of a VAE only, or a damaged one: {one_line(exc)}") from exc
    return Recognised(config=config, names=plain)


def _not_one(prefixes: list[str], checkpoint: Checkpoint) -> ModelError:
    if len(prefixes) > 1:
        places = ", ".join(shown(prefix) for prefix in prefixes[:5])
        return ModelError(
            f"{checkpoint.where} holds several VAEs, with names that begin with {places}; save the one that you mean"
        )
    if prefixes:
        return ModelError(
            f"{checkpoint.where} holds a VAE with names that begin with {shown(prefixes[0])}; only "
            f"{', '.join(f'{prefix}.' for prefix in _PREFIXES)} are taken off. Rename its weights"
        )
    first = ", ".join(shown(name) for name in sorted(checkpoint.shapes)[:3]) or "no tensors"
    return ModelError(
        f"{checkpoint.where} holds no VAE of CogVideoX or Wan, by its names ({first}); if it is another model that "
        "longvid can run, pass the folder that holds its config.json"
    )
