"""What a dataset is made of: the values that decide every token of it."""

from dataclasses import dataclass

from hydra.errors import ConfigError

DEFAULT_CORPUS = "default"
TOKENIZER_KINDS = ("bpe", "bytes", "characters")
BOS_TOKEN = "<|endoftext|>"  # starts every document; predicting it means predicting that the document before it ends
MIN_BPE_VOCAB_SIZE = 257  # 256 bytes and BOS_TOKEN


@dataclass(frozen=True)
class DataSpec:
    """A corpus, how it is cut into tokens, and how much of it is kept for validation.

    Raises ConfigError when a value cannot be right on any machine; what lies on disk is checked by check_corpus.
    """

    corpus: tuple[str, ...]
    """"default" (the Python source of four pinned packages) or paths of utf-8 text files and folders, in order."""

    tokenizer: str
    """"bpe" (byte-level, trained on the train split), "bytes", "characters", or the path of a tokenizer.json."""

    vocab_size: int
    """Most entries of the "bpe" vocabulary, 256 bytes and special token included; other tokenizers bring their own."""

    validation_fraction: float
    """About this part of the corpus' bytes, between 0 and 1, is never trained on."""

    def __post_init__(self) -> None:
        """Check the values."""
        if isinstance(self.corpus, str) or not self.corpus or not all(self.corpus):
            raise ConfigError(
                f"corpus must be a tuple of at least one name or path, but got {self.corpus!r}; "
                f'give ("{DEFAULT_CORPUS}",) or paths of text files and folders'
            )
        if not self.tokenizer:
            raise ConfigError(f"tokenizer must be one of {TOKENIZER_KINDS} or the path of a tokenizer.json, but got ''")
        if self.tokenizer == "bpe" and self.vocab_size < MIN_BPE_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE} (256 bytes and {BOS_TOKEN}), but got "
                f'{self.vocab_size}; give more, or tokenizer="bytes"'
            )
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"validation_fraction must lie between 0 and 1, but got {self.validation_fraction}; 0.02 is usual"
            )
