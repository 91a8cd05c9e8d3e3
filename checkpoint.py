"""Saving and loading: a run's checkpoints, and GPT-2 weights in Hugging Face's format.

    python checkpoint.py --out_dir=out --export=FOLDER    # the run's best model as a Hugging Face folder

A checkpoint is one file, written by torch.save and read with weights_only=True, so that it can hold tensors and plain
values but no code. `out/latest.pt` is for resuming, `out/best.pt` (the lowest validation loss) for sampling.
"""
import json
import os
import sys
from pathlib import Path

import torch

from model import GPT, GPTConfig
from tokenizer import BPETokenizer, fetch_vocabulary, load_tokenizer, write_atomically

out_dir = "out"              # the run to export
export: str | None = None    # the folder to write: config.json, model.safetensors and, for byte-pair models, the tokenizer

FORMAT_VERSION = 1


# --- a run's checkpoints ---

def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors and plain values to `path`. The file appears whole or not at all: it is written under
    another name, synced to the disk, then renamed. ValueError if a tensor is not finite, and nothing is written."""
    _check_finite(checkpoint)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint | {"format_version": FORMAT_VERSION}, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _check_finite(value, name="checkpoint"):
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite, so nothing was saved")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_finite(item, name)


def load_checkpoint(path):
    """Path -> the dict, on the CPU. ValueError if the file is not such a checkpoint, FileNotFoundError without one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # torch.load raises many kinds for a file that is cut short, or not its own, or unsafe
        raise ValueError(f"{path} cannot be read: it is damaged or not a checkpoint; delete it or restore a copy") from None
    version = checkpoint.get("format_version") if isinstance(checkpoint, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has checkpoint format {version}, this program reads {FORMAT_VERSION}; train anew")
    return checkpoint


def load_model(out_dir):
    """A run's folder -> model (in eval mode, on the CPU), tokenizer, checkpoint: of best.pt, else latest.pt.
    FileNotFoundError if there is neither, ValueError if it cannot be read."""
    path = next((p for p in (Path(out_dir, "best.pt"), Path(out_dir, "latest.pt")) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no checkpoint in {out_dir}: train one first, "
                                "for example with python train.py config/train_shakespeare_char.py")
    checkpoint = load_checkpoint(path)
    missing = {"model", "model_args", "tokenizer"} - checkpoint.keys()
    if missing:
        raise ValueError(f"{path} lacks {min(missing)!r}: it is not a checkpoint of train.py")
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), load_tokenizer(checkpoint["tokenizer"]), checkpoint


def _first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# --- GPT-2 weights in Hugging Face's format ---

# OpenAI wrote these layers as "Conv1D", which keeps a linear layer's matrix transposed, (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_pretrained(name_or_folder):
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, the name of any GPT-2 on Hugging Face, or a folder with config.json and
    the weights (safetensors, sharded too, or pytorch_model.bin) -> model in eval mode, tokenizer (None if the folder
    has none, or not GPT-2's). ValueError if it cannot be had, is not a GPT-2, or differs from the architecture here."""
    folder = Path(name_or_folder)
    is_name = not folder.is_dir()
    if is_name:
        folder = _download(str(name_or_folder))
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{name_or_folder} has no readable config.json ({_first_line(e)})") from None
    config = _read_config(given, name_or_folder)
    tensors = _read_tensors(folder, name_or_folder)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask, which older files carry
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors.get("wte.weight")
    elif not torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
        raise ValueError(f"{name_or_folder} has a head that is not tied to wte, which this model does not support")
    model = GPT(config)
    if all(t is not None and t.dtype == torch.float64 for t in tensors.values()):
        model = model.double()
    own = model.state_dict()
    for name in [*own, *(tensors.keys() - own.keys())]:
        if name not in own or tensors.get(name) is None:
            raise ValueError(f"{name_or_folder}: the tensor {name} is {'missing' if name in own else 'not part of a GPT-2'}")
        t = tensors[name].T if name.endswith(TRANSPOSED) else tensors[name]
        if t.shape != own[name].shape:
            raise ValueError(f"{name_or_folder}: {name} has shape {tuple(tensors[name].shape)}, which does not fit config.json")
        own[name].copy_(t)
    return model.eval(), _pretrained_tokenizer(folder, is_name, config.vocab_size)


def _download(name):
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name} is not a folder, and loading it by name needs: pip install huggingface_hub") from None
    patterns = ["config.json", "vocab.json", "model*.safetensors*", "pytorch_model*.bin*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns[:3]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the hub raises its own and the network's kinds, for a wrong name as for no connection
        raise ValueError(f"{name} is neither a folder here nor a repository that can be reached on Hugging Face "
                         f"({type(e).__name__}: {_first_line(e)})") from None
    return folder


def _read_config(given, name):
    """Hugging Face's config.json -> GPTConfig. ValueError for what our GPT does not do."""
    n_embd = given.get("n_embd", 768)
    required = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
                "n_inner": (4 * n_embd, None), "tie_word_embeddings": (True, None), "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None),
                "layer_norm_epsilon": (1e-5, None)}
    for key, allowed in required.items():
        if given.get(key) not in allowed:
            raise ValueError(f"{name}: config.json has {key} {given.get(key)!r}, only {allowed[0]!r} is supported")
    return GPTConfig(block_size=given.get("n_positions", 1024), vocab_size=given.get("vocab_size", 50257),
                     n_layer=given.get("n_layer", 12), n_head=given.get("n_head", 12), n_embd=n_embd, bias=True)


def _read_tensors(folder, name):
    """All tensors of a folder, whether in one file or in several."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{name} holds neither model.safetensors nor pytorch_model.bin")
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".bin":
                tensors |= torch.load(file, map_location="cpu", weights_only=True)
            else:
                from safetensors.torch import load_file
                tensors |= load_file(file)
        except ImportError:
            raise ValueError(f"reading {file} needs: pip install safetensors") from None
        except Exception as e:  # either library raises many kinds for a file that is cut short or not its own
            raise ValueError(f"{file} cannot be read ({_first_line(e)}); fetch it again") from None
    return tensors


def _pretrained_tokenizer(folder, is_name, vocab_size):
    if vocab_size != 50257:
        return None
    if (folder / "vocab.json").is_file():
        own = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        if own != json.loads(fetch_vocabulary()["encoder.json"].read_text(encoding="utf-8")):
            return None
    elif not is_name:
        return None
    return BPETokenizer()


def save_pretrained(model, tokenizer, folder):
    """Writes a folder that transformers' AutoModelForCausalLM.from_pretrained loads, and with a BPETokenizer its
    AutoTokenizer too. A model without biases gets biases of zero, which compute the same. ValueError if safetensors
    is not installed."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError("writing the weights needs: pip install safetensors") from None
    c, eot = model.config, getattr(tokenizer, "eot", None)
    tied = model.lm_head.weight is model.wte.weight
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), torch.Tensor) or (name == "lm_head" and tied):
            continue
        prefix = name if name == "lm_head" else f"transformer.{name}"
        weight = module.weight.detach().cpu()
        tensors[f"{prefix}.weight"] = (weight.T if f"{name}.weight".endswith(TRANSPOSED) else weight).contiguous()
        if name not in ("wte", "wpe", "lm_head"):
            size = weight.size(0)
            tensors[f"{prefix}.bias"] = torch.zeros(size, dtype=weight.dtype) if module.bias is None else module.bias.detach().cpu()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
              "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
              "n_head": c.n_head, "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": tied,
              "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
              "bos_token_id": eot, "eos_token_id": eot, "dtype": str(model.wte.weight.dtype).removeprefix("torch.")}
    files = {"config.json": json.dumps(config, indent=1).encode(), "model.safetensors": save(tensors, {"format": "pt"})}
    if isinstance(tokenizer, BPETokenizer):
        paths = fetch_vocabulary()
        special = {k: "<|endoftext|>" for k in ("bos_token", "eos_token", "unk_token")}
        files |= {"vocab.json": paths["encoder.json"].read_bytes(), "merges.txt": paths["vocab.bpe"].read_bytes(),
                  "tokenizer_config.json": json.dumps(
                      {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size} | special).encode()}
    for name, data in files.items():
        write_atomically(Path(folder, name), data)


if __name__ == "__main__":
    exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))
    if export is None:
        sys.exit("error: nothing to do; name the folder to write with --export=FOLDER")
    try:
        model, tokenizer, _ = load_model(out_dir)
        save_pretrained(model, tokenizer, export)
    except (ValueError, RuntimeError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"wrote {export}" + ("" if isinstance(tokenizer, BPETokenizer) else ", without a tokenizer: a character "
                               "tokenizer has no such format; the checkpoint keeps it"))
