"""What the kernel says of processes that come and go while it is asked."""

from __future__ import annotations

import os
import threading

from esperd.actors.activity import activity


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


def test_nothing_is_known_of_a_process_that_is_gone() -> None:
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    assert activity(gone) is None
