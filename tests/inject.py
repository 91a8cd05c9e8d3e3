"""Runs a script in which one change of a file fails, or kills the process: the n-th that it makes.

    python tests/inject.py kill 7 train.py --max_iters=5     # ends like SIGKILL at its 7th change
    python tests/inject.py fail 7 train.py --max_iters=5     # its 7th change fails as on a full disk

A change, in the current folder or below it, is: opening a file to write it, the first and the second write to it (of
which half is done), fsync, renaming, removing, truncating, making or removing a folder. If the script comes that far,
the change is printed to standard output.
"""
import builtins
import errno
import io
import os
import runpy
import sys

how, number = sys.argv[1], int(sys.argv[2])
folder = os.getcwd()  # changes elsewhere do not count
count = 0


def change(what, path, do_half=lambda: None):
    """Counts a change of a file. The one that was asked for happens by half, and then fails or ends the process."""
    global count
    if isinstance(path, int) or not os.path.abspath(path or "").startswith(folder):  # a descriptor, or another's file
        return
    count += 1
    if count == number:
        do_half()
        os.write(1, f"injected: {how} at {what} {path and os.path.basename(path)}\n".encode())
        if how == "kill":
            os._exit(9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path and str(path))


def on_audit(event, args):
    """Python calls this before each operation of the system."""
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        change("opening", args[0])
    elif event == "os.mkdir" and os.path.isdir(args[0]):  # which changes nothing
        return
    elif event in ("os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"):
        change(event, args[0])


class Writer(io.BufferedWriter):
    """A file whose first two writes count as changes."""
    writes = 0

    def write(self, data):
        self.writes += 1
        if self.writes <= 2:
            change("writing", self.name, lambda: (super(Writer, self).write(data[:len(data) // 2]), self.flush()))
        return super().write(data)


def open_with_faults(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
    """The built-in open, with a Writer for files that are only written."""
    if isinstance(file, int) or opener or "+" in mode or not set(mode) & set("wax"):
        return original_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    binary = Writer(io.FileIO(file, mode.replace("b", "").replace("t", "")))
    return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)


def fsync_with_faults(descriptor):
    """os.fsync, which counts as a change."""
    change("fsync", None)
    original_fsync(descriptor)


original_open, original_fsync = builtins.open, os.fsync
sys.dont_write_bytecode = True
sys.argv = sys.argv[3:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
builtins.open = io.open = open_with_faults
os.fsync = fsync_with_faults
sys.addaudithook(on_audit)
runpy.run_path(sys.argv[0], run_name="__main__")
