"""How the C library hands out memory: large blocks kept for the next use instead of given back and faulted in anew."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, from now on; whether the C library can.

    glibc takes large blocks (always those above 32 MiB) afresh from the kernel, which hands them out page by page, zeroed, and
    gives the top of its heap back. A model's intermediate results on the CPU are such blocks: measured over MACE (32x0e, 128
    atoms, float64), the gradient of a force loss takes 0.7 of the time without all that, with the same peak memory. Results do
    not change. Meant for processes that do little else: it holds for everything in them.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    wishes = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all([mallopt(name, value) == 1 for name, value in wishes])
