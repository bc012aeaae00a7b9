"""The dry run is exact: equal to the byte to a tracked run on real CPU tensors, and pinned by golden numbers."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from support.contexts import forward_context
from support.plans import fixed_plan

from longvid import (
    AllocationTracker,
    MemoryBudgetError,
    ModelError,
    OptionError,
    ScheduleError,
    load_model,
    make_plan,
)
from longvid.models.device import placed
from longvid.models.forward import decode_chunk, encode_chunk
from longvid.models.kernels.cpu import has_bfloat16
from longvid.models.layers import norms
from longvid.models.numerics import Numerics
from longvid.planning.dry_run import DryRuns
from longvid.planning.kernel_choice import can_compute
from longvid.planning.options import parse_dtype
from longvid.planning.workload import Execution

# bytes at 720x480 in bfloat16: projected peak of the run and all contexts, weights (431,167,814) included in the first
GOLDEN = {"encode": (4_726_285_638, 1_801_267_200), "decode": (7_144_795_462, 2_809_382_400)}


@pytest.fixture(scope="module")
def full_plan():
    return fixed_plan("cogvideox-2b", height=480, width=720, dtype="bfloat16")


def contexts_by_formula(direction, height, width, element_bytes=2):
    """Two frames of every 3x3x3 convolution's input, written down from the architecture alone."""
    widths, per_block = (128, 256, 256, 512), 3
    total = 0
    if direction == "encode":
        h, w, c = height, width, 3
        total += c * h * w
        c = widths[0]
        for i, width_ in enumerate(widths):
            for j in range(per_block):
                total += ((c if j == 0 else width_) + width_) * h * w
            c = width_
            if i < len(widths) - 1:
                h, w = h // 2, w // 2
        total += 2 * 2 * c * h * w + c * h * w
    else:
        h, w, c = height // 8, width // 8, widths[-1]
        total += 16 * h * w + 2 * 2 * c * h * w
        for i, width_ in enumerate(reversed(widths)):
            for j in range(per_block + 1):
                total += ((c if j == 0 else width_) + width_) * h * w
            c = width_
            if i < len(widths) - 1:
                h, w = 2 * h, 2 * w
        total += c * h * w
    return 2 * total * element_bytes


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_golden_numbers(full_plan, direction):
    part = full_plan.direction(direction)
    assert (part.projected_bytes, part.cache_bytes) == GOLDEN[direction]
    assert part.cache_bytes == contexts_by_formula(direction, 480, 720)
    assert part.weights_bytes == 2 * 215_583_907


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_peak_of_a_middle_chunk_against_diffusers(full_plan, direction):
    """Against 6.60 and 15.8 GB; `python benchmarks/peers_memory.py --meta-only` measures both sides."""
    part = full_plan.direction(direction)
    ours = part.steady_chunk_bytes - part.weights_bytes
    assert ours <= {"encode": 0.76 * 6.60e9, "decode": 0.48 * 15.8e9}[direction]


def test_parts_add_up(full_plan):
    for part in (full_plan.encode, full_plan.decode):
        assert sum(part.parts.values()) == part.projected_bytes
        assert part.weights_bytes + part.cache_bytes + part.activation_bytes == part.steady_chunk_bytes
        assert sum(layer.bytes for layer in part.layers) == part.cache_bytes
    assert full_plan.projected_bytes == full_plan.decode.projected_bytes


def as_computed_here(numerics, dtype):
    """These numerics in the form that this machine has kernels for.

    PyTorch's own bfloat16 convolutions allocate memory that a dry run cannot see. Where the library has none,
    :func:`choose_numerics` always has products in float32.
    """
    if dtype == torch.bfloat16 and not has_bfloat16():
        return replace(numerics, float32_products=True)
    return numerics


def run_for_real(model, direction, height, width, dtype, execution=None):
    """Peak bytes of the first and of the middle chunks on CPU tensors; kept buffers settle in one or two."""
    execution = execution or Execution()
    device = torch.device("cpu")
    ready, tracker, peaks = placed(model, device, dtype), AllocationTracker(), []
    plan, p = model.geometry.schedule, model.geometry.pixels_per_latent
    module = ready.encoder if direction == "encode" else ready.decoder
    keep, kernels = execution.keeps_buffers, execution.keeps_kernels
    options = {"numerics": execution.numerics, "keep_buffers": keep, "keep_kernels": kernels}
    with forward_context(module, **asdict(execution.limits), **options) as context:
        for chunk in (plan.full(i) for i in range(3)):
            if direction == "encode":
                host, step = (
                    torch.randint(0, 256, (chunk.padded_frames, height, width, 3), dtype=torch.uint8),
                    encode_chunk,
                )
            else:
                host = torch.randn(chunk.num_latents, model.geometry.latent_channels, height // p, width // p)
                step = decode_chunk
            with tracker:
                tracker.reset_peak()
                step(ready, context, host, device=device, dtype=dtype)
            peaks.append(tracker.peak_bytes)
            assert tracker.live_bytes == context.cache.nbytes + context.buffers.num_bytes + context.kernel_bytes
            assert kernels or not context.kernel_bytes
            assert keep == bool(context.buffers.num_bytes)
    assert tracker.live_bytes == 0
    return peaks


PLAIN, LAST = Numerics(), Numerics(layout="channels_last")
PAIRED = Numerics(layout="channels_last", paired_frames=True)
FUSED = Numerics(layout="channels_last", fused_residuals=True)
WIDE = Numerics(layout="channels_last", float32_products=True)
ALL = Numerics(layout="channels_last", paired_frames=True, fused_residuals=True, float32_products=True)


def in_both_directions(cases, keeps):
    """Every case in both directions and with every value of ``keeps``; they take turns in `make test`."""
    return [
        pytest.param(direction, keep, *case, marks=[] if i % (2 * len(keeps)) == 2 * k + j else [pytest.mark.slow])
        for i, case in enumerate(cases)
        for j, direction in enumerate(("encode", "decode"))
        for k, keep in enumerate(keeps)
    ]


@pytest.mark.parametrize(
    ("direction", "keep", "size", "dtype", "numerics", "slice_frames"),
    in_both_directions(
        [
            ((32, 48), torch.float32, PLAIN, None),
            ((40, 24), torch.bfloat16, PLAIN, None),
            ((32, 16), torch.bfloat16, PLAIN, 3),
            ((16, 24), torch.float32, PLAIN, 1),
            ((32, 48), torch.bfloat16, LAST, None),
            ((40, 24), torch.float32, LAST, 1),
            ((32, 16), torch.float32, PAIRED, None),
            ((40, 24), torch.float32, PAIRED, 3),
            ((32, 16), torch.bfloat16, FUSED, None),
            ((40, 24), torch.float32, FUSED, 1),
            ((32, 16), torch.bfloat16, WIDE, 1),
            ((16, 24), torch.bfloat16, Numerics(float32_products=True), None),
            ((32, 16), torch.float32, ALL, 3),
            ((32, 48), torch.bfloat16, ALL, None),
        ],
        keeps=[False, True],
    ),
)
def test_projection_equals_a_tracked_run_to_the_byte(vae, direction, keep, size, dtype, numerics, slice_frames):
    if not can_compute(numerics, dtype):
        pytest.skip("a kernel is missing here")
    numerics = as_computed_here(numerics, dtype)
    setting = {"dtype": dtype, "numerics": numerics, "slice_frames": slice_frames, "keep_buffers": keep}
    plan = fixed_plan(vae, height=size[0], width=size[1], **setting).direction(direction)
    assert_planned(plan, vae, direction, size, dtype, keep)


def assert_planned(plan, model, direction, size, dtype, keep):
    first, *middle = run_for_real(model, direction, *size, dtype, plan.execution)
    assert plan.execution.keeps_buffers == keep
    if not keep:
        assert len(set(middle)) == 1
    assert max(middle) == middle[-1] == plan.steady_chunk_bytes - plan.weights_bytes
    assert plan.projected_bytes - plan.weights_bytes == max(first, *middle)


@pytest.mark.parametrize(
    ("direction", "keep", "dtype", "numerics", "slice_frames"),
    in_both_directions(
        [
            (torch.bfloat16, LAST, None),
            (torch.bfloat16, WIDE, 2),
            (torch.float32, PAIRED, None),
            (torch.float32, ALL, 2),
            (torch.bfloat16, ALL, 2),
        ],
        keeps=[True],
    )
    + in_both_directions(
        [
            (torch.float32, LAST, 2),
            (torch.bfloat16, FUSED, None),
            (torch.float32, PAIRED, 2),
            (torch.bfloat16, WIDE, None),
        ],
        keeps=[False],
    ),
)
def test_tiles_and_packed_kernels_are_in_the_projection(
    packable, monkeypatch, direction, keep, dtype, numerics, slice_frames
):
    monkeypatch.setattr(norms, "SLAB_BYTES", 2**15)  # a few rows of these frames, fewer than a tile has
    monkeypatch.setattr(DryRuns, "_known", {})
    if not can_compute(numerics, dtype):
        pytest.skip("a kernel is missing here")
    numerics = as_computed_here(numerics, dtype)
    setting = {"height": 72, "width": 24, "dtype": dtype, "numerics": numerics, "keep_buffers": keep}
    setting["slice_frames"] = slice_frames
    whole = fixed_plan(packable, **setting).direction(direction)
    plan = fixed_plan(packable, **setting, tile_bytes=2**16).direction(direction)
    assert plan.execution.limits.tile_elements == 2**16 // dtype.itemsize
    if not keep:  # or else the kernels are kept, which are larger than all else of such frames
        assert plan.projected_bytes < whole.projected_bytes
    assert plan.execution.keeps_kernels == keep
    assert_planned(plan, packable, direction, (72, 24), dtype, keep)
    if keep and slice_frames is None:  # kernels are the first thing to do without
        less = fixed_plan(packable, **setting, tile_bytes=2**16, memory=plan.projected_bytes - 1).direction(direction)
        assert not less.execution.keeps_kernels
        assert_planned(less, packable, direction, (72, 24), dtype, keep)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_is_kept_between_chunks_only_where_there_is_room(vae, direction):
    setting = {"height": 32, "width": 48, "keep_buffers": True, "numerics": LAST, "tile_bytes": 2**14}

    def planned(**more):
        return fixed_plan(vae, **setting, **more).direction(direction)

    kept = planned()
    thrifty = fixed_plan(vae, **{**setting, "keep_buffers": False}).direction(direction)
    assert kept.execution.keeps_buffers
    assert not thrifty.execution.keeps_buffers
    assert thrifty.projected_bytes < kept.projected_bytes < 1.25 * thrifty.projected_bytes
    assert planned(memory=kept.projected_bytes) == kept
    less = planned(memory=kept.projected_bytes - 1)
    assert (less.execution.keeps_buffers, less.projected_bytes) == (False, thrifty.projected_bytes)
    assert less.placement.offloaded == frozenset()  # it costs less than transfers
    assert not planned(offload="all").execution.keeps_buffers  # who offloads wants little memory
    assert kept.minimum_bytes == thrifty.minimum_bytes


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_projection_equals_a_tracked_run_of_the_full_architecture(direction):
    model = load_model("cogvideox-2b", random_weights=0)
    plan = fixed_plan(model, height=64, width=96).direction(direction)
    assert max(run_for_real(model, direction, 64, 96, torch.float32)) == plan.projected_bytes - plan.weights_bytes


@pytest.mark.parametrize(
    ("size", "numerics"), [((1080, 1920), PLAIN), ((1080, 1920), LAST), ((2160, 3840), LAST)], ids=str
)
def test_no_convolution_of_a_large_frame_exceeds_32_bit_indexing(monkeypatch, size, numerics):
    """Long chunks are cut in slices; at 3840x2160 not even three frames fit, and bands of rows come in."""
    from longvid.models.kernels import convolution

    largest, heights, real = [], set(), convolution._call

    def recording(x, *args):
        out = real(x, *args)
        largest.append(max(x.numel(), out.numel()))
        heights.add(x.shape[-2])
        return out

    monkeypatch.setattr(convolution, "_call", recording)
    monkeypatch.setattr(DryRuns, "_known", {})
    plan = fixed_plan("cogvideox-2b", height=size[0], width=size[1], dtype="bfloat16", numerics=numerics)
    assert (plan.height, plan.width) == (size[0], size[1])
    assert plan.decode.projected_bytes > plan.encode.projected_bytes > 18e9
    assert max(largest) <= 2**31 - 1
    if size[0] == 2160:
        assert any(h not in {2160 >> k for k in range(4)} | {(2160 >> k) + 1 for k in range(4)} for h in heights)


def test_sizes_are_padded_up_to_latents(vae):
    plan = fixed_plan(vae, height=33, width=41)
    assert (plan.height, plan.width) == (40, 48)


def test_budget(vae):
    fixed = {"height": 32, "width": 32, "offload": "none", "slice_frames": 8}
    needed = fixed_plan(vae, **fixed).encode.projected_bytes
    fixed_plan(vae, **fixed, memory=needed).check("encode")
    with pytest.raises(MemoryBudgetError, match="encode at 32x32 in float32 needs") as caught:
        fixed_plan(vae, **fixed, memory=needed - 1).check("encode")
    assert caught.value.projected_bytes == needed
    with pytest.raises(MemoryBudgetError, match="contexts of other open videos"):
        fixed_plan(vae, **fixed, memory=needed, held_bytes=1).check("encode")


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("numerics", [Numerics(), Numerics(layout="channels_last", paired_frames=True)], ids=str)
def test_slices_get_shorter_before_contexts_leave(vae, direction, numerics):
    """The longest slices that fit; transfers only when the shortest do not."""
    setting = {"height": 32, "width": 48, "numerics": numerics, "directions": (direction,)}
    free = fixed_plan(vae, **setting).direction(direction)
    assert free.execution.slice_frames is None
    # Slices that are in between may need as much as whole chunks: a longer window at a time, but an output beside it.
    shortest = fixed_plan(vae, **setting, slice_frames=2 if numerics.paired_frames else 1).direction(direction)
    assert shortest.projected_bytes < free.projected_bytes
    seen = []
    for step in range(5):
        memory = shortest.projected_bytes + (free.projected_bytes - shortest.projected_bytes) * step // 4
        part = fixed_plan(vae, **setting, memory=memory).direction(direction)
        assert part.projected_bytes <= memory
        assert not part.placement.offloaded
        seen.append(part.execution.slice_frames or 8)
    assert seen == sorted(seen)
    assert fixed_plan(vae, **setting, memory=free.projected_bytes).direction(direction).execution.slice_frames is None
    less = fixed_plan(vae, **setting, memory=shortest.projected_bytes - 1).direction(direction)
    assert less.execution == shortest.execution
    assert less.placement.offloaded
    assert less.minimum_bytes == shortest.minimum_bytes < shortest.projected_bytes


@pytest.mark.parametrize(("reserved", "held"), [(0, 0), (3_000_000, 1_500_000)])
def test_what_is_suggested_fits(vae, reserved, held):
    """Every suggestion, read back and planned with, is within the budget."""
    setting = {"height": 48, "width": 64, "reserved": reserved, "held_bytes": held}
    need = fixed_plan(vae, **setting).encode
    memory = (need.weights_bytes + need.minimum_bytes) // 2 + reserved + held
    plan = fixed_plan(vae, **setting, memory=memory, offload="none")
    assert not plan.fits("encode")
    suggestions = plan.encode.suggestions
    assert len(suggestions) >= 3
    for text in suggestions:
        changed = {**setting, "memory": memory, "offload": "auto"}
        if found := re.search(r"a budget of (\w+)( as it is)?", text):
            changed |= {"memory": found[1], "offload": "none" if found[2] else "auto"}
        elif found := re.search(r"frames of (\d+)x(\d+)", text):
            changed |= {"width": int(found[1]), "height": int(found[2])}
        elif found := re.search(r"dtype (\w+)", text):
            changed |= {"dtype": found[1]}
        else:
            assert text == "offload auto or all"
        assert fixed_plan(vae, **changed).fits("encode"), text


def test_shorter_chunks_are_suggested_where_the_cut_is_free():
    eight = fixed_plan("tiny", height=64, width=96, chunk_frames=8)
    plan = fixed_plan("tiny", height=64, width=96, chunk_frames=16, memory=eight.projected_bytes)
    direction = next(d for d in ("encode", "decode") if not plan.fits(d))
    assert "chunks of 8 frames" in plan.direction(direction).suggestions


def test_what_may_be_held_between_chunks_is_a_limit_for_any_chunk_length():
    need = fixed_plan("tiny", height=64, width=96)
    limit = need.decode.cache_bytes // 2
    plan = fixed_plan("tiny", height=64, width=96, memory="1GiB", idle_limit_bytes=limit, directions=["decode"])
    assert plan.decode.idle_bytes <= limit
    assert plan.decode.placement.offloaded


def test_explained_and_recorded(vae):
    plan = fixed_plan(vae, height=32, width=32, memory="1GiB")
    text = plan.explain()
    assert "peak of the run" in text
    assert "1.00 GiB allowed" in text
    assert "yes" in text
    record = plan.to_dict()
    assert record["encode"]["layers"][0]["name"] == "conv_in"
    assert record["decode"]["chunk_frames"] == 8


def test_the_model_is_not_moved(vae):
    before = {k: v.data_ptr() for k, v in vae.state_dict().items()}
    fixed_plan(vae, height=32, width=32, dtype="bfloat16")
    assert {k: v.data_ptr() for k, v in vae.state_dict().items()} == before


def test_hooks_on_the_model_hear_nothing_of_a_dry_run(vae):
    heard = []
    handles = [
        vae.encoder.conv_in.register_forward_hook(lambda *_: heard.append(1)),
        vae.encoder.conv_in.conv.register_forward_pre_hook(lambda *_: heard.append(1)),
    ]
    fixed_plan(vae, height=32, width=32)
    assert not heard
    assert vae.encoder.conv_in._forward_hooks
    for handle in handles:
        handle.remove()


def test_bad_requests():
    with pytest.raises(ScheduleError, match="no area"):
        make_plan("cogvideox-nano", height=0, width=8)
    with pytest.raises(ModelError, match="float64"):
        parse_dtype(torch.float64)
    with pytest.raises(ModelError, match="choose bfloat16"):
        make_plan("cogvideox-nano", height=8, width=8, dtype="half")
    with pytest.raises(OptionError, match="choose auto, none, all"):
        make_plan("cogvideox-nano", height=8, width=8, offload="some")
