# Tiny Shakespeare, character by character: the first model to train. Looks at the machine and picks one of two sizes.
import torch

dataset = "shakespeare_char"
optimizer = "muon"
bias = False
patience = 4

if torch.cuda.is_available():  # 10.7M parameters, the size that nanoGPT trains on a GPU
    print("a GPU is there: 6 layers, 6 heads, 384 wide, sequences of 256 characters")
    n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
    batch_size = 64
    dropout = 0.2
    max_iters = 2000
    learning_rate = 1e-3
    weight_decay = 0.1
    eval_interval = 250
else:  # 0.8M parameters, about two minutes on two CPU cores
    print("no GPU is there: 4 layers, 4 heads, 128 wide, sequences of 128 characters")
    n_layer, n_head, n_embd, block_size = 4, 4, 128, 128
    batch_size = 8
    max_iters = 2000
    learning_rate = 3e-3
    weight_decay = 0.0
    log_interval = 50
    eval_interval = 500
    checkpoint_interval = 500
