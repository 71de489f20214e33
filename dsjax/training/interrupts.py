"""Ctrl-C and SIGTERM: the first asks the run to save and stop, a second Ctrl-C stops it at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

EXIT_STATUS = 130
"""What a shell reports for a program that Ctrl-C has stopped."""


class Interrupts:
    """While entered, turns the first SIGINT or SIGTERM into `requested`, and the second SIGINT into the end.

    Python runs a signal handler between two lines of Python, that is not before a step or a compilation has come back
    from the device, which may take minutes. The interpreter however writes the signal's number to a socket at
    once, where a thread of ours waits for it. Outside the main thread, where Python allows no handlers, nothing is
    caught. announce: called with the signal's name, from that thread, on the first signal.
    """

    def __init__(self, announce: Callable[[str], None]):
        self._announce = announce
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop."""
        return self._requested.is_set()

    def __enter__(self):
        self._handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)  # the interpreter insists
        self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:  # a shell's background job is to outlive its Ctrl-C
                continue
            # The handler itself has nothing to do, but without one Python would not write to the socket.
            self._handlers[number] = signal.signal(number, lambda *_: None)
        self._watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exception):
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._outbox.close()  # ends the watcher
        self._watcher.join()
        self._inbox.close()

    def _watch(self) -> None:
        while received := self._inbox.recv(1):
            number = signal.Signals(received[0])
            if number not in self._handlers:
                continue
            if not self._requested.is_set():
                self._requested.set()
                self._announce(number.name)
            elif number == signal.SIGINT:
                stop_at_once()


def stop_at_once() -> None:
    """Ends the process without waiting for the device, for threads or for a checkpoint that is being written."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")  # the progress bar had hidden the cursor
    sys.stdout.flush()
    os.write(2, b"stopped at once; the last complete checkpoint is as it was\n")
    os._exit(EXIT_STATUS)
