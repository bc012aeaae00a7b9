"""How far the forms of bfloat16 are from the same weights in float32, and errors of values that are not finite."""

import copy
import re

import pytest
import torch
from support.contexts import forward_context

from longvid import ModelError
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.forward import decode_chunk
from longvid.models.kernels.cpu import has_bfloat16
from longvid.models.numerics import Numerics

CPU = torch.device("cpu")
WIDE = CogVideoXConfig(block_out_channels=(16, 16, 16, 16), norm_num_groups=4, layers_per_block=1)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return CogVideoXVAE(WIDE).eval()


@pytest.fixture(scope="module")
def distance(wide):
    """Of the moments of two chunks from those of the same weights in float32, relative."""
    narrow = copy.deepcopy(wide).bfloat16()
    exact = copy.deepcopy(narrow).float()
    torch.manual_seed(1)
    chunks = [(2 * torch.rand(1, 3, t, 32, 48) - 1).bfloat16() for t in (9, 8)]

    def moments(model, dtype, numerics):
        layout = torch.channels_last_3d if numerics.layout == "channels_last" else torch.contiguous_format
        with forward_context(model.encoder, numerics=numerics) as context:
            return torch.cat([model.encode(x.to(dtype, memory_format=layout), context).float() for x in chunks], 2)

    truth = moments(exact, torch.float32, Numerics())
    return lambda numerics: float((moments(narrow, torch.bfloat16, numerics) - truth).norm() / truth.norm())


def test_float32_products_are_not_further_from_float32_than_plain_bfloat16(distance):
    plain = distance(Numerics())
    assert plain > 0.005  # or else there would be nothing to compare
    for layout in ("contiguous", "channels_last"):
        assert distance(Numerics(layout=layout, float32_products=True)) <= plain


@pytest.mark.parametrize("widens", [True, *([False] if has_bfloat16() else [])])
def test_an_encoder_with_winograd_stays_within_its_bar(distance, widens):
    """1.25 times the distance of the plain contiguous form, which computes what diffusers computes."""
    winograd = Numerics(layout="channels_last", paired_frames=True, float32_products=widens)
    assert distance(winograd) <= 1.25 * distance(Numerics())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_are_named(wide, value):
    latents = torch.zeros(3, 16, 4, 6)
    latents[1, 0, 0, 0] = value
    with (
        forward_context(wide.decoder) as context,
        pytest.raises(ModelError, match="latent 1 of the chunk is not finite"),
    ):
        decode_chunk(wide, context, latents, device=CPU, dtype=torch.float32)


def test_frames_that_are_not_finite_in_float32_are_not_told_to_try_it(wide):
    broken = copy.deepcopy(wide)
    broken.decoder.conv_out.conv.bias.data.fill_(torch.nan)
    with forward_context(broken.decoder) as context, pytest.raises(ModelError) as caught:
        decode_chunk(broken, context, torch.zeros(3, 16, 4, 6), device=CPU, dtype=torch.float32)
    assert re.search("frame 0 of the decoded chunk is not finite in torch.float32$", str(caught.value))
