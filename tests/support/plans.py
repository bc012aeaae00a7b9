"""Plans with fixed numerics, whatever this machine would choose."""

from longvid.memory.offload import OffloadPolicy
from longvid.models.loading import load_architecture
from longvid.models.numerics import Numerics
from longvid.planning import kernel_choice
from longvid.planning.options import ComputeOptions, parse_dtype, planned_device
from longvid.planning.planner import Planner
from longvid.units import parse_bytes


def fixed_plan(
    model, *, height, width, numerics=None, tile_bytes=None, keep_buffers=False, directions=("encode", "decode"),
    held_bytes=0, idle_limit_bytes=None, dtype=None, offload="auto", memory=None, reserved=0, **options,
):  # fmt: skip
    """A plan for a CPU with these numerics, contiguous and plain by default, in whole frames, nothing kept."""
    vae = load_architecture(model)
    allowed = None if memory is None else parse_bytes(memory)
    asked = ComputeOptions(
        dtype=parse_dtype(dtype), numerics=numerics or Numerics(), keep_buffers=keep_buffers,
        offload=OffloadPolicy.parse(offload), allowed_bytes=allowed, reserved_bytes=reserved, **options,
    )  # fmt: skip
    planner = Planner(vae, planned_device("cpu")[0])
    planner.tile_bytes = tile_bytes
    held = {"held_bytes": held_bytes, "idle_limit_bytes": idle_limit_bytes}
    return planner.plan((height, width), asked, directions, **held)


def without_measurements(monkeypatch):
    """Fail if a plan depends on a micro-benchmark, whose result may differ from process to process."""

    def measured(makers, device):
        raise AssertionError("a form was measured")

    monkeypatch.setattr(kernel_choice, "_benchmark", measured)
