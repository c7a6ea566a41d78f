"""How the C library hands out memory: in large pages that are kept."""

import os
import sys

# A training step takes and gives back gigabytes. By default glibc maps each array above 32 MB anew, page by page:
# 222,000 page faults a step of batch 16 on JAX. These settings keep the memory and ask for pages of 2 MB.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"


def use_large_pages(module: str) -> None:
    """Starts `python -m module` again with those settings, since glibc reads them at the start of a process.

    Does nothing where they are set already, or `GLIBC_TUNABLES` has the user's own; other systems than Linux,
    and other C libraries, do without.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
