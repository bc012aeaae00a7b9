"""Parity of Wan 2.1 and 2.2 with diffusers: same weights, same chunks, the same bits in float64."""

import logging

import pytest
import torch

from longvid import ConvCache, ModelError, ScheduleError, load_model
from longvid.memory.copy_engine import CopyEngine
from longvid.memory.offloader import Offloader
from longvid.models.kernels.cpu import has_bfloat16
from longvid.models.wan import LATENT_STATISTICS, WanConfig

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

NANO = {"base_dim": 8, "num_res_blocks": 1}
PATCHES = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
CONFIGS = {
    "2.1": NANO,
    "2.1 deeper": {**NANO, "num_res_blocks": 2, "dim_mult": [1, 2, 2, 4]},
    "2.2": {**NANO, "decoder_base_dim": 16, "z_dim": 48, "is_residual": True, **PATCHES},
}
SIZE = {"2.1": (32, 48), "2.1 deeper": (32, 48), "2.2": (64, 96)}
"""not powers of two, for which BLAS rounds a product of float64 by the number of its columns: the reference has one
``quant_conv`` for the whole video"""


def reference(config, dtype=torch.float64, seed=0):
    """A diffusers instance whose weights hide no mix-up."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLWan(**config).eval()
    for name, weight in vae.named_parameters():
        if "gamma" in name:  # gains of 1 would hide one
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    return vae.to(dtype)


def chunked(model, direction, x, lengths):
    module, step = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    with ConvCache(module) as cache:
        return torch.cat([step(part, cache) for part in torch.split(x, lengths, dim=2)], dim=2)


def relative_error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def both(config, num_frames, size, dtype, **options):
    """Results in both directions with the reference's chunks, ours and theirs, of ``num_frames`` frames."""
    theirs = reference(config, dtype, **options)
    model = load_model(theirs)
    height, width = size
    p, num_latents = model.geometry.pixels_per_latent, 1 + (num_frames - 1) // 4
    x = (torch.rand(1, 3, num_frames, height, width) * 2 - 1).to(dtype)
    z = torch.randn(1, model.geometry.latent_channels, num_latents, height // p, width // p).to(dtype)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
    whole = x[:, :, : 1 + 4 * (num_latents - 1)]  # the rest is dropped there
    got = (
        chunked(model, "encode", whole, [1] + [4] * (num_latents - 1)),
        chunked(model, "decode", z, [1] * num_latents),
    )
    return got, expected


@pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 7, 8, 9, 11, 13])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_reference_s_chunks_give_its_bits_in_float64(config, num_frames):
    got, expected = both(CONFIGS[config], num_frames, SIZE[config], torch.float64)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("config", CONFIGS)
def test_other_dtypes(config, dtype, tolerance, num_frames):
    got, expected = both(CONFIGS[config], num_frames, (32, 48), dtype)
    errors = list(map(relative_error, got, expected))
    assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("name", ["2.1", pytest.param("2.2", marks=pytest.mark.slow)])
def test_full_width(name):
    config = {} if name == "2.1" else {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
    config |= PATCHES if name == "2.2" else {}
    got, expected = both(config, 5, (32, 32), torch.float32)
    errors = list(map(relative_error, got, expected))
    assert max(errors) <= 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2.1", "2.2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_full_width_in_other_dtypes(name, dtype):
    if dtype == torch.bfloat16 and not has_bfloat16():
        pytest.skip("PyTorch's own bfloat16 kernels are too slow")
    config = {} if name == "2.1" else {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True}
    got, expected = both({**config, **(PATCHES if name == "2.2" else {})}, 5, (32, 48), dtype)
    errors = list(map(relative_error, got, expected))
    # The reference has one quant_conv for the whole video. At 96 channels and 6 pixels BLAS rounds by its columns.
    exact = 0.0 if name == "2.1" else 1e-15
    assert max(errors) <= (exact if dtype == torch.float64 else 1e-2), errors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("config", ["2.1", "2.2"])
def test_any_cut_gives_the_same(config, dtype, tolerance):
    model = load_model(reference(CONFIGS[config], dtype))
    height, width = 32, 48
    p, c = model.geometry.pixels_per_latent, model.geometry.latent_channels
    x = (torch.rand(1, 3, 33, height, width) * 2 - 1).to(dtype)
    z = torch.randn(1, c, 9, height // p, width // p).to(dtype)
    encoded, decoded = chunked(model, "encode", x, [33]), chunked(model, "decode", z, [9])
    for lengths in ([1] + [4] * 8, [5, 8, 8, 8, 4], [9, 4, 4, 16], [17, 16], [1, 32], [5, 4, 4, 20]):
        assert relative_error(chunked(model, "encode", x, lengths), encoded) <= tolerance
    for lengths in ([1] * 9, [2, 2, 2, 3], [1, 4, 4], [5, 1, 3], [3, 6]):
        assert relative_error(chunked(model, "decode", z, lengths), decoded) <= tolerance


def test_a_layout_changes_the_last_bits_only():
    for config in ("2.1", "2.2"):
        model = load_model(reference(CONFIGS[config], torch.float32))
        x = torch.rand(1, 3, 9, *SIZE[config]) * 2 - 1
        last = x.contiguous(memory_format=torch.channels_last_3d)
        encoded = chunked(model, "encode", x, [9])
        assert relative_error(chunked(model, "encode", last, [9]), encoded) <= 1e-5
        z = encoded[:, : model.geometry.latent_channels]
        last = z.contiguous(memory_format=torch.channels_last_3d)
        assert relative_error(chunked(model, "decode", last, [3]), chunked(model, "decode", z, [3])) <= 1e-5


@pytest.mark.parametrize("config", ["2.1", "2.2"])
def test_weights_of_one_entry_find_no_permuted_axis(config):
    """A map that is right for some weights only would be hidden by alike ones: one entry of every tensor stands out."""
    theirs = reference(CONFIGS[config])
    generator = torch.Generator().manual_seed(3)
    for name, weight in theirs.named_parameters():
        if weight.ndim > 1 and "gamma" not in name:
            entry = torch.randint(weight.numel(), (1,), generator=generator)
            with torch.no_grad():
                weight.mul_(0.3).view(-1)[entry] += 2.0
    model = load_model(theirs)
    x = torch.rand(1, 3, 5, *SIZE[config], dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.parameters
        z = expected[:, : model.geometry.latent_channels]
        pixels = theirs.decode(z).sample
    assert relative_error(chunked(model, "encode", x, [1, 4]), expected) <= 1e-14
    assert relative_error(chunked(model, "decode", z, [1, 1]), pixels) <= 1e-14
    assert pixels.std() > 0.01


def test_a_qwen_image_vae_is_the_same_architecture():
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLQwenImage(**NANO).eval().double()
    model = load_model(theirs)
    x = torch.rand(1, 3, 5, 32, 48, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.parameters
    assert relative_error(chunked(model, "encode", x, [1, 4]), expected) <= 1e-14
    assert model.describe()["latents_mean"] == LATENT_STATISTICS[16][0]


def test_scaling_is_that_of_the_config_or_the_published_one():
    assert WanConfig.from_dict({}).latents_mean == LATENT_STATISTICS[16][0]
    assert WanConfig.from_dict({"z_dim": 48}).latents_std == LATENT_STATISTICS[48][1]
    assert WanConfig.from_dict({"z_dim": 4}).latents_std is None
    own = WanConfig.from_dict({"z_dim": 2, "latents_mean": [0.5, 1.0], "latents_std": [2.0, 3.0]})
    assert (own.latents_mean, own.latents_std) == ((0.5, 1.0), (2.0, 3.0))


def test_published_statistics_are_those_of_diffusers():
    config = diffusers.AutoencoderKLWan(**NANO).config
    assert LATENT_STATISTICS[16] == (tuple(config.latents_mean), tuple(config.latents_std))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"in_channels": 4}, "RGB"),
        ({"patch_size": 2}, "RGB in patches of 2x2"),
        ({"temperal_downsample": [True, True]}, "3 changes of size"),
        ({"latents_mean": [0.0, 1.0]}, "2 values for 16"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal = 8"),
        ({"scale_factor_spatial": 32}, "scale_factor_spatial = 32"),
    ],
)
def test_impossible_configs_are_refused(config, said):
    with pytest.raises(ModelError, match=said):
        WanConfig.from_dict(config)


def test_chunks_that_do_not_fit_are_refused_and_the_video_continues():
    model = load_model("wan2.1-nano", random_weights=0)
    with ConvCache(model.encoder) as cache:
        for num_frames, size in ((3, (32, 32)), (4, (32, 32)), (5, (30, 32))):
            with pytest.raises(ScheduleError):
                model.encode(torch.zeros(1, 3, num_frames, *size), cache)
        assert model.encode(torch.zeros(1, 3, 5, 32, 32), cache).shape == (1, 32, 2, 4, 4)
        with pytest.raises(ScheduleError, match="4 n frames"):
            model.encode(torch.zeros(1, 3, 5, 32, 32), cache)
        assert model.encode(torch.zeros(1, 3, 8, 32, 32), cache).shape == (1, 32, 2, 4, 4)


def test_a_shortcut_is_added_once_where_memory_runs_out(monkeypatch):
    """It changes the output in place: repeated as a whole, it would add the frames before the failure once more."""
    model = load_model("wan2.2-nano", random_weights=0)
    chunks = torch.randn(2, 1, 48, 2, 2, 2)
    real, calls = torch.Tensor.repeat_interleave, []

    def decode(failing):
        with (
            CopyEngine(torch.device("cpu")) as copies,
            ConvCache(model.decoder, offloader=Offloader(copies=copies)) as cache,
        ):
            first = model.decode(chunks[0], cache)
            calls.clear()
            calls.append(failing)
            return first, model.decode(chunks[1], cache)

    def repeat_interleave(self, *args, **kwargs):
        calls.append(1)
        if calls[0] == len(calls):
            raise torch.OutOfMemoryError("out of memory, as injected")
        return real(self, *args, **kwargs)

    expected = decode(None)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", repeat_interleave)
    with pytest.warns(UserWarning, match="ran out of memory"):
        got = decode(3)  # in the second frame of the first block
    assert all(map(torch.equal, got, expected))
