"""What a program has set for PyTorch has no effect on results."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from longvid import VideoSession, load_model, open_store


@contextmanager
def default(set_it, value, before):
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
}


def results(model, frames, folder):
    """Latents and frames of whole videos, and of push mode."""
    pieces = []
    with VideoSession(model, device="cpu") as session:
        session.encode(frames, folder / "a.zarr", representation="moments", store_dtype="float32")
        session.decode(folder / "a.zarr", pieces.append)
        with session.encoder() as encoder:
            pushed = [encoder.push(frames), encoder.finish()]
    return (
        np.asarray(open_store(folder / "a.zarr").moments[:]),
        np.concatenate(pieces),
        torch.cat(pushed, dim=2).numpy(),
    )


@pytest.fixture(scope="module", params=["tiny", "cogvideox-nano"])
def undisturbed(request, vae, tmp_path_factory):
    model = load_model("tiny") if request.param == "tiny" else vae
    frames = np.random.default_rng(4).integers(0, 256, (21, 16, 24, 3), dtype=np.uint8)
    return model, frames, results(model, frames, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("setting", SURROUNDINGS)
def test_settings_of_the_program_change_no_bit(undisturbed, tmp_path, setting):
    model, frames, expected = undisturbed
    with SURROUNDINGS[setting]():
        got = results(model, frames, tmp_path)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_negative_control_autocast_changes_what_is_computed_without_a_session(vae):
    from longvid import ConvCache

    z = torch.randn(1, 16, 3, 2, 3)
    with ConvCache(vae.decoder) as cache:
        plain = vae.decode(z, cache)
    with torch.autocast("cpu", torch.bfloat16), ConvCache(vae.decoder) as cache:
        assert not torch.equal(vae.decode(z, cache), plain)
