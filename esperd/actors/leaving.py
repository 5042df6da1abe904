"""The end of a process that imported torch, and of one that hangs."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
from typing import NoReturn

WHERE_SIGNAL = signal.SIGUSR1
"""Has a process print where its threads are. One that did not :func:`tell_where_it_hangs` dies of it, as it is to anyway."""


def tell_where_it_hangs() -> None:
    """From now on, print where every thread is, the main one last, when the daemon is about to end this process for it hangs."""
    faulthandler.register(WHERE_SIGNAL)


def leave(status: int) -> NoReturn:
    """End this process now: exit handlers run and output is flushed, but the interpreter is not torn down.

    With torch and its compiler loaded the teardown takes 1 to 2.4 s (measured on two busy cores), in which the daemon could
    neither lease the next job nor end.
    """
    atexit._run_exitfuncs()  # what `sys.exit` would run; there is no public name for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
