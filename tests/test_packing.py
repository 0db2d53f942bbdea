"""model/data/packing.py against golden set 6, and its mathematical properties."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data.packing import cu_seqlens_from_bos, pack_row, segment_positions

# golden set 6, produced by the published training script (parameter-golf PR #1536)
CASES = json.loads((Path(__file__).parent / "golden" / "cu_seqlens.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_segments_agree_with_the_published_code(case: dict[str, Any]) -> None:
    packing = cu_seqlens_from_bos(
        np.array(case["bos"]), case["total_len"], max_segment=case["max_doc_len"], bucket=case["bucket"]
    )
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == case["cu_seqlens"]
    assert packing.max_seqlen == case["max_seqlen"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 7))
def test_positions_restart_at_each_bos_and_each_cut(tokens: list[int], max_segment: int) -> None:
    row = np.array(tokens, dtype=np.uint16)
    expected, position = [], -1
    for index, token in enumerate(tokens):
        is_document_start = index == 0 or token == 1
        is_cut = bool(max_segment) and position + 1 == max_segment
        position = 0 if is_document_start or is_cut else position + 1
        expected.append(position)
    packing = pack_row(row, max_segment=max_segment)
    assert segment_positions(packing, row.size).tolist() == expected
    assert packing.max_seqlen == max(expected) + 1


def test_fixed_shapes_change_the_padding_and_nothing_else() -> None:
    row = torch.tensor([[1, 5, 1, 5, 5, 5]])
    free = pack_row(row, max_segment=3, bucket=4)
    fixed = pack_row(row, max_segment=3, max_seqlen=3, bucket=9)
    assert free.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert fixed.cu_seqlens.tolist() == [0, 2, 5, 6, 6, 6, 6, 6, 6]
    assert (free.max_seqlen, fixed.max_seqlen) == (3, 3)
    assert torch.equal(segment_positions(free, 6), segment_positions(fixed, 6))


def test_a_segment_beyond_the_promised_length_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seqlen=2 is below a segment of 4"):
        pack_row(np.array([1, 5, 5, 5]), max_segment=0, max_seqlen=2)


@pytest.mark.parametrize("positions", [[-1], [4], [2, 1], [0, 0]])
def test_positions_outside_the_row_or_out_of_order_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending and inside a row of total_len=4"):
        cu_seqlens_from_bos(np.array(positions), 4, max_segment=0)
