# Tiny Shakespeare, character by character: the first model to train. With an NVIDIA GPU it is nanoGPT's size, 10.7M
# parameters. Otherwise it has 0.4M, since a small model sees more text in the same time.
import torch

dataset = "shakespeare_char"
optimizer = "muon"
beta2 = 0.99       # a step sees few tokens, so the gradient's square is averaged over more steps
weight_decay = 0.1
final_lr_fraction = 0.0
eval_tokens = 120_000  # all of the validation split
patience = 4

if torch.cuda.is_available():
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = 64
    dropout = 0.2
    max_iters = 1500
    learning_rate = 1e-3
    muon_learning_rate = 0.02
    lr_decay = "cosine"
    log_interval = 50
    eval_interval = 250
else:
    n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
    batch_size = 14
    max_iters = 1750
    learning_rate = 7e-3
    muon_learning_rate = 0.02
    muon_momentum, beta1 = 0.9, 0.7  # a short run: averages over fewer steps
    lr_decay = "linear"
    warmup_iters = 100
    log_interval = 50
    eval_interval = 350
    checkpoint_interval = 350
