"""Media files with random damage: frames or an error of ours, never a crash, a hang, or much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.bad_media import B_FRAMES, JPEG, MPEG2, MPEG4, VP9, clip, noisy

CHILD = """
import faulthandler, json, random, sys, time, warnings
from pathlib import Path
faulthandler.enable()
warnings.simplefilter("ignore")
from longvid.errors import LongvidError
from longvid.media.limits import Limits
from longvid.media.sources import open_source

seeds = [Path(name) for name in sys.argv[4:]]
target, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
limits = Limits(max_pixels=10**6, max_frames=200, stall_seconds=60)
dice = random.Random(seed)

def mutate(data):
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 20])):
        # headers decide what is done, so that they are hit more often than pixels are
        within = dice.choice([64, 1024, 1024, len(data)])
        at = dice.randrange(min(within, len(data)))
        if dice.random() < 0.3:
            at = len(data) - 1 - at
        kind = dice.randrange(6)
        if kind == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            data[at : at + 4] = dice.choice([b"\\0\\0\\0\\0", b"\\xff" * 4, b"\\x7f\\xff\\xff\\xff", b"\\0\\0\\0\\1"])
        elif kind == 3:
            del data[at : at + dice.randrange(1, 200)]
        elif kind == 4:
            data[at:at] = data[at : at + dice.randrange(1, 200)]
        else:
            del data[max(at, 16) :]
        if len(data) < 32:
            break
    return bytes(data)

outcomes, slowest, problems = {}, 0.0, []

def peak():  # KiB; getrusage would say what the process that started this one had
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0

begin = peak()
for number in range(count):
    source = dice.choice(seeds)
    path = target / f"mutant{source.suffix}"
    path.write_bytes(mutate(source.read_bytes()))
    policy = dice.choice(["stop", "keep", "conceal"])
    print(number, policy, path.suffix, file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        with open_source(path, on_error=policy, limits=limits) as video:
            shape = (video.info.height, video.info.width, 3)
            for block in video.blocks():
                assert block.frames_THWC.shape == (len(block.pts_T), *shape)
                assert len(block.valid_T) == len(block.pts_T)
        result = "frames"
    except LongvidError as exc:
        result = getattr(exc, "kind", type(exc).__name__)
    except Exception as exc:
        result = "problem"
        problems.append(f"{number} {policy} {source.name}: {exc!r}")
    outcomes[result] = outcomes.get(result, 0) + 1
    slowest = max(slowest, time.monotonic() - started)
grown = peak() - begin
print(json.dumps({"outcomes": outcomes, "slowest": slowest, "problems": problems, "grown": grown}))
"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    frames = noisy(12)
    return [
        clip(folder, "a.mp4", frames, options=B_FRAMES), clip(folder, "b.mp4", frames, movflags="+faststart"),
        clip(folder, "c.mp4", frames, movflags="frag_keyframe+empty_moov"), clip(folder, "a.mkv", frames),
        clip(folder, "a.webm", frames, **VP9), clip(folder, "a.ts", frames), clip(folder, "a.avi", frames, **MPEG4),
        clip(folder, "b.avi", frames, **JPEG), clip(folder, "a.mpg", frames, **MPEG2), clip(folder, "a.flv", frames),
        clip(folder, "a.h264", frames), clip(folder, "a.gif", frames, codec="gif", pix_fmt="rgb8", rate=10),
    ]  # fmt: skip


def fuzz(folder: Path, seeds: list[Path], seed: int, count: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(seed), str(count), *map(str, seeds)],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}, after {done.stderr[-600:]}"
    return json.loads(done.stdout)


def check(found: dict, count: int, ledger) -> None:
    problems = len(found["problems"])
    for number in range(count):
        ledger.add("media: mutant", survived=number >= problems, seconds=found["slowest"])
    assert found["problems"] == []
    assert sum(found["outcomes"].values()) == count
    assert "stalled" not in found["outcomes"]  # each takes a few milliseconds
    assert found["grown"] < 300 * 1024  # KiB
    # mutants that are all refused, or all read, would show nothing
    assert found["outcomes"].get("frames", 0) > count // 20
    assert found["outcomes"].get("damaged", 0) > count // 20


def test_three_hundred_mutants(tmp_path, seeds, ledger):
    check(fuzz(tmp_path, seeds, seed=1, count=300), 300, ledger)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_two_thousand_mutants(tmp_path, seeds, ledger, seed):
    check(fuzz(tmp_path, seeds, seed, count=250), 250, ledger)
