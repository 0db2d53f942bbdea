"""Golden sets 1, 4, 5, 6 and 7: byte tables, Newton-Schulz and Muon, GPTQ and byte shuffle, packing, schedule."""

from __future__ import annotations

import numpy as np

from model.data.packing import cu_seqlens_from_bos
from tests.parity_core import GoldenSet


def check_packing(golden: GoldenSet) -> None:
    """Set 6: where segments start in a row, for each case exactly."""
    wrong = []
    for number, case in enumerate(golden.content[golden.files[0]]["cases"]):
        packing = cu_seqlens_from_bos(
            np.asarray(case["bos"], dtype=np.int64), case["total_len"],
            max_segment=case["max_doc_len"], bucket=case["bucket"],
        )  # fmt: skip
        if packing.cu_seqlens.tolist() != case["cu_seqlens"] or packing.max_seqlen != case["max_seqlen"]:
            wrong.append(number)
    golden.check("cases", is_equal=not wrong)
