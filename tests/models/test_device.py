import pytest
import torch

from longvid.errors import ModelError
from longvid.models.device import resolve_device, tensor_bytes


def test_tensor_bytes_counts_shared_tensors_once():
    layer = torch.nn.Linear(3, 2)
    twice = torch.nn.ModuleList([layer, layer])
    assert tensor_bytes(twice) == (3 * 2 + 2) * 4


@pytest.mark.parametrize("device", [["cpu"], None, 1.5, ("cuda", 0)])
def test_what_is_no_device_is_named(device):
    with pytest.raises(ModelError, match="is not a device") as caught:
        resolve_device(device)
    assert repr(device) in str(caught.value)


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ModelError, match="device 'nonsense' cannot be used here"):
        resolve_device("nonsense")
    assert resolve_device("cpu") == torch.device("cpu")
