"""Which text was scored: its hash says whether two scores may be compared, whoever computed them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from model.data.tokenizer import Tokenizer
from model.data.validation import ValidationSet
from model.distributed import Dist


def describe_validation(tokenizer: Tokenizer, validation: ValidationSet, dist: Dist) -> dict[str, Any]:
    """Return what the validation text is: a hash over its decoded documents, their number and bytes.

    Every rank decodes its share of the documents.
    """
    starts = validation.document_starts
    ends, mine = np.append(starts[1:], validation.tokens.size), np.array_split(np.arange(starts.size), dist.world_size)
    digests, sizes = [], []
    for index in mine[dist.rank]:
        text = tokenizer.decode(validation.tokens[starts[index] : ends[index]]).encode()
        digests.append(hashlib.sha256(text).digest())
        sizes.append([len(text)])
    words = np.frombuffer(bytearray(b"".join(digests)), dtype=np.int64).reshape(-1, 4)  # to be written to by gloo
    digest = hashlib.sha256(dist.gather_rows(words).tobytes())
    num_bytes = int(dist.gather_rows(np.array(sizes, dtype=np.int64).reshape(-1, 1)).sum())
    return {
        "val_documents_hash": digest.hexdigest(),
        "val_documents": validation.num_documents,
        "val_bytes": num_bytes,
        "tokenizer_hash": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }
