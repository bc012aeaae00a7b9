"""Profile: the thresholds that ``longvid tune`` found for one model, size, dtype and device, and what it measured.

A profile is a TOML file that people may edit. For another setting it is refused, and the message says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from longvid import __version__
from longvid.environment import describe_machine
from longvid.errors import ModelError
from longvid.events import Direction
from longvid.files import check_file_target, write_whole
from longvid.memory.offload import OffloadPolicy
from longvid.models.base import CausalVAE, model_name
from longvid.planning.cost_model import DeviceRates

__all__ = ["DirectionProfile", "Profile", "ProfileScope"]

_FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileScope:
    """The setting that a profile was measured in."""

    model: str
    architecture: str
    "digest of the class and its config; weights do not matter to memory or speed"
    size: str
    "frame size after padding, WIDTHxHEIGHT"
    dtype: str
    device: str
    "name of the processor that computes"

    @classmethod
    def of(cls, model: CausalVAE, *, height: int, width: int, dtype: torch.dtype, device: torch.device) -> ProfileScope:
        """The scope of a model on a device."""
        facts, machine = model.describe(), describe_machine(str(device))
        height, width = model.geometry.padded_size(height, width)
        config = json.dumps([facts.get("class_name"), facts.get("config")], sort_keys=True, default=str)
        return cls(
            model=model_name(model),
            architecture=hashlib.sha256(config.encode()).hexdigest()[:16],
            size=f"{width}x{height}",
            dtype=str(dtype).removeprefix("torch."),
            device=str(machine["accelerator"] or machine["cpu"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionProfile:
    """The chosen threshold of one direction, and the rates that were measured."""

    slice_frames: int
    "frames of a slice in the layer with the largest frames"
    resident_bytes: int
    "contexts that stay on the device, together"
    prefetch_bytes: int
    peak_bytes: int
    "measured peak of the run with it, weights included"
    slowdown: float
    "measured time of a chunk divided by the time without offloading"
    flops_per_second: float
    link_bytes_per_second: float

    @property
    def policy(self) -> OffloadPolicy:
        """The threshold as an offload policy."""
        if self.resident_bytes == 0:
            return OffloadPolicy("all", prefetch_bytes=self.prefetch_bytes)
        return OffloadPolicy("size", self.resident_bytes, prefetch_bytes=self.prefetch_bytes)

    @property
    def rates(self) -> DeviceRates:
        """The measured rates of the device."""
        return DeviceRates(
            flops_per_second=self.flops_per_second, link_bytes_per_second=self.link_bytes_per_second, measured=True
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Thresholds for both directions, or for the one that was tuned."""

    scope: ProfileScope
    reserved_bytes: int
    "measured peak above the plan: scratch memory of kernels and the allocator's rounding"
    directions: Mapping[Direction, DirectionProfile]

    def check(self, scope: ProfileScope) -> None:
        """Raise ModelError, with what differs, unless the profile holds for ``scope``. Names of models may differ."""
        mine, asked = asdict(self.scope), asdict(scope)
        differs = {key: f"{key} {mine[key]} instead of {asked[key]}" for key in mine if mine[key] != asked[key]}
        if "size" in differs:
            differs["size"] = f"frame {differs['size']}"
        model = differs.pop("model", f"another configuration of {self.scope.model}")
        if "architecture" in differs:
            differs["architecture"] = model
        if differs:
            raise ModelError(
                f"the profile was measured in another setting: {', '.join(differs.values())}; run longvid tune for "
                "this one, or leave it out"
            )

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the TOML file, all or nothing.

        Raises:
            StoreError: a file is there and ``overwrite`` is not set, or the disk refuses the write.
        """
        import tomli_w

        check_file_target(path, overwrite=overwrite, what="profile")
        content: dict[str, Any] = {
            "longvid": {"kind": "profile", "format_version": _FORMAT_VERSION, "created_by": f"longvid {__version__}"},
            "scope": asdict(self.scope),
            "reserved_bytes": self.reserved_bytes,
        }
        for direction, part in self.directions.items():
            content[direction] = asdict(part)
        write_whole(path, tomli_w.dumps(content), what="the profile")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`write` wrote.

        Raises:
            ModelError: there is no such file, or it is not a profile.
        """
        where = Path(path)
        try:
            content = tomllib.loads(where.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise ModelError(f"there is no profile {where}; longvid tune --save {where} makes one") from exc
        except (OSError, ValueError) as exc:
            raise ModelError(f"the profile {where} cannot be read: {exc}") from exc
        try:
            if content["longvid"]["kind"] != "profile" or content["longvid"]["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"it says {content['longvid']}")
            directions = {
                name: DirectionProfile(**_numbers(content[name], name))
                for name in get_args(Direction)
                if name in content
            }
            if not directions:
                raise ValueError("it has neither encode nor decode")
            return cls(
                scope=ProfileScope(**content["scope"]),
                **_numbers({"reserved_bytes": content["reserved_bytes"]}, "profile"),
                directions=directions,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ModelError(f"{where} is not a profile that longvid tune wrote: {exc}") from exc


def _numbers(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The table, if its bytes are whole numbers from 0 and its rates positive numbers: people edit these files."""
    for key, value in table.items():
        good = isinstance(value, int) if key.endswith(("_bytes", "_frames")) else isinstance(value, (int, float))
        if not good or isinstance(value, bool) or value < 0 or (value == 0 and not key.endswith("_bytes")):
            raise ValueError(f"{key} = {value!r} of {name} is not a {'number of bytes' if 'bytes' in key else 'rate'}")
    return dict(table)
