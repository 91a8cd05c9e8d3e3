"""Checkpoints and datasets of nanoGPT: loaded, sampled from, finetuned and exported; a pickle's code does not run."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from checkpoint import load_model, load_pretrained
from conftest import ROOT, TEXT, TINY
from files import UserError, finish_publishing, open_dataset
from test_prepare import read
from tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, read_nanogpt_characters

transformers = pytest.importorskip("transformers")
CHARS = "".join(sorted(set(TEXT)))


def reference(vocab_size, bias):
    """A GPT-2 of Hugging Face's with nanoGPT's exact GELU and random weights."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=48, n_layer=3, n_head=4, activation_function="gelu")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.15).add_("ln_" in name and name.endswith("weight"))
            if name.endswith("bias") and not bias:
                p.zero_()
    return model


def nanogpt_checkpoint(model, bias, dataset, prefix="", mask=False):
    """What nanoGPT's train.py saves: linear layers as (out, in), where GPT-2's own files have (in, out)."""
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {prefix + name: t.T.contiguous() if name.endswith(transposed) else t
             for name, t in model.state_dict().items() if bias or not name.endswith("bias")}
    if mask:
        state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
    c = model.config
    return {"model": state, "optimizer": {}, "iter_num": 100, "best_val_loss": torch.tensor(1.5),
            "model_args": dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=32, bias=bias,
                               vocab_size=c.vocab_size, dropout=0.1),
            "config": {"dataset": dataset, "learning_rate": 1e-3}}


def write_dataset(folder, chars=CHARS, ids=None, protocol=None):
    """nanoGPT's train.bin, val.bin and meta.pkl for TEXT."""
    folder.mkdir(parents=True)
    ids = np.array([chars.index(c) for c in TEXT] if ids is None else ids, dtype="<u2")
    ids[:-500].tofile(folder / "train.bin")
    ids[-500:].tofile(folder / "val.bin")
    if chars:
        with open(folder / "meta.pkl", "wb") as f:
            pickle.dump({"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                         "stoi": {c: i for i, c in enumerate(chars)}}, f, protocol)


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_a_fault_leaves_the_old_dataset_or_the_new(project, how):
    """Also if another command fails after it. The two datasets have equal sizes and different characters."""
    found = set()
    for n in range(1, 30):
        if n == 1:
            write_dataset(project.folder / "a")
            write_dataset(project.folder / "b", CHARS[::-1])
        shutil.rmtree(project.folder / "data" / "theirs", ignore_errors=True)
        project.run("prepare.py", "--dataset=theirs", "--input=a")
        done = project.finish(ROOT / "tests" / "inject.py", how, n, "prepare.py", "--dataset=theirs", "--input=b")
        project.fails("prepare.py", "--dataset=theirs", "--input=nothing")
        finish_publishing(project.folder / "data" / "theirs")
        meta, *splits = open_dataset(project.folder / "data" / "theirs")
        assert load_tokenizer(meta["tokenizer"]).decode(np.concatenate(splits).tolist()) == TEXT
        found.add(meta["source"][-1])
        if "injected" not in done.stdout:
            break
    assert 8 < n < 29 and done.returncode == 0 and found == {"a", "b"}


@pytest.mark.parametrize("bias, prefix, mask", [(False, "", False), (True, "_orig_mod.", True)])
def test_logits_are_nanogpts(project, bias, prefix, mask):
    folder = project.folder / "nanoGPT"
    write_dataset(folder / "data" / "tiny")
    theirs = reference(len(CHARS), bias)
    (folder / "out").mkdir()
    torch.save(nanogpt_checkpoint(theirs, bias, "tiny", prefix, mask), folder / "out" / "ckpt.pt")
    model, tok, _ = load_model(folder / "out")
    assert tok.chars == CHARS  # from the dataset's meta.pkl, where nanoGPT has it
    idx = torch.randint(len(CHARS), (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        approximate = (model(idx)[0] - expected).abs().max()
        for block in model.h:
            block.mlp.gelu = torch.nn.GELU()  # as one would change it in model.py
        exact = (model(idx)[0] - expected).abs().max()
    assert exact < 1e-5 < approximate < 0.01 * expected.abs().max()


def test_sampled_finetuned_and_exported(project):
    write_dataset(project.folder / "theirs" / "shakespeare_char")
    os.mkdir(project.folder / "nano")
    torch.save(nanogpt_checkpoint(reference(len(CHARS), False), False, "shakespeare_char"),
               project.folder / "nano" / "ckpt.pt")
    write_dataset(project.folder / "others" / "greek", CHARS[::-1])
    project.run("prepare.py", "--dataset=greek", "--input=others/greek")  # as many characters, but not the same ids
    error = project.fails("sample.py", "--out_dir=nano")
    assert "does not say which" in error and "prepare.py --dataset=shakespeare_char --input=" in error
    project.run("prepare.py", "--dataset=mine", "--input=theirs/shakespeare_char")
    meta, train, val = read(project, "mine")
    assert load_tokenizer(meta["tokenizer"]).decode(train + val) == TEXT and len(val) == 500
    assert (meta["train_bytes"], meta["val_bytes"]) == (len(TEXT) - 500, 500)
    for where in ("--out_dir=nano", "--init_from=nano", "--init_from=nano/ckpt.pt"):
        assert project.run("sample.py", where, "--start=The", "--max_new_tokens=9").startswith("The")
    project.run("train.py", "--init_from=nano", "--dataset=mine", "--max_iters=5", "--out_dir=tuned")
    assert load_model(project.folder / "tuned")[0].config.n_embd == 48
    pytest.importorskip("safetensors")
    project.run("checkpoint.py", "--out_dir=nano", "--export=exported")
    assert "train.py" not in (project.folder / "exported" / "README.md").read_text()  # nanoGPT trained it
    model, _ = load_pretrained(project.folder / "exported")
    idx = torch.arange(20)[None]
    os.rename(project.folder / "theirs" / "shakespeare_char" / "meta.pkl", project.folder / "nano" / "meta.pkl")
    torch.testing.assert_close(model(idx)[0], load_model(project.folder / "nano")[0](idx)[0])


def test_a_character_dataset_without_its_characters(project):
    folder = project.folder / "theirs"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        np.arange(9, dtype="<u2").tofile(folder / name)
    assert "theirs has no meta.pkl" in project.fails("prepare.py", "--dataset=mine", "--input=theirs")
    np.array([1, 2000], dtype="<u2").tofile(folder / "train.bin")  # a token of GPT-2
    project.run("prepare.py", "--dataset=mine", "--input=theirs")
    (folder / "val.bin").write_bytes(b"abc")
    error = project.fails("prepare.py", "--dataset=mine", "--input=theirs")
    assert "should hold two or more numbers of 2 bytes, but has 3 bytes" in error


def test_padded_vocabulary(tmp_path):
    theirs = reference(50304, True)
    torch.save(nanogpt_checkpoint(theirs, True, "openwebtext"), tmp_path / "ckpt.pt")
    model, tok, _ = load_model(tmp_path)
    assert isinstance(tok, BPETokenizer) and model.config.vocab_size == 50257
    idx = torch.randint(50257, (1, 8))
    for block in model.h:
        block.mlp.gelu = torch.nn.GELU()
    assert (model(idx)[0] - theirs(idx).logits[..., :50257]).abs().max() < 1e-4


def test_byte_pairs(project):
    ids = BPETokenizer().encode(TEXT)
    write_dataset(project.folder / "theirs", chars="", ids=ids)
    project.run("prepare.py", "--dataset=mine", "--input=theirs")
    meta, train, val = read(project, "mine")
    assert train + val == ids and meta["tokenizer"] == {"kind": "gpt2"}
    assert meta["train_bytes"] + meta["val_bytes"] == len(TEXT.encode())


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content, words", [
    (pickle.dumps({"itos": Hostile()}), "could be code"), (b"", "meta.pkl"), (b"\x80\x04K", "meta.pkl"),
    (pickle.dumps([1]), "meta.pkl"), (pickle.dumps({"itos": {0: "ab", 1: "b"}}), "meta.pkl"),
    (b"\x80\x02r\xff\xff\xff\x7f.", "meta.pkl")], ids=range(6))
def test_a_bad_pickle_is_one_line(project, content, words):
    write_dataset(project.folder / "theirs")
    (project.folder / "theirs" / "meta.pkl").write_bytes(content)
    assert words in project.fails("prepare.py", "--dataset=mine", "--input=theirs")
    assert not (project.folder / "hacked").exists() and not (project.folder / "data" / "mine").exists()


def nested(depth):
    """A tuple of few objects whose hash takes 2^depth steps."""
    value = ()
    for _ in range(depth):
        value = value, value
    return value


@pytest.mark.parametrize("content, words", [
    (pickle.dumps(bytearray(9), 5), "BYTEARRAY8"), (pickle.dumps({nested(15): 1}), "EMPTY_TUPLE"),
    (pickle.dumps(10 ** 1000), "LONG4"), (pickle.dumps({-(2 ** 31): 0}), "BININT"), (b"r\0\0\0\x01.", "LONG_BINPUT"),
    (b"\x80\x04\x95" + bytes(6) + b"\1\0}.", "FRAME"), (b"}" * (1 << 23), "more than 4 MB")], ids=range(7))
def test_a_pickle_does_not_take_the_memory(tmp_path, content, words):
    """Longer ones of the first five kinds take all memory, or do not end; so does the last, if it is long."""
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_nanogpt_characters(tmp_path / "meta.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_any_protocol_of_a_pickle(tmp_path, protocol):
    chars = "".join(map(chr, range(32, 700)))
    write_dataset(tmp_path / "theirs", chars=chars, ids=range(600), protocol=protocol)
    assert read_nanogpt_characters(tmp_path / "theirs" / "meta.pkl").chars == chars


def test_ids_outside_the_vocabulary_are_found(project):
    write_dataset(project.folder / "theirs", ids=[0, 1, len(CHARS)] * 500)
    assert f"has the id {len(CHARS)}" in project.fails("prepare.py", "--dataset=mine", "--input=theirs")


def test_a_character_dataset_is_trained_on(project):
    write_dataset(project.folder / "theirs", chars=CHARS[::-1])  # in another order than ours
    project.run("prepare.py", "--dataset=mine", "--input=theirs")
    project.run("train.py", *TINY, "--dataset=mine", "--max_iters=2")
    assert load_model(project.folder / "out")[1].state() == CharTokenizer(CHARS[::-1]).state()
