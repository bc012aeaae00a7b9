import numpy as np
import pytest
import torch

from longvid.errors import MemoryBudgetError
from longvid.memory.tracker import AllocationTracker, DeviceMeter, is_out_of_memory


@pytest.fixture(params=["cpu", "meta"])
def device(request):
    return request.param


def test_counts_storages_not_views(device):
    with AllocationTracker() as tracker:
        x = torch.zeros(1000, device=device)
        y = x.view(10, 100)[2:]
        y.add_(1)
        assert tracker.live_bytes == 4000
        z = x + 1
        assert tracker.live_bytes == 8000
        del x
        assert tracker.live_bytes == 8000  # y still looks into it
        del y, z
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 8000)


def test_a_view_of_a_weight_is_not_an_allocation(device):
    weight = torch.zeros(1000, device=device)
    with AllocationTracker() as tracker:
        row = weight.view(10, 100)[0]
        again = row[1:]
        assert tracker.live_bytes == 0
        again.clone()
    assert tracker.peak_bytes == 99 * 4


def test_a_tensor_that_dies_outside_the_mode_is_counted_out(device):
    tracker = AllocationTracker()
    with tracker:
        x = torch.zeros(10, device=device)
    assert tracker.live_bytes == 40
    del x
    assert tracker.live_bytes == 0
    with tracker:
        tracker.reset_peak()
        torch.zeros(5, device=device)
    assert tracker.peak_bytes == 20


def test_numpy_memory_is_not_the_device_s(device):
    with AllocationTracker() as tracker:
        x = torch.from_numpy(np.zeros(100, np.uint8))
        before = tracker.live_bytes
        x.to(device, copy=True)
    assert tracker.peak_bytes - before == 100


def test_meter_adds_the_weights():
    meter = DeviceMeter(torch.device("cpu"), base_bytes=1000)
    with meter.measure():
        torch.zeros(10)
    assert (meter.peak_bytes, meter.chunk_peak_bytes) == (1040, 1040)


def test_meter_looks_at_the_first_three_chunks_and_every_32nd():
    meter, seen = DeviceMeter(torch.device("cpu"), base_bytes=0), []
    for index in range(70):
        before = meter.peak_bytes
        with meter.measure():
            torch.zeros(index + 1)
        if meter.peak_bytes > before:
            seen.append(index)
    assert seen == [0, 1, 2, 32, 64]


def test_what_counts_as_running_out():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    for said in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "GET was unable to find an engine to execute this computation",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(MemoryBudgetError("a budget is no device"))
