import threading
import time
from concurrent.futures import Future

import pytest
from support.clock import Clock, wait_until, wait_until_blocked

from longvid.runtime.prefetch import Prefetcher, StopRequest, Writer


def test_items_arrive_in_order_and_the_thread_ends():
    with Prefetcher(iter(range(50))) as items:
        assert list(items) == list(range(50))
    assert not any(t.name.startswith("longvid-read") for t in threading.enumerate())


def test_the_reader_is_never_more_than_its_queue_ahead():
    made = []

    def source():
        for i in range(20):
            made.append(i)
            yield i

    with Prefetcher(source(), depth=2) as items:
        for item in items:
            time.sleep(0.01)
            assert len(made) <= item + 1 + 2 + 1  # taken, queued, and one in hand


def test_an_error_of_the_reader_surfaces_with_its_traceback():
    def source():
        yield 1
        raise LookupError("broken disc")

    with pytest.raises(LookupError, match="broken disc") as caught, Prefetcher(source()) as items:
        list(items)
    assert "source" in [entry.name for entry in caught.traceback]


def test_leaving_early_stops_an_endless_reader():
    def source():
        while True:
            yield 0

    with Prefetcher(source()) as items:
        next(iter(items))
    assert not any(t.name.startswith("longvid-read") for t in threading.enumerate())


def test_the_writer_consumes_everything_before_it_leaves():
    got = []
    with Writer(got.append) as writer:
        for i in range(50):
            writer.put(i)
    assert got == list(range(50))


def test_the_writer_holds_back_a_fast_producer():
    got = []

    def slow(item):
        time.sleep(0.01)
        got.append(item)

    with Writer(slow, depth=2) as writer:
        for i in range(20):
            writer.put(i)
            assert i - len(got) <= 2 + 1
    assert writer.wait_seconds > 0


@pytest.mark.parametrize("at", [0, 3, 9])
def test_an_error_of_the_writer_reaches_the_producer(at):
    def consume(item):
        if item == at:
            raise OSError("disc full")

    with pytest.raises(OSError, match="disc full"), Writer(consume) as writer:
        for i in range(10):
            writer.put(i)


def test_an_error_of_the_producer_drops_what_waits():
    got = []

    def slow(item):
        wait_until_blocked(threading.Thread.join)  # until the producer leaves
        got.append(item)

    with pytest.raises(KeyError), Writer(slow, depth=5) as writer:
        for i in range(5):
            writer.put(i)
        raise KeyError
    assert len(got) <= 1  # the one in hand
    assert not any(t.name.startswith("longvid-write") for t in threading.enumerate())


def test_a_failed_writer_is_heard_of_while_the_source_is_silent():
    def source():
        yield 1
        wait_until_blocked(threading.Thread.join)  # the thread must end before the reader can be left
        yield 2

    def fail(_):
        raise OSError("disk")

    seen, stop = [], StopRequest()
    with (
        pytest.raises(OSError, match="disk"),
        Writer(fail, stop=stop) as writer,
        Prefetcher(source(), check=writer.check, stop=stop) as items,
    ):
        for item in items:
            seen.append(item)
            writer.put(item)
    assert seen == [1]  # the error did not wait for a second item


@pytest.mark.timeout(120)
def test_a_stop_ends_the_wait_for_a_silent_source():
    stop, seen = StopRequest(), []

    def source():
        yield 1
        wait_until_blocked(StopRequest.wait)
        stop.make()
        wait_until_blocked(threading.Thread.join)  # the consumer leaves although there is no second item
        yield 2

    with Prefetcher(source(), stop=stop) as items:
        seen += items
    assert (seen, items.ended) == ([1], False)


def test_items_behind_an_error_of_the_writer_are_dropped():
    got = []

    def consume(item):
        got.append(item)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), Writer(consume, depth=5) as writer:
        for item in range(5):
            writer.put(item)
        writer.settle()
    assert got == [0]


# ------------------------------------------------------------------------------------- no time is lost to polling


@pytest.mark.timeout(120)
def test_items_and_ends_never_wait_for_a_poll():
    got = []
    with Writer(got.append) as writer, Prefetcher(iter(range(20)), check=writer.check) as items:
        for item in items:
            time.sleep(0.002 * (item % 3))  # now the one waits, now the other
            writer.put(item)
    assert got == list(range(20))


@pytest.mark.timeout(120)
def test_leaving_wakes_a_reader_that_waits_for_room():
    made = []

    def source():
        for i in range(1000):
            made.append(i)
            yield i

    with Prefetcher(source(), depth=2) as items:
        next(iter(items))
        while len(made) < 4:  # one taken, two queued, one waits for room
            time.sleep(0.001)
        time.sleep(0.01)
    assert len(made) == 4


@pytest.mark.timeout(120)
def test_an_error_of_the_producer_wakes_an_idle_writer():
    with pytest.raises(KeyError), Writer(lambda _: None):
        time.sleep(0.01)
        raise KeyError
    assert not any(t.name.startswith("longvid-write") for t in threading.enumerate())


@pytest.mark.timeout(120)
def test_a_failing_writer_wakes_a_producer_that_waits_for_room():
    def fail(_):
        wait_until_blocked(Future.result)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), Writer(fail, depth=1) as writer:
        for i in range(3):
            writer.put(i)


# ------------------------------------------------------------------------------------- what is measured


def wait_until_idle(thread):
    """Until the time for which it has been busy stands still."""

    def is_idle():
        before = thread.busy_seconds
        time.sleep(0.001)
        return thread.busy_seconds == before

    wait_until(is_idle, "the thread is idle")


def test_a_reader_that_waits_for_room_is_not_busy(clock):
    made = []

    def source():
        for i in range(3):
            clock.jump()
            made.append(i)
            yield i

    with Prefetcher(source(), depth=1) as items:
        for item in items:
            wait_until(lambda item=item: len(made) == min(item + 3, 3), "one item waits and one is in hand")
            wait_until_idle(items)
            clock.jump(100)
    assert 3 <= items.busy_seconds / Clock.JUMP < 4
    assert items.wait_seconds / Clock.JUMP < 4


def test_a_writer_that_waits_for_items_is_not_busy(clock):
    got = []

    def consume(item):
        clock.jump()
        got.append(item)

    with Writer(consume) as writer:
        for i in range(3):
            wait_until(lambda i=i: len(got) == i, "all is written")
            wait_until_idle(writer)
            clock.jump(100)
            writer.put(i)
    assert 3 <= writer.busy_seconds / Clock.JUMP < 4


def test_leaving_counts_as_waiting_while_the_last_items_are_written(clock):
    def consume(_):
        wait_until_blocked(Future.result)
        clock.jump()

    with Writer(consume, depth=4) as writer:
        for i in range(3):
            writer.put(i)
        assert writer.wait_seconds < Clock.JUMP
    assert 3 <= writer.wait_seconds / Clock.JUMP < 4


def test_a_producer_that_waits_for_room_waits(clock):
    def consume(item):
        if item == 0:
            wait_until_blocked(Future.result)
            clock.jump()

    with Writer(consume, depth=1) as writer:
        for i in range(3):
            writer.put(i)
        assert 1 <= writer.wait_seconds / Clock.JUMP < 2


def test_the_item_in_hand_counts_and_time_never_runs_back(clock):
    begun, go, seen = threading.Event(), threading.Event(), []

    def source():
        begun.set()
        go.wait()
        yield from range(2000)

    with Prefetcher(source()) as items:
        begun.wait()
        clock.jump()
        assert items.busy_seconds >= Clock.JUMP  # nothing was made yet
        go.set()
        for _ in items:
            seen += [items.busy_seconds, items.busy_seconds]
    assert seen == sorted(seen)


def test_a_failed_item_counts_too(clock):
    def source():
        clock.jump()
        raise LookupError
        yield

    with pytest.raises(LookupError), Prefetcher(source()) as items:
        list(items)
    assert items.busy_seconds >= Clock.JUMP
