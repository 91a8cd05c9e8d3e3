"""GPT-2 weights in and out, against transformers' GPT2LMHeadModel with random weights."""
import json
import re
import shlex
import zipfile
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from checkpoint import load_checkpoint, load_model, load_pretrained, model_card, save_pretrained
from files import UserError
from model import GPT, GPTConfig
from test_train import same_run
from tokenizer import BPETokenizer, CharTokenizer


def theirs(seed=0, dtype=torch.float32, **changes):
    """A GPT2LMHeadModel in which no bias is zero and no layer norm one."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**dict(n_layer=3, n_head=5, n_embd=40, vocab_size=101, n_positions=33,
                                                 bos_token_id=None, eos_token_id=None), **changes}))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.1
    return model.to(dtype).eval()


def agree(ours, hf, dtype):
    """Whether logits and loss are the same, and a greedy text of 50 tokens."""
    V, block_size = ours.config.vocab_size, ours.config.block_size
    x = torch.randint(V, (2, min(33, block_size)))
    with torch.no_grad():
        logits, loss = ours(x[:, :-1], x[:, 1:])
        expected = hf(x[:, :-1])
        their_loss = hf(x, labels=x).loss  # in float32, whatever the model's dtype
        if dtype == torch.float64:
            their_loss = torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), x[:, 1:].flatten())
    tolerance = (1e-4 if dtype == torch.float32 else 1e-10) * max(1, expected.logits.abs().max().item())
    assert (logits - expected.logits).abs().max() <= tolerance
    assert abs(loss.item() - their_loss.item()) <= tolerance
    n = min(50, block_size - 5)
    text = hf.generate(x[:, :5], max_new_tokens=n, do_sample=False, eos_token_id=None,
                       attention_mask=torch.ones_like(x[:, :5]))
    assert torch.equal(ours.generate(x[:, :5], n, temperature=0), text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changes", [{}, dict(n_layer=1, n_head=1, n_embd=7, vocab_size=13, n_positions=64)])
def test_their_weights_in_our_model(tmp_path, dtype, changes):
    hf = theirs(dtype=dtype, **changes)
    hf.save_pretrained(tmp_path)
    ours, tokenizer = load_pretrained(tmp_path)
    assert tokenizer is None and not ours.training
    agree(ours, hf, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias, tied", [(True, True), (False, True), (True, False)])
def test_our_folder_in_their_model(tmp_path, dtype, bias, tied):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(block_size=60, vocab_size=101, n_layer=3, n_head=5, n_embd=40, bias=bias))
    if not tied:
        ours.lm_head.weight = torch.nn.Parameter(torch.randn_like(ours.lm_head.weight))
    for p in ours.parameters():
        p.data += torch.randn_like(p) * 0.1
    ours = ours.to(dtype).eval()
    save_pretrained(ours, CharTokenizer("".join(chr(33 + i) for i in range(101))), tmp_path)
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    agree(ours, hf.eval(), dtype)
    if tied:
        again, _ = load_pretrained(tmp_path)
        x = torch.randint(101, (1, 9))
        assert torch.equal(again(x)[0], ours(x)[0])
    else:
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            load_pretrained(tmp_path)


def test_sharded_and_bin(tmp_path):
    hf = theirs()
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    hf.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(hf.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("sharded", "bin"):
        agree(load_pretrained(tmp_path / folder)[0], hf, torch.float32)


@pytest.mark.parametrize("content", [[1], {3: torch.zeros(2)}, {"a": 1}, bytearray(9), "legacy", "compressed"])
def test_a_bin_that_is_not_of_tensors(tmp_path, content):
    """It gets the checks of a checkpoint of ours, which tests/test_faults.py tests."""
    theirs().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs().state_dict() if isinstance(content, str) else content, path,
               _use_new_zipfile_serialization=content != "legacy")
    if content == "compressed":
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in records.items():
                archive.writestr(name, data)
    with pytest.raises(UserError, match="older than PyTorch 1.6; if you trust it, .* save it as model.safetensors"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("value, words", [(float("nan"), "h.0.mlp.c_fc.weight'] is not finite"),
                                          (1e30, "what the model computes is not finite")])
def test_weights_that_are_not_finite_or_too_large(tmp_path, value, words):
    hf = theirs()
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_fc.weight[3, 5] = value
    hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        load_pretrained(tmp_path)


def test_names_without_prefix_and_old_masks(tmp_path):
    hf = theirs()
    hf.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 33, 33)  # as in OpenAI's files
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    agree(load_pretrained(tmp_path)[0], hf, torch.float32)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, "model_type 'llama'"), ({"activation_function": "relu"}, "activation_function 'relu'"),
    ({"n_inner": 17}, "n_inner 17"), ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ({"vocab_size": 99}, r"wte.weight has shape \(101, 40\)"), ({"n_layer": 4}, "h.3.* is missing"),
    ({"n_layer": 2}, "h.2.* is not part of a GPT-2"), ({"n_head": 3}, "divisible by n_head"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon")])
def test_what_does_not_fit_is_named(tmp_path, change, words):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_a_type_that_is_not_of_weights_is_named(tmp_path, dtype):
    theirs().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"].to(dtype)},
              tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"ln_f.bias is of {dtype}"):
        load_pretrained(tmp_path)


def test_a_head_without_the_embedding_is_named(tmp_path):
    theirs().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"lm_head.weight": tensors.pop("transformer.wte.weight"), **tensors}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="wte.weight is missing"):
        load_pretrained(tmp_path)


def test_an_untied_head_is_named(tmp_path):
    hf = theirs()
    hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not tied"):
        load_pretrained(tmp_path)


def test_what_cannot_be_had_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither a folder here nor a repository that can be reached"):
        load_pretrained("no-such/model")
    with pytest.raises(ValueError, match="no readable config.json"):
        load_pretrained(tmp_path)
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 7}))
    with pytest.raises(ValueError, match="does not fit a GPT-2 .*divisible"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors"):
        load_pretrained(tmp_path)


def test_a_card_with_a_name_that_is_not_utf8(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=2, n_layer=1, n_head=1, n_embd=8))
    save_pretrained(model, CharTokenizer("ab"), tmp_path / "out", "from b\udcff.txt")
    assert (tmp_path / "out" / "README.md").read_text() == "from b\\udcff.txt"


def test_a_character_model_is_exported_with_its_tokenizer(trained):
    trained.run("train.py", "--dataset=tiny", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=256",
                "--max_iters=40", "--out_dir=long")
    trained.run("checkpoint.py", "--out_dir=long", "--export=characters")
    folder = trained.folder / "characters"
    text = trained.run("sample.py", "--start=The old", "--max_new_tokens=200", "--temperature=0", "--out_dir=long")
    generate = pipeline("text-generation", model=str(folder), device="cpu", dtype=torch.float32)
    assert generate("The old", max_new_tokens=200, do_sample=False)[0]["generated_text"] + "\n" == text
    assert trained.run("sample.py", "--start=The old", "--max_new_tokens=200", "--temperature=0",
                       "--init_from=characters") == text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("  The\n\nfox , it ")) == "  The\n\nfox , it "
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("é")
    card = (folder / "README.md").read_text()
    assert "n_layer 2, n_head 2, n_embd 32" in card and "Dataset: tiny" in card and "Validation loss: " in card
    assert "at most 256 tokens" in card
    command = next(line for line in card.splitlines() if "train.py" in line)
    trained.run("train.py", *shlex.split(command)[2:], "--out_dir=from-card")
    assert same_run(trained.folder / "long", trained.folder / "from-card")


def test_a_folder_that_transformers_saved_again(tmp_path):
    """It then has tokenizer.json, but not vocab.json."""
    model = GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    save_pretrained(model, BPETokenizer(), tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "vocab.json").unlink()
    assert isinstance(load_pretrained(tmp_path / "ours")[1], BPETokenizer)
    text = (tmp_path / "ours" / "tokenizer.json").read_text()
    assert '"the": 1169,' in text
    (tmp_path / "ours" / "tokenizer.json").write_text(text.replace('"the": 1169,', '"teh": 1169,'))
    assert load_pretrained(tmp_path / "ours")[1] is None


def test_float64_weights_are_trained_in_float32_and_written_in_int8(trained):
    model, tok, _ = load_model(trained.folder / "out")
    save_pretrained(model.double(), tok, trained.folder / "double")
    trained.run("train.py", "--dataset=tiny", "--init_from=double", "--max_iters=1", "--out_dir=single")
    assert load_checkpoint(trained.folder / "single" / "latest.pt")["model"]["wte.weight"].dtype == torch.float32
    done = trained.finish("sample.py", "--init_from=double", "--dtype=int8", "--start=The old", "--max_new_tokens=9")
    assert done.returncode == 0 and done.stderr == ""


def test_a_finetuning_run_that_is_resumed_chooses_as_before(trained):
    """A setting at None is chosen anew, for finetuning again."""
    how = ["--out_dir=finetuned", "--max_iters=1", "--eval_tokens=100"]
    first = trained.run("train.py", "--dataset=tiny", "--init_from=out", *how)
    again = trained.run("train.py", "--init_from=resume", *how, "--learning_rate=None", "--optimizer=adamw")
    rate = re.search("--learning_rate=[^ ]+", first)[0]
    assert rate == "--learning_rate=0.0001" and rate in again


def test_the_example_in_a_model_card_runs_for_any_characters_and_context(tmp_path):
    text = {"tokenizer": {"kind": "char", "chars": "hé天"}, "model_config": asdict(GPTConfig(8, 3, 1, 1, 4))}
    assert "generate('h', max_new_tokens=7)" in model_card(text, tmp_path)
    text["tokenizer"]["chars"] = "é天"
    assert "generate('é', max_new_tokens=7)" in model_card(text, tmp_path)


def test_trained_exported_and_finetuned(trained):
    """From a byte-pair model trained here to transformers' pipeline, and from the exported folder back to training."""
    project = trained
    (project.folder / "verse.txt").write_text("Shall I compare thee to a summer's day? Thou art more lovely. " * 200)
    project.run("prepare.py", "--dataset=verse", "--input=verse.txt", "--tokenizer=gpt2")
    small = ["--dataset=verse", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=208", "--batch_size=1"]
    project.run("train.py", *small, "--max_iters=30", "--learning_rate=1e-2", "--out_dir=verse", "--eval_interval=30")
    project.run("checkpoint.py", "--out_dir=verse", "--export=exported")
    folder = project.folder / "exported"
    assert AutoTokenizer.from_pretrained(folder).encode("Shall I compare") == BPETokenizer().encode("Shall I compare")
    generate = pipeline("text-generation", model=str(folder), device="cpu", dtype=torch.float32)
    expected = generate("Shall I compare", max_new_tokens=200, do_sample=False)[0]["generated_text"]
    for where in ("--out_dir=verse", "--init_from=exported"):
        ours = project.run("sample.py", "--start=Shall I compare", "--max_new_tokens=200", "--temperature=0", where)
        assert ours == expected + "\n"

    model, tokenizer = load_pretrained(folder)
    assert isinstance(tokenizer, BPETokenizer)
    before, _, checkpoint = load_model(project.folder / "verse")
    x = torch.randint(50257, (1, 20))
    torch.testing.assert_close(model(x)[0], before(x)[0])
    printed = project.run("train.py", "--init_from=exported", "--dataset=verse", "--eval_only", "--batch_size=4")
    loss = float(printed.split("validation loss ")[1].split()[0])
    assert loss == pytest.approx(checkpoint["best_val_loss"], abs=0.005)  # both in bfloat16, if that is fast here
    project.run("train.py", "--init_from=exported", "--dataset=verse", "--block_size=20", "--max_iters=2",
                "--batch_size=4", "--dropout=0.1", "--out_dir=tuned")
    tuned, _, _ = load_model(project.folder / "tuned")
    assert tuned.config.block_size == 20 and tuned.config.bias and tuned.config.dropout == 0.1
    project.run("train.py", "--init_from=resume", "--max_iters=4", "--out_dir=tuned")
    assert "n_layer=2, not 3" in project.fails("train.py", "--init_from=exported", "--dataset=verse", "--n_layer=3")
    assert "block_size 300" in project.fails("train.py", "--init_from=exported", "--dataset=verse", "--block_size=300")
    assert "different tokenizers" in project.fails("train.py", "--init_from=exported", "--dataset=tiny")
    assert "--init_from=exported takes" in project.fails("sample.py", "--out_dir=exported")
    assert "neither a folder" in project.fails("sample.py", "--init_from=no-such/model")
    assert "--export=FOLDER" in project.fails("checkpoint.py")
