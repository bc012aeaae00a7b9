"""Parity with diffusers: same weights, same chunks, the same numbers but for the last bits."""

import logging

import pytest
import torch

from longvid import ConvCache, ModelError, load_model
from longvid.models.cogvideox import CogVideoXConfig

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

NANO = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}
CONFIGS = {
    "nano": NANO,
    "deeper": {**NANO, "layers_per_block": 2, "block_out_channels": (8, 8, 24, 24), "norm_eps": 1e-5},
    "quant": {**NANO, "latent_channels": 3, "use_quant_conv": True, "use_post_quant_conv": True},
    "1.5": {**NANO, "scaling_factor": 0.7, "invert_scale_latents": True, "sample_height": 300, "sample_width": 300},
    "time-8": {**NANO, "temporal_compression_ratio": 8},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def reference(config, dtype=torch.float32):
    vae = diffusers.AutoencoderKLCogVideoX(**config).eval()
    # norms with weights of 1 and biases of 0 would hide a mix-up
    for name, p in vae.named_parameters():
        if "norm" in name and p.ndim == 1:
            torch.nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.2)
    vae = vae.to(dtype)
    if vae.config.temporal_compression_ratio != 4:
        vae.num_sample_frames_batch_size = 2 * vae.config.temporal_compression_ratio
    return vae


def ours(model, direction, x, num_frames, plan=None):
    module, step = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    with ConvCache(module) as cache:
        parts = []
        for c in (plan or model.geometry.schedule).chunks(num_frames):
            a, b = (c.frame_start, c.frame_stop) if direction == "encode" else (c.latent_start, c.latent_stop)
            parts.append(step(x[:, :, a:b], cache))
        return torch.cat(parts, dim=2)


def relative_error(got, expected):
    assert got.shape == expected.shape
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def check(config, num_frames, height, width, dtype):
    theirs = reference(config, dtype)
    model = load_model(theirs)
    p = model.geometry.pixels_per_latent
    x = (torch.rand(1, 3, num_frames, height, width) * 2 - 1).to(dtype)
    t = model.geometry.schedule.num_latents(num_frames)
    z = torch.randn(1, model.geometry.latent_channels, t, height // p, width // p).to(dtype)
    with torch.no_grad():
        moments, pixels = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
    errors = {
        "encode": relative_error(ours(model, "encode", x, num_frames), moments),
        "decode": relative_error(ours(model, "decode", z, num_frames), pixels),
    }
    assert all(e <= TOLERANCE[dtype] for e in errors.values()), errors


@pytest.mark.parametrize(
    ("num_frames", "dtype"), [(1, torch.float32), (9, torch.float32), (17, torch.float32), (17, torch.bfloat16)]
)
@pytest.mark.parametrize("config", [c for c in CONFIGS if c != "time-8"])
def test_small_configurations(config, num_frames, dtype):
    check(CONFIGS[config], num_frames, 32, 48, dtype)


@pytest.mark.parametrize(("num_frames", "dtype"), [(33, torch.float32), (1, torch.bfloat16)])
def test_other_lengths(num_frames, dtype):
    check(NANO, num_frames, 32, 48, dtype)


@pytest.mark.parametrize("num_frames", [1, 17])
def test_another_temporal_compression(num_frames):
    check(CONFIGS["time-8"], num_frames, 32, 32, torch.float32)


@pytest.mark.parametrize("config", ["nano", "time-8"])
def test_every_length_by_the_reference_plan(config):
    """The online plan pads and gives other latents where diffusers makes the first chunk longer."""
    theirs = reference(CONFIGS[config])
    model = load_model(theirs)
    f, own = model.geometry.frames_per_latent, model.geometry.schedule
    for num_frames in [*range(1, 4 * f + 3), 6 * f, 7 * f + 1]:
        plan = model.geometry.reference_schedule(num_frames)
        x = torch.rand(1, 3, num_frames, 16, 16) * 2 - 1
        z = torch.randn(1, 16, plan.num_latents(num_frames), 2, 2)
        with torch.no_grad():
            moments, pixels = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
        assert relative_error(ours(model, "encode", x, num_frames, plan), moments) <= 1e-5, num_frames
        decode, decoded = own.reference_decode(z.shape[2])
        assert relative_error(ours(model, "decode", z, decoded, decode), pixels) <= 1e-5, num_frames


def test_full_configuration():
    check({}, 17, 16, 24, torch.float32)


@pytest.mark.slow
def test_full_configuration_in_bfloat16():
    """Slow where PyTorch's library has no bfloat16 convolutions: minutes for frames of this size."""
    check({}, 9, 16, 16, torch.bfloat16)


def test_bfloat16_encode_is_the_reference_bit_for_bit():
    theirs = reference(NANO, torch.bfloat16)
    x = (torch.rand(1, 3, 17, 32, 48) * 2 - 1).bfloat16()
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.parameters
    assert torch.equal(ours(load_model(theirs), "encode", x, 17), expected)


def test_another_chunk_plan_gives_another_result():
    """Negative control: the norms run over the frames of a chunk, so the plan is part of the result."""
    model = load_model(reference(NANO))
    x = torch.rand(1, 3, 17, 32, 48) * 2 - 1
    with ConvCache(model.encoder) as cache:
        whole = model.encode(x, cache)
    assert relative_error(whole, ours(model, "encode", x, 17)) > 1e-3


def test_weights_are_shared_with_the_instance_not_copied():
    theirs = reference(NANO)
    model = load_model(theirs)
    for name, tensor in theirs.state_dict().items():
        assert model.state_dict()[name].data_ptr() == tensor.data_ptr()
    assert all(p.requires_grad for p in theirs.parameters())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"block_out_channels": (6, 8, 8), "norm_num_groups": 4}, "do not divide"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio 3"),
        ({"block_out_channels": (32, 64), "temporal_compression_ratio": 4}, "at most 2, which is what 2 blocks allow"),
        ({"use_quant_conv": True}, "cannot follow 16 latent channels"),
        ({"in_channels": 1}, "RGB"),
        ({"down_block_types": ["SomethingElse"]}, "SomethingElse"),
    ],
)
def test_impossible_configs_are_refused(config, said):
    with pytest.raises(ModelError, match=said):
        CogVideoXConfig.from_dict(config)


def test_described_facts():
    facts = load_model("cogvideox1.5-5b").describe()
    assert facts["class_name"] == "AutoencoderKLCogVideoX"
    assert facts["scaling_factor"] == 0.7
    assert facts["invert_scale_latents"] is True
    assert (facts["temporal_compression_ratio"], facts["spatial_compression_ratio"]) == (4, 8)
