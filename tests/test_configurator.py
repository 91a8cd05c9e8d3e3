import pytest

SCRIPT = '''"""What it does."""
from pathlib import Path

# first group
name = "x"                  # a word
size = 3                    # a number
# second group
rate = 0.5                  # a rate
flag = False                # yes or no
limit: int | None = None    # none by default
compile = 1                 # the name of a builtin
exec((Path(__file__).resolve().parent / "configurator.py").read_text())
not_a_knob = 1
print(repr((name, size, rate, flag, limit)), sorted(overrides), config["size"])
'''


@pytest.fixture
def script(project):
    (project.folder / "script.py").write_text(SCRIPT)
    (project.folder / "config" / "some.py").write_text(
        "import math\nfrom os import path as _path\n_half = size // 2\nsize = _half + 10\nrate = int(math.pi)\n")
    return project


@pytest.mark.parametrize("arguments, values", [
    ([], "('x', 3, 0.5, False, None) [] 3"),
    (["--name=a=b", "--size", "7", "--rate=2", "--flag"], "('a=b', 7, 2.0, True, None)"),
    (["--flag", "False", "--limit=4"], "('x', 3, 0.5, False, 4)"),
    (["--limit=4", "--limit=None", "--name=", "--size=-2"], "('', -2, 0.5, False, None)"),
    (["config/some.py"], "('x', 11, 3.0, False, None) ['rate', 'size'] 11"),
    (["--size=5", "config/some.py", "--rate=1e-3"], "('x', 12, 0.001, False, None)"),
    (["--flag", "config/some.py", "--name=--x"], "('--x', 11, 3.0, True, None)"),
])
def test_values(script, arguments, values):
    assert values in script.run("script.py", *arguments)


def test_works_from_any_directory_and_prints_overrides(script, tmp_path_factory):
    printed = script.run("script.py", "config/some.py", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert "overrides: size=11, rate=3.0" in printed


def test_torchrun_speaks_once(script):
    assert "overrides" not in script.run("script.py", "--size=1", env={"RANK": "1"})


def test_help_is_read_from_the_source(script):
    printed = script.run("script.py", "--help")
    for line in ("What it does.", "--name='x'", "a word", "first group", "second group", "--limit=None", "none by default"):
        assert line in printed
    assert "not_a_knob" not in printed


@pytest.mark.parametrize("arguments, words", [
    (["--siz=3"], ["'siz'", "did you mean size?"]),
    (["--zzzzzz=3"], ["'zzzzzz'", "--help"]),
    (["--not_a_knob=3"], ["not_a_knob"]),
    (["--size=2.5"], ["size expects int", "2.5"]),
    (["--size=None"], ["size expects int"]),
    (["--rate=fast"], ["rate expects float", "fast"]),
    (["--flag=yes"], ["flag expects True or False", "yes"]),
    (["--limit=x"], ["limit expects int or None"]),
    (["--size"], ["--size needs a value"]),
    (["--name", "--size=1"], ["--name needs a value"]),
    (["config/none.py"], ["config/none.py", "not found"]),
])
def test_errors(script, arguments, words):
    error = script.fails("script.py", *arguments)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("source, words", [
    ("sise = 3", ["unknown setting 'sise' in config/bad.py", "did you mean size?"]),
    ("size = 'three'", ["size expects int", "'three'"]),
    ("flag = 1", ["flag expects True or False"]),
    ("size = 3\nrate = 1 / 0", ["config/bad.py, line 2", "ZeroDivisionError"]),
    ("size = 3\n\nrate = = 1", ["config/bad.py, line 3", "SyntaxError"]),
])
def test_errors_in_config_files(script, source, words):
    (script.folder / "config" / "bad.py").write_text(source)
    error = script.fails("script.py", "config/bad.py")
    assert all(word in error for word in words), error
