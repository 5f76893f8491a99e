"""Memory of large tensors on a CPU, kept for the next ones.

glibc takes blocks of 32 MiB and more from the kernel one by one and gives each back when it is freed, so that every
large tensor of every step is made of new pages, which the kernel has to clear first. With many behaviours a batch that
may take as long as computing: SIM (soft) with 64 floats a feature trained 1.6 times as fast without.
"""

import ctypes
from contextlib import suppress

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_large_blocks() -> None:
    """Take large blocks from the heap and keep it; the process holds the most memory that it ever had.

    Does nothing where the C library has no `mallopt`.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
