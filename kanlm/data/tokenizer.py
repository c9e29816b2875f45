"""How text becomes tokens: bytes, characters, a BPE trained here, or a pretrained one.

All four are `tokenizers` objects in a `PreTrainedTokenizerFast`, so that a trained model
and its tokenizer load with transformers alone. The three made here are lossless on any
text, for bits per byte is only fair if the tokens spell the bytes: a character that the
training text lacks is spelt in UTF-8 bytes, each a token of its own.

Text that contains the end-of-document marker literally is encoded as ordinary text.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kanlm.config import TokenizerSettings
from kanlm.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"

#: Characters of training text that vocabularies are learned from, which bounds memory.
VOCABULARY_CHARACTERS = 2**28


def build_tokenizer(
    settings: TokenizerSettings, texts: Callable[[], Iterator[str]]
) -> PreTrainedTokenizerFast:
    """Build the tokenizer that the settings name.

    Args:
        settings: kind, and what belongs to it.
        texts: gives the training documents, from which alone `characters` and `bpe`
            learn; at most the first `VOCABULARY_CHARACTERS` are read.

    Returns:
        A tokenizer whose `eos_token` ends a document. The same text gives the same tokens.

    Raises:
        UserError: a pretrained tokenizer cannot be had, or names no end of text.
    """
    if settings.kind == "pretrained":
        assert settings.name is not None
        return _load_pretrained(settings.name)
    if settings.kind == "bytes":
        backend = _byte_tokenizer()
    elif settings.kind == "characters":
        backend = _character_tokenizer(_first_characters(texts()))
    else:
        assert settings.vocab_size is not None
        backend = _train_bpe(settings.vocab_size, _first_characters(texts()))
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    return wrap(backend)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a tokenizer that ends documents with `END_OF_DOCUMENT` transformers' interface."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_DOCUMENT,
        bos_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts in parallel as ordinary text, without special tokens.

    Returns:
        For each text its token ids, (tokens,) int64.
    """
    backend = tokenizer.backend_tokenizer
    literal = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = literal
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def decode(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> str:
    """Spell tokens, markers included, as text."""
    return tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def end_of_document(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends a document."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hex sha256 of everything that decides how text is encoded.

    Padding and truncation are left out: a call of the tokenizer changes them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _byte_tokenizer() -> Tokenizer:
    """The 256 bytes, token id = byte."""
    # ByteLevel writes a printable byte as itself and the others, in order, as the letters
    # of its alphabet from code point 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    vocabulary = dict(zip(alphabet, [*printable, *others], strict=True))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _character_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """The characters of the texts in the order of Unicode, then the 256 bytes."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    names = [*sorted(seen), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _train_bpe(vocab_size: int, texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's division into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _first_characters(texts: Iterator[str]) -> Iterator[str]:
    left = VOCABULARY_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _load_pretrained(name: str) -> PreTrainedTokenizerFast:
    # This import brings torch along, which nothing else here needs.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer.name = '{name}': cannot be loaded ({reason}); without network give a "
            "folder that holds tokenizer.json, or tokenizer.kind = bpe"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer.name = '{name}': has no fast version (tokenizer.json)")
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"tokenizer.name = '{name}': has no eos token to end documents with")
    return tokenizer
