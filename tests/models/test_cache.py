"""The cache: windows, validation, lifecycle, and that nothing is kept longer or larger than it must be."""

import pytest
import torch
from torch import nn

from longvid import CacheError, CausalConv3d, ConvCache, ForwardContext
from longvid.models.layers.window import Window


class Two(nn.Module):
    """Two causal convs with a 1x1 between them: the smallest model with a schema."""

    def __init__(self, channels=4):
        super().__init__()
        self.first = CausalConv3d(3, channels, 3)
        self.point = CausalConv3d(channels, channels, 1)
        self.second = CausalConv3d(channels, 2, (5, 1, 1), initial_context="zeros")

    @torch.inference_mode()
    def forward(self, x, cache):
        with cache.chunk():
            return self.second(self.point(self.first(x, cache), cache), cache)


@pytest.fixture
def model():
    return Two().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 21, 6, 5)


def run(model, x, cuts):
    with ConvCache(model) as cache:
        return torch.cat([model(part, cache) for part in x.split(cuts, dim=2)], dim=2)


def contexts(cache):
    return [home.device for home in cache.offloader._homes.values()]


@pytest.mark.parametrize("cuts", [[1] * 21, [9, 8, 4], [2, 19], [20, 1]])
def test_pieces_equal_the_whole(model, x, cuts):
    torch.testing.assert_close(run(model, x, cuts), run(model, x, [21]), rtol=1e-5, atol=1e-6)


def test_the_whole_equals_a_padded_convolution(model, x):
    """Independent of the cache: pad in front by hand and call the plain convolutions."""
    with torch.no_grad():
        h = model.first.conv(torch.cat([x[:, :, :1]] * 2 + [x], dim=2))
        h = model.point.conv(h)
        expected = model.second.conv(torch.cat([torch.zeros_like(h[:, :, :4]), h], dim=2))
    torch.testing.assert_close(run(model, x, [21]), expected, rtol=1e-5, atol=1e-6)


def test_output_does_not_see_the_future(model, x):
    before = run(model, x, [9, 12])
    changed = x.clone()
    changed[:, :, 10:] = 0
    after = run(model, changed, [9, 12])
    assert torch.equal(before[:, :, :10], after[:, :, :10])
    assert not torch.equal(before[:, :, 10:], after[:, :, 10:])


def test_entries_are_module_paths_and_k1_has_none(model, x):
    with ConvCache(model) as cache:
        assert cache.layer_bytes() == {"first": 0, "second": 0}
        for n, part in enumerate(x.split([9, 8, 4], dim=2), start=1):
            model(part, cache)
            assert cache.layer_bytes() == {"first": 2 * 3 * 2 * 6 * 5 * 4, "second": 2 * 4 * 4 * 6 * 5 * 4}
            assert cache.num_chunks == n
        assert cache.nbytes == sum(cache.layer_bytes().values())
    assert cache.nbytes == 0


def test_a_context_does_not_pin_a_window(model, x):
    with ConvCache(model) as cache:
        model(x, cache)
        for context in contexts(cache):
            assert context.untyped_storage().nbytes() == context.numel() * 4


def test_contexts_stay_in_place(model, x):
    """Static addresses are what pinned transfers and captured graphs will rely on."""
    with ConvCache(model) as cache:
        model(x[:, :, :9], cache)
        before = [context.data_ptr() for context in contexts(cache)]
        model(x[:, :, 9:], cache)
        assert [context.data_ptr() for context in contexts(cache)] == before


def test_two_videos_interleave(model, x):
    a, b = x[:1], x[1:]
    with ConvCache(model) as cache_a, ConvCache(model) as cache_b:
        parts = [(model(p, cache_a), model(q, cache_b)) for p, q in zip(a.split(7, 2), b.split(7, 2), strict=True)]
    assert torch.equal(torch.cat([p for p, _ in parts], 2), run(model, a, [7, 7, 7]))
    assert torch.equal(torch.cat([q for _, q in parts], 2), run(model, b, [7, 7, 7]))


def test_negative_control_a_continued_cache_differs_from_a_fresh_one(model, x):
    with ConvCache(model) as cache:
        model(x[:, :, :9], cache)
        continued = model(x[:, :, 9:], cache)
    assert not torch.equal(continued, run(model, x[:, :, 9:], [12]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:1], "batch 1 instead of 2"),
        (lambda x: x[..., :4], "size 4x6 instead of 5x6"),
        (lambda x: x.double(), "dtype torch.float64 instead of torch.float32"),
        (lambda x: x.to("meta"), "device meta instead of cpu"),
    ],
)
def test_another_video_is_refused_and_says_what_disagrees(model, x, change, said):
    with ConvCache(model) as cache:
        model(x[:, :, :9], cache)
        other = change(x)
        module = model.to(other.dtype) if other.dtype != x.dtype else model
        with pytest.raises(CacheError, match=f"layer 'first' got {said}"):
            module(other, cache)
        assert cache.nbytes == 0


def test_all_disagreements_are_named_at_once(model, x):
    with ConvCache(model) as cache:
        model(x[:, :, :9], cache)
        with pytest.raises(CacheError, match="batch 1 instead of 2, size 4x6 instead of 5x6"):
            model(x[:1, ..., :4], cache)


def test_a_foreign_layer_is_refused(model, x):
    with ConvCache(Two()) as cache, pytest.raises(CacheError, match="not a layer of the module"):
        model(x, cache)


def test_a_layer_that_runs_twice_or_not_at_all_is_refused(model, x):
    with ConvCache(model) as cache, pytest.raises(CacheError, match="'first' ran twice in chunk 0"), cache.chunk():
        model.first(x, cache)
        model.first(x, cache)
    with (
        ConvCache(model) as cache,
        pytest.raises(CacheError, match=r"1 of 2 layers did not run.*'second'"),
        cache.chunk(),
    ):
        model.first(x, cache)


def test_life_outside_its_bounds_is_refused(model, x):
    cache = ConvCache(model)
    with pytest.raises(CacheError, match="not open yet"):
        model(x, cache)
    with cache:
        with pytest.raises(CacheError, match="outside a chunk"):
            model.first(x, cache)
        with pytest.raises(CacheError, match="already running"), cache.chunk():
            model(x, cache)
    with pytest.raises(CacheError, match="closed"):
        model(x, cache)
    with pytest.raises(CacheError, match="cannot be entered"), cache:
        pass
    cache.close()


def test_one_window_at_a_time(model, x):
    with (
        ConvCache(model) as cache,
        torch.inference_mode(),
        pytest.raises(CacheError, match="'second' opened its window inside that of 'first'"),
        cache.chunk(),
        Window(model.first, ForwardContext.of(cache), like=x),
        Window(model.second, ForwardContext.of(cache), like=torch.zeros(2, 4, 21, 6, 5)),
    ):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_after_an_exception_nothing_is_held(model, x, error):
    with ConvCache(model) as cache:
        model(x[:, :, :9], cache)
        with pytest.raises(error), cache.chunk():
            model.first(x[:, :, 9:], cache)
            raise error
        assert cache.nbytes == 0
        with pytest.raises(CacheError, match="inconsistent"):
            model(x[:, :, 9:], cache)


def test_a_window_is_dead_after_its_block(model, x):
    with ConvCache(model) as cache, torch.inference_mode(), cache.chunk():
        with Window(model.first, ForwardContext.of(cache), like=x) as window:
            window.new.copy_(x)
            h = model.first.convolve(window, ForwardContext.of(cache))
        with pytest.raises(CacheError, match="'first' is not open"):
            _ = window.new
        model.second(model.point(h, cache), cache)
