# Gives a script its command line, its config files and its error messages. Scripts do not import this file. They
# execute it, below their settings, which it changes, and above their heavy imports:
#
#     exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())
#
# A setting is a line `name = value  # meaning` above that exec, of type int, float, str or bool. A setting that may be
# None carries an annotation: `top_k: int | None = None  # meaning`. Arguments apply from left to right:
#
#     python train.py config/quick.py --max_iters=50 --dropout 0.1 --compile
#
# A config file is Python that assigns settings. It is code: run only files that you trust. Afterwards the script has
# three more globals. `config` holds the value of every setting. `overrides` holds those that a config file or the
# command line set. `checked` checks the types of settings from elsewhere: `checked({"top_k": 5}, "out/latest.pt")`.
#
# Mistakes of the user and errors of the system print one line, `error: ...`, and end with exit code 1.
# Ctrl-C ends with exit code 130. Any other exception is a bug and prints its traceback. GPT_TRACEBACK=1 in the
# environment prints the traceback of every error.
import os
import sys

for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:  # closed, as after `>&-`. Otherwise the next file that is opened takes its place.
        _stream = open(os.devnull, _mode)
        setattr(sys, _name, _stream)
        setattr(sys, f"__{_name}__", _stream)

# --- errors ---


class UserError(ValueError):
    """An error that one line explains. files.py defines it again, for modules to import, so _one_line goes by the
    name."""


def _one_line(error):
    """The line to print for an exception; None if it deserves a traceback."""
    if any(kind.__name__ == "UserError" for kind in type(error).__mro__):
        text = str(error)
    elif isinstance(error, OSError):
        paths = " -> ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
        text = ": ".join(part for part in (paths, error.strerror) if part) or str(error) or type(error).__name__
    elif (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
          or "can't allocate memory" in str(error)):
        import re
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))  # PyTorch and numpy say how much they asked for
        text = f"out of memory{f', asking for {size[1]}' if size else ''}; choose smaller sizes"
    elif isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy", "filelock", "tiktoken"):
        text = (f"{sys.executable} has no {error.name}; activate the environment where you have installed it "
                "(. .venv/bin/activate), or install it: pip install -r requirements.txt")
    else:
        return None
    return " ".join(line.strip() for line in text.splitlines())


def _exit_now(code):
    """Ends the process without Python's clean-up."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue
    os._exit(code)


def _on_error(kind, error, trace):
    """Python calls this with the exception that ends the script."""
    import signal
    import time
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    sys.stderr = sys.__stderr__  # torch.distributed puts a buffer here, and _exit_now would lose what is in it
    if issubclass(kind, BrokenPipeError):  # nobody reads the output any more, as after `| head`
        _exit_now(0)
    try:
        sys.stdout.flush()
    except OSError:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = "standard output"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python's own flush, at its end, fails once more
    line, rank = _one_line(error), os.environ.get("RANK")
    if line and rank not in (None, "0"):
        # Under torchrun every process usually has the same error. Rank 0 prints it, and torchrun ends the others while
        # they wait. If that has not happened after 5 seconds, rank 0 has no such error, so they print it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if os.environ.get("GPT_TRACEBACK") == "1" or not (line or issubclass(kind, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
    elif line:
        print(f"error: {line}", file=sys.stderr)
    if issubclass(kind, KeyboardInterrupt):
        _exit_now(130)
    if rank is not None:  # threads of torch.distributed can crash the process during Python's clean-up
        _exit_now(1)


def _on_interrupt(number, frame):
    """Ctrl-C. During an import it ends the process, since a module written in C may lose the exception."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _on_unraisable(event):
    """Python calls this with an exception that it cannot raise, for example in __del__."""
    if isinstance(event.exc_value, KeyboardInterrupt):
        _exit_now(130)
    sys.__unraisablehook__(event)


def _on_exit():
    """Flushes stdout while an error can still be reported in one line: the disk is full, or the reader has gone."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.stdout.flush()
    except OSError as error:
        _on_error(type(error), error, error.__traceback__)
        _exit_now(1)


def _install_hooks():
    """From here on, the four _on_ functions handle errors and Ctrl-C."""
    sys.excepthook, sys.unraisablehook = _on_error, _on_unraisable
    import atexit
    import signal
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)
    atexit.register(_on_exit)


_install_hooks()
for _stream in (sys.stdin, sys.stdout, sys.stderr):  # UTF-8 in files and pipes, too, where Windows has other ideas
    try:
        # What is not UTF-8 is shown by its number in outputs, and stays an error in the input.
        _stream.reconfigure(encoding="utf-8", errors="surrogateescape" if _stream is sys.stdin else "backslashreplace")
    except (AttributeError, ValueError):  # it is closed, replaced by another object, or has been read from
        continue

# --- settings ---


def _read_settings(path, namespace):
    """A script -> its docstring, and {name: (type, whether it may be None, its node in the syntax tree)}."""
    import ast
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    settings = {}
    for node in tree.body:
        # The exec of this file ends the settings, also where it stands behind `if __name__ == "__main__":`.
        if isinstance(node, ast.If) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            break
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        targets = [ast.unparse(target) for target in getattr(node, "targets", None) or [node.target]]
        name = targets[0]
        if isinstance(node, ast.AnnAssign):
            kind, *others = ast.unparse(node.annotation).split(" | ")
        else:
            kind, others = type(namespace.get(name)).__name__, []
        try:
            if (len(targets) > 1 or not name.isidentifier() or not name.islower() or name.startswith("_")
                    or isinstance(node, ast.AugAssign) or others not in ([], ["None"])):
                raise ValueError
            namespace[name] = _as_kind(namespace[name], kinds[kind], bool(others))
        except (KeyError, ValueError, OverflowError):
            raise UserError(
                f"{os.path.basename(path)}, line {node.lineno}: {ast.unparse(node):.80} is not a setting; allowed are "
                "lines such as n_layer = 6 and top_k: int | None = None, with a lower-case name and an int, float, str "
                "or bool") from None
        settings[name] = kinds[kind], bool(others), node
    return (ast.get_docstring(tree, clean=False) or "").rstrip(), settings


def _as_kind(value, kind, optional, from_text=False):
    """The value, converted to the type of its setting. KeyError, ValueError or OverflowError if it does not fit."""
    if optional and (value is None or (from_text and value == "None")):
        return None
    if from_text:
        value = {"True": True, "False": False}[value] if kind is bool else kind(value)
    if kind is float and type(value) in (int, float):
        if 3e38 < abs(value) < float("inf"):  # more than PyTorch's float32 can hold
            raise OverflowError
        return float(value)
    if type(value) is not kind or (kind is int and not -2 ** 63 <= value < 2 ** 63) or (kind is str and "\0" in value):
        raise ValueError
    if kind is str:
        value.encode("utf-8", "surrogateescape")  # ValueError for half a character, which no file's name can hold
    return value


def _unknown(name, settings, where, hint=""):
    """The error for a name that is not a setting."""
    import difflib
    near = difflib.get_close_matches(name, settings, n=1)
    advice = f"did you mean {near[0]}?" if near else f"--help lists them all{hint}"
    return UserError(f"unknown setting {name!r} {where}; {advice}")


def _checked(name, value, settings, where, from_text=False):
    """A value for the setting `name`, converted to its type."""
    kind, optional, node = settings[name]
    if from_text and kind is str and name not in ("start", "stop"):  # not a text, and perhaps a path
        if not value and getattr(node.value, "value", None) != "":  # such as --out_dir=$FOLDER, where FOLDER is not set
            raise UserError(f"{name} is empty {where}; leave it out, or give it a value")
        if value.startswith("~/"):  # the shell expands it only at the start of a word
            value = os.path.expanduser(value)
    try:
        return _as_kind(value, kind, optional, from_text)
    except (KeyError, ValueError, OverflowError) as e:
        expected = ("True or False" if kind is bool else kind.__name__) + (" or None" if optional else "")
        if kind is float and isinstance(e, OverflowError):
            expected = "float of at most 3e38"
        got = f"{value!r:.200}" if type(value) is not int or abs(value) < 2 ** 63 else "a number of more than 64 bits"
        raise UserError(f"{name} expects {expected}, got {got} {where}") from None


def _print_help(path, doc, settings):
    """--help: the script's docstring and its settings, under the comments that head them."""
    import ast
    import tokenize
    beside, alone = {}, {}  # comments, by line: those after code, and those on lines of their own with their column
    with open(path, "rb") as f:
        for token in tokenize.tokenize(f.readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                alone[token.start[0]] = token.start[1], token.string.lstrip("# ")
            elif token.type == tokenize.COMMENT:
                beside[token.start[0]] = token.string.lstrip("# ")
    print(f"{doc}\n\nSettings, with their defaults (also from a config file, as name = value):\n")
    for name, (kind, _, node) in settings.items():
        first, last = node.lineno, node.end_lineno
        while first - 1 in alone and alone[first - 1][0] == 0:
            first -= 1
        if first < node.lineno:
            print("", *(alone[line][1] for line in range(first, node.lineno)), sep="\n")
        print(f"  {f'--{name}={ast.unparse(node.value)}':<32} {kind.__name__:<5}  {beside.get(last, '')}")
        while last + 1 in alone and alone[last + 1][0] > 0:  # the comment goes on
            last += 1
            print(" " * 41, alone[last][1])


# --- config files ---


class _Recorder(dict):
    """The globals of a config file. Notes which names it sets."""

    def __init__(self, values):
        super().__init__(values)
        self.names = set()

    def __setitem__(self, name, value):
        self.names.add(name)
        super().__setitem__(name, value)


def _assignments(node):
    """Yields (name, line) for each name that an assignment sets, outside of functions and classes."""
    import ast
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in getattr(child, "targets", None) or [child.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        yield part.id, child.lineno
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            yield from _assignments(child)


def _find_config_file(path):
    """The config file as named from the current folder, or else from the script's; None if there is none."""
    for found in (path, os.path.join(os.path.dirname(os.path.realpath(__file__)), path)):
        if os.path.isfile(found):
            return found
    return None


def _read_config_file(path, settings, namespace):
    """Executes a config file on a copy of the settings; returns those that it sets, {name: value}."""
    import ast
    import builtins
    import difflib
    found = _find_config_file(path)
    before = {name: namespace[name] for name in settings}
    values = _Recorder(before | {"__file__": found, "__name__": "config"})
    try:
        with open(found, encoding="utf-8-sig") as f:
            source = f.read()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    try:
        tree = ast.parse(source, found)
        lines = dict(_assignments(tree))
        for name, line in lines.items():
            if name not in settings and not name.startswith("_"):
                raise _unknown(name, settings, f"in {path}, line {line}", "; a variable of your own begins with _")
        exec(builtins.compile(tree, found, "exec"), values)  # some scripts have a setting named compile
        for name in values.names - lines.keys() - settings.keys():  # from another file, which may set anything
            if (type(values.get(name)) in (int, float, str, bool) and not name.startswith("_")
                    and difflib.get_close_matches(name, settings, n=1)):
                raise _unknown(name, settings, f"in {path}", "")
    except (UserError, BrokenPipeError):
        raise
    except (Exception, SystemExit) as error:
        line, trace = 1, error.__traceback__
        while trace:  # the last line of the config file that the error passed through
            if trace.tb_frame.f_code.co_filename == found:
                line = trace.tb_lineno
            trace = trace.tb_next
        what = error
        if isinstance(error, SyntaxError):
            what = error.msg
            line = error.lineno if error.filename == found else line
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {what}") from error
    where = {name: f"in {path}, line {line}" for name, line in lines.items()}
    return {name: _checked(name, values[name], settings, where.get(name, f"in {path}"))
            for name in settings
            if name in values and (name in values.names or values[name] is not before[name])}


# --- the command line ---


def _read_arguments(arguments, settings):
    """The command line -> [(setting, value) or (None, config file), ...] in order, everything checked."""
    steps, words = [], list(arguments)
    pair = None  # `--name value`, if only bare words came since: they may be one pattern that the shell expanded
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            steps.append((None, _checked_config_file(word, pair)))
            continue
        name, equals, value = word[2:].partition("=")
        pair = None
        if name not in settings:
            raise _unknown(name, settings, "on the command line")
        if not equals and settings[name][0] is bool:
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value, as --{name}=value")
            value = words.pop(0)
            pair = name, value
        steps.append((name, _checked(name, value, settings, "on the command line", from_text=True)))
    return steps


def _checked_config_file(path, pair):
    """The path of a config file. UserError if it is none, or if the shell seems to have made it from a pattern."""
    hint, expanded = "", False
    if pair and os.path.exists(path) and os.path.exists(pair[1]):
        name, value = pair
        folder, file = os.path.split(path)
        pattern = os.path.join(folder, "*" + os.path.splitext(file)[1])
        hint = f"; to keep the shell from expanding a pattern, quote it: --{name}=\"{pattern}\""
        expanded = os.path.dirname(value) == folder
    if expanded or not path.endswith(".py"):
        raise UserError(f"unexpected {path!r}: settings are given as --key=value, config files end in .py{hint}; a "
                        'value with spaces needs quotes, as in --start="To be"')
    if not _find_config_file(path):
        raise UserError(f"config file {path} not found; settings are given as --key=value")
    return path


def _configure(arguments, namespace):
    """Applies the command line to the script's globals; returns what it sets, {name: value}."""
    script = namespace["__file__"]
    doc, settings = _read_settings(script, namespace)
    if "--help" in arguments or "-h" in arguments:
        _print_help(script, doc, settings)
        sys.exit(0)
    overrides = {}
    for name, value in _read_arguments(arguments, settings):
        found = {name: value} if name else _read_config_file(value, settings, namespace)
        overrides |= found
        namespace.update(found)
    namespace["config"] = {name: namespace[name] for name in settings}
    namespace["checked"] = lambda values, path: {
        name: _checked(name, value, settings, f"in {path}; --{name} replaces it") for name, value in values.items()}
    return overrides


overrides = _configure(sys.argv[1:], globals())
