# The quickest way to a GPT: tiny Shakespeare, 3 layers, 0.3M parameters. 10 to 20 seconds on two CPU cores, validation
# loss 1.90.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 3, 3, 96, 64
batch_size = 12
max_iters = 540
optimizer = "muon"
learning_rate = 5e-3
muon_learning_rate = 0.03
warmup_iters = 20
beta2 = 0.99
weight_decay = 0.1
final_lr_fraction = 0.0
patience = 4
log_interval = 50
eval_interval = 270
checkpoint_interval = 270
