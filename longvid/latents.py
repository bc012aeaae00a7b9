"""Latents as diffusion models see them: the formula between raw latents and normalized ones, and where channels are.

A VAE computes **raw** latents, and stores hold these. Diffusion models work on **normalized** latents: what the
pipelines of diffusers give to the transformer, and what ``output_type="latent"`` returns. The facts of the model decide
the formula (:func:`normalize`). It is computed in the order of the pipelines, so that float32 gives their bits, and in
float32 for narrower dtypes, with one rounding at the end.

Arrays are those of numpy or torch: (t, c, h, w) as in a store; (c, t, h, w), (b, c, t, h, w) or (b, t, c, h, w) as in
pipelines. torch is never imported here: a tensor comes from a caller who did.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from longvid.errors import ModelError, OptionError

__all__ = ["denormalize", "find_channel_axis", "normalize"]

_LAYOUTS = {4: {0: "(c, t, h, w)", 1: "(t, c, h, w)"}, 5: {1: "(b, c, t, h, w)", 2: "(b, t, c, h, w)"}}
"layouts of latents by their number of axes, then by the axis of channels"

ArrayT = TypeVar("ArrayT")


def normalize(z: ArrayT, model: Any, *, channel_axis: int | None = None, image: bool = False) -> ArrayT:
    """Raw latents to those that the pipelines of the model's family give to their transformer.

    ====================  ====================================================================
    Wan, Qwen-Image       ``(z - latents_mean) / latents_std``, per channel
    CogVideoX             ``z * scaling_factor``
    CogVideoX 1.5         the same; ``z / scaling_factor`` with ``image=True``
    ``tiny``              ``z``
    others                ``(z - latents_mean) / latents_std * scaling_factor``, or
                          ``(z - shift_factor) * scaling_factor``, of what the model describes
    ====================  ====================================================================

    Args:
        z: numpy array or torch tensor of a floating dtype: (t, c, h, w), (c, t, h, w), (b, c, t, h, w) or
            (b, t, c, h, w). Not moments: take their first half of the channels, which is the mean.
        model: whose latents they are: a :class:`~longvid.LatentStore`, a model that :func:`longvid.load_model` gave,
            a VAE or a pipeline of diffusers, or the facts of one by name (``store.vae``, ``vae.config``).
        channel_axis: the axis of the channels. None finds it, if only one axis of these layouts has as many entries as
            the model has latent channels.
        image: these are latents of the picture that an image-to-video pipeline is conditioned on. Models with
            ``invert_scale_latents`` (CogVideoX 1.5) were trained on such latents divided by the factor.

    Returns:
        a new array of the same kind, shape, dtype and device.

    Raises:
        OptionError: the shape or the dtype does not fit, or more than one axis could be that of the channels.
        ModelError: nothing says how latents of this model are scaled, or what is said cannot be used.
    """
    return _scaled(z, model, channel_axis, image, back=False)


def denormalize(z: ArrayT, model: Any, *, channel_axis: int | None = None, image: bool = False) -> ArrayT:
    """What a pipeline's transformer works on to raw latents, which decoders take; the opposite of :func:`normalize`.

    Arguments and errors are those of :func:`normalize`.
    """
    return _scaled(z, model, channel_axis, image, back=True)


def find_channel_axis(shape: Sequence[int], channels: int, channel_axis: int | None = None) -> int:
    """The axis of the channels in an array of latents of this shape.

    Args:
        shape: of four axes, or of five with a batch in front.
        channels: latent channels of the model.
        channel_axis: what the caller says; None to find it.

    Raises:
        OptionError: no axis fits, or two do and the caller does not say which.
    """
    found, layouts = " x ".join(map(str, shape)), _LAYOUTS.get(len(shape))
    if layouts is None:
        raise OptionError(f"latents of shape {found} have {len(shape)} axes; {_all_layouts()} are expected")
    named = " or ".join(layouts.values())
    if channel_axis is not None:
        axis = channel_axis + len(shape) if channel_axis < 0 else channel_axis
        if axis not in layouts or shape[axis] != channels:
            raise OptionError(
                f"channel_axis={channel_axis} was given for latents of shape {found}; it is axis "
                f"{' or '.join(map(str, layouts))} of {named}, with {channels} channels"
            )
        return axis
    fitting = [axis for axis in layouts if shape[axis] == channels]
    if not fitting:
        moments = any(shape[axis] == 2 * channels for axis in layouts)
        advice = "these look like moments: pass the first half of their channels, the mean"
        raise OptionError(
            f"latents of shape {found} are not those of this model, which has {channels} latent channels: {named} is "
            f"expected; {advice if moments else 'check the model'}"
        )
    if len(fitting) > 1:
        raise OptionError(
            f"latents of shape {found} can be {named}, since two axes have {channels} entries; say which one has the "
            f"channels: channel_axis={fitting[0]} or channel_axis={fitting[1]} (--channel-axis)"
        )
    return fitting[0]


def _all_layouts() -> str:
    return ", ".join(name for layouts in _LAYOUTS.values() for name in layouts.values())


# ------------------------------------------------------------------------------------------------- the formula


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """The facts of a model that say how its latents are scaled."""

    channels: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    shift: float
    factor: float
    inverted_for_images: bool

    @property
    def per_channel(self) -> bool:
        return self.mean is not None

    def apply(self, x: Any, column: Callable[[tuple[float, ...]], Any], *, image: bool, back: bool) -> Any:
        """The formula, for float32 or wider; ``column`` makes an array of numbers per channel.

        The pipelines multiply by 1/std, a rounded number, and divide by it on the way back.
        """
        if image and self.inverted_for_images:
            back = not back
        if self.mean is not None and self.std is not None:
            mean, reciprocal = column(self.mean), 1.0 / column(self.std)
            if back:
                return (x if self.factor == 1 else 1 / self.factor * x) / reciprocal + mean
            scaled = (x - mean) * reciprocal
            return scaled if self.factor == 1 else self.factor * scaled
        if back:
            raw = 1 / self.factor * x
            return raw + self.shift if self.shift else raw
        return self.factor * (x - self.shift if self.shift else x)


def _scaled(z: ArrayT, model: Any, channel_axis: int | None, image: bool, *, back: bool) -> ArrayT:
    scale, array = _scale_of(model), _as_array(z)
    axis = 0
    if scale.channels is not None and (scale.per_channel or channel_axis is not None):
        axis = find_channel_axis(array.shape, scale.channels, channel_axis)
    elif scale.channels is not None:
        _require_channels(array.shape, scale.channels)  # one factor for all: it does not matter which axis it is
    shape = [1] * array.ndim
    shape[axis] = -1
    torch = sys.modules.get("torch")
    result: ArrayT
    if torch is not None and isinstance(array, torch.Tensor):
        wide = torch.promote_types(array.dtype, torch.float32)

        def tensor_column(values: tuple[float, ...]) -> Any:
            return torch.tensor(values, dtype=torch.float32).view(shape).to(array.device, wide)

        result = scale.apply(array.to(wide), tensor_column, image=image, back=back).to(array.dtype)
        return result

    def array_column(values: tuple[float, ...]) -> Any:  # float32 first, as torch.tensor makes them
        return np.array(values, np.float32).reshape(shape).astype(np.result_type(array.dtype, np.float32))

    wide_array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
    result = scale.apply(wide_array, array_column, image=image, back=back).astype(array.dtype, copy=False)
    return result


def _require_channels(shape: Sequence[int], channels: int) -> None:
    fitting = [axis for axis in _LAYOUTS.get(len(shape), {}) if shape[axis] == channels]
    find_channel_axis(shape, channels, fitting[0] if fitting else None)


def _as_array(z: Any) -> Any:
    """A tensor as it is, anything else as a numpy array; OptionError unless its numbers are floating."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(z, torch.Tensor):
        if z.is_floating_point():
            return z
        dtype = z.dtype
    else:
        array = np.asarray(z)
        if array.dtype.kind == "f":
            return array
        dtype = array.dtype
    raise OptionError(f"latents of dtype {dtype} were given; floating numbers are expected")


def _scale_of(model: Any) -> _Scale:
    facts, channels = _facts_of(model)
    mean, std = (_numbers(facts, name) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise ModelError("the model has latents_mean or latents_std, and not both; its latents cannot be scaled")
    if mean is None and facts.get("scaling_factor") is None:
        raise ModelError(
            "nothing says how latents of this model are scaled: its facts (describe(), or vae in the attributes of a "
            "store) have neither scaling_factor nor latents_mean and latents_std; scaling_factor 1.0 stands for none"
        )
    if mean is not None and std is not None:
        channels = len(mean) if channels is None else channels
        if not len(mean) == len(std) == channels:
            raise ModelError(
                f"latents_mean has {len(mean)} values and latents_std {len(std)}, for {channels} latent channels"
            )
        if min(std) <= 0:
            raise ModelError(f"latents_std has the value {min(std)}; numbers above 0 are expected")
    factor = _number(facts, "scaling_factor", 1.0)
    if factor == 0:
        raise ModelError("scaling_factor is 0; another number is expected")
    return _Scale(
        channels=channels,
        mean=mean,
        std=std,
        shift=_number(facts, "shift_factor", 0.0),
        factor=factor,
        inverted_for_images=bool(facts.get("invert_scale_latents")),
    )


def _facts_of(model: Any) -> tuple[Mapping[str, Any], int | None]:
    """What is known of a model by name, and its latent channels if that is known."""
    if isinstance(model, Mapping):
        config = model.get("config")
        records = [model, *([config] if isinstance(config, Mapping) else [])]
        known = (record.get(name) for record in records for name in ("latent_channels", "z_dim"))
        return model, next((number for number in known if isinstance(number, int)), None)
    if hasattr(model, "describe") and hasattr(model, "geometry"):
        return model.describe(), int(model.geometry.latent_channels)
    if isinstance(getattr(model, "vae", None), Mapping):  # a store
        return model.vae, int(model.latents.shape[1])
    for inner in (getattr(model, "vae", None), getattr(model, "config", None)):  # a pipeline, a VAE of diffusers
        if inner is not None:
            return _facts_of(inner)
    raise ModelError(
        f"a {type(model).__name__} does not say how latents are scaled; pass a store (lv.open_store), a model "
        "(lv.load_model), or a VAE or pipeline of diffusers"
    )


def _numbers(facts: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    values = facts.get(name)
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or not values:
        raise ModelError(f"{name} is {ascii(values)[:60]}; a list of numbers is expected")
    return tuple(_checked(value, name) for value in values)


def _number(facts: Mapping[str, Any], name: str, default: float) -> float:
    value = facts.get(name)
    return default if value is None else _checked(value, name)


def _checked(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ModelError(f"{name} has the value {ascii(value)[:60]}; finite numbers are expected")
    return float(value)
