"""What is known of the challenge's validation text under each tokenizer, and fingerprints of its training shards: data.

Nats per token over bits per byte is ln 2 times the bytes of a token, so it is one constant for a tokenizer and a text.
The evaluators of one log differ by up to 7e-5 of it, because they do not score exactly the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple


class KnownText(NamedTuple):
    """A tokenizer's canonical validation text: the counts of targets in use, and nats per bits per byte.

    vocab_size: of the tokenizer; origin: where the figures come from.
    """

    name: str
    vocab_size: int
    val_tokens: tuple[int, ...]
    nats_per_bpb: float
    origin: str


KNOWN_TEXTS = (
    KnownText("SP1024, first export", 1024, (63_779_840,), 1.692876, "log of the launch baseline"),
    KnownText("SP1024", 1024, (62_021_632, 62_021_846), 1.688458, "logs of parameter-golf 42 to 1204"),
    KnownText("SP4096", 4096, (45_508_608,), 2.301027, "logs of parameter-golf 1218 and 1334"),
    KnownText("SP8192", 8192, (40_540_160,), 2.583104, "logs of parameter-golf 1394 to 1626"),
    KnownText(
        "SP8192 CaseOps", 8192, (47_851_520, 47_852_288, 47_853_343), 2.188371, "logs of parameter-golf 1736 and 1868"
    ),
)
SAME_COUNT_FRAC = 1e-4  # the count moves with the evaluation's sequence length
SAME_TEXT_FRAC = 0.02  # a part of the text has other bytes per token than the whole
RATIO_LIMIT_FRAC = 3e-4


class Fingerprint(NamedTuple):
    """Step-1 training losses by seed of the CaseOps recipe on one set of shards."""

    shards: str
    has_validation_documents: bool
    losses: dict[int, float]
    origin: str


FINGERPRINTS = (
    Fingerprint("clean CaseOps shards", False, {42: 9.0087, 0: 9.0105, 1234: 9.0017, 314: 8.9988},
                "logs of runs on 80, 150 and 1,499 shards, which agree"),
    Fingerprint("CaseOps shards that hold 40,000 of the 50,000 scored documents", True, {42: 9.0073, 0: 9.0099},
                "logs of runs on shards prepared with 10,000 validation documents (parameter-golf issue 2127)"),
)  # fmt: skip


def text_of_count(val_tokens: int | None) -> KnownText | None:
    """Return the known text with this number of targets, None for any other number."""
    for text in KNOWN_TEXTS:
        if val_tokens and any(abs(val_tokens - count) <= SAME_COUNT_FRAC * count for count in text.val_tokens):
            return text
    return None


def text_of_tokenizer(vocab_size: int | None, nats_per_bpb: float) -> KnownText | None:
    """Return the known text of the tokenizer that a vocabulary and a ratio name, whatever part of it was scored."""
    for text in reversed(KNOWN_TEXTS):
        is_near = abs(nats_per_bpb / text.nats_per_bpb - 1) <= SAME_TEXT_FRAC
        if vocab_size == text.vocab_size and is_near:
            return text
    return None
