"""Original names of weights, written from what is known of the authors' modules and not from what reads them."""

import re

_ENDS = {
    r"norm1\.gamma": "residual.0.gamma",
    r"conv1\.(weight|bias)": r"residual.2.\1",
    r"norm2\.gamma": "residual.3.gamma",
    r"conv2\.(weight|bias)": r"residual.6.\1",
    r"conv_shortcut\.(weight|bias)": r"shortcut.\1",
}


def _in_block(name):
    for ours, theirs in _ENDS.items():
        if re.fullmatch(ours, name):
            return re.sub(ours, theirs, name)
    return name


def wan(name, *, blocks=2, residual=False):
    """The authors' name of a weight of Wan; ``blocks`` is num_res_blocks."""
    for ours, theirs in (("quant_conv.", "conv1."), ("post_quant_conv.", "conv2.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    half, rest = name.split(".", 1)
    for ours, theirs in (("conv_in.", "conv1."), ("norm_out.", "head.0."), ("conv_out.", "head.2.")):
        if rest.startswith(ours):
            return f"{half}.{theirs}{rest.removeprefix(ours)}"
    for ours, number in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        if rest.startswith(f"mid_block.{ours}."):
            return f"{half}.middle.{number}.{_in_block(rest.removeprefix(f'mid_block.{ours}.'))}"
    samples = "downsamples" if half == "encoder" else "upsamples"
    blocks += half == "decoder"
    if half == "encoder" and not residual:
        _, number, end = rest.split(".", 2)
        return f"encoder.downsamples.{number}.{_in_block(end)}"
    block, layer, end = re.fullmatch(
        r"\w+_blocks\.(\d)\.(resnets\.\d|(?:down|up)sampler|upsamplers\.0)\.(.+)", rest
    ).groups()
    number = int(layer[-1]) if layer.startswith("resnets") else blocks
    if residual:
        return f"{half}.{samples}.{block}.{samples}.{number}.{_in_block(end)}"
    return f"decoder.upsamples.{int(block) * (blocks + 1) + number}.{_in_block(end)}"


def cogvideox(name, *, levels=4):
    """The authors' name of a weight of CogVideoX."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut")
