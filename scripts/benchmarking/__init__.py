"""Speed and memory of blocks beside an MLP of equal parameters, and of text on its way to batches.

Every figure is a ratio of things measured in turn in one process, because the speed of a
machine changes by the minute. Counts of bytes and FLOPs, which do not, stand beside them.
`./scripts/bench NAME` runs one, `./scripts/benchmarks` runs all and publishes them.

Adding a benchmark is one module here and one line in `BENCHMARKS`. The module holds

- `Settings`, a dataclass of what can be set, `output_dir` among it;
- `measure(settings, report)`, which returns rows for JSON and reports what it is at;
- `tables(results)` and, if it draws, `figures(results)`, shown when it has run;
- `section(results)`, its part of scripts/benchmarks.md in Markdown.
"""

#: Name of a module here → what it measures, in the order of the published page.
BENCHMARKS = {
    "layers": "forward and backward of a block, and what it keeps for it",
    "step": "a training step of a whole model beside SwiGLU's",
    "decode": "feed-forward blocks over new inputs by batch size, and whole models",
    "peers": "a KAN layer beside those of other repositories",
    "data": "preparing text beside the tokenizer alone, and cutting batches",
    "growth": "exponents by which time grows with tokens, width and grid",
}
