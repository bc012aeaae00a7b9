"""Warm-up: its length is found, pinned for the built-in families, and right to the bit."""

import pytest
import torch
from support.models import RunningMean
from torch import nn

from longvid import CausalConv3d, ConvCache, ForwardContext, LatentGeometry, ModelError, load_model, warmup
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offload import Placement
from longvid.memory.offloader import Offloader
from longvid.models.cogvideox import CogVideoXConfig, CogVideoXVAE
from longvid.models.wan import WanConfig, WanVAE


@pytest.fixture(scope="module")
def deep():
    """CogVideoX with all its layers, at the smallest width."""
    torch.manual_seed(1)
    return CogVideoXVAE(CogVideoXConfig(block_out_channels=(4, 4, 4, 4), norm_num_groups=2)).eval()


@pytest.mark.parametrize(("direction", "chunks"), [("encode", 30), ("decode", 38)])
def test_cogvideox_in_full_depth(deep, direction, chunks):
    found = warmup(deep, direction)
    assert found.chunks == chunks
    assert list(found.ready.values()) == list(range(1, chunks + 1))  # one layer a chunk
    assert found.last_layer(0) == "conv_in"
    assert found.last_layer(chunks - 1) == "conv_out"
    assert found.last_layer(chunks) is None


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "chunks"), [("encode", 30), ("decode", 38)])
def test_cogvideox_at_full_width(direction, chunks):
    assert warmup(load_model("cogvideox-2b", random_weights=0), direction).chunks == chunks


@pytest.mark.parametrize(("direction", "latents"), [("encode", 28), ("decode", 38)])
@pytest.mark.parametrize("generation", ["2.1", "2.2"])
def test_wan_in_full_depth(generation, direction, latents):
    """The depth is that of the published models, and so is W: 28 and 38 latents, however they are cut."""
    config = {"base_dim": 4}
    if generation == "2.2":
        config |= {"z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    torch.manual_seed(1)
    model = WanVAE(WanConfig(**config)).eval()
    assert warmup(model, direction, chunk_frames=4).chunks == latents
    assert warmup(model, direction, chunk_frames=16).chunks == -(-latents // 4)


@pytest.mark.parametrize(
    ("chunk_frames", "encode", "decode"), [(16, 2, 2), (8, 3, 4), (4, 6, 8)], ids=["4 latents", "2 latents", "1 latent"]
)
def test_tiny(chunk_frames, encode, decode):
    model = load_model("tiny")
    assert warmup(model, "encode", chunk_frames=chunk_frames).chunks == encode
    assert warmup(model, "decode", chunk_frames=chunk_frames).chunks == decode


class Model(nn.Module):
    """One causal convolution, and an operation over the frames before it."""

    geometry = LatentGeometry(
        latent_channels=4, frames_per_latent=1, pixels_per_latent=1, chunk_frames=4, chunk_invariant=True
    )

    def __init__(self, past):
        super().__init__()
        self.encoder = CausalConv3d(3, 8, 3)
        self.decoder = CausalConv3d(4, 3, 3)
        self.past = past

    def encode(self, x, context):
        context = ForwardContext.of(context)
        with context.chunk():
            return self.encoder(self.past(x), context)

    def describe(self):
        return {"class_name": "Model"}


class AttentionOverAllFrames(nn.Module):
    def __init__(self):
        super().__init__()
        self.frames = []

    def forward(self, x):
        self.frames.append(x)
        keys = torch.cat(self.frames, dim=2).flatten(3).mean(dim=3)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", x.flatten(3).mean(dim=3), keys), dim=-1)
        return x + torch.einsum("bts,bcs->bct", weights, keys)[..., None, None]


@pytest.mark.parametrize("past", [RunningMean, AttentionOverAllFrames])
def test_a_past_that_never_ends_is_refused_and_the_model_left_as_it_was(past):
    model = Model(past())
    with pytest.raises(ModelError, match="encoder of Model never forgets its first frames"):
        warmup(model, "encode")
    assert not torch.isnan(torch.cat([tensor.flatten() for tensor in model.state_dict().values()])).any()
    assert not getattr(model.past, "frames", [])
    assert warmup(Model(nn.Identity()), "encode").chunks == 1


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_from_its_end_on_a_cold_start_has_the_bits_of_the_whole_run_and_not_before(deep, direction):
    found, first = warmup(deep, direction), 2
    model, module = (deep.encode, deep.encoder) if direction == "encode" else (deep.decode, deep.decoder)
    schedule = deep.geometry.schedule
    inputs = [
        torch.rand(1, 3, chunk.padded_frames, 8, 8)
        if direction == "encode"
        else torch.randn(1, 16, chunk.num_latents, 1, 1)
        for chunk in map(schedule.full, range(first + found.chunks + 2))
    ]
    with ConvCache(module) as cache:
        expected = [model(x, cache) for x in inputs]
    with ConvCache(module) as cache:
        cache.start_at(first)
        got = [model(x, cache) for x in inputs[first:]]
    equal = [torch.equal(a, b) for a, b in zip(got, expected[first:], strict=True)]
    assert all(equal[found.chunks :])
    assert not equal[0]
    offloader = Offloader(Placement(offloaded=frozenset(found.ready)), CopyEngine(torch.device("cpu")))
    for moving in (None, offloader):
        with ConvCache(module, offloader=moving) as cache:
            cache.start_at(first)
            for chunk, x in enumerate(inputs[first : first + found.chunks]):
                cache.last_layer = found.last_layer(chunk)
                assert model(x, cache) is None
            cache.last_layer = None
            for x, whole in zip(inputs[first + found.chunks :], expected[first + found.chunks :], strict=True):
                assert torch.equal(model(x, cache), whole)
