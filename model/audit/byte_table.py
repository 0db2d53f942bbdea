"""Probe of the byte denominator (R8): the table against SentencePiece's own decoding, per document and per id."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import sentencepiece as spm

from model.audit.records import own_ranges
from model.audit.verdicts import FAIL, PASS, Result
from model.data.tokenizer import ByteTable, Tokenizer, target_bytes
from model.data.validation import ValidationSet

NO_BYTES = 0
# each lead byte of UTF-8 that can occur in text, with continuation bytes that make one valid character of it
LEADS = {
    **dict.fromkeys(range(194, 224), (128,)),
    **{lead: (0xA0, 0x80) if lead == 0xE0 else (0x80, 0x80) for lead in range(0xE0, 0xF0)},
    **{lead: (0x90, 0x80, 0x80) if lead == 0xF0 else (0x80, 0x80, 0x80) for lead in range(0xF0, 0xF5)},
}
NEVER_IN_TEXT = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def probe_bytes(tokenizer: Tokenizer, table: ByteTable, validation: ValidationSet, stated: Sequence[int]) -> Result:
    """Compare the table's bytes with the length of decoded text: every document, the total, and every vocabulary id.

    stated: the bytes that the run's rows give each document.
    """
    processor = spm.SentencePieceProcessor(model_proto=tokenizer.path.read_bytes())
    faults = find_wrong_documents(processor, table, validation, stated)
    faults += [
        f"id {index} ({processor.id_to_piece(index)!r}): {what}" for index, what in find_wrong_ids(processor, table)
    ]
    size = validation.num_documents + int(processor.get_piece_size())
    return Result(
        probe="bytes", rule="R8", result=FAIL if faults else PASS, measured=len(faults), limit=0, unit="disagreements",
        sample_size=size, sample_of="documents and vocabulary ids (all)",
        detail=faults[0] if faults else f"{sum(map(int, stated)):,} bytes in {validation.num_documents} documents",
        not_checked="the raw text before normalization: the denominator is the normalized text by definition; byte "
        "pieces that no UTF-8 text holds",
    )  # fmt: skip


def find_wrong_documents(
    processor: spm.SentencePieceProcessor, table: ByteTable, validation: ValidationSet, stated: Sequence[int]
) -> list[str]:
    """Return a line for each document whose text has another length than the table or the run's row says."""
    counted = np.concatenate(([0], np.cumsum(target_bytes(table, validation.tokens), dtype=np.int64)))
    faults, total = [], 0
    stated_by_document = dict(enumerate(stated))
    ranges = own_ranges(validation)
    index_of = {int(start): index for index, start in enumerate(validation.document_starts)}
    for start, end in ranges:
        index, whole = index_of[start], end
        if index == validation.num_documents - 1:  # the stream may be cut inside a character
            while whole - start > 1 and processor.is_byte(int(validation.tokens[whole - 1])):
                whole -= 1
        length = len(processor.decode(validation.tokens[start:whole].tolist()).encode()) + end - whole
        ours = int(counted[end - 1] - counted[start])
        total += length
        if length != ours or stated_by_document.get(index) != ours:
            said = stated_by_document.get(index)
            faults.append(f"document {index} has {length} bytes of text, the table counts {ours}, its row says {said}")
    if total != sum(map(int, stated)):
        faults.append(f"the documents have {total} bytes of text together, the rows say {sum(map(int, stated))}")
    return faults


def find_wrong_ids(processor: spm.SentencePieceProcessor, table: ByteTable) -> list[tuple[int, str]]:
    """Return (id, fault) for every id whose bytes in the table are not those of the text it decodes to."""
    size = int(processor.get_piece_size())
    specials = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)]
    byte_ids = {int(processor.id_to_piece(i)[3:5], 16): i for i in range(size) if processor.is_byte(i)}
    ordinary = sorted(set(range(size)) - set(specials) - set(byte_ids.values()))
    anchor = next(i for i in ordinary if processor.id_to_piece(i).isascii() and processor.id_to_piece(i).isalnum())

    def count(ids: Sequence[int]) -> int:
        return int(target_bytes(table, np.array(ids, dtype=np.uint16)).sum())

    def length(ids: Sequence[int]) -> int:
        return len(processor.decode(list(ids)).encode())

    faults = _wrong_ordinary(ordinary, anchor, length, count)
    faults += [(i, f"counts {count([anchor, i])} bytes, but stands for no text") for i in specials
               if count([anchor, i]) != NO_BYTES or not table.is_boundary[i]]  # fmt: skip
    for value, index in byte_ids.items():
        if count([anchor, index]) != 1:
            faults.append((index, f"counts {count([anchor, index])} bytes, a byte piece is 1"))
        if value in NEVER_IN_TEXT or 0x80 <= value < 0xC2:
            continue
        pieces = [byte_ids[byte] for byte in (value, *LEADS.get(value, ())) if byte in byte_ids]
        if length([anchor, *pieces]) - length([anchor]) != count([anchor, *pieces]):
            faults.append((index, f"its character has {length([anchor, *pieces]) - length([anchor])} bytes of text"))
    return faults


def _wrong_ordinary(
    ordinary: Sequence[int], anchor: int, length: Callable[[Sequence[int]], int], count: Callable[[Sequence[int]], int]
) -> list[tuple[int, str]]:
    """Check ordinary pieces behind another piece, and (for their leading space) at the start of a document."""
    from model.data.shards import BOS_ID

    faults, before = [], length([anchor])
    for index in ordinary:
        behind, first = length([anchor, index]) - before, length([BOS_ID, index])
        if behind != count([anchor, index]):
            faults.append((index, f"counts {count([anchor, index])} bytes, its text has {behind}"))
        elif first != count([BOS_ID, index]):
            faults.append((index, f"counts {count([BOS_ID, index])} bytes behind a BOS, its text has {first}"))
    return faults
