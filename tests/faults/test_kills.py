"""Killed at any file operation, and again while it resumes: readers see a true prefix, and the end is the same bits."""

import random

import pytest
from support.fault_runs import Forker, Outcome, Truth, explain, plain_rows, published_frames, root_of, spread

JOBS = ("encode", "decode")


@pytest.fixture(scope="module")
def forker():
    with Forker() as forker:
        yield forker


@pytest.fixture(scope="module")
def truths(forker, tmp_path_factory):
    """Undisturbed runs of both directions, and where the latents lie that are decoded."""
    folder = tmp_path_factory.mktemp("truth")
    found = {}
    for job in JOBS:
        ending = forker.run(job, folder / f"{job}.zarr", store=folder / "encode.zarr")
        found[job] = Truth.of(job, folder / f"{job}.zarr", ending)
    return found, folder / "encode.zarr"


def killed_at(forker, job, path, store, truth, points):
    """Kill a run at each of ``points`` in turn, each one resuming the one before, then let one finish.

    A run that resumes changes nothing that readers see before its first commit.
    """
    outcome, num_killed = Outcome(), 0
    for point in points:
        frames, seen = outcome.frames, seen_by_readers(path)
        ending = forker.run(job, path, store=store, kill_at=point)
        num_killed += ending.killed
        if not ending.killed:
            break
        outcome.see(path, truth, least=frames)
        if 0 < outcome.frames == frames and not outcome.complete and seen_by_readers(path) != seen:
            outcome.failed.append("the root metadata changed without a commit")
    if num_killed == len(points):
        ending = forker.run(job, path, store=store)
    outcome.see_end(path, truth, ending)
    return outcome, num_killed, ending.seconds


def seen_by_readers(path):
    """What the root metadata say of the data."""
    root = root_of(path)
    return root and (root["consolidated_metadata"], root["attributes"]["longvid"]["digests"])


def account(ledger, fault, outcome, truth, seconds, where):
    lost_bytes = int(outcome.lost_frames * truth.frame_bytes)
    ledger.add(fault, survived=outcome.ok, silently_wrong=bool(outcome.wrong), lost_bytes=lost_bytes, seconds=seconds)
    return [] if outcome.ok else [(where, outcome)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("job", "count"), [("encode", 18), ("decode", 18)])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(
    job, count, forker, truths, tmp_path, ledger, all_faults
):
    found, store = truths
    truth, bad = found[job], []
    points = list(range(truth.points))
    if not all_faults:  # a store comes into being in the first dozen, each of which is a state of its own
        points = [*points[:12], *(12 + point for point in spread(truth.points - 12, count - 12, seed=1))]
    told = forker.each(lambda point: killed_at(forker, job, tmp_path / f"{point}.zarr", store, truth, [point]), points)
    for point, (outcome, num_killed, seconds) in zip(points, told, strict=True):
        if num_killed:
            bad += account(ledger, f"kill: {job}", outcome, truth, seconds, point)
    assert not bad, explain(bad)
    assert sum(outcome.started_in_the_middle for outcome, *_ in told) >= (len(points) // 5 if all_faults else 2)


@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_while_it_goes_on_after_a_kill(forker, truths, tmp_path, ledger, all_faults):
    found, store = truths
    bad, rng, trials = [], random.Random(2), []
    for number in range(200 if all_faults else 6):
        job = JOBS[number % 3 == 2]
        total = found[job].points
        # A resumed run does less the later the first kill was; early points are its opening, sweep and first commit.
        trials.append((number, job, [rng.randrange(total), rng.randrange(rng.choice((60, total)))]))

    def tried(trial):
        number, job, points = trial
        return killed_at(forker, job, tmp_path / f"{number}.zarr", store, found[job], points)

    told = forker.each(tried, trials)
    for (_, job, points), (outcome, num_killed, seconds) in zip(trials, told, strict=True):
        if num_killed:
            fault = "kill: twice" if num_killed == 2 else f"kill: {job}"
            bad += account(ledger, fault, outcome, found[job], seconds, (job, *points))
    assert not bad, explain(bad)
    assert any(num_killed == 2 and outcome.started_in_the_middle for outcome, num_killed, _ in told)


def test_negative_control_plain_zarr_shows_rows_that_nobody_wrote(forker, tmp_path, ledger, all_faults):
    """The same kills, a writer that appends: a longer shape comes before its rows, and they read as fill."""
    import zarr

    rows = plain_rows()
    total = forker.run("plain", tmp_path / "undisturbed.zarr").points
    num_wrong = 0
    for point in spread(total, total if all_faults else 16, seed=3):
        path = tmp_path / f"{point}.zarr"
        assert forker.run("plain", path, kill_at=point).killed
        try:
            shown = zarr.open_array(path, mode="r")[:]
        except FileNotFoundError:  # before the array was there
            shown = rows[:0]
        wrong = not (shown == rows[: len(shown)]).all()
        ledger.add("kill: encode", survived=not wrong, silently_wrong=wrong, who="plain zarr")
        num_wrong += wrong
    assert num_wrong


def test_nothing_is_counted_that_did_not_happen(forker, truths, tmp_path):
    """A point beyond the end kills nothing; the last point there is does, after everything is published."""
    found, _ = truths
    total = found["encode"].points
    late = forker.run("encode", tmp_path / "a.zarr", kill_at=total)
    assert late.finished
    assert late.points == total
    assert forker.run("encode", tmp_path / "b.zarr", kill_at=total - 1).killed
    assert published_frames(tmp_path / "b.zarr") == len(found["encode"].arrays["frame_pts"])
