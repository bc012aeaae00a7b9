"""Normalized latents are those of the diffusers pipelines: compared with the pipelines' own code, bit for bit.

The pipelines cannot be imported without transformers. Their methods are read from the installed files and run here,
with a VAE that encodes everything to given latents.
"""

import __future__

import ast
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import longvid as lv
from longvid import ModelError, OptionError
from longvid.latents import find_channel_axis
from longvid.models.wan import LATENT_STATISTICS

diffusers = pytest.importorskip("diffusers")
logging.getLogger("diffusers").setLevel(logging.ERROR)

NANO_WAN = {"base_dim": 8, "num_res_blocks": 1}
NANO_COGVIDEOX = {"block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4, "layers_per_block": 1}
WAN_V2V, COGVIDEOX_V2V = "wan/pipeline_wan_video2video.py", "cogvideo/pipeline_cogvideox_video2video.py"
SHAPE = (1, 16, 3, 4, 6)


def wan_config(channels=16):
    mean, std = LATENT_STATISTICS[channels]
    return diffusers.configuration_utils.FrozenDict(z_dim=channels, latents_mean=list(mean), latents_std=list(std))


def cogvideox(**options):
    """An instance of diffusers and our model of it, with the factor of the 5b models."""
    theirs = diffusers.AutoencoderKLCogVideoX(**NANO_COGVIDEOX, scaling_factor=0.7, **options)
    return theirs, lv.load_model(theirs)


def installed(file):
    return ast.parse((Path(diffusers.__file__).parent / "pipelines" / file).read_text())


def run_nodes(nodes, names):
    code = compile(ast.Module(nodes, []), "pipeline", "exec", __future__.annotations.compiler_flag)
    exec(code, names)
    return names


def method(file, name):
    """A method of the pipeline in an installed file of diffusers."""
    wanted = (name, "retrieve_latents")
    functions = [node for node in ast.walk(installed(file)) if getattr(node, "name", None) in wanted]
    randn_tensor = diffusers.utils.torch_utils.randn_tensor
    return run_nodes(functions, {"torch": torch, "randn_tensor": randn_tensor})[name]


def wan_before_the_decoder(z, vae):
    """The lines of WanPipeline.__call__ that turn latents into those that the decoder takes."""
    (call,) = (node for node in ast.walk(installed("wan/pipeline_wan.py")) if getattr(node, "name", "") == "__call__")
    lines = [
        node
        for node in ast.walk(call)
        if isinstance(node, ast.Assign)
        and (
            ast.unparse(node.targets[0]) in ("latents_mean", "latents_std")
            or (ast.unparse(node.targets[0]) == "latents" and isinstance(node.value, ast.BinOp))
        )
    ]
    assert len(lines) == 3
    lines.sort(key=lambda node: node.lineno)
    return run_nodes(lines, {"torch": torch, "self": SimpleNamespace(vae=vae), "latents": z})["latents"]


def fake_vae(config, z, dtype=torch.float32):
    """A VAE that encodes everything to ``z``, and keeps what it is asked to decode."""
    posterior = SimpleNamespace(mode=lambda: z, sample=lambda generator: z)
    decoded = []
    return SimpleNamespace(
        config=config, dtype=dtype, decoded=decoded, encode=lambda x: SimpleNamespace(latent_dist=posterior),
        decode=lambda z: SimpleNamespace(sample=decoded.append(z)),
    )  # fmt: skip


def pipeline(vae, **more):
    """What the methods of a pipeline ask of it; the noise schedule adds none."""
    scheduler = SimpleNamespace(add_noise=lambda latents, noise, step: latents, init_noise_sigma=1.0)
    factor = getattr(vae.config, "scaling_factor", None)
    scales = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": 8, "vae_scaling_factor_image": factor}
    return SimpleNamespace(vae=vae, scheduler=scheduler, **scales, **more)


def video_latents(file, vae, dtype):
    """What a video-to-video pipeline gives to its transformer, from a video of three latents."""
    options = {"height": 32, "width": 48, "dtype": dtype, "device": torch.device("cpu"), "timestep": torch.tensor([1])}
    return method(file, "prepare_latents")(pipeline(vae), video=torch.zeros(1, 3, 9, 32, 48), **options)


def channels_second(latents):
    return latents.movedim(2, 1)  # pipelines of CogVideoX have (b, t, c, h, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [16, 48])
def test_wan(channels, dtype):
    z = torch.randn(1, channels, 3, 4, 6, dtype=dtype)
    vae = fake_vae(wan_config(channels), z, dtype)
    expected = video_latents(WAN_V2V, vae, dtype)
    assert torch.equal(lv.normalize(z, vae.config), expected)

    assert torch.equal(lv.denormalize(z, vae.config), wan_before_the_decoder(z, vae))


def test_wan_in_bfloat16_is_rounded_once():
    z = (torch.randn(1, 16, 3, 8, 12) * 3).bfloat16()
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in LATENT_STATISTICS[16])
    # pipelines/wan/pipeline_wan_vace.py, prepare_video_latents
    assert torch.equal(lv.normalize(z, wan_config()), ((z.float() - mean) * (1.0 / std)).bfloat16())

    exact = z.double() * std.double() + mean.double()
    rounded = lv.denormalize(z, wan_config())
    theirs = wan_before_the_decoder(z, fake_vae(wan_config(), z))
    assert theirs.dtype == torch.bfloat16
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).abs().mean() < 0.7 * (theirs.double() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cogvideox(dtype):
    theirs, model = cogvideox()
    z = torch.randn(SHAPE).to(dtype)
    vae = fake_vae(theirs.config, z, dtype)
    expected = video_latents(COGVIDEOX_V2V, vae, dtype)
    for known in (model, theirs, theirs.config, pipeline(theirs)):
        assert torch.equal(lv.normalize(z, known), channels_second(expected))

    method("cogvideo/pipeline_cogvideox.py", "decode_latents")(pipeline(vae), channels_second(z))
    assert torch.equal(lv.denormalize(z, model), vae.decoded[0])


@pytest.mark.parametrize("inverted", [False, True])
def test_images_of_cogvideox(inverted):
    theirs, model = cogvideox(invert_scale_latents=inverted)
    z = torch.randn(1, 16, 1, 4, 6)
    self = pipeline(fake_vae(theirs.config, z), transformer=SimpleNamespace(config=SimpleNamespace(patch_size_t=None)))
    _, expected = method("cogvideo/pipeline_cogvideox_image2video.py", "prepare_latents")(
        self, torch.zeros(1, 3, 32, 48), num_frames=9, height=32, width=48, dtype=torch.float32, device="cpu"
    )
    got = lv.normalize(z, model, image=True)
    assert torch.equal(got, channels_second(expected)[:, :, :1])
    assert torch.equal(got, lv.normalize(z, model)) != inverted
    assert torch.allclose(lv.denormalize(got, model, image=True), z)


def test_qwen_image():
    theirs = diffusers.AutoencoderKLQwenImage(**NANO_WAN)
    model, z = lv.load_model(theirs), torch.randn(1, 16, 1, 4, 6)
    self = SimpleNamespace(vae=fake_vae(theirs.config, z), latent_channels=16)
    expected = method("qwenimage/pipeline_qwenimage_img2img.py", "_encode_vae_image")(self, torch.zeros(1), None)
    assert torch.equal(lv.normalize(z, model), expected)
    edited = method("qwenimage/pipeline_qwenimage_edit.py", "_encode_vae_image")(
        self, torch.zeros(1), None
    )  # divides by std
    assert torch.allclose(lv.normalize(z, model), edited, rtol=1e-6, atol=1e-6)


def test_wan_from_a_video_to_the_transformer(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**NANO_WAN).eval()
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    with lv.VideoSession(theirs, device="cpu", dtype="float32") as session:
        session.encode(frames, tmp_path / "a.zarr", store_dtype="float32")
    pixels = torch.from_numpy(frames).movedim(3, 0)[None] / 127.5 - 1
    with torch.no_grad():
        raw = theirs.encode(pixels).latent_dist.mode()
    expected = video_latents(WAN_V2V, fake_vae(theirs.config, raw), torch.float32)
    got = lv.open_store(tmp_path / "a.zarr").read(0, 3, normalized=True)
    assert got.dtype == np.float32
    assert np.allclose(got, expected[0].movedim(1, 0).numpy(), rtol=1e-4, atol=1e-5)


MODELS = {
    "wan": wan_config(),
    "cogvideox": {"scaling_factor": 1.15258426, "latent_channels": 16},
    "shifted": {"scaling_factor": 0.5, "shift_factor": 0.25, "latent_channels": 16},
    "all": {**wan_config(), "scaling_factor": 0.7},
}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS)
def test_numpy_and_torch_agree_and_keep_what_they_are_given(facts, dtype):
    z = np.random.default_rng(0).normal(size=(5, 16, 4, 6)).astype(dtype)
    before = z.copy()
    there = lv.normalize(z, facts)
    assert (there.dtype, there.shape) == (z.dtype, z.shape)
    assert not np.array_equal(there, z)
    assert np.array_equal(there, lv.normalize(torch.from_numpy(z), facts).numpy())
    back = lv.denormalize(there, facts)
    assert np.array_equal(back, lv.denormalize(torch.from_numpy(there), facts).numpy())
    assert np.allclose(back, z, atol=4e-3 if dtype == "float16" else 1e-6)
    assert np.array_equal(z, before)


def test_shift_and_factor():
    assert lv.normalize(np.full((1, 16, 1, 1), 0.75), MODELS["shifted"])[0, 0, 0, 0] == 0.25
    assert lv.denormalize(np.full((1, 16, 1, 1), 0.25), MODELS["shifted"])[0, 0, 0, 0] == 0.75


@pytest.mark.parametrize("model", ["wan2.1-nano", "wan2.2-nano", "cogvideox-nano", "tiny"])
def test_the_layout_does_not_matter(model):
    model = lv.load_model(model)
    z = torch.randn(1, model.geometry.latent_channels, 3, 4, 6)
    expected = lv.normalize(z, model)
    assert torch.equal(lv.normalize(z[0], model), expected[0])
    assert torch.equal(lv.normalize(z.movedim(1, 2), model), expected.movedim(1, 2))
    assert torch.equal(lv.normalize(z[0].movedim(0, 1), model), expected[0].movedim(0, 1))


def test_tiny_has_no_scale():
    z = torch.randn(3, 16, 4, 6)
    scaled = lv.normalize(z, lv.load_model("tiny"))
    assert torch.equal(scaled, z)
    assert scaled.data_ptr() != z.data_ptr()


def test_gradients_pass():
    z = torch.randn(SHAPE, requires_grad=True)
    lv.normalize(z, wan_config()).sum().backward()
    std = torch.tensor(LATENT_STATISTICS[16][1]).view(1, 16, 1, 1, 1)
    assert torch.allclose(z.grad, (1 / std).expand(SHAPE))


def test_the_axis_is_found_only_if_one_fits():
    assert find_channel_axis((3, 16, 4, 6), 16) == 1
    assert find_channel_axis((16, 3, 4, 6), 16) == 0
    assert find_channel_axis((1, 16, 3, 16, 16), 16) == 1
    assert find_channel_axis((16, 3, 16, 4, 6), 16) == 2
    square = np.random.default_rng(0).normal(size=(16, 16, 2, 2))
    with pytest.raises(OptionError, match=r"two axes have 16 entries.*channel_axis=0 or channel_axis=1"):
        lv.normalize(square, wan_config())
    first, second = (lv.normalize(square, wan_config(), channel_axis=axis) for axis in (0, 1))
    assert np.array_equal(second, lv.normalize(square.swapaxes(0, 1), wan_config(), channel_axis=-4).swapaxes(0, 1))
    assert not np.array_equal(first, second)
    assert lv.normalize(square, MODELS["cogvideox"]).shape == square.shape  # one factor for all channels


@pytest.mark.parametrize(
    ("z", "options", "said"),
    [
        (np.zeros((3, 8, 4, 6)), {}, "16 latent channels"),
        (np.zeros((3, 32, 4, 6)), {}, "these look like moments"),
        (np.zeros((16, 4, 6)), {}, "have 3 axes"),
        (np.zeros((3, 16, 4, 6), np.int64), {}, "dtype int64"),
        (torch.zeros((3, 16, 4, 6), dtype=torch.int64), {}, "dtype torch.int64"),
        (np.zeros((3, 16, 4, 6)), {"channel_axis": 0}, "channel_axis=0 was given"),
        (np.zeros((3, 16, 16, 6)), {"channel_axis": 2}, "it is axis 0 or 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("facts", [MODELS["wan"], MODELS["cogvideox"]], ids=["wan", "cogvideox"])
def test_what_does_not_fit_is_refused(facts, z, options, said):
    for function in (lv.normalize, lv.denormalize):
        with pytest.raises(OptionError, match=said):
            function(z, facts, **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"latent_channels": 16}, "nothing says how latents of this model are scaled"),
        ({"latents_mean": [0.0] * 16}, "and not both"),
        ({"latents_mean": [0.0] * 16, "latents_std": [1.0] * 15}, "16 values and latents_std 15"),
        ({"latents_mean": [0.0] * 16, "latents_std": [0.0] * 16}, "numbers above 0"),
        ({"latents_mean": [0.0] * 16, "latents_std": ["1"] * 16}, "finite numbers"),
        ({"latents_mean": 0.0, "latents_std": 1.0}, "a list of numbers"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "finite numbers"),
        ("wan2.1", "a str does not say"),
        (None, "a NoneType does not say"),
    ],
)  # fmt: skip
def test_models_that_do_not_say_how_are_refused(model, said):
    with pytest.raises(ModelError, match=said):
        lv.normalize(np.zeros((3, 16, 4, 6)), model)
