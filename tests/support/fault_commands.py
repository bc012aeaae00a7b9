"""The command line in forked children: with system calls that fail, limits, and signals at any time."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.fault_runs import CHUNK_FRAMES, HEIGHT, WIDTH, Outcome, Truth, write_video
from support.file_operations import Operations
from support.forking import Forkers, serve

_UNIT_LATENTS = 4
NUM_FRAMES = 90
"24 latents, which are units without a rest"
_MIDDLE = 7
"the number of a chunk"
OPTIONS = (
    "--model", "tiny", "--device", "cpu", "--layout", "contiguous", "--chunk-frames", str(CHUNK_FRAMES),
    "--json", "--quiet",
)  # fmt: skip
"of every run"


# ------------------------------------------------------------------------------------------- in the child


def _trace(command: dict) -> subprocess.Popen:
    """Have strace make system calls fail in this process."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, to anybody
    calls = command["inject"].partition(":")[0]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", command["trace"], "-e", f"trace={calls}", "-e", f"inject={command['inject']}"]
        + [part for path in command["only"] for part in ("-P", path)]
        + ["-p", str(os.getpid())],
        stdin=subprocess.DEVNULL,
    )
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if tracer.poll() is not None:
            raise PermissionError("strace may not attach")
        time.sleep(0.005)
    return tracer


def _watch_steps(answer: dict) -> None:
    """Note the most frames that readers were shown by any root metadata."""
    real = os.replace

    def replace(source, target, **options):
        real(source, target, **options)
        if os.path.basename(source) == ".zarr.json.partial":
            with open(target, "rb") as file, contextlib.suppress(KeyError):
                root = json.load(file)
                if "consolidated_metadata" in root:
                    answer["shown"] = max(answer["shown"], root["attributes"]["longvid"]["num_frames"])

    os.replace = replace


def _in_chunk(chunk: int, signals: Iterable[int], lasts: bool) -> None:
    """Send signals while a chunk is computed, which may never end by itself."""
    from longvid.runtime.run import EncodeRun

    real = EncodeRun.latents

    def latents(self, item, *args):
        if item.index == chunk:
            for signum in signals:
                os.kill(os.getpid(), signum)
            while lasts:
                time.sleep(60)
        return real(self, item, *args)

    EncodeRun.latents = latents


def _child(command: dict) -> dict:
    from longvid import Durability
    from longvid.cli.commands import main

    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    answer = {"shown": 0}
    _watch_steps(answer)
    Durability.commit_due = lambda _, *, seconds, units: seconds >= command["commit_seconds"]
    for name, most in command["limits"].items():
        resource.setrlimit(getattr(resource, name), (most, resource.getrlimit(getattr(resource, name))[1]))
    tracer = _trace(command) if command["inject"] else None
    signum, point = command["signal_at"] or (0, None)
    operations = Operations(command["argv"][min(2, len(command["argv"]) - 1)], point, signum=signum)
    if command["argv"][0] == "encode":
        operations.install()
    if command["in_chunk"]:
        _in_chunk(*command["in_chunk"])
    said, complained = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = main([*command["argv"], "--debug"])
    except BaseException:  # no command line lets anything through
        code = -1
        complained.write(traceback.format_exc())
    answer |= {"code": code, "said": said.getvalue(), "complained": complained.getvalue()}
    answer |= {"seconds": time.perf_counter() - started, "points": operations.points}
    answer["foreign"] = sorted(operations.foreign)
    if tracer is not None:
        tracer.send_signal(signal.SIGINT)  # it lets go
        tracer.wait()
    return answer


def _main() -> None:
    import torch
    import zarr  # noqa: F401 - for the children

    import longvid.cli.commands
    import longvid.runtime.session  # noqa: F401 - for the children
    from longvid import VideoSession
    from longvid.store import latent_writer

    torch.set_num_threads(1)
    # Computes nothing, and does what would take every child a second.
    with VideoSession("tiny", device="cpu", layout="contiguous") as session:
        session.plan(height=HEIGHT, width=WIDTH)
    latent_writer.TARGET_CHUNK_BYTES = _UNIT_LATENTS * 16 * (HEIGHT // 8) * (WIDTH // 8) * 2
    serve(_child)


# ------------------------------------------------------------------------------------------- in the tests


@dataclass(frozen=True)
class Ran:
    """What a command said, and how it ended."""

    code: int
    "-1 for an exception that nobody caught, -2 for a process that died without a word"
    said: str
    complained: str
    "with the traceback of an error"
    seconds: float
    ended_by: int
    "a signal, or 0"
    shown: int
    "the most frames that readers could see while it ran"
    points: int
    "at which a signal may be sent: before and after every operation on files of the store"
    foreign: list[str]
    "see :class:`Operations`"

    @property
    def report(self) -> dict:
        return json.loads(self.said)

    # what fault_runs wants to know of an ending

    @property
    def finished(self) -> bool:
        return self.code == 0

    @property
    def error(self) -> str:
        return self.complained

    @property
    def resumed_from(self) -> int:
        return self.report["resumed_from_frame"]

    @property
    def computed(self) -> int:
        return self.report["frames_computed"]


class Commands(Forkers):
    """Runs commands, each in a child of its own, at most two at a time. Use it in a ``with`` statement."""

    module = "support.fault_commands"

    def run(
        self,
        *argv: str | Path,
        limits: dict[str, int] | None = None,
        inject: str | None = None,
        only: tuple[Path, ...] = (),
        trace: Path | None = None,
        signal_at: tuple[int, int] | None = None,
        in_chunk: tuple[int, Iterable[int], bool] | None = None,
        commit_seconds: float = 0,
    ) -> Ran:
        """Run `longvid` with these arguments.

        Args:
            limits: of the process, by the name in `resource`.
            inject: a fault in strace's words, which needs `trace`, the file that then tells what was made to fail.
            only: paths whose system calls may fail; all by default.
            signal_at: a signal, and the point at which the process gets it (see :attr:`Ran.points`).
            in_chunk: a chunk, the signals that come while it is computed, and whether it then never ends.
            commit_seconds: between two commits; by default one for every unit.
        """
        command = {
            "argv": argv, "limits": limits or {}, "inject": inject, "only": only, "trace": trace,
            "signal_at": signal_at, "in_chunk": in_chunk, "commit_seconds": commit_seconds,
        }  # fmt: skip
        silent = {"code": -2, "said": "", "complained": "", "seconds": 0.0, "shown": 0, "points": 0, "foreign": []}
        return Ran(**(silent | self.ask(command)))


class Bench:
    """A video, what an undisturbed run makes of it, and what runs commands."""

    def __init__(self, commands: Commands, folder: Path) -> None:
        self.commands = commands
        self.video = write_video(folder, NUM_FRAMES)
        ran = commands.run("encode", self.video, folder / "a.zarr", *OPTIONS)
        self.truth = Truth.of("encode", folder / "a.zarr", ran)

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Bench]:
        with Commands() as commands:
            yield cls(commands, folder)


class Trial:
    """A run that a fault ends, or not, and the one after it, which has to finish it."""

    def __init__(self, bench: Bench, store: Path) -> None:
        self._bench, self.store = bench, store
        self.outcome = Outcome()
        self.hurt: Ran
        "the run with the fault"
        self.ran: Ran
        "the run after it"

    def _run(self, **fault) -> Ran:
        ran = self._bench.commands.run("encode", self._bench.video, self.store, *OPTIONS, **fault)
        self.outcome.failed += [f"{name} was written" for name in ran.foreign]
        return ran

    def strike(self, code: int = 4, words: str = "", **fault) -> Ran:
        """Run with a fault: exit code 0, or this one with these words, and readers see no less than before."""
        self.hurt = ran = self._run(**fault)
        if ran.code not in (0, code) or (ran.code == code and words not in ran.complained):
            self.outcome.failed.append(f"exit code {ran.code}: {ran.complained}")
        self.outcome.see(self.store, self._bench.truth, least=max(ran.shown, self.outcome.frames))
        return ran

    def begin(self) -> int:
        """Stop a run in the middle of the video, where one that resumes it does not begin with frame 0. How far."""
        ran = self.strike(code=143, in_chunk=(_MIDDLE, [signal.SIGTERM], False))
        assert ran.code == 143, ran.complained
        assert self._bench.truth.start(self.outcome.frames) > 0
        return self.outcome.frames

    def go_on(self) -> Ran:
        self.ran = self._run()
        self.outcome.see_end(self.store, self._bench.truth, self.ran)
        return self.ran

    def add_to(self, ledger, fault: str) -> None:
        ledger.add(
            fault,
            survived=self.outcome.ok,
            silently_wrong=bool(self.outcome.wrong),
            lost_bytes=int(self.outcome.lost_frames * self._bench.truth.frame_bytes),
            seconds=self.ran.seconds,
        )


class SmallDisk:
    """A file system in memory, of a size that is changed at will, which no other process has mounted.

    It lies in a mount namespace that belongs to a shell, and is reached through that shell's entry in /proc.
    """

    def __init__(self, folder: Path) -> None:
        flags = "-m" if os.geteuid() == 0 else "-rm"
        self._shell = subprocess.Popen(
            ["unshare", flags, "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._folder = folder
        self.path = Path(f"/proc/{self._shell.pid}/root{folder}")

    def _do(self, command: str) -> None:
        self._shell.stdin.write(f"{command} >&2; echo done $?\n")
        self._shell.stdin.flush()
        while not (line := self._shell.stdout.readline()).startswith("done"):
            if not line:
                raise PermissionError(command)
        if line != "done 0\n":
            raise PermissionError(command)

    def fresh(self, options: str) -> None:
        """An empty disk with these options of mount."""
        self._do(f"umount {self._folder} 2>/dev/null; mount -t tmpfs -o {options} tmpfs {self._folder}")

    def change(self, options: str) -> None:
        self._do(f"mount -o remount,{options} tmpfs {self._folder}")

    def close(self) -> None:
        self._shell.stdin.close()
        self._shell.wait()
        self._shell.stdout.close()

    @staticmethod
    @functools.cache
    def is_permitted() -> bool:
        """Whether this process may mount something somewhere."""
        if shutil.which("unshare") is None or shutil.which("mount") is None:
            return False
        flags = "-m" if os.geteuid() == 0 else "-rm"
        done = subprocess.run(["unshare", flags, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True)
        return done.returncode == 0


@functools.cache
def strace_is_permitted() -> bool:
    """Whether strace is there and may make a system call fail."""
    if shutil.which("strace") is None:
        return False
    options = ["-f", "-qq", "-o", os.devnull, "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    code = "import os\ntry: os.fsync(1)\nexcept OSError as exc: raise SystemExit(exc.errno)"
    done = subprocess.run(["strace", *options, sys.executable, "-c", code], capture_output=True)
    return done.returncode == 5


if __name__ == "__main__":
    _main()
