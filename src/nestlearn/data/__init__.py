"""text → tokens → batches, each a pure function of its input; a batch comes with the state to resume after it."""

from nestlearn.data.batches import Batch, Batches, BatchState, Streams
from nestlearn.data.text import Corpus, Document, Documents, first_bytes, read_texts, separate_texts, standard_library
from nestlearn.data.tokens import Tokenizer, load_tokenizer, tokenize

__all__ = [
    "Batch",
    "BatchState",
    "Batches",
    "Corpus",
    "Document",
    "Documents",
    "Streams",
    "Tokenizer",
    "first_bytes",
    "load_tokenizer",
    "read_texts",
    "separate_texts",
    "standard_library",
    "tokenize",
]
