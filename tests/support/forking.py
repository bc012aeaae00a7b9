"""A process that forks a child for every command, and what asks it to.

The forking process imports torch and zarr and uses neither, since their threads do not survive a fork; children inherit
the imports and start in milliseconds. Commands and answers are lines of JSON. A module that is a server calls
:func:`serve`; tests use a :class:`Forkers` of that module.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from support import TESTS

_CHILD_SECONDS = 240
"after which a child is ended: it hangs"
_NUM_FORKERS = 2


def serve(child: Callable[[dict], dict]) -> None:
    """Fork for every command; its answer is what ``child`` gives for it and, in ``ended_by``, a signal or 0."""
    gc.freeze()  # else the first collection of a child copies all that it shares
    for line in sys.stdin:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            os.dup2(2, 1)
            try:
                signal.alarm(_CHILD_SECONDS)
                os.write(send, json.dumps(child(json.loads(line))).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(send)
        with open(receive, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        answer = {**(json.loads(told) if told else {}), "ended_by": os.WTERMSIG(status)}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer
    os._exit(0)  # extension modules that were imported and never used tell of leaks otherwise


class Forkers:
    """Two such processes. Use it in a ``with`` statement."""

    module: str
    "name of the server's module"

    def __enter__(self) -> Self:
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(_NUM_FORKERS):
            self._idle.put(
                subprocess.Popen(
                    [sys.executable, "-m", self.module],
                    cwd=TESTS,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
        return self

    def __exit__(self, *_) -> None:
        for _ in range(_NUM_FORKERS):
            process = self._idle.get()
            process.stdin.close()
            process.wait()
            process.stdout.close()

    def each(self, function, items) -> list:
        """What ``function`` gives for every item, in order; two at a time."""
        with ThreadPoolExecutor(_NUM_FORKERS) as executor:
            return list(executor.map(function, items))

    def ask(self, command: dict) -> dict:
        """The answer of a child to a command."""
        process = self._idle.get()
        try:
            process.stdin.write(json.dumps(command, default=str) + "\n")
            return json.loads(process.stdout.readline())
        finally:
            self._idle.put(process)
