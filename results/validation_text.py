"""Which text a score was computed on, and whether two scores are on the same one."""

from __future__ import annotations

from typing import NamedTuple

from results.published.records import FINEWEB_BYTES

OTHER_SIZE_FRAC = 1e-3  # sizes taken from printed scores are rounded, and tokenizers of one text differ by 3e-4


class Text(NamedTuple):
    """Identity of a validation text: the hash of its documents where it is known, and its size."""

    documents_hash: str | None
    num_bytes: float | None

    @property
    def is_fineweb(self) -> bool:
        """The size is that of the challenge's validation set."""
        return self.num_bytes is not None and FINEWEB_BYTES[0] <= self.num_bytes <= FINEWEB_BYTES[1]


def why_not_comparable(a: Text, b: Text) -> str | None:
    """Return why two scores are not on the same validation text, None when they are."""
    if a.documents_hash and b.documents_hash:
        if a.documents_hash == b.documents_hash:
            return None
        return f"other validation text (documents {a.documents_hash[:12]} and {b.documents_hash[:12]})"
    if a.is_fineweb and b.is_fineweb:
        return None
    return f"other validation text, or not known to be the same ({_size(a)} and {_size(b)})"


def relate(a: Text, b: Text) -> str:
    """Return whether two texts are "same", "other", or "not known" to be either."""
    if why_not_comparable(a, b) is None:
        return "same"
    if a.documents_hash and b.documents_hash:
        return "other"
    if a.num_bytes is None or b.num_bytes is None:
        return "not known"
    return "other" if abs(a.num_bytes - b.num_bytes) > OTHER_SIZE_FRAC * max(a.num_bytes, b.num_bytes) else "not known"


def _size(text: Text) -> str:
    if text.documents_hash:
        known = f"documents {text.documents_hash[:12]}"
        return known if text.num_bytes is None else f"{known}, {text.num_bytes / 1e6:.3f} MB"
    return "unknown" if text.num_bytes is None else f"{text.num_bytes / 1e6:.3f} MB"
