"""What the kernel says of processes that come and go while it is asked."""

from __future__ import annotations

import os
import signal
import threading
import time

from esperd.actors.activity import activity, belongs_to


def test_children_that_end_while_they_are_looked_at_are_no_error() -> None:
    over = threading.Event()

    def spawn() -> None:
        while not over.is_set():
            os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)

    spawner = threading.Thread(target=spawn)
    spawner.start()
    try:
        assert all(activity(os.getpid()) is not None for _ in range(1_500))
    finally:
        over.set()
        spawner.join()


def test_a_process_belongs_to_its_ancestors_and_takes_processor_time() -> None:
    child = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
    try:
        assert belongs_to(os.getpid(), os.getpid())
        assert belongs_to(child, os.getpid())
        assert not belongs_to(os.getpid(), child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = activity(os.getpid())
    began_s = time.process_time()
    while time.process_time() - began_s < 0.2:
        pass
    after = activity(os.getpid())
    assert before is not None
    assert after is not None
    assert after.cpu_s - before.cpu_s > 0.1


def test_nothing_is_known_of_a_process_that_is_gone() -> None:
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    assert activity(gone) is None
