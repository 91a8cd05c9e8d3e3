"""tokenizer.py: round trips, GPT-2's own ids, streams of ids, and mistakes that are named."""
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, TEXT
from files import UserError
from tokenizer import BPETokenizer, CharTokenizer, fetch_vocabulary, load_tokenizer

TRICKY = "naïve café — 你好，世界 👩‍👩‍👧 don't  stop\r\n\n\t x\x1c\u2003 ١٢٣ <|endoftext|> \U0001f600!"


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer()


def test_char_round_trip():
    tok = CharTokenizer.from_text(TEXT + TRICKY)
    assert tok.decode(tok.encode(TRICKY)) == tok.decode(iter(tok.encode(TRICKY))) == TRICKY
    assert list(tok.encode_array(TRICKY)) == tok.encode(TRICKY)
    assert tok.chars == "".join(sorted(set(TEXT + TRICKY)))
    assert tok.eot is None
    again = load_tokenizer(tok.state())
    assert again.encode(TRICKY) == tok.encode(TRICKY)


def test_the_end_of_a_text_in_a_prompt(bpe):
    """A prompt may name the token. In a text it is ordinary characters, which no model has learnt to end at."""
    for text, ids in (("", []), ("<|endoftext|>", [bpe.eot]), ("a<|endoftext|> b", [64, bpe.eot, 275])):
        assert bpe.encode_prompt(text) == ids
        assert bpe.eot not in bpe.encode(text)
    assert CharTokenizer("<|endoftx>").encode_prompt("<|>") == [0, 1, 9]


def test_long_white_space_is_cut_into_what_tiktoken_can_read(bpe, monkeypatch):
    lengths = []
    monkeypatch.setattr(bpe, "_bpe", type("Reader", (), {"encode_to_numpy": lambda _, text, **how: np.array(
        lengths.append(len(text)) or [0])})())
    bpe.encode_array("ab" + " " * 1_200_000 + "c" + "\n" * 499_999 + "d" + "\t" * 500_000)
    assert lengths == [500_002, 500_000, 200_000 + 1 + 499_999 + 1 + 500_000, 0]


@pytest.mark.parametrize("c", ["Q", "é", "\U0001f600"])
def test_unknown_character_is_named(c):
    tok = CharTokenizer.from_text("abc\n")
    for encode in (tok.encode, tok.encode_array):
        with pytest.raises(ValueError, match=f"{c}.*U\\+{ord(c):04X}.*abc"):
            encode("a" + c + "b")


def test_ids_outside_the_vocabulary(bpe):
    for tok in (CharTokenizer("ab"), bpe):
        for bad in (-1, tok.vocab_size):
            with pytest.raises(ValueError, match="outside the vocabulary"):
                tok.decode([bad])
            with pytest.raises(ValueError, match="outside the vocabulary"):
                tok.stream().push(bad)


def test_bpe_is_gpt2s(bpe):
    # Figures anyone can look up: GPT-2's ids for "Hello, world!".
    assert bpe.encode("Hello, world!") == [15496, 11, 995, 0]
    assert (bpe.vocab_size, bpe.eot) == (50257, 50256)
    assert bpe.decode(bpe.encode(TRICKY)) == bpe.decode(iter(bpe.encode(TRICKY))) == TRICKY
    assert list(bpe.encode_array(TRICKY)) == bpe.encode(TRICKY)
    assert load_tokenizer(bpe.state()).encode(TRICKY) == bpe.encode(TRICKY)


def test_stream_never_shows_half_a_character(bpe):
    ids = bpe.encode(TRICKY)
    stream = bpe.stream()
    pieces = [stream.push(i) for i in ids]
    assert len(ids) > len(TRICKY.split()) and "" in pieces  # some characters are spread over several tokens
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == TRICKY


def test_stream_agrees_with_decode_on_any_ids(bpe):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(bpe.vocab_size) for _ in range(20)]
        stream = bpe.stream()
        assert "".join(stream.push(i) for i in ids) + stream.flush() == bpe.decode(ids)


@pytest.mark.parametrize("state, words", [
    ({"kind": "sentencepiece"}, "unknown tokenizer 'sentencepiece'"), (None, "unknown tokenizer None"),
    ("char", "unknown"), ([], "unknown"), ({}, "unknown"), ({"kind": ["char"]}, "unknown"),
    ({"kind": "char"}, "got None"), ({"kind": "char", "chars": ["a", "b"]}, r"got \['a', 'b'\]"),
    ({"kind": "char", "chars": ""}, "got ''"), ({"kind": "char", "chars": "aba"}, "got 'aba'"),
    ({"kind": "char", "chars": "a\ud800"}, "got 'a")])
def test_malformed_states(state, words):
    with pytest.raises(UserError, match=words):
        load_tokenizer(state)


def test_vocabulary_is_fetched_into_an_empty_cache(tmp_path):
    code = "from tokenizer import BPETokenizer; print(BPETokenizer().encode('Hello, world!'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path)})
    assert done.stdout.strip() == "[15496, 11, 995, 0]", done.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_is_mended(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    paths = fetch_vocabulary()
    paths["vocab.bpe"].write_bytes(b"damaged")
    assert fetch_vocabulary()["vocab.bpe"].stat().st_size > 400_000
