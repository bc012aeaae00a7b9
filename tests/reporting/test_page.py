"""The report page: what it says, what it never does, and that it stays small."""

import html
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from support.runs import (
    BASE_BYTES,
    CHUNK_FRAMES,
    MIB,
    RSS_BYTES,
    chunk_event,
    decoder_layers,
    encoder_layers,
    run_report,
    run_start,
    simulated,
)

from longvid import LongvidError, SessionStateError, StoreError
from longvid.events import LayerContext, Span
from longvid.reporting.history import MAX_POINTS, ChunkView, RunHistory, Stay, stays_on_device
from longvid.reporting.page import ReportPage
from longvid.units import format_seconds

NASTY = "</script><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>'\"&amp;$$x$$"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self._inside = [], [], ""
        self.feed(source)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.words.append("" if tag == "wbr" else " ")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)

    def count(self, tag, **attributes):
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def tell(page, layers=None, num_chunks=20, *, failed=False, **facts):
    layers = encoder_layers(8) if layers is None else layers
    page.run_started(run_start(layers, **facts))
    event = None
    for event in simulated(layers, num_chunks, direction=facts.get("direction", "encode")):
        page(event)
    page.run_finished(None if failed else run_report(event))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    with ReportPage(path) as page:
        tell(page)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    return path.read_text()


# ------------------------------------------------------------------------------------- what it says


def test_the_headline_says_what_was_run_and_what_it_needed(source):
    text = Page(source).text
    assert re.search(r"Encoded 161 frames at \d+(\.\d+)? frames/s", text)
    assert "Measured peak 3.01 GiB, projected 3.03 GiB, 4.00 GiB allowed (512.00 MiB of it reserved)." in text
    assert "720x480 in bfloat16 with THUDM/CogVideoX-2b on cpu, in chunks of 8 frames" in text
    assert "of 8 layers wait in host memory" in text


def test_every_part_is_there_in_order(source):
    titles = re.findall(r"<h3>(.*?)</h3>", source)
    assert titles == [
        "Device memory", "Process memory", "Contexts on the device", "Transfers beside computation", "Throughput",
        "Where the time went", "Plan", "Layers", "Machine",
    ]  # fmt: skip
    page = Page(source)
    assert page.count("div", **{"class": "chart", "role": "img"}) == 6
    assert "THUDM/CogVideoX-2b at 720x480 in bfloat16, 4.00 GiB allowed encode 3.03 GiB" in page.text
    for layer in encoder_layers():
        assert layer.name in page.text
    assert "a processor" in page.text


def test_the_share_of_time_in_which_compute_ran_is_that_of_the_whole_run(tmp_path):
    events = [chunk_event(index) for index in range(4)]
    with ReportPage(tmp_path / "r.html") as page:
        for report in (run_report(events[-1]), None):
            page.run_started(run_start())
            for event in events:
                page(event)
            page.run_finished(report)
    done, failed = Page((tmp_path / "r.html").read_text()).text.split("Encoding failed after")[-2:]
    assert "Compute ran 75.0% of the time and waited for the reader or the writer 12.5%." in done
    assert "reading 50.0% computing 75.0% writing 25.0% compute waits 12.5%" in done
    # A run that failed has no totals, and what its chunks said is added up.
    assert "Compute ran 84.0% of the time and waited for the reader or the writer 10.0%." in failed
    assert "reading 40.0% computing 84.0% writing 20.0% compute waits 10.0%" in failed


def test_shares_of_a_clock_that_did_not_move_are_no_error(tmp_path):
    history = RunHistory(run_start())
    history.add(chunk_event(seconds=0.0))
    assert history.whole.stage_shares == {
        "read": 0.2,
        "compute": 0.42,
        "write": 0.1,
        "wait": history.whole.time_shares[1],
    }
    history.add(chunk_event(1, seconds=0.1, read_seconds=7.0))
    assert history.points[-1].stage_shares["read"] == 1.0


def test_several_runs_have_a_section_each(tmp_path):
    with ReportPage(tmp_path / "r.html") as report:
        tell(report, num_chunks=3)
        assert "longvid report: 2 runs" not in (tmp_path / "r.html").read_text()
        tell(report, decoder_layers(10), num_chunks=3, direction="decode")
    page = Page((tmp_path / "r.html").read_text())
    assert page.count("section") == 2
    assert "longvid report: 2 runs" in page.text
    assert re.search("Encoded 25 frames.*Decoded 25 frames", page.text)
    assert page.count("a", href="#run-2") == page.count("section", id="run-2") == 1


def test_a_failed_run_is_told_as_far_as_it_went(tmp_path):
    with ReportPage(tmp_path / "r.html") as report:
        tell(report, failed=True, frames_total=1000)
    text = Page((tmp_path / "r.html").read_text()).text
    assert "Encoding failed after 161 of 1,000 frames" in text
    assert "Measured peak 3.01 GiB" in text


def test_a_run_that_failed_before_its_first_chunk_is_told_too(tmp_path):
    report = ReportPage(tmp_path / "r.html")
    report.run_started(run_start(frames_total=1000))
    report.run_finished(None)
    page = Page((tmp_path / "r.html").read_text())
    assert "Encoding failed after 0 of 1,000 frames" in page.text
    assert "Peak not measured" in page.text
    assert "no chunk was finished" in page.text
    assert page.count("div", **{"class": "chart"}) == 0


def test_leaving_in_the_middle_of_a_run_is_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), ReportPage(tmp_path / "r.html") as report:
        report.run_started(run_start())
        report(chunk_event())
        raise ZeroDivisionError
    assert "Encoding failed after 8 frames" in Page((tmp_path / "r.html").read_text()).text


def test_without_spans_and_measured_peaks_the_other_charts_remain(tmp_path):
    report = ReportPage(tmp_path / "r.html")
    report.run_started(run_start(allowed_bytes=None))
    report(chunk_event(chunk_peak_bytes=None))
    report.run_finished(run_report(chunk_event()))
    page = Page((tmp_path / "r.html").read_text())
    assert page.count("div", **{"class": "chart"}) == 3
    assert "What each layer did was not recorded" in page.text
    assert "no limit set" in page.text


def test_more_than_allowed_is_not_passed_over(tmp_path):
    report = ReportPage(tmp_path / "r.html")
    report.run_started(run_start(allowed_bytes=BASE_BYTES - 1))
    report(chunk_event())
    report.run_finished(run_report(chunk_event()))
    assert "The run used more than it was allowed." in Page((tmp_path / "r.html").read_text()).text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"), (0.3504, "350 ms"), (0.9999, "1.0 s"), (12.44, "12.4 s"), (59.96, "1 min 00 s"),
        (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min"),
    ],
)  # fmt: skip
def test_times_are_in_a_human_unit(seconds, text):
    assert format_seconds(seconds) == text


# ------------------------------------------------------------------------------------- what it never does


def test_nothing_is_loaded_from_anywhere(source):
    for tag, attributes in Page(source).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    style = re.search("<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in Page(source).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_text_from_outside_is_never_markup(tmp_path):
    layers = (LayerContext(name=NASTY, bytes=MIB, resident=False), LayerContext(name="b", bytes=1, resident=True))
    start = run_start(
        layers, model=NASTY, host_tier=NASTY, plan=NASTY, device="cpu", dtype=NASTY, offload=NASTY,
        machine={"cpu": NASTY, NASTY: NASTY},
    )  # fmt: skip
    with ReportPage(tmp_path / "r.html") as report:
        report.run_started(start)
        for event in simulated(layers, 3):
            report(event)
        report.run_finished(run_report(event))
    source = (tmp_path / "r.html").read_text()
    page, plain = Page(source), Page(source.replace(html.escape(NASTY), ""))
    assert "<script>alert" not in source
    assert page.count("img") == 0
    assert page.count("script") == plain.count("script")
    assert page.tags[-1][0] == "script"
    assert page.text.count("alert(1)") >= 6


@pytest.mark.parametrize("content", ["<html>my page</html>", None])
def test_an_existing_page_is_replaced_only_when_asked(tmp_path, source, content):
    path = tmp_path / "r.html"
    path.write_text(content or source)
    with pytest.raises(StoreError, match=r"replace it with --overwrite \(overwrite=True\)") as caught:
        ReportPage(path)
    assert caught.value.kind == "exists"
    with ReportPage(path, overwrite=True) as report:
        assert path.read_text() == (content or source)
        tell(report, num_chunks=1)
    assert "Encoded 9 frames" in path.read_text()


@pytest.mark.parametrize("report", [None, run_report(chunk_event(), complete=False)])
def test_the_page_of_a_run_that_was_not_completed_is_replaced(tmp_path, report):
    path = tmp_path / "r.html"
    page = ReportPage(path)
    page.run_started(run_start())
    page(chunk_event())
    page.run_finished(report)
    with ReportPage(path) as page:
        tell(page, num_chunks=1)
    assert "Encoded 9 frames" in path.read_text()
    with pytest.raises(StoreError, match="--overwrite"):
        ReportPage(path)


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    with pytest.raises(StoreError, match="there is no folder") as caught:
        ReportPage(tmp_path / "no" / "r.html")
    assert caught.value.kind == "missing"
    with pytest.raises(StoreError, match="is not a file"):
        ReportPage(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, source, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text(source)
    report = ReportPage(path, overwrite=True)
    report.run_started(run_start())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="cannot be written: No space left on device"):
        report.run_finished(None)
    assert path.read_text() == source
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_a_missing_library_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(LongvidError, match=re.escape('pip install "longvid[report]"')):
        ReportPage(tmp_path / "r.html")


def test_events_out_of_order_are_refused(tmp_path):
    report = ReportPage(tmp_path / "r.html")
    with pytest.raises(SessionStateError, match="run_started"):
        report(chunk_event())
    with pytest.raises(SessionStateError, match="run_started"):
        report.run_finished(None)


# ------------------------------------------------------------------------------------- that it stays small


def test_hours_of_video_fit_into_the_same_page(tmp_path):
    layers = decoder_layers(30)
    spans = next(simulated(layers, 1)).spans
    with ReportPage(tmp_path / "r.html") as report:
        for direction in ("encode", "decode"):
            report.run_started(run_start(layers, direction=direction))
            for index in range(20_000):
                report(chunk_event(index, direction=direction, spans=spans))
            report.run_finished(run_report(chunk_event(index, direction=direction)))
    assert (tmp_path / "r.html").stat().st_size < 3_000_000


def test_many_runs_fit_into_the_same_page(tmp_path):
    layers = decoder_layers(110)
    with ReportPage(tmp_path / "r.html") as report:
        for _ in range(9):
            report.run_started(run_start(layers))
            for event in simulated(layers, 4):
                report(event)
            for index in range(4, MAX_POINTS):
                report(chunk_event(index))
            report.run_finished(run_report(event))
    source = (tmp_path / "r.html").read_text()
    assert len(source) < 3_000_000
    assert Page(source).count("section") == 9
    assert Page(source).count("div", **{"class": "chart"}) == 5 * 6


@pytest.mark.parametrize("num_chunks", [1, MAX_POINTS, MAX_POINTS + 1, 20_000])
def test_history_is_bounded_and_keeps_extremes_and_sums(num_chunks):
    history = RunHistory(run_start())
    high = num_chunks * 2 // 3
    for index in range(num_chunks):
        extra = 5 * MIB if index == high else 0
        measured = index % 32 == 0 or index == high
        peak = BASE_BYTES + extra if measured else None
        history.add(chunk_event(index, chunk_peak_bytes=peak, rss_bytes=RSS_BYTES + 2 * extra))
    points = history.points
    assert len(points) <= MAX_POINTS
    assert max(p.peak_bytes or 0 for p in points) == BASE_BYTES + 5 * MIB
    assert max(p.rss_bytes for p in points) == RSS_BYTES + 10 * MIB
    assert sum(p.num_chunks for p in points) == num_chunks
    assert sum(p.num_frames for p in points) == num_chunks * CHUNK_FRAMES
    for name, seconds in (("compute", 0.42), ("wait", 0.05), ("read", 0.2), ("write", 0.1)):
        assert sum(getattr(p, f"{name}_seconds") for p in points) == pytest.approx(seconds * num_chunks)
    assert points[0].start_seconds == 0
    assert all(a.stop_seconds == b.start_seconds for a, b in pairwise(points))
    assert sum(w.num_chunks for w in history.windows) == num_chunks
    assert len(history.windows) <= 120


def test_only_the_last_chunks_keep_their_spans():
    history = RunHistory(run_start())
    layers = decoder_layers(110)
    for event in simulated(layers, 9):
        history.add(event)
    history.add(chunk_event(9, seconds=99.0))
    assert [view.index for view in history.views] == [5, 6, 7, 8]
    many = next(simulated(layers, 1)).spans * 40
    history.add(chunk_event(10, seconds=100.0, spans=many))
    assert sum(len(view.spans) for view in history.views) <= 4000


# ------------------------------------------------------------------------------------- contexts on the device


def span(lane, start, stop, layer="a"):
    return Span(lane=lane, layer=layer, start_seconds=start, stop_seconds=stop, num_bytes=1)


def stays(*spans, resident=False, first=7, begin=10.0, end=20.0):
    layers = [LayerContext(name="a", bytes=1, resident=resident)]
    views = [ChunkView(first, begin, end, spans)]
    return [(s.start_seconds, s.stop_seconds) for s in stays_on_device(layers, views)]


def test_a_resident_context_is_always_there():
    assert stays(span("compute", 12, 13), resident=True) == [(10, 20)]


def test_an_offloaded_context_is_there_from_fetch_to_return():
    assert stays(span("to_device", 11, 12), span("compute", 12, 13), span("to_host", 13, 14)) == [(11, 14)]


def test_a_window_that_waits_for_its_fetch_does_not_have_it_yet():
    assert stays(span("compute", 11, 13), span("to_device", 11.5, 12), span("to_host", 13, 14)) == [(11.5, 14)]


def test_a_context_that_is_still_leaving_was_there_before():
    spans = [span("to_host", 10.5, 11), span("to_device", 15, 16), span("compute", 16, 17), span("to_host", 17, 18)]
    assert stays(*spans) == [(10, 11), (15, 18)]


def test_a_context_that_was_fetched_before_is_there_from_the_beginning():
    assert stays(span("compute", 12, 13), span("to_host", 13, 14)) == [(10, 14)]
    assert stays(span("to_device", 9, 11), span("compute", 12, 13), span("to_host", 13, 14)) == [(10, 14)]


def test_in_the_first_chunk_a_context_comes_into_being():
    assert stays(span("compute", 12, 13), span("to_host", 13, 14), first=0) == [(12, 14)]


def test_a_context_that_has_not_left_is_there_to_the_end():
    assert stays(span("to_device", 18, 19), span("compute", 19, 20)) == [(18, 20)]
    assert stays() == []


def test_layers_are_told_apart():
    layers = [LayerContext(name=name, bytes=1, resident=False) for name in "ab"]
    spans = (span("to_device", 1, 2, "b"), span("to_host", 2, 3, "b"), span("to_device", 4, 5), span("to_host", 6, 7))
    views = [ChunkView(1, 0, 9, spans)]
    assert stays_on_device(layers, views) == [Stay("a", 4, 7), Stay("b", 1, 3)]


# ------------------------------------------------------------------------------------- in a browser

PROBE = """
<script>
function canvases(root) {
  const own = [...root.querySelectorAll("canvas")];
  const deep = [...root.querySelectorAll("*")].filter(e => e.shadowRoot).flatMap(e => canvases(e.shadowRoot));
  return own.concat(deep);
}
function drawn(canvas) {
  if (!canvas.width || !canvas.height) return false;
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return data.some(value => value > 0);
}
setTimeout(() => {
  document.body.dataset.drawn = canvases(document).filter(drawn).length;
  console.warn("probed");
  document.body.dataset.overflow = document.documentElement.scrollWidth > window.innerWidth;
}, 4000);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_draws_every_chart_without_complaint(tmp_path, width):
    layers = (*encoder_layers(8), LayerContext(name=NASTY, bytes=MIB, resident=False))
    with ReportPage(tmp_path / "r.html") as report:
        tell(report, layers, model=NASTY)
    probed = tmp_path / "probed.html"
    probed.write_text((tmp_path / "r.html").read_text().replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr",
            "--virtual-time-budget=8000", "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    body = next(attributes for tag, attributes in Page(done.stdout).tags if tag == "body")
    assert int(body["data-drawn"]) >= 6
    assert body["data-overflow"] == "false"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    complaints = [line for line in console if "setting log level" not in line]
    assert len(complaints) == 1, complaints
    assert "probed" in complaints[0]
