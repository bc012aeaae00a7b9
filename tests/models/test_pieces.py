"""Layers that run piece by piece: the same numbers, the planned bytes, and every context moved once per chunk."""

import itertools

import pytest
import torch
from support.contexts import forward_context

from longvid import CacheError, ConvCache, load_model
from longvid.memory.offloader import Offloader
from longvid.models.context import ForwardContext, Limits
from longvid.models.numerics import Numerics

NAMES = ["wan2.1-nano", "wan2.2-nano"]
SIZE = {"wan2.1-nano": (48, 64), "wan2.2-nano": (64, 96)}


def inputs(model, direction, size, num_chunks=3, dtype=torch.float32):
    """Chunks of one latent, the first of two."""
    height, width = size
    p, c = model.geometry.pixels_per_latent, model.geometry.latent_channels
    generator = torch.Generator().manual_seed(1)
    for i in range(num_chunks):
        if direction == "encode":
            yield torch.rand(1, 3, 4 + (i == 0), height, width, generator=generator, dtype=dtype) * 2 - 1
        else:
            yield torch.randn(1, c, 1 + (i == 0), height // p, width // p, generator=generator, dtype=dtype)


def run(model, direction, size, limits, layout=torch.contiguous_format, **options):
    module, step = (model.encoder, model.encode) if direction == "encode" else (model.decoder, model.decode)
    with ForwardContext(ConvCache(module, **options), limits=limits) as context:
        return [step(x.contiguous(memory_format=layout), context) for x in inputs(model, direction, size)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("pieces", ["resnets", "stages"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_what_whole_chunks_give(name, direction, pieces, layout):
    model = load_model(name, random_weights=0)
    whole = run(model, direction, SIZE[name], Limits(), layout)
    for slice_elements, tile_elements in itertools.product((1, 30_000, 2**31), (None, 4000)):
        limits = Limits(pieces=pieces, slice_elements=slice_elements, tile_elements=tile_elements)
        for got, expected in zip(run(model, direction, SIZE[name], limits, layout), whole, strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Moves(Offloader):
    """Notes when contexts are opened, begun and kept."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def begin(self, group):
        self.seen.append(("begin", group))
        super().begin(group)

    def end(self):
        self.seen.append(("end", self._group))
        super().end()

    def keep(self, path, context, *, complete=True):
        self.seen.append(("complete" if complete else "part", path))
        super().keep(path, context, complete=complete)


def test_a_context_is_complete_once_per_chunk():
    model = load_model("wan2.1-nano", random_weights=0)
    moves = Moves()
    run(model, "encode", (48, 64), Limits(pieces="resnets", slice_elements=1), offloader=moves)
    complete = [path for what, path in moves.seen if what == "complete"]
    layers = [path for path, layer in model.encoder.named_modules() if getattr(layer, "context_frames", 0)]
    assert sorted(complete) == sorted(3 * layers)
    groups = [name for what, name in moves.seen if what == "begin"]
    assert len(groups) == 3 * len(set(groups))
    assert "down_blocks.0.conv1 .. down_blocks.0.conv2" in groups
    assert moves.seen.count(("part", "down_blocks.0.conv1")) == 4 + 3 + 3  # of 5, 4 and 4 frames


def test_a_layer_that_misses_a_piece_is_an_error():
    model = load_model("wan2.1-nano", random_weights=0)
    block = model.encoder.down_blocks[0]
    x = torch.zeros(1, 8, 2, 8, 8)
    parts = [range(1), range(1, 2)]
    with (
        forward_context(block) as context,
        pytest.raises(CacheError, match="did not run in piece 0"),
        torch.inference_mode(),
        context.chunk(),
    ):
        for part in context.cache.pieces([block], parts):
            block.conv1(x[:, :, part.start : part.stop], context)


def test_a_layer_that_runs_twice_in_a_piece_is_an_error():
    model = load_model("wan2.1-nano", random_weights=0)
    block = model.encoder.down_blocks[0]
    x = torch.zeros(1, 8, 2, 8, 8)
    with (
        forward_context(block) as context,
        pytest.raises(CacheError, match="ran twice"),
        torch.inference_mode(),
        context.chunk(),
    ):
        for _ in context.cache.pieces([block], [range(1), range(1, 2)]):
            for _ in range(2):
                block.conv1(x[:, :, :1], context)


def test_winograd_pairs_stay_pairs():
    model = load_model("wan2.1-nano", random_weights=0)
    outs = []
    for pieces in (None, "resnets", "stages"):
        limits = Limits(pieces=pieces, slice_elements=1)
        with ForwardContext(
            ConvCache(model.decoder), limits=limits, numerics=Numerics(layout="channels_last", paired_frames=True)
        ) as context:
            chunks = inputs(model, "decode", (48, 64))
            outs.append([model.decode(z.contiguous(memory_format=torch.channels_last_3d), context) for z in chunks])
    for got in outs[1:]:
        for a, b in zip(got, outs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
