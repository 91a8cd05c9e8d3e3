"""What prepare.py makes of files that are not plain UTF-8 text with \n at the end of each line."""
import base64
import bz2
import collections
import gzip
import json
import lzma
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import ROOT, TEXT
from files import UserError
from readers import opened, read_documents
from test_prepare import ids_of, read, small_pieces
from tokenizer import BPETokenizer, load_tokenizer

TWO = ["one\ntext of some words", "the other text, in \"quotes\""]
HALF = "--val_fraction=0.5"


def documents(project, *arguments):
    """The documents of a dataset that prepare.py makes in byte pairs, and what it says on standard error."""
    done = project.finish("prepare.py", "--dataset=mine", "--tokenizer=gpt2", HALF, *arguments)
    assert done.returncode == 0, done.stderr
    meta, train, val = read(project, "mine")
    tok = BPETokenizer()
    text = tok.decode(train + val)
    eot = (train + val).count(tok.eot)
    assert meta["train_bytes"] + meta["val_bytes"] == len(text.encode()) - eot * len("<|endoftext|>")
    return text.split("<|endoftext|>"), done.stderr


@pytest.mark.parametrize("name, compress", [
    ("a.txt.gz", gzip.compress), ("a.bz2", bz2.compress), ("a.txt.xz", lzma.compress)])
def test_compressed_text(project, name, compress):
    content = compress(TWO[0].encode())
    (project.folder / name).write_bytes(content)
    assert documents(project, f"--input={name}") == (TWO[:1], "")
    (project.folder / name).write_bytes(content[:-9])
    assert f"{name} is damaged" in project.fails("prepare.py", "--dataset=new", f"--input={name}")
    (project.folder / name).write_bytes(b"plain text")
    assert f"{name} is damaged" in project.fails("prepare.py", "--dataset=new", f"--input={name}")
    (project.folder / name).write_bytes(content + content[:-20].replace(content[:3], b"B" + content[1:3]))
    assert f"{name} is damaged" in project.fails("prepare.py", "--dataset=new", f"--input={name}")
    assert not (project.folder / "data" / "new").exists()


def test_xz_that_asks_for_memory(tmp_path):
    """The size of its dictionary, which comes first, says how much memory xz takes."""
    path, text = tmp_path / "a.xz", b"some text\n" * 9
    several = lzma.compress(text, preset=9) + bytes(8) + lzma.compress(b"") + lzma.compress(text)
    for content in (several, several + bytes(4), lzma.compress(text * 2, lzma.FORMAT_ALONE)):
        path.write_bytes(content)
        with opened(path) as (f, _):
            assert f.read() == text * 2
    for content in (several[:-30], several + b"more"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"), opened(path) as (f, _):
            f.read()
    huge = lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}])
    head = bytearray(huge[12:24])
    assert head[3:5] == b"\1\x10"
    head[4] = 40  # 4 GB
    head[-4:] = zlib.crc32(head[:-4]).to_bytes(4, "little")
    path.write_bytes(lzma.compress(text) + huge[:12] + head + huge[24:])
    with pytest.raises(UserError, match="limit exceeded.; decompress it first"), opened(path) as (f, _):
        f.read()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("rows, settings", [([100 << 20], {"use_dictionary": False}),
                                            ([12 << 20] * 10, {"dictionary_pagesize_limit": 1 << 30})])
def test_parquet_that_unfolds(tmp_path, monkeypatch, rows, settings):
    """A page of a few bytes may stand for gigabytes of one letter, and so may a dictionary to which each row refers."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.array("a" * n for n in rows)})
    pyarrow.parquet.write_table(table, path, compression="zstd", **settings)
    assert path.stat().st_size < 1 << 16
    # In processes of their own, since pyarrow keeps memory that it has had, and may use it again.
    code = """if True:
        import collections, resource, sys, readers
        readers.UNFOLDED = int(sys.argv[2]) << 20
        try:
            found = readers.read_documents(readers.Path(sys.argv[1]), "text", [], collections.Counter())
            print([sum(len(text) for text, _ in document) for document in found])
        except readers.UserError as e:
            print(e)
        print(resource.getrlimit(resource.RLIMIT_DATA)[0])"""
    for limit, words in ((800, str(rows)), (100, f"{path} takes more than 100 MB of memory to read; write it with "
                                                  "smaller pages and shorter rows")):
        done = subprocess.run([sys.executable, "-c", code, path, str(limit)], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.split("\n")[:2] == [words, "-1"], done.stderr


@pytest.mark.parametrize("kind", ["ms", "us", "ns"])
def test_parquet_with_times(tmp_path, kind):
    """Such as Python cannot hold: after the year 9999, or of nanoseconds."""
    times = pyarrow.array([0, 2 ** 62 + 1], pyarrow.timestamp(kind))
    pyarrow.parquet.write_table(pyarrow.table({"when": times, "text": TWO}), tmp_path / "a.parquet")
    for key, expected, bad_records in (("text", TWO, 0), ("when", [], 2)):
        bad = []
        found = read_documents(tmp_path / "a.parquet", key, bad, collections.Counter())
        assert [text for document in found for text, _ in document] == expected
        assert len(bad) == bad_records and all("is not a string but" in why for why in bad)


RECORDS = [{"text": text} for text in TWO]


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps(RECORDS)), ("a.json", json.dumps(RECORDS, indent=2)), ("a.json", json.dumps(TWO)),
    ("a.json", "\n".join(map(json.dumps, RECORDS))), ("a.json", "\ufeff" + "\n".join(map(json.dumps, TWO))),
    ("a.ndjson", "\r\n".join(map(json.dumps, RECORDS))), ("a.jsonl", "\n\n".join(map(json.dumps, TWO))),
    ("a.ndjson.gz", gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))], ids=range(8))
def test_json(project, name, content):
    (project.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert documents(project, f"--input={name}") == (TWO, "")


def test_a_single_json_object(project):
    (project.folder / "a.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert documents(project, "--input=a.json") == (TWO[:1], "")


@pytest.mark.parametrize("content, words", [
    ('{"text": "half', "is not JSON"), ("[1, 2", "is not JSON"), ("[1, 2]", "2 bad records"), ("", "is empty"),
    ('{"data": ["a", "b"]}', "no key 'text' (--text_key) among ['data']"), ("3", "1 bad record skipped"),
    ('[{"text": "a"}, {"text": "a", "n": ' + "1" * 5000 + "}]", "record 2 has a number with too many digits")])
def test_other_json_is_one_line(project, content, words):
    (project.folder / "a.json").write_text(content)
    assert words in project.fails("prepare.py", "--dataset=mine", "--input=a.json")
    assert not (project.folder / "data" / "mine").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("piece", [1 << 20, 1001])
def test_line_ends_and_byte_order_marks(project, name, piece):
    text = "".join(f"{'x' * (i % 7)}\r\n\r{i}\n\r\n\n\r\r" for i in range(3000))
    content = "\ufeff" + text
    (project.folder / name).write_bytes((content if name == "a.txt" else json.dumps({"text": content})).encode())
    if piece < 1 << 20:
        small_pieces(project)  # \r\n stands across the borders of pieces
    found, said = documents(project, f"--input={name}")
    assert found == [text.replace("\r\n", "\n").replace("\r", "\n")]
    assert said == ("byte order marks: removed in 1 of 1 documents\n"
                    "line ends: \\r\\n and \\r became \\n in 1 of 1 documents\n")


def test_nul_bytes_are_refused(project):
    for content in (b"text\0more", TEXT.encode("utf-16"), b"\x89PNG\r\n\0\0"):
        (project.folder / "a.txt").write_bytes(content)
        error = project.fails("prepare.py", "--dataset=mine", "--input=a.txt")
        assert f"a.txt is not text: it has a NUL byte at offset {content.index(0)}" in error
    (project.folder / "a.jsonl").write_text('{"text": "a\\u0000b"}')
    assert "NUL" in project.fails("prepare.py", "--dataset=mine", "--input=a.jsonl")


def test_a_folder_with_other_files(project):
    folder = project.folder / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "c.jsonl").write_text('"second"')
    (folder / "deeper" / "d.pyc").write_bytes(b"\xcb\r\r\n\0\0\0\0")
    (folder / "e.txt").write_text("third")
    found, said = documents(project, "--input=texts")
    assert found == ["first", "third", "second"] or found == ["first", "second", "third"]
    assert said.startswith("skipped 2 of 5 files, which are not text: ") and "b.png" in said and "d.pyc" in said
    (folder / "old.txt").write_bytes("café".encode("latin-1"))  # text that would be lost if it was left out
    for where, words in (("texts", "old.txt is not UTF-8"), ("texts/*.png", "none of its files is text")):
        done = project.finish("prepare.py", "--dataset=new", f"--input={where}")
        skipped, error = done.stderr.splitlines()
        assert done.returncode == 1 and "skipped" in skipped and error.startswith("error: ") and words in error


def test_standard_input(project):
    command = project.command("prepare.py", "--dataset=mine", "--input=-", HALF)
    for text, code in ((TEXT, 0), ("", 1)):
        done = subprocess.run(command, cwd=project.folder, input=text.encode(), capture_output=True)
        assert done.returncode == code, done.stderr
        assert done.stderr == (b"" if text else b"error: standard input is empty\n")
        meta, train, val = read(project, "mine")
        assert load_tokenizer(meta["tokenizer"]).decode(train + val) == TEXT and meta["source"] == "standard input"
    assert sorted(p.name for p in (project.folder / "data" / "mine").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_json_lines_from_a_pipe(project):
    command = project.command("prepare.py", "--dataset=mine", "--input=-", HALF)
    done = subprocess.run(command, cwd=project.folder, input=b'{"id": 1, "text": "some"}\n' * 20, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith(b"error: this looks like JSON Lines with the field 'text'")
    assert not (project.folder / "data" / "mine").exists()
    done = subprocess.run(command, cwd=project.folder, input=b'{"id": 1, "words": "some"}\n' * 20, capture_output=True)
    assert done.returncode == 0  # a text like any other


def test_a_pattern_may_name_folders(project):
    (project.folder / "texts" / "part").mkdir(parents=True)
    (project.folder / "texts" / "a.txt").write_text(TWO[0])
    (project.folder / "texts" / "part" / "b.txt").write_text(TWO[1])
    assert documents(project, "--input=texts/*") == (TWO, "")


def test_a_folder_that_cannot_be_read(project):
    """Its texts are not left out in silence. (Whoever runs the tests may have the right to read every folder.)"""
    (project.folder / "texts" / "part").mkdir(parents=True)
    (project.folder / "texts" / "a.txt").write_text("some text")
    source = (project.folder / "prepare.py").read_text(encoding="utf-8")
    refuse = '''
def scandir(path, real=os.scandir):
    if str(path).endswith("part"):
        raise PermissionError(13, "Permission denied", str(path))
    return real(path)

os.scandir = scandir

def files_below('''
    (project.folder / "prepare.py").write_text(source.replace("\ndef files_below(", refuse), encoding="utf-8")
    error = project.fails("prepare.py", "--dataset=mine", "--input=texts", fresh=True)
    assert error.endswith(f"{Path('texts', 'part')}: Permission denied\n")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_validation_text_of_its_own(project, tokenizer):
    (project.folder / "a.txt").write_text("training text")
    (project.folder / "val").mkdir()
    (project.folder / "val" / "b.txt").write_text("another é text")
    (project.folder / "val" / "c.txt").write_text("more")
    project.run("prepare.py", "--dataset=mine", "--input=a.txt", "--val_input=val", f"--tokenizer={tokenizer}")
    meta, train, val = read(project, "mine")
    tok = load_tokenizer(meta["tokenizer"])
    assert tok.decode(train) == "training text" and val == ids_of(tok, ["another é text", "more"])
    assert (meta["train_bytes"], meta["val_bytes"], meta["documents"]) == (13, 19 + (tokenizer == "char"), 3)
    assert "no such file" in project.fails("prepare.py", "--dataset=new", "--input=a.txt", "--val_input=none")


def test_long_text_without_white_space(project):
    rng = np.random.default_rng(0)
    code = base64.b64encode(rng.bytes(30_000)).decode()
    chinese = "".join(rng.choice(list("的一是不了人我在有他，。")) for _ in range(9000))
    text = code + "don't'll've" * 500 + chinese + "x" * 3000 + "1" * 3000 + "'s" * 900 + "?!" * 900
    (project.folder / "a.txt").write_bytes(text.encode())
    small_pieces(project)
    assert documents(project, "--input=a.txt")[0] == [text]
    _, train, val = read(project, "mine")
    assert train + val == BPETokenizer().encode(text)  # cut, but as if it was not
    (project.folder / "a.txt").write_bytes(b"x" * 50_000)
    assert documents(project, "--input=a.txt")[0] == ["x" * 50_000]
