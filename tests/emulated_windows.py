"""Runs a script with the ways in which Windows differs, as far as Linux can show them.

    python tests/emulated_windows.py train.py config/quick.py --max_iters=5
    python tests/emulated_windows.py prepare.py --dataset=mine --input=book.txt

- The modules resource, fcntl, termios, pwd, grp and readline are missing. So are os.sched_getaffinity, os.mkfifo,
  os.setsid, os.killpg, SIGHUP, SIGUSR1, SIGUSR2 and SIGQUIT.
- A text file that the project opens without naming an encoding is read and written as cp1252. So are standard output
  and standard error, and printing what cp1252 lacks is an error. PYTHONUTF8=1 makes both UTF-8. Lines end in "\\r\\n".
- A file that is open or memory-mapped cannot be replaced, renamed or deleted.
- os.rename onto something that exists fails. A folder cannot be opened. A name may not hold : * ? " < > | or end in a
  dot or a blank.

It cannot show what happens behind `sys.platform == "win32"`, drive letters, or PyTorch's build for Windows.
"""
import builtins
import importlib.abc
import io
import os
import pathlib
import runpy
import shutil
import signal
import sys

MODULES = {"resource", "fcntl", "termios", "pwd", "grp", "readline"}
PROJECT = os.path.dirname(os.path.abspath(sys.argv[1])) if len(sys.argv) > 1 else os.getcwd()


def asked_by_the_project(depth):
    """Whether the project's code, and not a library's, called a function here. pathlib counts as the caller's."""
    frame = sys._getframe(depth + 1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.endswith("pathlib.py") and "importlib" not in name and name != __file__:
            return os.path.abspath(name).startswith(PROJECT) and "site-packages" not in name
        frame = frame.f_back
    return False


# --- files in use ---

def in_use(path):
    """The open or mapped files of this process at or under a path."""
    path, files = os.path.realpath(path), set()
    for number in os.listdir("/proc/self/fd"):
        try:
            files.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        files |= {line.split(None, 5)[5].strip() for line in maps if len(line.split(None, 5)) == 6}
    return [f for f in files if f == path or f.startswith(path + os.sep)]


def check_not_in_use(path):
    if in_use(path):
        raise PermissionError(13, "The process cannot access the file because it is being used by another process",
                              os.fspath(path))


def check_name(path):
    path = os.fspath(path)
    for part in pathlib.PurePath(path).parts[os.path.isabs(path):]:
        if any(c in part for c in ':*?"<>|') or (part not in (".", "..") and part[-1] in ". "):
            raise OSError(22, "The filename, directory name, or volume label syntax is incorrect", path)


def install_files():
    real = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "open", "mkdir")}

    def replace(a, b, **how):
        check_not_in_use(a)
        check_not_in_use(b)
        check_name(b)
        return real["replace"](a, b, **how)

    def rename(a, b, **how):
        check_not_in_use(a)
        check_name(b)
        if os.path.lexists(b):
            raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(a), 183,
                                  os.fspath(b))
        return real["rename"](a, b, **how)

    def unlink(path, **how):
        if how.get("dir_fd") is None:
            check_not_in_use(path)
        return real["unlink"](path, **how)

    def open_number(path, flags, *args, **how):
        if not isinstance(path, int) and os.path.isdir(path) and asked_by_the_project(1):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real["open"](path, flags, *args, **how)

    def mkdir(path, *args, **how):
        check_name(path)
        return real["mkdir"](path, *args, **how)

    os.replace, os.rename, os.open, os.mkdir = replace, rename, open_number, mkdir
    os.unlink = os.remove = unlink
    shutil._use_fd_functions = False  # so that rmtree deletes by path, as on Windows


# --- text ---

def install_text():
    real_open, utf8 = io.open, os.environ.get("PYTHONUTF8") == "1"

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **how):
        if "b" not in mode and asked_by_the_project(1):
            if encoding in (None, "locale"):
                encoding = "utf-8" if utf8 else "cp1252"
            if newline is None and not mode.startswith("r"):
                newline = "\r\n"
        if not isinstance(file, int) and not mode.startswith("r"):
            check_name(file)
        return real_open(file, mode, buffering, encoding, errors, newline, *args, **how)

    builtins.open = io.open = open_file
    sys.stdout.reconfigure(newline="\r\n")
    sys.stderr.reconfigure(newline="\r\n")
    if not utf8:
        sys.stdout.reconfigure(encoding="cp1252", errors="strict")
        sys.stderr.reconfigure(encoding="cp1252", errors="backslashreplace")


# --- what is missing ---

class Missing(importlib.abc.MetaPathFinder):
    """Refuses modules that Windows lacks, unless a library wants them."""

    def find_spec(self, name, path=None, target=None):
        if name in MODULES and asked_by_the_project(1):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def install():
    """From here on, the script is on Windows."""
    real_import = builtins.__import__

    def import_(name, *args, **how):
        if name in MODULES and asked_by_the_project(1):  # also if a library has imported it already
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **how)

    sys.meta_path.insert(0, Missing())
    builtins.__import__ = import_
    for name in ("sched_getaffinity", "mkfifo", "setsid", "killpg"):
        delattr(os, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"):
        delattr(signal, name)
    install_files()
    install_text()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = PROJECT
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")
