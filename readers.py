"""Reads the files that prepare.py accepts and yields their documents: text, JSON, Parquet, compressed or not.

    for document in read_documents(Path("web.jsonl.gz"), "text", bad=[], notes=Counter()):
        for text, position in document: ...      # about PIECE characters at a time

Every reader removes byte order marks, turns the line ends \\r\\n and \\r into \\n, and refuses NUL characters.
"""
import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zlib
from pathlib import Path

from files import UserError

PIECE = 1 << 20       # roughly this many bytes or characters are read at a time
RECORD = 1 << 25      # the longest JSON record; a few bytes in a compressed file may stand for one of any length
UNFOLDED = 3 << 29    # bytes that reading a .parquet file may take, whose pages are compressed
DICTIONARY = 1 << 29  # bytes that reading an .xz file may take; `xz -9` makes files that need 65 MB
BRACKETS = 2_000_000  # the most of a JSON record: three bytes of it may become 64 in memory
COMPRESSED = {".gz": gzip.open, ".bz2": lambda raw: decompressed(raw, bz2.BZ2Decompressor),
              ".xz": lambda raw: decompressed(raw, lambda: lzma.LZMADecompressor(memlimit=DICTIONARY))}
OPENWEBTEXT = Path("Skylion007/openwebtext")  # its name on Hugging Face, used instead of a file's path
OPENWEBTEXT_DOCUMENTS = 8_013_769             # used instead of a file's size


def kind_of(path):
    """The ending that says what a file holds, such as .jsonl for a.jsonl and a.jsonl.gz."""
    return next((s for s in reversed([s.lower() for s in path.suffixes]) if s not in COMPRESSED), "")


def decompressed(raw, decompressor):
    """The text of an open .bz2 or .xz file, as a stream. decompressor: makes a new one, of bz2 or lzma."""
    return io.BufferedReader(Streams(raw, decompressor), PIECE)


class Streams(io.RawIOBase):
    """A file that consists of one or more compressed streams. Python's lzma.open has no limit, and an .xz file may ask
    for 4 GB. bz2.open ends without an error where a damaged stream begins."""

    def __init__(self, raw, make):
        self.raw, self.make, self.decompressor = raw, make, make()

    def readable(self):
        return True

    def readinto(self, buffer):
        text = b""
        while not text:
            data = self.raw.read(PIECE) if self.decompressor.needs_input else b""
            if self.decompressor.eof:  # another stream may follow, after zeros
                data = self.decompressor.unused_data.lstrip(b"\0") or self.raw.read(PIECE).lstrip(b"\0")
                if not data:
                    return 0
                self.decompressor = self.make()
            elif not data and self.decompressor.needs_input:
                raise EOFError("it ends too early")
            text = self.decompressor.decompress(data, len(buffer))
        buffer[:len(text)] = text
        return len(text)


@contextlib.contextmanager
def opened(path):
    """Opens a file, decompressed if its name says so -> a binary stream, and a function that returns how many bytes of
    the file have been read. UserError if it is damaged."""
    decompress = COMPRESSED.get(path.suffix.lower(), lambda raw: contextlib.nullcontext(raw))
    try:
        with open(path, "rb") as raw, decompress(raw) as f:
            yield f, raw.tell
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise UserError(f"{path} is damaged or not a {path.suffix} file ({e}); decompress it first, if you can"
                        ) from None


def size_of(path):
    """The size of a file in bytes, or of openwebtext in documents: the unit of the progress bar."""
    return OPENWEBTEXT_DOCUMENTS if path == OPENWEBTEXT else path.stat().st_size


def read_text(path, notes):
    """Yields (text, bytes read so far), about PIECE bytes at a time. UserError if the file is not text in UTF-8."""
    decoder, newlines, offset = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, True), 0
    with opened(path) as (f, position):
        while True:
            start = offset - len(decoder.getstate()[0])
            chunk = f.read(PIECE)
            offset += len(chunk)
            if b"\0" in chunk:
                where = offset - len(chunk) + chunk.find(0)
                raise UserError(f"{path} is not text: it has a NUL byte at offset {where}; "
                                "decompress it, or convert it from UTF-16 to UTF-8, for example with iconv")
            try:
                text = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {start + e.start}; "
                                "convert it first, for example with iconv") from None
            yield without_mark(text, notes) if start == 0 else text, position()
            if not chunk:
                notes["line ends"] += newlines.newlines not in (None, "\n")
                return


def without_mark(text, notes):
    """The beginning of a text, without the byte order mark that some editors put there."""
    notes["byte order marks"] += text.startswith("\ufeff")
    return text.removeprefix("\ufeff")


def read_json_lines(path):
    """Yields (line number, line, bytes read so far). Skips empty lines. UserError for a line longer than RECORD."""
    with opened(path) as (f, position):
        for number in itertools.count(1):
            line = f.readline(RECORD + 1)
            if len(line) > RECORD:
                raise UserError(f"{path}:{number}: this line has more than {RECORD >> 20} MB; split it up")
            if not line:
                return
            if line.strip():
                yield number, line, position()


def parsed(record):
    """A JSON record in bytes -> the value. ValueError if it is damaged, or has so many objects that it takes memory."""
    if record.count(b"[") + record.count(b"{") > BRACKETS:
        raise ValueError(f"it has more than {BRACKETS:,} brackets")
    return json.loads(record.rstrip().decode("utf-8-sig"))


def read_json_file(path):
    """Yields (number, line or record, bytes read so far) of a .json file, which is an array of records, a single record
    or, as in a .jsonl file, a record on each line. UserError if it is none of these."""
    with opened(path) as (f, _):
        head = f.read(PIECE).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from read_json_array(path)
        return
    lines = read_json_lines(path)
    head = list(itertools.islice(lines, 2))
    try:
        parsed(head[0][1])
    except (IndexError, ValueError, RecursionError):
        pass
    else:
        yield from itertools.chain(head, lines)
        return
    with opened(path) as (f, position):
        record = f.read(RECORD + 1)
        if len(record) > RECORD:
            raise UserError(f"{path} has more than {RECORD >> 20} MB, but it is no array, and no record a line")
        try:
            yield 1, parsed(record), position()
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not JSON: {e}") from None


def read_json_array(path):
    """Yields (number, record, bytes read so far) of a file that holds [record, record, ...], with one record at a time
    in memory. UserError if it holds something else or if a record is longer than RECORD."""
    decode, skip = codecs.getincrementaldecoder("utf-8-sig")().decode, re.compile(r"\s*").match
    scan = json.JSONDecoder().raw_decode
    with opened(path) as (f, position):
        text, at, number, chunk = "", 0, 0, None
        while True:
            at = skip(text, at).end()  # before a record there is a comma or, for the first, a bracket
            start, why = skip(text, at + 1).end(), "it ends too early"
            if text[at:at + 1] not in ("", "[" if number == 0 else ",", "]" if number else ""):
                raise UserError(f"{path} is not JSON: no comma after record {number}")
            closed = text[at:at + 1] == "]" or number == 0 and text[start:start + 1] == "]"
            if closed and text[start if number else start + 1:].strip():
                raise UserError(f"{path} is not JSON: there is more after the closing bracket")
            if not closed:
                try:
                    record, end = scan(text, start)
                    if skip(text, end).end() < len(text):  # else the record, a number, may go on
                        number, at = number + 1, end
                        yield number, record, position()
                        continue
                except json.JSONDecodeError as e:
                    why = f"{e.msg} in record {number + 1}"
                except RecursionError:
                    raise UserError(f"{path} is not JSON: record {number + 1} is nested too deeply") from None
                except ValueError:  # Python reads no integer of more than 4300 digits
                    raise UserError(f"{path}: record {number + 1} has a number with too many digits") from None
            if chunk == b"" and closed:
                return
            if chunk == b"":
                raise UserError(f"{path} is not JSON: {why}")
            text, at = text[at:], 0
            if len(text) > RECORD or text.count("[") + text.count("{") > BRACKETS:
                raise UserError(f"{path}: record {number + 1} is not JSON, or has more than {RECORD >> 20} MB or "
                                f"{BRACKETS:,} brackets")
            chunk = f.read(min(max(PIECE, len(text)), RECORD // 4))
            try:
                text += decode(chunk, final=not chunk)
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is not UTF-8 ({e.reason}); convert it first, for example with iconv") from None


@contextlib.contextmanager
def memory_limit(size):
    """Lets this process take at most `size` bytes more than it has; what needs more raises MemoryError. Only Linux
    offers that."""
    try:
        import resource
        with open("/proc/self/status", encoding="ascii") as f:
            used = 1024 * int(re.search(r"VmData:\s+(\d+)", f.read())[1])
    except (ImportError, OSError):
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (used + size, before, most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def read_parquet(path, text_key):
    """Yields (row number, value in the column text_key, approximate bytes read so far)."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # pyarrow's other pool reserves 1 GB in advance
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} can only be read with pyarrow: pip install pyarrow") from None
    try:
        # A row group may not fit into memory. A page must, and so must all rows of a batch.
        with memory_limit(UNFOLDED):
            table = ParquetFile(path, pre_buffer=False, buffer_size=PIECE)
        with table:
            if text_key not in table.schema_arrow.names:
                raise UserError(f"{path} has no column {text_key!r} but {table.schema_arrow.names}; "
                                "name the one to read with --text_key")
            number, size, total = 0, size_of(path), table.metadata.num_rows
            batches = table.iter_batches(batch_size=10, columns=[text_key])
            while True:
                values = []
                with memory_limit(UNFOLDED):  # not while other code runs: its threads need memory
                    rows = next(batches, None)
                    if rows is None:
                        break
                    for value in rows.column(0):
                        with contextlib.suppress(ValueError, OverflowError):  # then it is a bad record
                            value = value.as_py()
                        values.append(value)
                for value in values:
                    number += 1
                    yield number, {text_key: value}, size * number // total
    except MemoryError:  # before the next line, since pyarrow's is also an ArrowException
        raise UserError(f"{path} takes more than {UNFOLDED >> 20} MB of memory to read; write it with smaller pages "
                        "and shorter rows") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
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


def text_of(record, text_key, notes):
    """A record (a string, or an object with the key text_key) -> its text. ValueError if it has none."""
    if isinstance(record, bytes):
        record = parsed(record)
    if isinstance(record, dict):
        if text_key not in record:
            raise ValueError(f"no key {text_key!r} (--text_key) among {str(list(record)):.80}")
        record = record[text_key]
        if not isinstance(record, str):
            raise ValueError(f"{text_key!r} is not a string but {type(record).__name__}")
    elif not isinstance(record, str):
        raise ValueError(f"not an object with the key {text_key!r} but {type(record).__name__}")
    record.encode()  # JSON can hold half a surrogate pair; UTF-8 cannot
    if "\0" in record:
        raise ValueError("the text has a NUL character")
    notes["line ends"] += "\r" in record
    return without_mark(record, notes).replace("\r\n", "\n").replace("\r", "\n")


def read_documents(path, text_key, bad, notes):
    """Yields each document of a file as an iterator over (text, position in the file). Records without a text are
    skipped. The list `bad` gets an entry for each, and the first three entries say why. `notes` counts the documents in
    which something was changed."""
    if kind_of(path) in (".json", ".parquet") and size_of(path) == 0:
        return
    if path == OPENWEBTEXT:
        records = read_openwebtext()
    elif kind_of(path) in (".jsonl", ".ndjson"):
        records = read_json_lines(path)
    elif kind_of(path) == ".json":
        records = read_json_file(path)
    elif kind_of(path) == ".parquet":
        records = read_parquet(path, text_key)
    else:
        yield read_text(path, notes)
        return
    for number, record, position in records:
        try:
            text = text_of(record, text_key, notes)
        except (ValueError, RecursionError) as e:  # RecursionError: thousands of brackets
            why = f"invalid JSON: {e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
            bad.append(f"{path}:{number}: {why}" if len(bad) < 3 else "")
            continue
        yield ((text[i:i + PIECE], position) for i in range(0, max(1, len(text)), PIECE))
