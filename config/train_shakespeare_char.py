# Tiny Shakespeare, character by character: the first model to train. Looks at the machine and picks one of two sizes.
import torch

dataset = "shakespeare_char"
optimizer = "muon"
beta2 = 0.99       # few tokens a step, so the gradient's square is averaged over more steps
weight_decay = 0.1
min_lr = 0.0
patience = 4

if torch.cuda.is_available():
    print("a GPU is there: 6 layers, 6 heads, 384 wide, sequences of 256 characters, 10.7M parameters as in nanoGPT")
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = 64
    dropout = 0.2
    max_iters = 2000
    learning_rate = 1e-3
    eval_interval = 250
else:
    print("no GPU is there: 4 layers, 4 heads, 128 wide, sequences of 128 characters, 0.8M parameters")
    n_layer, n_head, n_embd, block_size = 4, 4, 128, 128
    batch_size = 8
    max_iters = 1900
    learning_rate = 5e-3
    muon_learning_rate = 0.015
    warmup_iters = 100
    log_interval = 50
    eval_interval = 475
    checkpoint_interval = 475
