# Turns a script's globals into its command line. Scripts do not import this file, they execute it:
#
#     exec((Path(__file__).resolve().parent / "configurator.py").read_text())
#
# A knob is a line `name = value  # meaning` above that exec, of type int, float, str or bool. One that may be
# None carries an annotation: `top_k: int | None = None  # meaning`. Arguments are applied from left to right:
#
#     python train.py config/quick.py --max_iters=50 --dropout 0.1 --compile
#
# A config file is Python that assigns knobs. It is code: run only files that you trust. Afterwards `config` holds
# every knob's value, and `overrides` those that a config file or the command line named.
import ast
import builtins
import difflib
import os
import sys
import tokenize
import traceback
import types
from pathlib import Path


def _read_knobs(script):
    """Path -> (docstring, lines for --help, {name: (type, may be None)}), all from the source of the script."""
    source = Path(script).read_text(encoding="utf-8")
    tree = ast.parse(source)
    comments = {}
    with open(script, "rb") as f:
        for token in tokenize.tokenize(f.readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
    knobs, help_lines, last_line, line_before = {}, [], 0, 0
    for node in tree.body:
        line_before, last_line = last_line, node.end_lineno
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # the exec of this file: knobs end here
            break
        if isinstance(node, ast.AnnAssign):
            name, kinds = node.target.id, ast.unparse(node.annotation).split(" | ")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            kinds = [type(globals()[name]).__name__]
        else:
            continue
        if kinds[0] not in ("int", "float", "str", "bool") or not name.islower():  # CONSTANTS are not knobs
            continue
        knobs[name] = {"int": int, "float": float, "str": str, "bool": bool}[kinds[0]], "None" in kinds
        headings = [comments[n] for n in range(line_before + 1, node.lineno) if n in comments]
        help_lines += [""] + headings if headings else []
        shown = f"--{name}={ast.unparse(node.value)}"
        help_lines.append(f"  {shown:<32} {kinds[0]:<5}  {comments.get(node.end_lineno, '')}")
    return ast.get_docstring(tree), help_lines, knobs


def _checked(name, value, knobs, where):
    """A value for the knob `name`, converted to its type; ends the program if it does not fit."""
    if name not in knobs:
        near = difflib.get_close_matches(name, knobs, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists them all"
        sys.exit(f"error: unknown setting {name!r} {where}{hint}")
    kind, optional = knobs[name]
    expected = f"error: {name} expects {'True or False' if kind is bool else kind.__name__}{' or None' if optional else ''}"
    expected += f", got {value!r} {where}"
    if optional and (value is None or (value == "None" and where == "on the command line")):
        return None
    if where == "on the command line" and kind is not str:
        try:
            return {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            sys.exit(expected)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        sys.exit(expected)
    return value


def _read_config_file(path, knobs, namespace):
    """Executes a config file on a copy of the knobs; returns the names that it set, with their values."""
    found = next((p for p in (Path(path), Path(__file__).resolve().parent / path) if p.is_file()), None)
    if found is None:
        sys.exit(f"error: config file {path} not found; settings are given as --key=value")
    values = {name: namespace[name] for name in knobs} | {"__file__": str(found)}
    try:
        tree = ast.parse(found.read_text(encoding="utf-8"))
        exec(builtins.compile(tree, str(found), "exec"), values)  # compile is a knob of some scripts
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(found)]
        line = e.lineno if isinstance(e, SyntaxError) else (lines or [0])[-1]
        what = " ".join(str(e.msg if isinstance(e, SyntaxError) else e).split())
        sys.exit(f"error: {path}, line {line}: {type(e).__name__}: {what}")
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {name: _checked(name, value, knobs, f"in {path}") for name, value in values.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)
            and (name in assigned or name not in knobs)}


def _configure(argv, namespace):
    """Applies the arguments to the script's globals; returns what they set, {name: value}."""
    doc, help_lines, knobs = _read_knobs(namespace["__file__"])
    if "--help" in argv or "-h" in argv:
        print(f"{doc}\n\nSettings, with their defaults (also from a config file, as name = value):\n")
        print("\n".join(help_lines))
        sys.exit(0)
    overrides, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            found = _read_config_file(word, knobs, namespace)
        else:
            name, has_value, value = word[2:].partition("=")
            is_flag = knobs.get(name, (None,))[0] is bool
            if not has_value and is_flag:
                value = words.pop(0) if words and words[0] in ("True", "False") else "True"
            elif not has_value and name in knobs:
                if not words or words[0].startswith("--"):
                    sys.exit(f"error: --{name} needs a value, as --{name}=value")
                value = words.pop(0)
            found = {name: _checked(name, value, knobs, "on the command line")}
        overrides |= found
        namespace.update(found)
    if overrides and os.environ.get("RANK", "0") == "0":  # torchrun starts many processes; one of them speaks
        print("overrides: " + ", ".join(f"{name}={value!r}" for name, value in overrides.items()), flush=True)
    namespace["config"] = {name: namespace[name] for name in knobs}
    return overrides


overrides = _configure(sys.argv[1:], globals())
