"""A session is used as it must not be: a typed error, no file, and the next video as if nothing had been."""

import os
import threading

import numpy as np
import pytest
import torch

from longvid import LongvidError, VideoSession, load_model

FRAMES = np.random.default_rng(6).integers(0, 256, (21, 32, 48, 3), dtype=np.uint8)
SETTINGS = {"device": "cpu", "chunk_frames": 8, "layout": "contiguous"}


@pytest.fixture(scope="module")
def model():
    return load_model("cogvideox-nano", random_weights=1)


def encoded(session):
    with session.encoder() as encoder:
        return torch.cat([encoder.push(FRAMES), encoder.finish()], dim=2)


def in_thread(call):
    """Call it in another thread, and raise here what it raised there."""
    raised = []

    def run():
        try:
            call()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def in_fork(call):
    """Call it in a forked child, and raise here a typed error if the child met one."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
        except LongvidError:
            code = 7
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
        raise LongvidError("the child was refused")


def before_it_is_open(model, out):
    VideoSession(model, **SETTINGS).encode(FRAMES, out)


def after_it_was_closed(model, out):
    with VideoSession(model, **SETTINGS) as session:
        pass
    session.encode(FRAMES, out)


def entered_again(model, out):
    with VideoSession(model, **SETTINGS) as session, session:
        session.encode(FRAMES, out)


def from_its_own_callback(model, out):
    with VideoSession(model, callbacks=[lambda _: session.encode(FRAMES, out)], **SETTINGS) as session:
        session.encode(FRAMES, out.with_name("other.zarr"))


def from_another_thread(model, out):
    with VideoSession(model, **SETTINGS) as session:
        in_thread(lambda: session.encode(FRAMES, out))


def from_a_forked_child(model, out):
    with VideoSession(model, **SETTINGS) as session:
        in_fork(lambda: session.encode(FRAMES, out))


def pushed_after_the_end(model, out):
    with VideoSession(model, **SETTINGS) as session, session.encoder() as encoder:
        encoder.push(FRAMES)
        encoder.finish()
        encoder.push(FRAMES)


def pushed_after_the_session_was_closed(model, out):
    with VideoSession(model, **SETTINGS) as session:
        encoder = session.encoder()
        encoder.__enter__()
        encoder.push(FRAMES)
    encoder.push(FRAMES)


def another_size_midway(model, out):
    with VideoSession(model, **SETTINGS) as session, session.encoder() as encoder:
        encoder.push(FRAMES)
        encoder.push(FRAMES[:, :16])


def floats_in_place_of_bytes(model, out):
    with VideoSession(model, **SETTINGS) as session:
        session.encode(FRAMES.astype(np.float32) / 255, out)


def channels_first(model, out):
    with VideoSession(model, **SETTINGS) as session:
        session.encode(FRAMES.transpose(0, 3, 1, 2), out)


def one_frame_without_its_axis(model, out):
    with VideoSession(model, **SETTINGS) as session, session.encoder() as encoder:
        encoder.push(FRAMES[0])


def latents_of_other_channels(model, out):
    with VideoSession(model, **SETTINGS) as session, session.decoder() as decoder:
        decoder.push(torch.zeros(1, 7, 4, 4, 6))


def weights_written_over_midway(model, out):
    weight = next(p for p in model.parameters() if p.ndim == 5)
    before = weight.detach().clone()

    def change(_):
        with torch.no_grad():
            weight.add_(1)

    try:
        with VideoSession(model, callbacks=[change], **SETTINGS) as session:
            session.encode(FRAMES, out)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def a_layer_replaced_midway(model, out):
    convolution = next(m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 5)
    weight = convolution.weight

    def replace(_):
        convolution.weight = torch.nn.Parameter(weight.detach() + 1, requires_grad=False)

    try:
        with VideoSession(model, callbacks=[replace], **SETTINGS) as session:
            session.encode(FRAMES, out)
    finally:
        convolution.weight = weight


MISUSES = (
    before_it_is_open, after_it_was_closed, entered_again, from_its_own_callback, from_another_thread,
    from_a_forked_child, pushed_after_the_end, pushed_after_the_session_was_closed, another_size_midway,
    floats_in_place_of_bytes, channels_first, one_frame_without_its_axis, latents_of_other_channels,
    weights_written_over_midway, a_layer_replaced_midway,
)  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.__name__)
def test_misuse_is_refused_and_leaves_nothing(model, tmp_path, ledger, misuse):
    with VideoSession(model, **SETTINGS) as session:
        expected = encoded(session)
    with pytest.raises(LongvidError):
        misuse(model, tmp_path / "out.zarr")
    left = (tmp_path / "out.zarr").exists()
    with VideoSession(model, **SETTINGS) as session:
        same = torch.equal(encoded(session), expected)
    ledger.add("misuse of a session", survived=same and not left, silently_wrong=not same)
    assert same
    assert not left
