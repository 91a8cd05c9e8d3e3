"""What the key-value cache buys in time, what it costs in memory, and how near decoding comes to the memory bandwidth.

    python bench_kv.py                               # the character model and GPT-2 124M, random weights: 8 minutes
    python bench_kv.py --peers --json=kv.json        # also Hugging Face's generate; figures for plot.py --what=kv
    pip install llama-cpp-python gguf                # then --peers also runs llama.cpp, on the same weights
    python bench_kv.py --model=gpt2 --dtype=bfloat16 --compile=True --prompt=64 --batch=1    # one line of the table
    python bench_kv.py --out_dir=out                 # a trained model, or --init_from=gpt2

Greedy text of 100 new tokens. The variants take turns, and medians are shown. The exit code is 1 if the cache fails a
check in float32, not compiled, with a batch of 1: the text must be the same without the cache, and after a prompt of 64
it must be written at least 3 times as fast with it. (With fewer new tokens, this speed is not checked.)
"""
import os

model: str | None = None       # char (10.7M parameters, block 256) or gpt2 (124M, block 1024); None: both
out_dir: str | None = None     # instead: the model of this run
init_from: str | None = None   # instead: GPT-2 weights, by name or folder
dtype: str | None = None       # only float32, bfloat16 or int8
compile: bool | None = None    # only compiled, or only eager; None: both, if a C++ compiler is there
prompt: int | None = None      # only this length of the prompt
batch: int | None = None       # only this batch size
new_tokens: int | None = None  # tokens to generate; None: 100, but at most half the context
repeats = 3                    # of each measurement, except for the slow ones
peers = False                  # also Hugging Face's generate with its cache, in float32, and llama.cpp on a CPU
json: str | None = None        # a file for the figures: a list of records, one a measurement
device: str | None = None      # cpu, cuda, mps, xpu; None: the best there is
seed = 1337                    # of the weights and prompts
# Settings are read before the heavy imports, so that --help and a typo answer at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import importlib.util

from files import UserError, check_can_write, write_atomically

if model not in (None, "char", "gpt2"):
    raise UserError(f"model must be char or gpt2, got {model!r}")
if dtype not in (None, "float32", "bfloat16", "int8"):
    raise UserError(f"dtype must be float32, bfloat16 or int8, got {dtype!r}")
if (new_tokens is not None and new_tokens < 4) or repeats < 1:
    raise UserError(f"new_tokens must be at least 4 and repeats at least 1, got {new_tokens} and {repeats}")
if (prompt is not None and prompt < 1) or (batch is not None and batch < 1):
    raise UserError(f"prompt and batch must be at least 1, got {prompt} and {batch}")
if sum(map(bool, (model, init_from, out_dir))) > 1:
    raise UserError("model, init_from and out_dir each name what to measure; give one of them")
if json:
    check_can_write(json)
if peers and not (importlib.util.find_spec("transformers") and importlib.util.find_spec("safetensors")):
    raise UserError("--peers needs: pip install transformers safetensors")

import copy
import itertools
import json as json_format
import re
import statistics
import sys
import tempfile
import time

import torch

from checkpoint import load_model, load_pretrained, save_pretrained
from device import check_generation_memory, choose_device, missing_compiler, synchronize
from fast import for_inference
from model import GPT, GPTConfig, keep_top_p

device = choose_device(device)
torch.set_float32_matmul_precision("highest")  # no TF32: its rounding could change which token is the most likely
MODELS = {"char": GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False),
          "gpt2": GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)}


def clock():
    """Seconds, after all work on the device is done."""
    synchronize(device)
    return time.perf_counter()


def time_of(function):
    """Seconds that a call takes."""
    start = clock()
    function()
    return clock() - start


# --- one measurement ---

def generate(gpt, idx, use_cache=True):
    """Greedy text, after two tokens to warm up -> seconds until the first new token, seconds for each of the others,
    the new ids (B, n)."""
    if use_cache:  # the first use of weights that were idle is slow
        list(itertools.islice(gpt.stream(idx, new_tokens, temperature=0), 2))
    times, tokens, mark = [], [], clock()
    for token in gpt.stream(idx, new_tokens, temperature=0, use_cache=use_cache):
        now = clock()
        times.append(now - mark)
        tokens.append(token)
        mark = now
    return times[0], times[1:], torch.stack(tokens, dim=1)


def generate_huggingface(hf, idx):
    """The same by transformers: two tokens to warm up, one for the time until the first, then all."""
    how = dict(do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones_like(idx))
    hf.generate(idx, max_new_tokens=2, **how)
    start = clock()
    hf.generate(idx, max_new_tokens=1, **how)
    first = clock()
    ids = hf.generate(idx, max_new_tokens=new_tokens, **how)
    prefill = first - start
    return prefill, [(clock() - first - prefill) / (new_tokens - 1)] * (new_tokens - 1), ids[:, idx.size(1):]


GGUF = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}  # llama.cpp's dtypes; Q8_0 has a scale for 32 weights
GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "h": "blk", "ln_1": "attn_norm",
              "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
              "mlp.c_proj": "ffn_down"}


def load_llama(gpt, kind, length):
    """The model in llama.cpp, with matrices of this dtype and room for a text of `length` tokens."""
    import gguf
    import llama_cpp
    config = gpt.config
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out = gguf.GGUFWriter(os.path.join(folder, "model.gguf"), "gpt2")
        out.add_tokenizer_model("none")
        for add, value in ((out.add_vocab_size, config.vocab_size), (out.add_context_length, config.block_size),
                           (out.add_embedding_length, config.n_embd), (out.add_feed_forward_length, 4 * config.n_embd),
                           (out.add_block_count, config.n_layer), (out.add_head_count, config.n_head),
                           (out.add_layer_norm_eps, 1e-5)):
            add(value)
        for name, t in gpt.state_dict().items():
            if name == "lm_head.weight":  # tied to wte, there too
                continue
            layer, which = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(?:weight|bias)", name).groups()
            theirs = (f"blk.{layer}." if layer else "") + GGUF_NAMES[which] + name[name.rindex("."):]
            of = gguf.GGMLQuantizationType[GGUF[kind] if t.dim() == 2 and which != "wpe" else "F32"]
            out.add_tensor(theirs, gguf.quants.quantize(t.float().numpy(), of), raw_dtype=of)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        threads = torch.get_num_threads()
        return llama_cpp.Llama(os.path.join(folder, "model.gguf"), n_ctx=length, n_threads=threads,
                               n_threads_batch=threads, verbose=False)


def generate_llama(llama, idx):
    """The same by llama.cpp."""
    import llama_cpp
    import numpy as np

    def next_id():
        """The likeliest next token."""
        logits = llama_cpp.llama_get_logits(llama.ctx)
        return int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax())

    llama.reset()
    times, ids, start = [], [], clock()
    llama.eval(idx[0].tolist())
    for _ in range(new_tokens):
        ids.append(next_id())
        times.append(clock())
        llama.eval(ids[-1:])
    return times[0] - start, [b - a for a, b in itertools.pairwise(times)], torch.tensor([ids])


@torch.no_grad()
def logits_along(gpt, ids, length):
    """The logits with which the cache predicts each token of ids (1, T) from position `length` on."""
    cache = gpt.new_cache(1)
    logits = [gpt.prefill(ids[:, :length], cache)]
    for t in range(length, ids.size(1) - 1):
        logits.append(gpt.decode_one_token(ids[:, t], cache))
    return torch.stack(logits, dim=1).float()


@torch.no_grad()
def token_time_at(gpt, position):
    """Seconds to decode one token with `position` tokens in the cache: the median of 10, or of fewer if it is full."""
    n, cache = min(10, gpt.config.block_size - position), gpt.new_cache(1)
    gpt.prefill(torch.zeros(1, position, dtype=torch.long, device=device), cache)
    token = torch.zeros(1, dtype=torch.long, device=device)
    return statistics.median(time_of(lambda: gpt.decode_one_token(token, cache)) for _ in range(n))


def memory_bandwidth():
    """Bytes a second at which this machine reads memory now: the sum of 400 MB, the median of twenty. On a shared
    machine it changes from one second to the next."""
    return numbers.nbytes / statistics.median(time_of(numbers.sum) for _ in range(20))


def weight_bytes(gpt):
    """Bytes of the matrices that every decoded token reads."""
    return sum(m.weight.nbytes for m in gpt.modules() if isinstance(m, torch.nn.Linear))


# --- all measurements of one model ---

def can_compile():
    """Whether there is what compiled decoding needs. Says what is missing; UserError if the settings ask for it."""
    missing = missing_compiler(device)
    if missing and compile:
        raise UserError(f"compiled decoding needs {missing}")
    if missing and compile is None:
        print(f"compiled decoding needs {missing}: it is left out")
    return not missing


def variants(config):
    """Yields (dtype, compiled, use_cache, batch, prompt) for what the settings ask for."""
    lengths = [n for n in (64, 512 if config.block_size >= 1024 else 128) if n + new_tokens <= config.block_size]
    short = lengths[0] if lengths else max(1, config.block_size - new_tokens)
    plan = [("float32", False, use_cache, 1, length) for length in lengths or [short] for use_cache in (True, False)]
    plan += [("float32", False, True, 8, short)] + [(kind, False, True, 1, short) for kind in ("bfloat16", "int8")]
    if can_compile():
        plan += [(kind, True, True, 1, short) for kind in ("float32", "bfloat16", "int8")]
    plan = [(d, c, u, batch or b, prompt or p) for d, c, u, b, p in plan]  # what the settings name, if anything
    for variant in dict.fromkeys(plan):
        if dtype in (None, variant[0]) and compile in (None, variant[1]):
            yield variant


def bench(name, gpt):
    """Measures one model, prints its table, returns its records and whether it passes."""
    config = gpt.config
    plan = list(variants(config))
    longest = max(p for *_, p in plan) + new_tokens
    if longest > config.block_size:
        hint = "; lower --prompt or --new_tokens" if config.block_size > 4 else ", which is too short to measure"
        raise UserError(f"a prompt of {longest - new_tokens} and {new_tokens} new tokens exceed the block_size of "
                        f"{name}, {config.block_size}{hint}")
    print(f"\n{name}: {gpt.num_parameters():,} parameters, block_size {config.block_size}, {device}, "
          f"{torch.get_num_threads()} threads, memory read at {memory_bandwidth() / 1e9:.1f} GB/s")
    gpts = {(d, c): for_inference(copy.deepcopy(gpt), d, c) for d, c in {(d, c) for d, c, *_ in plan}}
    for d, c, use_cache, b, p in plan:
        if use_cache:
            check_generation_memory(device, gpts[d, c], b, p + new_tokens, 0, "lower --batch")
    idx = torch.randint(config.vocab_size, (max(b for *_, b, _ in plan), longest), device=device,
                        generator=torch.Generator(device).manual_seed(seed))
    runs = {v: lambda v=v: generate(gpts[v[:2]], idx[:v[3], :v[4]], v[2]) for v in plan}
    if peers:
        from transformers import GPT2LMHeadModel
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
            save_pretrained(gpt, None, folder)
            hf = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
        for length in dict.fromkeys(p for *_, p in plan):
            runs["huggingface", "float32", length] = lambda length=length: generate_huggingface(hf, idx[:1, :length])
        if device.type != "cpu" or not config.bias:  # llama.cpp's GPT-2 always has biases
            print("llama.cpp only takes part on a CPU and for a model with biases")
        elif not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
            print("llama.cpp takes part after: pip install llama-cpp-python gguf")
        else:
            for kind, length in dict.fromkeys((d, p) for d, _, use_cache, b, p in plan if use_cache and b == 1):
                llama = load_llama(gpt, kind, longest)
                runs["llama.cpp", kind, length] = lambda llama=llama, length=length: generate_llama(
                    llama, idx[:1, :length])

    # Those of one dtype come one after the other, since a shared machine is faster at some times than at others.
    runs = dict(sorted(runs.items(), key=lambda item: list(GGUF).index(item[0][len(item[0]) == 3])))

    torch.compiler.reset()  # drop what was compiled for the model before
    compiled = {}  # seconds of a first text, less those of a later one: the compiler's
    for v in plan:
        if v[1]:
            start = clock()
            list(gpts[v[:2]].stream(idx[:v[3], :v[4]], new_tokens, temperature=0))
            compiled[v] = clock() - start
    results = {v: [] for v in runs}
    for turn in range(repeats):
        for v, run in runs.items():
            if turn == 0 or len(v) == 3 or v[2]:  # without the cache: once
                measured = len(v) == 5 and v[2]
                before = memory_bandwidth() if measured else None
                results[v].append((*run(), (before + memory_bandwidth()) / 2 if measured else None))

    records, total = [], {}
    print(f"\n{'':<12}{'dtype':<10}{'mode':<10}{'cache':<7}{'batch':<7}{'prompt':<8}{'prefill s':<11}{'decode s':<10}"
          f"{'tokens/s':<10}{'of memory':<11}{'compile s':<10}")
    for v, runs_of_v in results.items():
        peer, (kind, is_compiled, use_cache, rows, length) = (
            (v[0], (v[1], False, True, 1, v[2])) if len(v) == 3 else (None, v))
        prefill = statistics.median(r[0] for r in runs_of_v)
        decode = statistics.median(sum(r[1]) for r in runs_of_v)
        total[v] = prefill + decode
        if v in compiled:
            compiled[v] -= total[v]
        speed = rows * (new_tokens - 1) / decode
        read = None if peer or not use_cache else statistics.median(
            weight_bytes(gpts[v[:2]]) * (new_tokens - 1) / sum(r[1]) / r[3] for r in runs_of_v)
        records.append({"model": name, "peer": peer, "dtype": kind, "compile": is_compiled, "use_cache": use_cache,
                        "batch": rows, "prompt": length, "new_tokens": new_tokens, "tokens_per_second": speed,
                        "prefill_seconds": prefill, "decode_seconds": decode, "compile_seconds": compiled.get(v),
                        "share_of_bandwidth": read, "device": str(device)})
        values = [peer or "ours", kind, "compiled" if is_compiled else "eager", "yes" if use_cache else "no", rows,
                  length, f"{prefill:.3f}", f"{decode:.2f}", f"{speed:.1f}", f"{read:.0%}" if read else "",
                  f"{compiled[v]:.0f}" if v in compiled else ""]
        widths = 12, 10, 10, 7, 7, 8, 11, 10, 10, 11, 10
        print("".join(f"{value:<{width}}" for value, width in zip(values, widths, strict=True)), flush=True)

    return records, report(config, gpts, plan, results, total, idx)


def report(config, gpts, plan, results, total, idx):
    """Prints what the table does not show; returns whether text and speed-up are as they must be."""
    good, eager = True, ("float32", False)
    for length in dict.fromkeys(p for *_, p in plan):
        cached, uncached = ((*eager, use_cache, 1, length) for use_cache in (True, False))
        if cached in total and uncached in total:
            same = torch.equal(results[cached][0][2], results[uncached][0][2])
            ratio = total[uncached] / total[cached]
            good &= same and (length != 64 or new_tokens < 100 or ratio >= 3)
            print(f"\nfloat32, eager, prompt {length}: {new_tokens} tokens {ratio:.1f} times as fast with the cache, "
                  f"{'the same text' if same else 'BUT THE TEXT DIFFERS'}")
    if eager in gpts:
        gpt, early = gpts[eager], max(1, min(50, config.block_size // 4))
        late = max(early, config.block_size - 24)
        times = [[token_time_at(gpt, position) for position in (early, late)] for _ in range(repeats)]
        early_time, late_time = (statistics.median(t) for t in zip(*times, strict=True))
        print(f"time for a token at position {early}: {early_time * 1e3:.1f} ms; at {late}: {late_time * 1e3:.1f} ms "
              f"({late_time / early_time:.2f} times)")
        cache = gpt.new_cache(1)
        formula = 2 * config.n_layer * config.block_size * config.n_embd * 4
        print(f"cache for a whole context, float32, batch 1: {cache.nbytes:,} bytes measured, {formula:,} by "
              f"2 * n_layer * B * length * n_embd * bytes")
    # Logits with most of the mass in a few tokens, as a trained model gives.
    logits = 4 * torch.randn(1, config.vocab_size, device=device, generator=torch.Generator(device).manual_seed(seed))
    top_p_time, sort_time = (statistics.median(time_of(f) for _ in range(20))
                             for f in (lambda: keep_top_p(logits, 0.9), lambda: logits.sort(descending=True)))
    print(f"top-p 0.9 of {config.vocab_size} logits: {top_p_time * 1e3:.2f} ms; sorting them: {sort_time * 1e3:.2f} ms")
    reference = plan[0]
    ids = torch.cat((idx[:1, :reference[4]], results[reference][0][2][:1]), dim=1)
    with torch.no_grad():
        exact = gpts[reference[:2]](ids)[0][:, reference[4] - 1:-1].float()
    for key, gpt in sorted(gpts.items()):
        logits = logits_along(gpt, ids, reference[4])
        difference, largest = (logits - exact).abs().max(), exact.abs().max()
        agreeing = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
        print(f"{key[0]}, {'compiled' if key[1] else 'eager'}, with the cache, against a full forward pass in "
              f"{reference[0]}: logits differ by at most {difference:.1e} (the largest is {largest:.1f}), "
              f"{agreeing:.0%} of the next tokens are the same")
    return good


torch.manual_seed(seed)
if init_from or out_dir:
    gpts = {init_from or out_dir: load_pretrained(init_from)[0] if init_from else load_model(out_dir)[0]}
else:
    gpts = {name: GPT(config) for name, config in MODELS.items() if model in (None, name)}
if new_tokens is None:
    new_tokens = min(100, *(max(4, gpt.config.block_size // 2) for gpt in gpts.values()))
numbers, records, good = torch.ones(100_000_000, device=device), [], True
for name, gpt in gpts.items():
    found, passed = bench(name, gpt.to(device).eval())
    records, good = records + found, good and passed
    if json:  # after each model, so that a later one that fails costs nothing
        write_atomically(json, json_format.dumps(records, indent=1).encode())
sys.exit(0 if good else 1)
