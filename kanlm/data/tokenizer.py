"""How text becomes tokens: bytes, characters, a BPE trained here, or a pretrained one.

All four are `tokenizers` objects in a `PreTrainedTokenizerFast`, so that a trained model
and its tokenizer load with transformers alone. The three made here are lossless on any
text, for bits per byte is only fair if the tokens spell the bytes: a character that the
training text lacks is spelt in UTF-8 bytes, each a token of its own.

Text that contains the end-of-document marker literally is encoded as ordinary text.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kanlm.config import TokenizerSettings
from kanlm.data.network import hub_problem
from kanlm.data.splits import blocks
from kanlm.errors import UserError, first_line

END_OF_DOCUMENT = "<|endoftext|>"

#: Characters of training text that vocabularies are learned from, which bounds memory.
VOCABULARY_CHARACTERS = 2**28

#: Characters that are tokenised at once. A character takes up to about 100 bytes meanwhile.
BATCH_CHARACTERS = 2**20
#: Characters of a text above which it is tokenised in pieces.
PIECE_CHARACTERS = 2**16

_T = TypeVar("_T")


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
        UserError: a pretrained tokenizer cannot be had, or names no end of text, or the text
            does not give as many tokens as are asked for.
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


class Encoder:
    """Turns texts into tokens, on all cores, as ordinary text without special tokens.

    It has a copy of the tokenizer, so that several threads may use one encoder, and padding
    or truncation that a call of the tokenizer switched on do not matter.

    A text longer than `PIECE_CHARACTERS` is tokenised in pieces where that gives the same
    tokens: on several cores, and in memory that does not grow with it. Where the tokenizer
    does not begin a new word at every space, a text is tokenised whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        state = tokenizer.backend_tokenizer.to_str()
        self.backend = Tokenizer.from_str(state)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True
        self.cuts = _keeps_words_in_blocks(json.loads(state))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's token ids, (tokens,) uint32."""
        tokens, lengths = self.encode_end_to_end(texts, [])
        return np.split(tokens, np.cumsum(lengths))[:-1]

    def encode_end_to_end(
        self, texts: Iterable[str], ending: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into one array.

        Args:
            texts: any texts.
            ending: tokens that follow each.

        Returns:
            Tokens of all texts, (tokens,) uint32, and those of each, (texts,) int64.
        """
        # Through a list of Python's integers, as no other way leads out of the library.
        ids, ends = array("I"), array("q", [0])
        for batch in batches(self._pieces(texts), lambda piece: len(piece[0])):
            encodings = self.backend.encode_batch_fast(
                [text for text, _ in batch], add_special_tokens=False
            )
            for (_, last), encoding in zip(batch, encodings, strict=True):
                ids.fromlist(encoding.ids)
                if last:
                    ids.extend(ending)
                    ends.append(len(ids))
        return np.array(ids, dtype=np.uint32), np.diff(np.array(ends, dtype=np.int64))

    def _pieces(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield what is encoded at once, and whether a text ends with it."""
        for text in texts:
            if not self.cuts or len(text) <= PIECE_CHARACTERS:
                yield text, True
                continue
            for block in blocks([text], PIECE_CHARACTERS):
                yield block, False
            yield "", True


def batches(
    items: Iterable[_T], characters: Callable[[_T], int], count: int | None = None
) -> Iterator[list[_T]]:
    """Group texts so that each group is worth tokenising in parallel and fits in memory.

    Args:
        items: texts, or what holds them.
        characters: of an item.
        count: items in a group at most.
    """
    batch: list[_T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if total >= BATCH_CHARACTERS or len(batch) == count:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def decode(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> str:
    """Spell tokens, markers included, as text."""
    return tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def end_of_document(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends a document."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many ids a model needs: one more than the largest, for there may be holes."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hex sha256 of everything that decides how text is encoded.

    Padding and truncation are left out: a call of the tokenizer changes them.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"padding": None, "truncation": None, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _keeps_words_in_blocks(state: dict[str, Any]) -> bool:
    """Whether `blocks` of a text have the tokens of the text.

    So it is where words are GPT-2's, or nothing is ever merged, unless an added token may
    stand across a cut.

    Args:
        state: a tokenizer's JSON.
    """
    words, model = state["pre_tokenizer"] or {}, state["model"]
    plain = state["normalizer"] is None and words.get("type", "ByteLevel") == "ByteLevel"
    starts_alike = not words.get("add_prefix_space") and model["type"] == "BPE"
    apart = words.get("use_regex") or not model.get("merges")
    special = all(token["special"] for token in state["added_tokens"])
    return bool(plain and starts_alike and apart and special)


def _byte_tokenizer() -> Tokenizer:
    """Make a tokenizer of the 256 bytes, token id = byte."""
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
    """Make a tokenizer of the texts' characters in the order of Unicode, then the 256 bytes."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    names = [*sorted(seen), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _train_bpe(vocab_size: int, texts: Iterator[str]) -> Tokenizer:
    """Train byte-level BPE with GPT-2's division into words.

    Raises:
        UserError: the text has too few different pieces for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size() + 1
    if reached != vocab_size:
        raise UserError(
            f"tokenizer.vocab_size = {vocab_size}: the training text gives no more than {reached} "
            f"tokens; set tokenizer.vocab_size={reached} or less, or give more text"
        )
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

    problem = None if Path(name).exists() else hub_problem()
    try:
        # Without network it may have been downloaded before.
        here = Path(name).exists() or problem is not None
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=here
        )
    except (OSError, ValueError) as error:
        reason = first_line(error) if problem is None else f"no network: {problem}"
        raise UserError(
            f"tokenizer.name = '{name}': cannot be loaded ({reason}); without network give a "
            "folder that holds tokenizer.json, or tokenizer.kind = bpe"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer.name = '{name}': has no fast version (tokenizer.json)")
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"tokenizer.name = '{name}': has no eos token to end documents with")
    return tokenizer
