"""How large a Python dict may get: what bounds by bytes must reckon with before they insert."""

from __future__ import annotations

_SMALL = 256


def most_dict_bytes(num_entries: int) -> int:
    """An upper bound on sys.getsizeof of a dict that never held more than `num_entries`. CPython
    grows to the power of two that is at least three times the entries; each place takes an index
    (4 bytes) and two thirds of an entry (24 bytes)."""
    places = 1 << max(3, (3 * num_entries).bit_length())
    return _SMALL + places * 4 + (places * 2 // 3 + 1) * 24
