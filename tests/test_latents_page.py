"""docs/latents.md: its code and its commands run as they are printed."""

import re
import shlex
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import longvid as lv
from longvid.cli.commands import main

PAGE = Path(__file__).parent.parent / "docs" / "latents.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (29, 32, 48, 3), dtype=np.uint8)
    with lv.VideoSession(lv.load_model("wan2.1-nano", random_weights=0), device="cpu") as session:
        session.encode(frames, "clip.zarr")
    z = torch.randn(1, 16, 8, 8, 12)
    safetensors.torch.save_file({"latents": z}, "latents.safetensors")
    np.save("cached.npy", z[0].numpy())

    code = re.findall(r"```(python)?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [language for language, _ in code] == ["python", "python", "python", "", "python"]
    names = {}
    for language, block in code:
        if language:
            exec(block, names)
            continue
        for line in block.splitlines():
            assert main([*shlex.split(line)[1:], "--quiet"]) == 0
    assert torch.allclose(names["z"], torch.from_numpy(names["store"].read(0, 8)), atol=1e-5)
    shown = "29 frames of 96x64, latents (8, 16, 8, 12) float32"
    assert shown in capsys.readouterr().out
    assert Path("back.mp4").stat().st_size
    assert len(lv.store.reader.open_frames("frames.zarr")) == 29
