# Tiny Shakespeare, for a good loss on two CPU cores: 6 layers, 6 heads, 192 wide, 2.7M parameters. Validation loss
# 1.427 after 18 minutes on an AMD EPYC (Zen 5). The run is twelve epochs long, so dropout is there against overfitting.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 6, 6, 192, 128
batch_size = 16
dropout = 0.1
max_iters = 6000
optimizer = "muon"
learning_rate = 5e-3
muon_learning_rate = 0.015
lr_decay = "cosine"
final_lr_fraction = 0.0
warmup_iters = 200
beta2 = 0.99
weight_decay = 0.1
log_interval = 50
eval_interval = 500
checkpoint_interval = 500
