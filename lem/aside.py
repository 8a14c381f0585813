"""Work that its giver does not wait for: done in a thread of its own, one job after another.

So the bookkeeping of a batch costs the next one no time: it is done while the engine works. Knows nothing of the jobs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Aside:
    """Does jobs in the order in which they were given; after one that failed, none."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | threading.Event | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done; raises what an earlier one has failed with."""
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="aside", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def wait(self) -> None:
        """Wait until all jobs that were given are done; raises what one has failed with."""
        if self._thread is not None:
            reached = threading.Event()
            self._jobs.put(reached)
            reached.wait()
        self._raise()

    def close(self) -> None:
        """Wait for the jobs and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
            elif self._error is None:
                try:
                    job()
                except BaseException as error:  # it is raised where the next job is given
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
