import threading
import time

import pytest

from longvid.pipeline import Prefetcher, Writer


def test_items_arrive_in_order_and_the_thread_ends():
    with Prefetcher(iter(range(50)), name="order") as items:
        assert list(items) == list(range(50))
    assert not any(t.name == "order" for t in threading.enumerate())


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

    started = time.monotonic()
    with Prefetcher(source(), name="endless") as items:
        next(iter(items))
    assert time.monotonic() - started < 5
    assert not any(t.name == "endless" for t in threading.enumerate())


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
        time.sleep(0.05)
        got.append(item)

    with pytest.raises(KeyError), Writer(slow, depth=5, name="dropped") as writer:
        for i in range(5):
            writer.put(i)
        raise KeyError
    assert len(got) < 5
    assert not any(t.name == "dropped" for t in threading.enumerate())


def test_a_failed_writer_is_heard_of_while_the_source_is_silent():
    silence = threading.Event()

    def source():
        yield 1
        silence.wait(30)
        yield 2

    def fail(_):
        raise OSError("disk")

    timer, seen = threading.Timer(1.0, silence.set), []
    with (
        pytest.raises(OSError, match="disk"),
        Writer(fail) as writer,
        Prefetcher(source(), check=writer.check) as items,
    ):
        timer.start()  # the thread must end before the reader can be left
        for item in items:
            seen.append(item)
            writer.put(item)
    assert seen == [1]  # the error did not wait for a second item
    timer.join()
