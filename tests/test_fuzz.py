"""Random damage to good files: there is an answer or an error of one line."""
import collections
import contextlib
import copy
import gzip
import json
import os
import pickle
import random

import pyarrow
import pyarrow.parquet
import torch

from checkpoint import TO_RESUME, load_checkpoint, load_model
from conftest import TEXT
from files import META, UserError, read_json, read_log
from readers import read_documents
from tokenizer import read_nanogpt_characters

CASES = int(os.environ.get("FUZZ_CASES", 12))  # of each kind; more find more


def damaged(content, rng):
    """The bytes with some of them changed, removed, inserted, repeated or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place, how = rng.randrange(len(content) + 1), rng.random()
        if how < 0.3:
            content[place:place + 1] = bytes([rng.randrange(256)])
        elif how < 0.5:
            del content[place:place + rng.choice([1, 5, 100, 10 ** 6])]
        elif how < 0.7:
            content[place:place] = rng.randbytes(rng.choice([1, 3, 50]))
        elif how < 0.9:
            content[place:place] = content[rng.randrange(len(content) + 1):][:rng.choice([3, 30])]
        else:
            content = content[:place]
    return bytes(content)


def answers(function, *args):
    """Calls the function, which may raise an error for users only."""
    with contextlib.suppress(UserError, OSError):
        function(*args)


def read_all(path):
    for document in read_documents(path, "text", [], collections.Counter()):
        for text, _ in document:
            text.encode()


def files(trained, tmp_path):
    """Good files of each kind, and what reads them."""
    records = [{"text": "abc"}, "def", {"text": "é\r\n"}] * 5
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"] * 30}), tmp_path / "good")
    lines = "\n".join(map(json.dumps, records)).encode()
    return {"a.txt": (TEXT[:500].encode() + "héllo 你好\r\n".encode(), read_all), "a.jsonl": (lines, read_all),
            "a.json": (json.dumps(records, indent=1).encode(), read_all),
            "a.jsonl.gz": (gzip.compress(lines), read_all),
            "a.parquet": ((tmp_path / "good").read_bytes(), read_all),
            "log.csv": ((trained.folder / "out" / "log.csv").read_bytes(), read_log),
            "meta.json": ((trained.folder / "data" / "tiny" / "meta.json").read_bytes(), lambda p: read_json(p, META)),
            "meta.pkl": (pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "b"}}), read_nanogpt_characters),
            "latest.pt": ((trained.folder / "out" / "latest.pt").read_bytes(), lambda p: load_checkpoint(p, TO_RESUME))}


def test_damaged_files(trained, tmp_path):
    rng = random.Random(0)
    for name, (content, read) in files(trained, tmp_path).items():
        for _ in range(CASES):
            (tmp_path / name).write_bytes(damaged(content, rng))
            answers(read, tmp_path / name)


VALUES = [None, 0, -1, 1.5, "x", [], {}, torch.zeros(2), True, float("nan"), 10 ** 30, b"z"]


def test_checkpoints_with_anything_in_place_of_a_field(trained, tmp_path):
    good = torch.load(trained.folder / "out" / "best.pt", weights_only=True)
    places = [(name,) for name in good] + [("model", "wte.weight"), ("model", "h.0.ln_1.weight")]
    places += [(part, name) for part in ("model_config", "tokenizer") for name in good[part]]
    for place in places:
        for value in VALUES:
            bad = copy.deepcopy(good)
            inner = bad if len(place) == 1 else bad[place[0]]
            inner[place[-1]] = value
            torch.save(bad, tmp_path / "best.pt")
            answers(load_model, tmp_path)
            del inner[place[-1]]
        torch.save(bad, tmp_path / "best.pt")
        answers(load_model, tmp_path)
