# The loss of GPT-2 124M as published, without any training: python train.py config/eval_gpt2.py
# With --init_from=gpt2-medium, gpt2-large or gpt2-xl: that of its larger siblings.
init_from = "gpt2"
dataset = "shakespeare"
eval_only = True
batch_size = 4
