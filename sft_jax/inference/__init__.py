"""Replies of a model: conversations in, the model's next turns out.

Reading order: generate (conversations to replies), sampler (prompts of token
ids through a batch that is refilled), decode (on the device), sampling (the
next token). logprobs scores text that is given; on_policy makes training
batches of replies.
"""
