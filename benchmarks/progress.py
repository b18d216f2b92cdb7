"""What long commands say while they work, and processes that end with the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, TypeVar

WIDTH = 60  # characters of a line, and of every table
EVERY = 20.0  # seconds between lines where there is no terminal

Key = TypeVar("Key")


class Progress:
    """Says what is being done: on a terminal in one line that changes, elsewhere in a line every
    `EVERY` seconds. A thread does it, so that a step may take as long as it likes.
    """

    def __init__(self) -> None:
        self._text, self._begun = "", time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._lock, self._end = Lock(), Event()
        self._thread = Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self("")
        self._end.set()
        self._thread.join()

    def __call__(self, text: str) -> None:
        """From now on this is being done; nothing, before other output, clears the line."""
        with self._lock:
            self._text = text
            if self._terminal and not text:
                print("\033[K", end="", flush=True)

    def of(self, task: str) -> Callable[[str], None]:
        """The same for what a task says of itself."""
        return lambda text: self(f"{task}, {text}")

    def _repeat(self) -> None:
        while not self._end.wait(1 if self._terminal else EVERY):
            with self._lock:
                if not self._text:
                    continue
                line = f"{time.monotonic() - self._begun:.0f} s: {self._text}"[:WIDTH]
                if self._terminal:
                    print(f"\033[K{line}", end="\r", flush=True)
                else:
                    print(line, flush=True)


def in_processes(
    function: Callable[..., Any],
    calls: dict[Key, tuple[Any, ...]],
    jobs: int | None = None,
    before: Callable[[], object] | None = None,
) -> Iterator[tuple[Key, Any]]:
    """Each call's key and result as they come, from processes that end with this one.

    Each process calls `before` first. Spawned ones find no functions of a package's `__main__`.
    """
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (before,))
    # Ctrl-C reaches all processes of a terminal; these inherit that they ignore it.
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting = {pool.submit(function, *call): key for key, call in calls.items()}
    signal.signal(signal.SIGINT, usual)
    try:
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(before: Callable[[], object] | None) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    if before is not None:
        before()


def _end_with_parent() -> None:
    """Also where that was killed, and could end nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
