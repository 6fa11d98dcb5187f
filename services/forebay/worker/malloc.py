"""How the C library's allocator treats the memory of messages."""

from __future__ import annotations

import ctypes

KEPT_MIB = 64
_OWN_MAPPING_MIB = 32  # the most that glibc takes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Lets glibc keep up to KEPT_MIB of freed memory at hand, in the whole process. By itself it
    gives a message of a megabyte back to the system as soon as it has been sent or read, and pays
    for each page of the next one: more than all else that is done to it. False, and no change, with
    a C library that has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mib = 1024 * 1024
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_MIB * mib)
        and mallopt(_M_TRIM_THRESHOLD, KEPT_MIB * mib)
    )
