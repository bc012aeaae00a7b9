"""Files of CogVideoX: the original names of the weights, and what shapes tell of the architecture.

Shapes do not tell everything: neither over how many channels a norm runs, nor how often time is halved. Both are known
of the published models, which have one architecture. Nor do they tell ``scaling_factor``: the same weights belong to
CogVideoX-2b and 5b, which scale their latents differently.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from longvid.errors import ModelError

__all__ = ["DIFFUSERS_MARK", "ORIGINAL_MARK", "config_of", "diffusers_names"]

ORIGINAL_MARK = "decoder.mid.block_1.norm1.norm_layer.weight"
DIFFUSERS_MARK = "decoder.mid_block.resnets.0.norm1.norm_layer.weight"
"a name that every file of the family has, in either spelling"

_PARTS = {"downsample": "downsamplers.0", "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut"}
_MIDDLE = {"block_1": "mid_block.resnets.0", "block_2": "mid_block.resnets.1"}
_PUBLISHED = {"block_out_channels": [128, 256, 256, 512], "layers_per_block": 3, "latent_channels": 16}


def diffusers_names(names: Collection[str]) -> dict[str, str]:
    """The name in diffusers format of each original name; those of the training loss are left out.

    The authors count the decoder's levels from the pixels, diffusers counts them from the latents.
    """
    levels = {path[2] for path in (name.split(".") for name in names) if path[:2] == ["decoder", "up"] and path[2:]}
    return {name: _renamed(name.split("."), len(levels)) for name in names if not name.startswith("loss.")}


def _renamed(path: list[str], levels: int) -> str:
    half, *rest = path
    if half not in ("encoder", "decoder") or len(rest) < 3:
        return ".".join(path)
    if rest[0] == "mid" and rest[1] in _MIDDLE:
        return ".".join((half, _MIDDLE[rest[1]], *_in_block(rest[2:])))
    if rest[0] not in ("down", "up") or not rest[1].isdecimal() or len(rest[1]) > 3:
        return ".".join(path)
    level = int(rest[1]) if rest[0] == "down" else levels - 1 - int(rest[1])
    inner = ["resnets", *rest[3:]] if rest[2] == "block" else rest[2:]
    return ".".join((half, f"{rest[0]}_blocks", str(level), *_in_block(inner)))


def _in_block(path: list[str]) -> list[str]:
    return [_PARTS.get(part, part) for part in path]


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of weights in diffusers names. Whether all of them fit it remains to be checked.

    Raises:
        ModelError: it is none of the published models. LookupError: shapes make no sense.
    """
    first = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    widths: list[int] = []
    layers = 0
    while (name := first.format(len(widths), 0)) in shapes:
        widths.append(shapes[name][0])
    while first.format(0, layers) in shapes:
        layers += 1
    latents = shapes["decoder.conv_in.conv.weight"][1]
    found = {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": latents}
    if found != _PUBLISHED:
        facts = ", ".join(f"{key} {value}" for key, value in found.items())
        raise ModelError(
            f"a CogVideoX with {facts} was not published, and weights alone do not tell its norm_num_groups and "
            "temporal_compression_ratio; put its config.json beside the file"
        )
    return {"_class_name": "AutoencoderKLCogVideoX", **found, "scaling_factor": None}
