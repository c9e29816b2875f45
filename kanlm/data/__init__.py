"""Text → blocks of tokens. Knows neither the model nor training.

1. `sources/` yields documents: the standard library, local files, hub datasets.
2. `splits.py` says which of train, validation and test a document belongs to.
3. `tokenizer.py` turns text into tokens, `batch_encode.py` batches of documents.
4. `preparation.py` tokenises a source once, resumably, into the files of `shards.py`;
   `distributed_prepare.py` does so in parts that are joined, and `datatrove.py` by many machines.
5. `corpus.py` mixes sources into a domain, without near-duplicates (`duplicates.py`).
6. `loader.py` cuts training text into batches; `describe.py` shows all this to a person.
"""
