"""Runs scripts in copies of a process that has imported torch already, as if each were started by `python SCRIPT`.

Importing torch takes longer than most tests, so conftest.py starts this process once. It reads requests from standard
input, one JSON object a line: {"arguments": [script, ...], "folder": ..., "environment": {...}, "stdout": file,
"stderr": file}. It forks for each. The copy runs the script. Its process id comes back as a line on standard output,
and later its exit code as another.

A copy ends as Python does: uncaught exceptions reach sys.excepthook, threads are joined, functions registered with
atexit are called, streams are flushed. It leaves out only the last step, freeing every module, which takes 0.4 seconds.
"""
import atexit
import contextlib
import json
import os
import runpy
import sys

exit_code = None  # of the script that this copy runs


@atexit.register  # the first to register is the last to be called
def end():
    """Ends a copy with the exit code of its script."""
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


import numpy  # noqa: F401
import tiktoken
import torch._dynamo  # noqa: F401, the first step of an optimizer imports it
import torch.distributed.tensor  # noqa: F401

with contextlib.suppress(Exception):  # if its vocabulary is not there yet, the tests that need it fetch it
    tiktoken.get_encoding("gpt2")


def wait_for_requests():
    """Forks for every request. Returns the request in the copy; ends the process when no more can come."""
    for line in sys.stdin:
        copy = os.fork()
        if copy == 0:
            return json.loads(line)
        print(copy, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)
    sys.exit()


request = wait_for_requests()
for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(opened, number)
    os.close(opened)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = request["arguments"]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    exit_code = 0
except SystemExit as error:
    exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    raise
except BaseException:
    exit_code = 1
    raise
