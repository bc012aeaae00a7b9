"""Forward contexts with their options in one call."""

from longvid import ConvCache, ForwardContext
from longvid.memory.buffer_pool import BufferPool
from longvid.models.context import Limits
from longvid.models.numerics import Numerics


def forward_context(module, *, numerics=None, offloader=None, keep_buffers=False, keep_kernels=False, **limits):
    return ForwardContext(
        ConvCache(module, offloader=offloader),
        BufferPool(keep=keep_buffers),
        numerics or Numerics(),
        Limits(**limits),
        keep_kernels,
    )
