"""Plans of layers that run piece by piece: to the byte what a run takes, and only where the budget asks for it."""

from dataclasses import replace

import pytest
import torch
from planning.test_plan import as_computed_here, run_for_real
from support.plans import fixed_plan

from longvid import VideoSession, load_model, open_store, warmup
from longvid.memory.offload import Placement
from longvid.models.context import Limits
from longvid.models.numerics import Numerics
from longvid.planning.dry_run import dry_run, skeleton_of
from longvid.planning.workload import Execution, Workload

SIZE = {"wan2.1-nano": (48, 64), "wan2.2-nano": (64, 96)}
LAST = Numerics(layout="channels_last")


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("pieces", [None, "resnets", "stages"])
@pytest.mark.parametrize(
    ("numerics", "dtype", "tile_elements"),
    [
        (Numerics(), torch.float32, None),
        (Numerics(), torch.bfloat16, None),
        (LAST, torch.float32, 3000),
        (replace(LAST, paired_frames=True), torch.float32, None),
    ],
)
@pytest.mark.parametrize("name", SIZE)
def test_a_dry_run_is_a_tracked_run_to_the_byte(name, numerics, dtype, tile_elements, pieces, direction):
    model = load_model(name, random_weights=0)
    height, width = SIZE[name]
    limits = Limits(pieces=pieces, slice_elements=height * width * 8, tile_elements=tile_elements)
    execution = Execution(numerics=as_computed_here(numerics, dtype), limits=limits)
    schedule = model.geometry.schedule
    workload = Workload(direction=direction, height=height, width=width, dtype=dtype, schedule=schedule)
    cost_model = dry_run(skeleton_of(model, dtype), workload, execution)
    first, *middle = run_for_real(model, direction, height, width, dtype, execution)
    assert set(middle) == {cost_model.steady_peak(Placement()).total_bytes}
    assert max(first, *middle) == cost_model.peak(Placement()).total_bytes


def frames(num_frames, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_frames, *size, 3), dtype=torch.uint8, generator=generator).numpy()


@pytest.mark.parametrize("offload", ["none", "all", "auto"])
@pytest.mark.parametrize("name", SIZE)
def test_a_budget_that_only_pieces_fit_is_kept_to_the_byte(name, offload, tmp_path):
    model = load_model(name, random_weights=0)
    size = SIZE[name]
    setting = {"height": size[0], "width": size[1], "chunk_frames": 4, "offload": offload}
    least = fixed_plan(model, **setting, memory=1).encode
    assert least.execution.limits.pieces == ("stages" if offload == "none" else "resnets")
    memory = least.projected_bytes
    assert fixed_plan(model, **setting, memory=memory).fits("encode")
    video = frames(13, size)
    options = {"device": "cpu", "layout": "contiguous", "paired_frames": "off", "reserved": 0, "chunk_frames": 4}
    with VideoSession(model, **options, offload=offload, memory=memory) as session:
        report = session.encode(video, tmp_path / "pieces.zarr")
        assert report.peak_device_bytes == report.projected_bytes <= memory
    with VideoSession(model, **options) as session:
        session.encode(video, tmp_path / "whole.zarr")
    pieces, whole = (open_store(tmp_path / f"{what}.zarr").read(0, 4) for what in ("pieces", "whole"))
    torch.testing.assert_close(torch.as_tensor(pieces), torch.as_tensor(whole), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("offload", [pytest.param("none", marks=pytest.mark.slow), "all"])
def test_a_run_in_pieces_is_continued_in_pieces_after_a_warm_up(offload, tmp_path, monkeypatch):
    """And not in whole chunks, whose last bits may differ."""
    monkeypatch.setattr("longvid.store.latent_writer.TARGET_CHUNK_BYTES", 4000)
    model, size = load_model("wan2.1-nano", random_weights=0), (32, 32)
    num_chunks = warmup(model, "encode", chunk_frames=4).chunks + 16
    video = frames(4 * num_chunks, size)
    setting = {"height": size[0], "width": size[1], "chunk_frames": 4, "offload": offload}
    memory = fixed_plan(model, **setting, memory=1).encode.projected_bytes
    options = {"device": "cpu", "layout": "contiguous", "paired_frames": "off", "reserved": 0, "chunk_frames": 4}

    def encode(path, stop_after=None, **more):
        def stop(event):
            if event.index == stop_after:
                session.stop()

        with VideoSession(model, **options, offload=offload, callbacks=[stop], **more) as session:
            return session.encode(video, tmp_path / path)

    encode("whole.zarr", memory=memory)
    assert not encode("a.zarr", stop_after=num_chunks - 3, memory=memory).complete
    report = encode("a.zarr", memory=memory)
    assert report.complete
    assert report.frames_computed < len(video)  # it began in the middle
    stores = [open_store(tmp_path / name) for name in ("whole.zarr", "a.zarr")]
    assert [store.metadata.tiling["pieces"] for store in stores] == 2 * ["stages" if offload == "none" else "resnets"]
    whole, found = (store.read(0, num_chunks) for store in stores)
    assert (whole == found).all()
