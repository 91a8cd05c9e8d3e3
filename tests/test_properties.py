"""What holds for every input, tried on inputs that `hypothesis` makes up: tokenizers, settings, the cache, the samplers
and the readers of files."""
import ast
import collections
import contextlib
import io
import json
import math
import os
import string
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint
from conftest import ROOT
from files import META, UserError, read_json, read_log
from model import GPT, GPTConfig, keep_top_k, keep_top_p, penalize_repetition, sample
from readers import read_documents
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, read_nanogpt_characters

CASES = int(os.environ.get("FUZZ_CASES", 12))  # more find more
settings.register_profile("here", max_examples=4 * CASES, deadline=None, database=None, derandomize=True,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("here")
texts = st.text(max_size=60) | st.text("ab '\n.1é你\U0001f600", max_size=60)  # the second has words and runs


# --- tokenizers ---

@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer()


@given(text=texts.filter(bool), other=texts)
def test_characters_survive(text, other):
    tok = load_tokenizer(CharTokenizer.from_text(text + other).state())
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.encode_array(text).tolist() == ids
    stream = tok.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


@given(text=texts)
def test_byte_pairs_survive(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and b"".join(map(bpe.token_bytes, ids)) == text.encode()
    stream = bpe.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


@given(ids=st.lists(st.integers(0, 50256), max_size=20))
def test_a_stream_of_any_ids_is_the_decoded_text(bpe, ids):
    stream = bpe.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == bpe.decode(ids)


def functions_of(script, *names):
    """Some functions of a script and what it imports, without running the rest."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names or isinstance(node, ast.Import)]
    found = {"PIECE": 20, "RUN": 15}  # instead of millions of characters
    exec(compile(tree, script, "exec"), found)
    return found


cut = functions_of("prepare.py", "cut", "last_safe_cut", "class_of")["cut"]


@given(parts=st.lists(texts, min_size=1, max_size=8))
def test_encoding_piece_by_piece_is_encoding_the_whole(bpe, parts):
    pieces = [piece for piece, _, _ in cut((part, 0) for part in parts)]
    text = "".join(parts)
    assert "".join(pieces) == text
    words = text.replace("\n", " ").split(" ")
    if max(map(len, words)) < 15:  # longer runs may be cut where their ids change
        assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(text)


# --- settings ---

SCRIPT = '''"""A script."""
count = 3                    # a number
rate = 0.5                   # a share
name = "a"                   # a name
flag = False                 # a switch
maybe: int | None = None     # may be missing
exec("")
'''
DEFAULTS = {"count": 3, "rate": 0.5, "name": "a", "flag": False, "maybe": None}
source = (ROOT / "configurator.py").read_text(encoding="utf-8")
configurator = {"__file__": str(ROOT / "configurator.py"), "sys": sys}
exec(compile(source[source.index("# --- settings ---"):source.index("\noverrides = ")], "configurator.py", "exec"),
     configurator | {"os": os, "UserError": UserError}, configurator)
for function in configurator.values():  # they find each other, and what the file defines above
    if hasattr(function, "__globals__"):
        function.__globals__.update(configurator)


def configure(folder, arguments):
    """The settings that a command line gives; None if it is refused with one sentence, or asks for help."""
    (folder / "script.py").write_text(SCRIPT)
    namespace = DEFAULTS | {"__file__": str(folder / "script.py")}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            configurator["_configure"](arguments, namespace)
    except (UserError, OSError):
        return None
    except SystemExit as end:
        assert end.code == 0 and {"-h", "--help"} & set(arguments)
        return None
    kinds = {"count": int, "rate": float, "name": str, "flag": bool, "maybe": (int, type(None))}
    assert namespace["config"].keys() == kinds.keys()
    assert all(isinstance(namespace[k], kind) and namespace["config"][k] is namespace[k] for k, kind in kinds.items())
    return namespace["config"]


values = st.sampled_from(["", "3", "-1", "1e3", "nan", "1e999", "1_0", "0x1", "9" * 5000, "True", "maybe", "None", "="])
words = st.text(max_size=12) | values | st.sampled_from(["--", "---", "--=", "-h", "--help", "x.py", "*.py", "\0.py"])
names = st.sampled_from([*DEFAULTS, "cuont", ""])
arguments = words | st.builds("--{}={}".format, names, values | st.text(max_size=8)) | st.builds("--{}".format, names)


@given(arguments=st.lists(arguments, max_size=5))
def test_any_command_line_is_a_configuration_or_one_sentence(tmp_path, arguments):
    configure(tmp_path, arguments)


@given(count=st.integers(-2 ** 63, 2 ** 63 - 1), flag=st.booleans(),
       rate=st.floats(-3e38, 3e38) | st.sampled_from([math.inf, -math.inf]),  # more is no float32
       name=st.text(min_size=1).filter(lambda name: "\0" not in name and not name.startswith("~/")),
       maybe=st.none() | st.integers(-5, 5))
def test_what_is_given_is_what_a_script_gets(tmp_path, count, rate, name, flag, maybe):
    chosen = {"count": count, "rate": rate, "name": name, "flag": flag, "maybe": maybe}
    assert configure(tmp_path, [f"--{k}={v}" for k, v in chosen.items()]) == chosen
    (tmp_path / "mine.py").write_text("".join(f"{k} = {v!r}\n" for k, v in chosen.items()).replace("= inf", "= 1e999")
                                      .replace("= -inf", "= -1e999"), encoding="utf-8")
    assert configure(tmp_path, [str(tmp_path / "mine.py")]) == chosen


statements = st.sampled_from([
    "count = 4", "rate = 1", "x = 1", "_x = 1", "import math", "count = 'a'", "1 / 0", "def f(:", "count =", "name = 3",
    "count = 10 ** 400", "rate = float('nan')", "flag = None", "maybe = ['a']", "del count", "print(count)", "é = 1",
    "from string import *", "class count: pass", "config = 3", "globals().clear()", "lambda: 0", "'\\", "\t",
    "count += 1", "raise KeyError", "open('none')", "count: str = 'a'", "if True: count = 4",
    "for count in 'ab': pass", "\0", "((("])


lines_of_code = statements | st.text(string.printable, max_size=15).filter(lambda line: "exit" not in line)


@given(lines=st.lists(lines_of_code, max_size=4))
def test_any_config_file_is_a_configuration_or_one_sentence(tmp_path, lines):
    (tmp_path / "mine.py").write_text("\n".join(lines), encoding="utf-8")
    configure(tmp_path, [str(tmp_path / "mine.py")])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x00", b"a" * 10 ** 6, b"(" * 10 ** 5, b"-" * 10 ** 5 + b"1"])
def test_config_files_that_are_no_code(tmp_path, content):
    (tmp_path / "mine.py").write_bytes(content)
    assert configure(tmp_path, [str(tmp_path / "mine.py")]) is None


# --- the cache and the samplers ---

@given(chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6), batch=st.integers(1, 3), seed=st.integers(0, 9))
def test_any_chunks_through_the_cache_give_the_logits_of_the_whole(chunks, batch, seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=40, vocab_size=11, n_layer=2, n_head=2, n_embd=8)).double().eval()
    idx = torch.randint(11, (batch, sum(chunks)))
    cache = model.new_cache(batch, sum(chunks))
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(idx)[0])
    with pytest.raises(ValueError, match="capacity"):
        cache.positions(1)


logit = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -1e30, 1e30])
logits_lists = st.lists(logit, min_size=1, max_size=30)


@given(logits=logits_lists, k=st.integers(1, 40), p=st.floats(0.001, 1.0))
def test_samplers_keep_the_likeliest_tokens_and_enough_of_them(logits, k, p):
    logits = torch.tensor([logits], dtype=torch.float64)
    kept = keep_top_k(logits, k)
    assert torch.equal(kept[kept.isfinite()], logits[logits >= logits.sort(descending=True).values[0, :k][-1]])
    kept = keep_top_p(logits, p)
    probabilities, inside = logits.softmax(-1)[0], kept[0].isfinite()
    total, least = probabilities[inside].sum().item(), probabilities[inside].min().item()
    assert torch.equal(kept[0][inside], logits[0][inside])
    assert total >= p - 1e-9 and total - least < p + 1e-9  # enough, and none too many
    assert not inside.all() or probabilities[~inside].numel() == 0
    assert (probabilities[~inside] <= least).all()


@given(logits=logits_lists, seen=st.lists(st.integers(0, 29), min_size=1, max_size=9), penalty=st.floats(0.1, 10.0))
def test_the_penalty_falls_on_what_was_seen_and_once(logits, seen, penalty):
    logits = torch.tensor([logits], dtype=torch.float64)
    ids = torch.tensor([seen]) % logits.size(1)
    penalized = penalize_repetition(logits, ids, penalty)
    for i, (before, after) in enumerate(zip(logits[0].tolist(), penalized[0].tolist(), strict=True)):
        expected = before if i not in ids else before * penalty if before < 0 else before / penalty
        assert after == pytest.approx(expected, rel=1e-12)


@given(logits=logits_lists, temperature=st.floats(0, 100), k=st.none() | st.integers(1, 40),
       p=st.none() | st.floats(0.01, 1), penalty=st.floats(0.5, 2))
def test_a_draw_is_a_token_that_the_samplers_keep(logits, temperature, k, p, penalty):
    logits = torch.tensor([logits], dtype=torch.float32)
    i = sample(logits, torch.zeros(1, 1, dtype=torch.int64), temperature, k, p, penalty)
    assert 0 <= i.item() < logits.size(1)
    if penalty == 1 and k is not None and temperature > 1e-8:
        assert keep_top_k(logits, k)[0, i].isfinite()


# --- files ---

def read_all(path):
    for document in read_documents(path, "text", [], collections.Counter()):
        for text, _ in document:
            text.encode()


READERS = {"a.txt": read_all, "a.jsonl": read_all, "a.json": read_all, "a.json.gz": read_all, "a.parquet": read_all,
           "log.csv": read_log, "meta.json": lambda path: read_json(path, META), "meta.pkl": read_nanogpt_characters,
           "latest.pt": load_checkpoint}
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("text"), inner, max_size=4)), max_leaves=8)


contents = st.binary(max_size=200) | (st.text(max_size=100) | json_values.map(json.dumps)).map(str.encode)


@pytest.mark.parametrize("name", READERS)
@given(content=contents)
def test_any_bytes_are_an_answer_or_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(UserError):
        READERS[name](tmp_path / name)


@given(records=st.lists(json_values, max_size=6), indent=st.none() | st.integers(0, 2),
       space=st.sampled_from(["", " ", "\n"]))
def test_a_json_array_is_read_as_a_whole_would_be(tmp_path, records, indent, space):
    (tmp_path / "a.json").write_text(space + json.dumps(records, indent=indent) + space)
    expected = [r["text"] if isinstance(r, dict) else r for r in records
                if isinstance(r, str) or (isinstance(r, dict) and isinstance(r.get("text"), str))]
    found = ["".join(text for text, _ in document)
             for document in read_documents(tmp_path / "a.json", "text", [], collections.Counter())]
    normal = [t.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n") for t in expected
              if "\0" not in t and not any("\ud800" <= c <= "\udfff" for c in t)]
    assert found == normal
