"""configurator.py: what it makes of command lines and config files, and how a script ends that executes it."""
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

EXECUTE = ('exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8")'
           '.read())\n')
SCRIPT = '''"""What it does."""
import os

# first group
name = "x"                  # a word
note = ""                   # nothing by default
size = 3                    # a number,
                            # and more about it
# second group
# of two lines
rate = 0.5                  # a rate
flag = False                # yes or no
limit: int | None = None    # none by default
share: float | None = 1     # an int, converted
compile = 1                 # the name of a builtin
# why this stands here
''' + EXECUTE + '''not_a_setting = 1
print(repr((name, size, rate, flag, limit)), sorted(overrides), config["size"], config["share"])
'''


@pytest.fixture
def script(project):
    (project.folder / "script.py").write_text(SCRIPT)
    (project.folder / "config" / "some.py").write_text(
        "import math\nfrom os import path as _path\n_half = size // 2\nsize = _half + 10\nrate = int(math.pi)\n")
    return project


# --- values ---

@pytest.mark.parametrize("arguments, values", [
    ([], "('x', 3, 0.5, False, None) [] 3 1.0"),
    (["--name=a=b", "--size", "7", "--rate=2", "--flag"], "('a=b', 7, 2.0, True, None)"),
    (["--flag", "False", "--limit=4"], "('x', 3, 0.5, False, 4)"),
    (["--limit=4", "--limit=None", "--note=", "--size=-2"], "('x', -2, 0.5, False, None) ['limit', 'note', 'size']"),
    (["--size", "-2", "--rate=inf"], "('x', -2, inf, False, None)"),
    ([f"--size={2 ** 62}", "--share=2"], f"('x', {2 ** 62}, 0.5, False, None) ['share', 'size'] {2 ** 62} 2.0"),
    (["config/some.py"], "('x', 11, 3.0, False, None) ['rate', 'size'] 11"),
    (["--size=5", "config/some.py", "--rate=1e-3"], "('x', 12, 0.001, False, None)"),
    (["--flag", "config/some.py", "--name=--x"], "('--x', 11, 3.0, True, None)"),
    (["--name", "texts/a.txt", "config/some.py"], "('texts/a.txt', 11, 3.0, False, None)"),
])
def test_values(script, arguments, values):
    printed = script.run("script.py", *arguments)
    assert printed.startswith(values) and printed.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make links")
def test_works_through_a_link(script, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "linked.py").symlink_to(script.folder / "script.py")
    assert script.run("bin/linked.py", "config/some.py", cwd=tmp_path, fresh=True).startswith("('x', 11, 3.0,")


def test_works_from_any_directory(script, tmp_path_factory):
    printed = script.run("script.py", "config/some.py", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert printed.startswith("('x', 11, 3.0, False, None) ['rate', 'size']")


def test_help_is_read_from_the_source(script):
    printed = script.run("script.py", "--help", "--nonsense=1")
    assert "What it does." in printed
    assert printed.split("as name = value):\n")[1].strip("\n").splitlines() == [
        "first group",
        "  --name='x'                       str    a word",
        "  --note=''                        str    nothing by default",
        "  --size=3                         int    a number,",
        "                                          and more about it",
        "",
        "second group",
        "of two lines",
        "  --rate=0.5                       float  a rate",
        "  --flag=False                     bool   yes or no",
        "  --limit=None                     int    none by default",
        "  --share=1                        float  an int, converted",
        "  --compile=1                      int    the name of a builtin"]


# --- mistakes on the command line ---

@pytest.mark.parametrize("arguments, words", [
    (["--siz=3"], ["'siz'", "did you mean size?"]),
    (["--zzzzzz=3"], ["'zzzzzz'", "--help"]),
    (["--not_a_setting=3"], ["not_a_setting"]),
    (["--size=2.5"], ["size expects int", "2.5"]),
    (["--size=None"], ["size expects int"]),
    (["--rate=fast"], ["rate expects float", "fast"]),
    (["--rate=1e39"], ["rate expects float of at most 3e38, got '1e39'"]),
    (["--flag=yes"], ["flag expects True or False", "yes"]),
    (["--flag", "true"], ["flag expects True or False", "true"]),
    (["--limit=x"], ["limit expects int or None"]),
    (["--size"], ["--size needs a value"]),
    (["--name", "--size=1"], ["--name needs a value"]),
    (["--name="], ["name is empty on the command line", "leave it out"]),
    (["--name=To", "be"], ["unexpected 'be'", 'a value with spaces needs quotes, as in --start="To be"']),
    (["config/none.py"], ["config/none.py", "not found"]),
    (["config"], ["'config'", "--key=value", "end in .py"]),
    (["-size=3"], ["'-size=3'", "--key=value"]),
])
def test_errors(script, arguments, words):
    error = script.fails("script.py", *arguments)
    assert all(word in error for word in words), error


def test_home(script):
    """The shell replaces ~ only at the start of a word."""
    for argument, value in (("--name=~/a", "HOME/a"), ("--name=~", "~"), ("--name=a~/b", "a~/b")):
        assert script.run("script.py", argument, env={"HOME": "HOME"}).startswith(f"('{value}', ")


@pytest.mark.parametrize("arguments", [["--size", "3", "5"], ["--name", "To", "be"]])
def test_no_pattern_is_suspected_where_no_files_are(script, arguments):
    assert "expanding" not in script.fails("script.py", *arguments)


@pytest.mark.parametrize("later", ["--siz=3", "--size=x", "--size", "config/none.py", "book.txt"])
def test_the_whole_command_line_is_checked_before_a_config_file_is_executed(script, later):
    (script.folder / "config" / "loud.py").write_text("open('executed', 'w').close()")
    script.fails("script.py", "config/loud.py", later)
    assert not (script.folder / "executed").exists()
    script.run("script.py", "config/loud.py")
    assert (script.folder / "executed").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".py"])
def test_an_expanded_pattern_is_not_executed(script, suffix):
    """The shell makes `--name texts/a.py texts/b.py texts/c.py` of `--name texts/*.py`."""
    (script.folder / "texts").mkdir()
    paths = [f"texts/{letter}{suffix}" for letter in "abc"]
    for path in paths:
        (script.folder / path).write_text("open('executed', 'w').close()")
    error = script.fails("script.py", "--size=3", "--name", *paths)
    assert f"'texts/b{suffix}'" in error and "end in .py" in error and f'--name="texts/*{suffix}"' in error
    assert not (script.folder / "executed").exists()


# --- lines above the exec that are no settings ---

@pytest.mark.parametrize("line", [
    "SHAPES = 3", "x = (1, 2)", "x = None", "a = b = 1", "a, b = 1, 2", "size += 1", "_a = 1", "a: int = None",
    "a: int = 'x'", "a: int", "a: list[int] | None = None", "a: int | str = 3", "os.x = 3"])
def test_a_setting_that_cannot_be_represented(script, line):
    path = script.folder / "script.py"
    path.write_text(path.read_text().replace("compile = 1", f"{line}  #"))
    error = script.fails("script.py")
    assert "script.py, line 15: " in error and "is not a setting" in error and "int, float, str or bool" in error


def test_imports_and_functions_above_the_exec_are_no_settings(script):
    path = script.folder / "script.py"
    path.write_text(path.read_text().replace("compile = 1", "from math import sqrt\ndef f():\n    x = 1\ncompile = 1"))
    assert "sqrt" not in script.run("script.py", "--help")
    assert "'x'" in script.fails("script.py", "--x=1")


# --- config files ---

@pytest.mark.parametrize("source, values", [
    ("from math import sqrt\nsize = int(sqrt(49))", "('x', 7, 0.5, False, None) ['size']"),
    ("def double(n):\n    m = 2 * n\n    return m\nsize = double(size)", "('x', 6, 0.5, False, None) ['size']"),
    ("for n in range(3):\n    size += n", "('x', 6, 0.5, False, None) ['size']"),
    ("with open('script.py') as file:\n    name = file.read(3)", "('\"\"\"', 3, 0.5, False, None) ['name']"),
    ("size = sum(n for n in range(5) if [k for k in (n,)])", "('x', 10, 0.5, False, None) ['size']"),
    ("try:\n    import nonsense\nexcept ImportError as error:\n    size, rate = 4, 5", "('x', 4, 5.0, False, None)"),
    ("class A:\n    size = 9", "('x', 3, 0.5, False, None) [] 3"),
    ("_n: int = 8\nsize: int = _n\n", "('x', 8, 0.5, False, None) ['size']"),
    ("if flag:\n    rate = 1.0\nelse:\n    size = 3", "('x', 3, 0.5, False, None) ['size'] 3"),
    ("def change():\n    global size\n    size = 5\nchange()", "('x', 5, 0.5, False, None) ['size'] 5"),
    ("for size in (1, 2):\n    pass", "('x', 2, 0.5, False, None) ['size'] 2"),
    ("limit = None\nname, *_rest = 'abc'", "('a', 3, 0.5, False, None) ['limit', 'name'] 3"),
    ("\ufeffsize = 4", "('x', 4, 0.5, False, None) ['size'] 4"),
])
def test_config_files_are_python(script, source, values):
    (script.folder / "config" / "new.py").write_text(source)
    assert script.run("script.py", "config/new.py").startswith(values)


@pytest.mark.parametrize("source, words", [
    ("sise = 3", ["unknown setting 'sise' in config/bad.py, line 1", "did you mean size?"]),
    ("half = size // 2", ["unknown setting 'half'", "begins with _"]),
    ("if flag:\n    sise = 3", ["unknown setting 'sise' in config/bad.py, line 2"]),
    ("size, sise = 3, 3", ["unknown setting 'sise'"]),
    ("for n in range(2):\n    m = n", ["unknown setting 'm'"]),
    ("sise: int = 3", ["unknown setting 'sise'"]),
    ("zzzz += 3", ["unknown setting 'zzzz'"]),
    ("size = 'three'", ["size expects int", "'three'", "config/bad.py, line 1"]),
    ("size = True", ["size expects int", "True"]),
    ("flag = 1", ["flag expects True or False"]),
    ("rate = 10 ** 400", ["rate expects float"]),
    ("import math as size", ["size expects int"]),
    ("size = 3\nrate = 1 / 0", ["config/bad.py, line 2", "ZeroDivisionError"]),
    ("size = 3\n\nrate = = 1", ["config/bad.py, line 3", "SyntaxError"]),
    ("def f():\n    raise ValueError('two\\nlines')\n\nf()", ["config/bad.py, line 2: ValueError: two lines"]),
    ("open('none.txt')", ["config/bad.py, line 1: FileNotFoundError", "none.txt"]),
    ("size = 3\nexit()", ["config/bad.py, line 2: SystemExit"]),
    ("exec(open('base.py').read())", ["unknown setting 'sise' in config/bad.py; did you mean size?"]),
    ("globals()['sise'] = 3", ["unknown setting 'sise' in config/bad.py; did you mean size?"]),
    (b"name = '\xff'", ["config/bad.py is not UTF-8"]),
    (b"name = 'a\\ud800'", ["name expects str", "got 'a\\ud800' in config/bad.py, line 1"]),
    (b"name = '\0'", ["config/bad.py, line 1", "null bytes"]),
])
def test_errors_in_config_files(script, source, words):
    (script.folder / "base.py").write_text("sise = 3")
    (script.folder / "config" / "bad.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    error = script.fails("script.py", "config/bad.py")
    assert all(word in error for word in words), error


# --- how a script ends ---

ENDINGS = {  # name: (how the script ends, its exit code, its standard error)
    "end": ("", 0, ""),
    "exit": ("sys.exit(3)", 3, ""),
    "exit with a message": ("sys.exit('words')", 1, "words\n"),
    "mistake": ("raise UserError('a\\nmistake')", 1, "error: a mistake\n"),
    "subclass of another class of that name": (
        "class UserError(Exception): pass\nclass Other(UserError): pass\nraise Other('words')", 1, "error: words\n"),
    "file": ("open('none.txt')", 1, "error: none.txt: No such file or directory\n"),
    "two files": ("os.rename('a', 'b')", 1, "error: a -> b: No such file or directory\n"),
    "no file": ("raise OSError(28, 'No space left on device')", 1, "error: No space left on device\n"),
    "no reason": ("raise ConnectionError", 1, "error: ConnectionError\n"),
    "pipe": ("raise BrokenPipeError", 0, ""),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, ""),
    "Ctrl-C where no exception can be raised": (
        "class A:\n    def __del__(self): raise KeyboardInterrupt\nA()\nprint('not reached')", 130, ""),
    "signal": ("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)", 130, ""),
    "at exit": ("atexit.register(print, 'at exit')\nthreading.Thread(target=print, args=['thread']).start()", 0, ""),
}


@pytest.fixture
def ending(project):
    """A function that writes a script which ends in the given way."""
    def write(lines):
        (project.folder / "ending.py").write_text(
            "import os\nsize = 3\n" + EXECUTE + "import atexit, signal, sys, threading, time\n"
            "from files import UserError\nprint('begin')\n" + lines)
        return project
    return write


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ENDINGS)
def test_ends(ending, name, fresh):
    lines, code, error = ENDINGS[name]
    done = ending(lines).finish("ending.py", fresh=fresh)
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == ("begin\nthread\nat exit\n" if name == "at exit" else "begin\n")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_bug_shows_its_traceback(ending, fresh):
    done = ending("def f():\n    return 1 / 0\nf()").finish("ending.py", fresh=fresh)
    assert done.returncode == 1 and done.stdout == "begin\n"
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("name", ["mistake", "file", "Ctrl-C"])
def test_tracebacks_on_demand(ending, name):
    lines, code, _ = ENDINGS[name]
    done = ending(lines).finish("ending.py", env={"GPT_TRACEBACK": "1"})
    assert done.returncode == code and done.stderr.startswith("Traceback") and "ending.py" in done.stderr


def test_a_python_without_the_packages(script):
    """Such as that of the system, if the environment is not active."""
    (script.folder / "script.py").write_text("import os\n" + EXECUTE + "import torch\n")
    done = subprocess.run([sys.executable, "-S", "script.py"], cwd=script.folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {sys.executable} has no torch; activate the env")
    assert done.stderr.count("\n") == 1


def test_a_broken_pipe_ends_in_silence(ending):
    """As with `| head -1`, both while the script prints and when Python flushes the rest at its end."""
    for lines in ("for i in range(100_000): print(i)", "time.sleep(0.1)"):
        process = subprocess.Popen(ending(lines).command("ending.py"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of Unix")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(ending, closed):
    project = ending("f = open('file.txt', 'w')\nprint('out')\nprint('error', file=sys.stderr)\nos.write(2, b'!')\n"
                     "assert not sys.stdin or sys.stdin.isatty() or not sys.stdin.read()\nraise UserError('mistake')")
    command = " ".join(map(shlex.quote, project.command("ending.py")))
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=project.folder,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and (project.folder / "file.txt").read_text() == ""
    assert done.stdout == ("" if " >&- " in f" {closed} " else "begin\nout\n")
    assert done.stderr == ("" if "2>&-" in closed else "error\n!error: mistake\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_under_the_output(ending):
    for lines in ("", "raise SystemExit(0)", "print('x' * 100_000, flush=True)"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(ending(lines).command("ending.py"), stdout=full, stderr=subprocess.PIPE, text=True,
                                  env=os.environ | {"PYTHONUNBUFFERED": ""})
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and "No space left on device" in done.stderr


@pytest.mark.parametrize("name", ["mistake", "file"])
def test_torchrun_prints_an_error_once(ending, name):
    lines, code, error = ENDINGS[name]
    done = ending(lines).finish("ending.py", env={"RANK": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (code, "begin\n", error)
    # The others print it if they still live after 5 seconds.
    lines = "time.sleep = lambda seconds: print('waits', seconds)\n" + lines
    done = ending(lines).finish("ending.py", env={"RANK": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (code, "begin\nwaits 5\n", error)


def test_torchrun_can_end_a_process_that_waits_with_its_error(ending):
    """Even one that handles SIGTERM itself."""
    project = ending("signal.signal(signal.SIGTERM, lambda *_: None)\nraise UserError('words')")
    process = subprocess.Popen(project.command("ending.py"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"RANK": "1"})
    assert process.stdout.readline() == "begin\n"  # printed when the error flushes the output
    start = time.time()
    while process.poll() is None and time.time() < start + 4:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGTERM


def test_after_torchrun_no_clean_up_can_crash(ending):
    done = ending("atexit.register(print, 'not reached')\nopen('none.txt')").finish("ending.py", env={"RANK": "0"})
    assert done.returncode == 1 and done.stdout == "begin\n"


def test_ctrl_c_is_quiet_at_any_moment(ending):
    """At 20 moments while a script imports torch, and after that."""
    project = ending("import torch, numpy\ntime.sleep(60)")

    def interrupt(moment):
        process = subprocess.Popen(project.command("ending.py"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        assert process.stdout.readline() == "begin\n"
        time.sleep(0.04 * moment)
        process.send_signal(signal.SIGINT)
        return process.communicate(), process.returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(interrupt, range(20))) == [(("", ""), 130)] * 20
