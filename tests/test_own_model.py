"""docs/own-model.md: its code runs as it is printed."""

import re
from pathlib import Path

import numpy as np
import torch

import longvid as lv

PAGE = Path(__file__).parent.parent / "docs" / "own-model.md"


def test_the_page_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S):
        exec(compile(block, PAGE.name, "exec"), names)
    store = lv.open_store("mine.zarr")
    assert store.complete
    assert store.latents.shape == (40, 4, 16, 24)
    assert isinstance(names["model"], lv.CausalVAE)
    assert names["second"].shape == (1, 8, 8, 16, 24)
    assert names["found"].conforms
    assert {finding.verdict for finding in names["found"].findings} == {"ok", "skipped"}

    # Chunk by chunk it computes what one pass over the whole video computes.
    x = torch.from_numpy(names["video"]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    model = names["model"]
    with lv.ConvCache(model.encoder) as cache:
        mean = model.encode(x, cache).chunk(2, dim=1)[0]
    np.testing.assert_allclose(store.latents[:], mean[0].movedim(0, 1).numpy(), rtol=1e-2, atol=1e-2)
