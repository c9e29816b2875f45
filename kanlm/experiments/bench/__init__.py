"""Speed and memory of blocks beside an MLP of equal parameters, and of text on its way to
batches beside the tokenizer alone: `kanlm bench`.

Every figure is a ratio of things measured in turn in one process, because the speed of a
machine changes by the minute. Counts of bytes and FLOPs, which do not, stand beside them.
"""
