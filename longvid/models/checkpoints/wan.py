"""Files of Wan: the original names of the weights, and the architecture that shapes tell.

The authors' modules are the same as those of diffusers and the weights have the same shapes; only names differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from longvid.errors import ModelError

__all__ = ["DIFFUSERS_MARK", "ORIGINAL_MARK", "config_of", "diffusers_names"]

ORIGINAL_MARK = "decoder.middle.0.residual.0.gamma"
DIFFUSERS_MARK = "decoder.mid_block.resnets.0.norm1.gamma"
"a name that every file of the family has, in either spelling"

_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_HALF = {
    ("conv1",): "conv_in",
    ("head", "0"): "norm_out",
    ("head", "2"): "conv_out",
    ("middle", "0"): "mid_block.resnets.0",
    ("middle", "1"): "mid_block.attentions.0",
    ("middle", "2"): "mid_block.resnets.1",
}
_BLOCK = {
    ("residual", "0"): "norm1",
    ("residual", "2"): "conv1",
    ("residual", "3"): "norm2",
    ("residual", "6"): "conv2",
    ("shortcut",): "conv_shortcut",
}
_SAMPLES = {"downsamples": ("down", "down_blocks"), "upsamples": ("up", "up_blocks")}


def diffusers_names(names: Collection[str]) -> dict[str, str]:
    """The name in diffusers format of each original name. A name of another model stays as it is."""
    paths = {name: tuple(name.split(".")) for name in names}
    samplers = {path[:end] for path in paths.values() for end in (3, 5) if set(path[end:]) & {"resample", "time_conv"}}
    flat = {
        path[:3] for path in paths.values() if len(path) > 3 and path[1:2] == ("upsamples",) and path[2].isdecimal()
    }
    places = dict(_places(flat, samplers))
    return {name: _renamed(path, places, samplers) or name for name, path in paths.items()}


def _places(flat: Collection[tuple[str, ...]], samplers: Collection[tuple[str, ...]]) -> Iterator[tuple[Any, str]]:
    """Where the entries of Wan 2.1's flat decoder are: blocks end with what changes the size."""
    block = layer = 0
    for path in sorted(flat, key=lambda path: (len(path[2]), path[2])):
        if path in samplers:
            yield path, f"decoder.up_blocks.{block}.upsamplers.0"
            block, layer = block + 1, 0
        else:
            yield path, f"decoder.up_blocks.{block}.resnets.{layer}"
            layer += 1


def _renamed(path: tuple[str, ...], places: Mapping[Any, str], samplers: Collection[tuple[str, ...]]) -> str | None:
    half, rest = path[0], path[1:]
    if half in _TOP:
        return ".".join((_TOP[half], *rest))
    if half not in ("encoder", "decoder"):
        return None
    for length in (1, 2):
        if rest[:length] in _HALF:
            return ".".join((half, _HALF[rest[:length]], *_in_block(rest[length:])))
    if len(rest) < 3 or rest[0] not in _SAMPLES:
        return None
    way, blocks = _SAMPLES[rest[0]]
    if rest[2] == rest[0] and len(rest) > 4:  # Wan 2.2: blocks with layers
        layer = f"{way}sampler" if path[:5] in samplers else f"resnets.{rest[3]}"
        return ".".join((half, blocks, rest[1], layer, *_in_block(rest[4:])))
    place = places.get(path[:3], f"{half}.{blocks}.{rest[1]}")
    return ".".join((place, *_in_block(rest[2:])))


def _in_block(path: tuple[str, ...]) -> tuple[str, ...]:
    for length in (1, 2):
        if path[:length] in _BLOCK:
            return (_BLOCK[path[:length]], *path[length:])
    return path


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of weights in diffusers names. Whether all of them fit it remains to be checked.

    Raises:
        ModelError: it is not an architecture of this family. LookupError, ArithmeticError: shapes make no sense.
    """
    base, channels = shapes["encoder.conv_in.weight"][:2]
    patch = next((p for p in range(1, 9) if 3 * p * p == channels), None)
    if patch is None:
        raise ModelError(f"the encoder takes {channels} channels, which are not RGB in square patches")
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    levels = list(_levels(shapes, "resnets." if residual else ""))
    if any(width % base for width, _, _ in levels) or not levels:
        raise ModelError(f"the encoder's widths {[width for width, _, _ in levels]} are not multiples of {base}")
    factors = [width // base for width, _, _ in levels]
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.norm_out.gamma"][0] // factors[0],
        "z_dim": shapes["post_quant_conv.weight"][0],
        "dim_mult": factors,
        "num_res_blocks": levels[0][1],
        "temperal_downsample": [time for _, _, time in levels[:-1]],
        "is_residual": residual,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if patch == 1 else patch,
    }


def _levels(shapes: Mapping[str, tuple[int, ...]], within: str) -> Iterator[tuple[int, int, bool]]:
    """Width, number of residual blocks and halving of time of each level of the encoder."""
    block = layer = number = 0
    width = 0
    while True:
        place = f"encoder.down_blocks.{block}." + (f"{within}{layer}." if within else "")
        sampler = f"encoder.down_blocks.{block}." + ("downsampler." if within else "")
        if f"encoder.down_blocks.{block}.to_qkv.weight" in shapes:
            raise ModelError("the encoder has attention between its blocks (attn_scales), which is not supported")
        if f"{place}conv1.weight" in shapes:
            width, number = shapes[f"{place}conv1.weight"][0], number + 1
            block, layer = (block, layer + 1) if within else (block + 1, 0)
            continue
        if not number:
            return
        time = f"{sampler}time_conv.weight" in shapes
        last = f"{sampler}resample.1.weight" not in shapes
        yield width, number, time
        if last:
            return
        block, layer, number = block + 1, 0, 0
