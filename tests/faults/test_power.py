"""The power fails at any file operation: what was synced is there, and a run resumed from it gives the same bits."""

import random

import pytest
from support.fault_runs import Forker, Outcome, Truth, explain
from support.file_operations import PowerCut


@pytest.fixture(scope="module")
def forker():
    with Forker() as forker:
        yield forker


@pytest.fixture(scope="module", params=["fsync", "rename"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def truths(forker, mode, tmp_path_factory):
    """Undisturbed runs of both directions, and where the latents lie that are decoded."""
    folder = tmp_path_factory.mktemp(mode)
    found = {}
    for job in ("encode", "decode"):
        ending = forker.run(job, folder / f"{job}.zarr", mode=mode, store=folder / "encode.zarr")
        found[job] = Truth.of(job, folder / f"{job}.zarr", ending)
    return found, folder / "encode.zarr"


def cut(forker, job, folder, mode, store, truth, seed):
    """Kill a run anywhere, leave of its store what a power cut might, and go on; what came of it, and the seconds.

    Every third time it is a run that resumes another one, which was killed before.
    """
    rng, path, outcome = random.Random(seed), folder / "a.zarr", Outcome()
    log, kept = folder / "log", folder / "kept"
    kept.mkdir(parents=True)
    points = [rng.randrange(truth.points)]
    if seed % 9 > 5:
        points.append(rng.randrange(rng.choice((100, truth.points))))
    for point in points:
        if not forker.run(job, path, mode=mode, store=store, kill_at=point, log=log, kept=kept).killed:
            return None
    failure = PowerCut(path, log, rng)
    failure.happen()
    # Without syncs nothing is promised; what was lost is what readers had been shown.
    outcome.see(path, truth, least=failure.durable_frames() if mode == "fsync" else failure.shown_frames())
    ending = forker.run(job, path, mode=mode, store=store)
    outcome.see_end(path, truth, ending)
    return outcome, ending.seconds


def job_of(seed):
    return ("encode", "decode")[seed % 3 == 2]


@pytest.mark.timeout(3600)
def test_a_power_cut_anywhere(forker, mode, truths, tmp_path, ledger, all_faults):
    """With syncs all is well in every state; without them, and that is the negative control, something is not."""
    found, store = truths
    count = 160 if all_faults else 12

    def tried(seed):
        return cut(forker, job_of(seed), tmp_path / str(seed), mode, store, found[job_of(seed)], seed)

    bad, in_the_middle = [], 0
    for seed, told in enumerate(forker.each(tried, range(count if mode == "fsync" else count // 2))):
        if told is None:
            continue
        outcome, seconds = told
        in_the_middle += outcome.started_in_the_middle
        ledger.add(
            f"power cut: {job_of(seed)}",
            survived=outcome.ok,
            silently_wrong=bool(outcome.wrong),
            lost_bytes=int(outcome.lost_frames * found[job_of(seed)].frame_bytes),
            seconds=seconds,
            who="longvid" if mode == "fsync" else "longvid, rename only",
        )
        if not outcome.ok:
            bad.append(((seed, job_of(seed)), outcome))
    if mode == "fsync":
        assert not bad, explain(bad)
        assert in_the_middle >= (count // 5 if all_faults else 2)
    else:
        assert bad
