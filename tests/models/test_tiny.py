"""The built-in model: cut as you like, same result; its caches matter; its weights are what the card says."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import fixed_plan
from torch.utils.flop_counter import FlopCounterMode

import longvid as lv
from longvid.demo.__main__ import CLIP
from longvid.errors import CacheError, MemoryBudgetError, ModelError, ScheduleError
from longvid.media.video_file import VideoFile
from longvid.models.cache import ConvCache
from longvid.models.layers.causal_conv import CausalConv3d
from longvid.models.loading import BUILT_IN
from longvid.models.tiny import BLOCK, BlockTransform, TinyConfig, TinyVAE
from longvid.train.__main__ import psnr
from longvid.train.fit import LinearCoder

WEIGHTS = BUILT_IN["tiny"]
GAIN_ON_CLIP = 1.5
LOSS_WITHOUT_CONTEXTS = 0.2
"dB; measured 2.4 and 0.3, see the model card"


@pytest.fixture(scope="module")
def tiny() -> TinyVAE:
    return lv.load_model()


@pytest.fixture(scope="module")
def small() -> TinyVAE:
    """The architecture at a small width, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = TinyConfig(coefficients=24, encoder_width=16, encoder_blocks=2, decoder_width=16, decoder_blocks=2)
        model = TinyVAE(config)
        model.transform.basis.copy_(torch.linalg.qr(torch.randn(BLOCK, 24)).Q.T)
        return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    with VideoFile(CLIP) as video:
        return np.concatenate([block.frames_THWC for block in video.blocks()])


def as_pixels(frames):
    return torch.from_numpy(frames).float().div(127.5).sub(1).permute(3, 0, 1, 2)[None]


def in_chunks(module, step, x, cuts, forget):
    """``step(piece, cache)`` on pieces of the lengths ``cuts``; ``forget`` drops every context in between."""
    with ConvCache(module) as cache:
        done = []
        for piece in x.split(cuts, dim=2):
            if forget:
                cache.offloader.drop()
            done.append(step(piece, cache))
    return torch.cat(done, dim=2)


def encode(model, x, cuts, *, forget=False):
    """Means of the posterior."""
    return in_chunks(model.encoder, model.encode, x, cuts, forget).chunk(2, dim=1)[0]


def decode(model, z, cuts, *, forget=False):
    return in_chunks(model.decoder, model.decode, z, cuts, forget)


def cut_evenly(total, first, n):
    edges = [0, *range(min(first, total), total, n), total]
    return [b - a for a, b in itertools.pairwise(edges)]


def relative(a, b):
    return float((a - b).norm() / b.norm())


class TestChunks:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**31))
    def test_any_cut_gives_the_same(self, small, lengths, seed):
        t = sum(lengths)
        x = torch.rand((1, 3, 1 + 4 * t, 16, 24), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        z = encode(small, x, [1 + 4 * t])
        assert z.shape == (1, 16, 1 + t, 2, 3)
        parts = encode(small, x, [1 + 4 * lengths[0], *(4 * n for n in lengths[1:])])
        assert relative(parts, z) < 1e-5
        y = decode(small, z, [1 + t])
        assert y.shape == x.shape
        assert relative(decode(small, z, [1 + lengths[0], *lengths[1:]]), y) < 1e-5

    @pytest.mark.parametrize("n", [4, 8, 16, 32])
    def test_the_built_in_model_at_the_usual_lengths(self, tiny, clip, n):
        x = as_pixels(clip[:, :96, :160])
        whole = encode(tiny, x, [49])
        assert relative(encode(tiny, x, cut_evenly(49, 1 + n, n)), whole) < 1e-5
        back = decode(tiny, whole, [13])
        assert relative(decode(tiny, whole, cut_evenly(13, 1 + n // 4, n // 4)), back) < 1e-5

    def test_training_computes_the_same(self, small):
        """The differentiable path of training and the cached one of the engine are one function."""
        x = torch.rand(2, 3, 13, 16, 16) * 2 - 1
        z = small.encoder(small.transform(x, True), None, True)
        assert relative(encode(small, x, [5, 8]), z) < 1e-5
        y = small.transform.inverse(small.decoder(z, None, True), True)
        assert relative(decode(small, z, [1, 1, 2]), y) < 1e-5

    @pytest.mark.parametrize(("frames", "said"), [(8, "1 \\+ 4 n frames, the first"), (6, "1 \\+ 4 n")])
    def test_a_first_chunk_of_another_length_is_refused(self, small, frames, said):
        with ConvCache(small.encoder) as cache, pytest.raises(ScheduleError, match=said):
            small.encode(torch.zeros(1, 3, frames, 16, 16), cache)

    def test_a_later_chunk_of_another_length_is_refused(self, small):
        with ConvCache(small.encoder) as cache:
            small.encode(torch.zeros(1, 3, 5, 16, 16), cache)
            with pytest.raises(ScheduleError, match="must have 4 n frames"):
                small.encode(torch.zeros(1, 3, 5, 16, 16), cache)

    def test_frames_that_are_not_whole_blocks_are_refused(self, small):
        with ConvCache(small.encoder) as cache, pytest.raises(ScheduleError, match="12x16 are not whole blocks"):
            small.encode(torch.zeros(1, 3, 5, 16, 12), cache)

    def test_another_size_in_one_video_is_refused(self, small):
        with ConvCache(small.encoder) as cache:
            small.encode(torch.zeros(1, 3, 5, 16, 16), cache)
            with pytest.raises(CacheError, match="size"):
                small.encode(torch.zeros(1, 3, 4, 16, 24), cache)


class TestTransform:
    def test_a_complete_basis_loses_nothing(self):
        transform = BlockTransform(BLOCK)
        transform.basis.copy_(torch.linalg.qr(torch.randn(BLOCK, BLOCK)).Q)
        transform.mean.copy_(torch.randn(BLOCK))
        x = torch.rand(2, 3, 9, 16, 24)
        assert relative(transform.inverse(transform(x, True), True), x) < 1e-5
        assert relative(transform.inverse(transform(x[:, :, 1:], False), False), x[:, :, 1:]) < 1e-5

    def test_the_built_in_basis_is_orthonormal(self, tiny):
        rows = tiny.transform.basis.double()
        assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-3


class TestFlatKernels:
    """Kernels that are flat in time or in space run as 2-D convolutions; so do they here, beside PyTorch's own."""

    @pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (1, 5, 3), (2, 1, 1)])
    def test_equal_to_conv3d(self, kernel):
        layer = CausalConv3d(6, 10, kernel)
        x = torch.randn(2, 6, 7, 12, 9)
        padded = torch.cat([x[:, :, :1]] * layer.context_frames + [x], dim=2)
        assert torch.allclose(layer.whole(x), layer.conv(padded), atol=1e-5)
        with ConvCache(layer) as cache:
            pieces = []
            for piece in x.split([4, 1, 2], dim=2):
                with cache.chunk():
                    pieces.append(layer(piece, cache))
        assert torch.allclose(torch.cat(pieces, dim=2), layer.conv(padded), atol=1e-5)

    def test_whole_is_differentiable(self):
        layer = CausalConv3d(2, 3, (3, 1, 1), initial_context="zeros").double()
        x = torch.randn(1, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer.whole, (x,))


class TestQuality:
    """On the embedded clip, which the weights have not seen. Other clips: benchmarks/quality.py."""

    def test_better_than_the_linear_coder(self, tiny, clip):
        x = as_pixels(clip)
        coder = LinearCoder.load(WEIGHTS / "linear.safetensors")
        linear = coder.reconstruct(x, 16)
        ours = decode(tiny, encode(tiny, x, [17, 16, 16]), [5, 4, 4])
        assert psnr(ours, x) > psnr(linear, x) + GAIN_ON_CLIP
        for t in (0, 24, 48):
            assert psnr(ours[:, :, t], x[:, :, t]) > psnr(linear[:, :, t], x[:, :, t])

    def test_the_contexts_matter(self, tiny, clip):
        """Negative control of everything that is said of caches: without them the picture is worse."""
        x = as_pixels(clip)
        cuts, latent_cuts = cut_evenly(49, 5, 4), cut_evenly(13, 2, 1)
        kept = decode(tiny, encode(tiny, x, cuts), latent_cuts)
        lost = decode(tiny, encode(tiny, x, cuts, forget=True), latent_cuts, forget=True)
        assert psnr(lost, x) < psnr(kept, x) - LOSS_WITHOUT_CONTEXTS

    def test_the_latents_have_unit_spread(self, tiny, clip):
        z = encode(tiny, as_pixels(clip), [49])
        assert 0.3 < float(z.std()) < 3

    def test_a_sample_is_as_good_as_the_mean(self, tiny, clip):
        x = as_pixels(clip)
        z = encode(tiny, x, [49])
        noisy = z + tiny.config.posterior_std * torch.randn(z.shape)
        assert psnr(decode(tiny, noisy, [13]), x) > psnr(decode(tiny, z, [13]), x) - 0.1

    def test_bfloat16_shows_the_same_picture(self, tiny, clip):
        x = as_pixels(clip[:17])
        with lv.VideoSession(tiny, device="cpu", dtype="bfloat16") as session:
            with session.encoder() as encoder:
                z = torch.cat([encoder.push(clip[:17]), encoder.finish()], dim=2)
            with session.decoder(num_frames=17) as decoder:
                back = np.concatenate([decoder.push(z), decoder.finish()])
        full = decode(tiny, encode(tiny, x, [17]), [5])
        assert psnr(as_pixels(back), x) > psnr(full, x) - 0.3


class TestCost:
    @pytest.mark.parametrize(("direction", "most"), [("encode", 25e3), ("decode", 60e3)])
    def test_multiply_adds_per_pixel_and_frame(self, tiny, direction, most):
        H, W, frames = 64, 96, 16
        module = tiny.encoder if direction == "encode" else tiny.decoder
        with ConvCache(module) as cache:
            for n in (frames + 1, frames):
                pixels, latents = torch.zeros(1, 3, n, H, W), torch.zeros(1, 16, -(-n // 4), H // 8, W // 8)
                with FlopCounterMode(display=False) as counter:
                    tiny.encode(pixels, cache) if direction == "encode" else tiny.decode(latents, cache)
        macs = counter.get_total_flops() / 2 / (frames * H * W)
        assert 500 < macs < most

    def test_weights_are_small_and_half_precision(self):
        file = WEIGHTS / "diffusion_pytorch_model.safetensors"
        assert file.stat().st_size <= 8e6
        assert {t.dtype for t in safetensors.torch.load_file(file).values()} == {torch.float16}
        card = (WEIGHTS / "README.md").read_text()
        for said in ("Big Buck Bunny", "CC-BY", "python -m longvid.train", "seed", "bad at"):
            assert said in card

    def test_the_record_of_training_holds(self):
        """Every held-out clip beats the linear coder, by 1.5 dB in the mean, as the card says."""
        gains = [f["gain"] for f in json.loads((WEIGHTS / "training.json").read_text())["figures"].values()]
        assert len(gains) >= 6
        assert min(gains) > 0
        assert np.mean(gains) >= 1.5


class TestLoading:
    def test_it_is_the_default(self, tiny):
        assert tiny.describe()["name_or_path"] == "tiny"
        assert next(tiny.parameters()).dtype == torch.float32
        assert not any(p.requires_grad for p in tiny.parameters())
        with lv.VideoSession(device="cpu") as session:
            assert session.plan(height=64, width=64).model == "tiny"

    def test_the_name_wins_over_a_folder(self, tmp_path, monkeypatch):
        (tmp_path / "tiny").mkdir()
        monkeypatch.chdir(tmp_path)
        assert isinstance(lv.load_model("tiny"), TinyVAE)
        with pytest.raises(ModelError, match=r"no config\.json"):
            lv.load_model("./tiny")

    def test_random_weights_are_refused(self):
        with pytest.raises(ModelError, match="'tiny' cannot have random_weights"):
            lv.load_model("tiny", random_weights=0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"encoder_width": -1}, "encoder_width = -1"),
            ({"decoder_blocks": 2.5}, "decoder_blocks = 2.5"),
            ({"coefficients": True}, "coefficients = True"),
            ({"coefficients": 8}, "between latent_channels and 768"),
            ({"encoder_width": 64}, "do not fit its config"),
        ],
    )
    def test_a_bad_config_is_refused(self, tmp_path, change, said):
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            (tmp_path / file).write_bytes((WEIGHTS / file).read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=said):
            lv.load_model(tmp_path)


class TestEngine:
    """A true citizen: sessions, stores, plans."""

    @pytest.mark.parametrize("num_frames", [1, 2, 4, 5, 6, 17, 18, 33, 40])
    def test_every_length_comes_back(self, small, frames, num_frames, tmp_path):
        video = np.concatenate([frames, frames])[:num_frames]
        got = []
        for n in (4, 16):
            path = tmp_path / f"{n}.zarr"
            with lv.VideoSession(small, device="cpu", chunk_frames=n) as session:
                session.encode(video, path, store_dtype="float32")
            assert lv.open_store(path).latents.shape[0] == 1 + -(-(num_frames - 1) // 4)
            with lv.VideoSession(small, device="cpu", chunk_frames=20 - n) as session:
                pieces: list[np.ndarray] = []
                assert session.decode(path, pieces.append).frames == num_frames
            got.append(np.concatenate(pieces).astype(int))
        assert got[0].shape == video.shape
        assert np.abs(got[0] - got[1]).max() <= 1  # rounding to 8 bits, at most

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda n: 0 < sum(n) < 26))
    def test_pushed_slices_change_nothing(self, small, slices):
        video = np.random.default_rng(1).integers(0, 256, (sum(slices), 16, 24, 3), dtype=np.uint8)
        with lv.VideoSession(small, device="cpu", chunk_frames=8) as session:
            with session.encoder() as encoder:
                whole = torch.cat([encoder.push(video), encoder.finish()], dim=2)
            with session.encoder() as encoder:
                parts, done = [], 0
                for n in slices:
                    parts.append(encoder.push(video[done : done + n]))
                    done += n
                parts.append(encoder.finish())
            assert torch.equal(torch.cat(parts, dim=2), whole)
            with session.decoder(num_frames=len(video)) as decoder:
                back = np.concatenate([decoder.push(whole), decoder.finish()])
            with session.decoder(num_frames=len(video)) as decoder:
                one_by_one = [decoder.push(z) for z in whole.split(1, dim=2)]
                assert np.array_equal(np.concatenate([*one_by_one, decoder.finish()]), back)
            assert back.shape == video.shape

    def test_the_plan_is_exact(self, tiny, clip, tmp_path):
        with lv.VideoSession(tiny, device="cpu") as session:
            plan = session.plan(height=176, width=320)
            encoded = session.encode(clip, tmp_path / "a.zarr")
            decoded = session.decode(tmp_path / "a.zarr", lambda _: None)
        assert encoded.peak_device_bytes == plan.encode.projected_bytes
        assert decoded.peak_device_bytes == plan.decode.projected_bytes

    def test_a_tight_budget_gets_shorter_chunks(self, tiny):
        def plan(**options):
            return fixed_plan(tiny, height=360, width=640, **options)

        own, short = plan(), plan(chunk_frames=4)
        assert own.schedule.chunk_frames == 16
        assert short.projected_bytes < own.projected_bytes
        between = plan(memory=(own.projected_bytes + short.projected_bytes) // 2)
        assert between.schedule.chunk_frames in (4, 8)
        assert between.projected_bytes <= between.budget.allowed_bytes
        assert plan(memory=own.projected_bytes).schedule.chunk_frames == 16
        too_small = plan(memory=short.projected_bytes - 1, offload="none")
        assert too_small.schedule.chunk_frames == 4
        with pytest.raises(MemoryBudgetError):
            too_small.check("decode")

    def test_a_session_keeps_to_the_budget(self, tiny, clip, tmp_path):
        memory = fixed_plan(tiny, height=176, width=320, chunk_frames=4).projected_bytes
        with lv.VideoSession(tiny, device="cpu", memory=memory) as session:
            assert session.encode(clip, tmp_path / "a.zarr").peak_device_bytes <= memory
            assert session.decode(tmp_path / "a.zarr", lambda _: None).peak_device_bytes <= memory
        assert lv.open_store(tmp_path / "a.zarr").schedule.chunk_frames == 4

    def test_other_models_keep_their_chunks(self, vae):
        for make in (
            lambda: lv.VideoSession(vae, chunk_frames=16),
            lambda: fixed_plan(vae, height=64, width=64, chunk_frames=16),
        ):
            with pytest.raises(ScheduleError, match="norms run over a chunk"):
                make()
        lv.VideoSession(vae, chunk_frames=8)

    def test_chunks_are_whole_latents(self, tiny):
        with pytest.raises(ScheduleError, match="multiple of frames_per_latent"):
            lv.VideoSession(tiny, chunk_frames=6)


def test_the_model_folder_is_whole():
    assert {p.name for p in WEIGHTS.iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "linear.safetensors", "training.json",
    }  # fmt: skip
