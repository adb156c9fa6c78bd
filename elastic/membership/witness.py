"""A process beside a worker that closes the worker's connection at the moment at which the worker dies.

The kernel closes the connections of a killed process after it has freed the memory, which takes some tenths of a second
for each GB. But first of all it releases the robust locks that threads of the process hold (set_robust_list(2)), and
wakes up who waits for them. So the thread that has the connection holds such a lock, and the witness, which waits for
the lock and has the connection too, ends it for both. If there is no witness the kernel ends it later.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import subprocess
import sys
import threading

_LOCK_BYTES = 256  # at least sizeof(pthread_mutex_t), followed by its attributes
_ATTRIBUTES_AT = 128
_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST


class Witness:
    """The witness, as its worker has it. All methods are called by the thread that has the connection.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        memory = os.memfd_create("witness")
        here, there = socket.socketpair()
        try:
            os.ftruncate(memory, _LOCK_BYTES)
            self._lock = _Lock(memory)
            self._lock.make()
            command = [sys.executable, "-I", "-S", __file__, str(there.fileno()), str(memory)]
            try:
                self._process = subprocess.Popen(command, pass_fds=(there.fileno(), memory), stdin=subprocess.DEVNULL)
            except OSError:
                self._lock.release()
                raise
        except OSError:
            here.close()
            raise
        finally:
            there.close()
            os.close(memory)
        self._socket = here
        self._socket.setblocking(False)

    def has(self, connection: socket.socket) -> bool:
        """From now on this is the worker's connection. False if the witness is gone, or stands still; it is ended."""
        try:
            socket.send_fds(self._socket, [b"c"], [connection.fileno()])
        except OSError:
            self.end()
            return False
        return True

    def end(self) -> None:
        """End the witness; the connection stays."""
        self._process.kill()
        self._process.wait()
        self._lock.release()
        self._socket.close()


class _Lock:
    """A lock in shared memory, by whose release the kernel tells that the thread which held it has died."""

    def __init__(self, memory: int):
        self._memory = mmap.mmap(memory, _LOCK_BYTES)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._threads = ctypes.CDLL(None)

    def make(self) -> None:
        """Make it, held by this thread."""
        lock, attributes = ctypes.c_void_p(self._at), ctypes.c_void_p(self._at + _ATTRIBUTES_AT)
        for error in (
            self._threads.pthread_mutexattr_init(attributes),
            self._threads.pthread_mutexattr_setpshared(attributes, _SHARED),
            self._threads.pthread_mutexattr_setrobust(attributes, _ROBUST),
            self._threads.pthread_mutex_init(lock, attributes),
            self._threads.pthread_mutex_lock(lock),
        ):
            if error:
                raise OSError(error, os.strerror(error))

    def release(self) -> None:
        """Release it, before its memory goes: the C library keeps a list through all robust locks of a thread."""
        self._threads.pthread_mutex_unlock(ctypes.c_void_p(self._at))

    def wait(self) -> None:
        """Wait until the thread that holds it has died."""
        self._threads.pthread_mutex_lock(ctypes.c_void_p(self._at))


def main() -> None:
    """Be the witness. It ends with the thread that holds the lock: a signal at that thread's death would come first."""
    to_worker, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    lock, connections = _Lock(memory), list[int]()

    def end_it() -> None:
        for connection in connections:
            with contextlib.suppress(OSError):  # the other side has ended it
                socket.socket(fileno=connection).shutdown(socket.SHUT_RDWR)
        os._exit(0)

    def wait() -> None:
        lock.wait()
        end_it()

    waiting = threading.Thread(target=wait, daemon=True)
    while True:
        text, found, _, _ = socket.recv_fds(to_worker, 1, 4)
        if not text:  # the worker has died, which the lock has yet to tell
            end_it()
        older, connections[:] = list(connections), found
        for connection in older:
            os.close(connection)
        if not waiting.is_alive():  # not before there is a connection to end
            waiting.start()


if __name__ == "__main__":
    main()
