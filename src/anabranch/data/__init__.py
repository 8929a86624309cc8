"""Text for language models: tokenizers, corpora, and streams of batches that are the same every time.

data = DataConfig(sequence_length=256).build()      # the standard library as bytes, tokenised once
stream = data.train(seed=0)
batch = stream.next_batch(32)                       # batch.token_BL, batch.target_BL, batch.domain_B
stream.load_state_dict(stream.state_dict())         # resumes in the middle of an epoch, at once

for batch in data.validation(batch_size=32):        # consecutive windows, with the bytes under every target
    ...
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.data.batch import Batch
from anabranch.data.bpe import BpeTokenizer, train_bpe
from anabranch.data.config import Data, DataConfig, corpus_windows, text_windows
from anabranch.data.corpus import Corpus, Document, Domain, Files, Mixture, Stdlib, Table, corpus_at
from anabranch.data.named import Named
from anabranch.data.store import TokenStore
from anabranch.data.stream import Lane, TokenStream
from anabranch.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
)
from anabranch.data.windows import Windows
from anabranch.places import cache_folder

__all__ = [
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "Data",
    "DataConfig",
    "Document",
    "Domain",
    "Files",
    "HuggingFaceTokenizer",
    "Lane",
    "Mixture",
    "Named",
    "Stdlib",
    "StreamDecoder",
    "Table",
    "TokenStore",
    "TokenStream",
    "Tokenizer",
    "Windows",
    "cache_folder",
    "corpus_at",
    "corpus_windows",
    "load_tokenizer",
    "text_windows",
    "train_bpe",
]
