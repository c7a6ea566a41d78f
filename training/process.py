"""How the process of a command starts, and how it ends."""

import os
import sys
from typing import NoReturn

# `training` in a checkout, `keras_mnv2.training` where the package is installed.
PACKAGE = __package__
# What a user types.
COMMAND = "python -m training" if PACKAGE == "training" else "keras-mnv2 train"
# The variable in which a launch tells its workers its own command.
LAUNCH = "KERAS_MNV2_LAUNCH"

# A training step takes and gives back gigabytes. By default glibc maps each array above 32 MB anew, page by page:
# 222,000 page faults a step of batch 16 on JAX. These settings keep the memory and ask for pages of 2 MB.
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"


def use_large_pages() -> None:
    """Starts this command again with those settings, since glibc reads them at the start of a process.

    Does nothing where they are set already, or `GLIBC_TUNABLES` has the user's own; other systems than Linux,
    and other C libraries, do without.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def fail(error: object) -> NoReturn:
    """Ends a command with what the error says, in one line."""
    # Keras's errors may have several.
    print(" ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(status_of(error))


def status_of(error: object) -> int:
    """2 where settings or data are at fault, as argparse has it; 1 where the machine is, as when its disk is full."""
    return 1 if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else 2
