"""The lock of a run folder: one process at a time has it."""

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
FILE_BYTES = 1024
MOST_ATTEMPTS = 1000
# Where the file system has no locks: of several that write their names at once, the last one has the folder.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who has a folder: process, when it started (in ticks of its machine), and since when, for people.

    The machine is told by its name, by the start of its kernel and by the space in which processes have their ids: two
    containers of one machine share the kernel alone.
    """

    pid: int
    started: str
    host: str
    boot: str
    pid_space: str
    since: str

    def __str__(self):
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made if it is missing, and then removed at the end if nothing was put into it.

    The file `run.lock` in it is locked by the operating system, which frees it however the process ends, and names its
    holder. Its name counts where such a lock may not reach: from other machines, and where the file system has none.

    Raises:
        ValueError: where another process has the folder, or may have it on another machine.
        OSError: where the folder cannot be made or written.
    """
    own, path = this_process(), folder / NAME
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with files.told(path):
        descriptor = _take(path, own)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # While it is locked: the next one may have it the moment that it is not.
            if _holder(path.read_bytes()[:FILE_BYTES]) == own:
                path.unlink()
            for one in made:
                one.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def this_process() -> Holder:
    """This process, from now on."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return Holder(
        os.getpid(),
        started(os.getpid()),
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(space) if space.is_symlink() else "",
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def started(pid: int) -> str:
    """When a process of this machine started, as Linux tells it; empty where that is not known or it has ended."""
    try:
        # The command's name, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def ended(holder: Holder, own: Holder, locked: bool) -> bool:
    """Whether a holder has ended, as far as this process can know.

    Args:
        holder: whom the file names.
        own: this process.
        locked: whether this process has got the operating system's lock.
    """
    if holder.boot != own.boot:
        # Of a machine that has this name, an earlier start.
        return holder.host == own.host
    if locked and own.boot:
        # The same kernel, which keeps the locks of all that runs, whatever the container.
        return True
    if (holder.host, holder.pid_space) != (own.host, own.pid_space):
        return False
    # A later process may have the same id.
    return locked or (bool(own.started) and started(holder.pid) != holder.started)


def _take(path, own):
    """The descriptor that has the lock; None where the file system has no locks."""
    descriptor, locked = _open(path)
    try:
        holder = _holder(_read(descriptor))
        if holder is not None:
            if not ended(holder, own, locked):
                raise ValueError(_refusal(path, holder, f", and if it has ended, remove {path}"))
            print(f"The lock of {path.parent} is taken over from {holder}, which has ended.", flush=True)
        os.lseek(descriptor, 0, os.SEEK_SET)
        # All of one length: none shows the end of an earlier one.
        os.write(descriptor, json.dumps(asdict(own)).encode().ljust(FILE_BYTES))
        if locked:
            return descriptor
        time.sleep(SETTLE_SECONDS)
        holder = _holder(_read(descriptor))
        if holder != own:
            raise ValueError(_refusal(path, holder))
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open(path):
    """A descriptor of the file, and whether it has the operating system's lock."""
    for attempt in itertools.count(1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except (FileExistsError, FileNotFoundError):
            # The one before may just have removed the folder.
            if attempt < MOST_ATTEMPTS:
                continue
            raise
        try:
            if fcntl is None:
                return descriptor, False
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(_read(descriptor))
            os.close(descriptor)
            raise ValueError(_refusal(path, holder)) from None
        except OSError:
            return descriptor, False  # The file system has no locks.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor, True
        # The one before has removed the file that is open here.
        os.close(descriptor)


def _read(descriptor):
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, FILE_BYTES)


def _holder(content):
    """Whom the file names; None where that is nobody, such as after a power cut."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _refusal(path, holder, otherwise=""):
    return (
        f"run_dir must be a folder that no other run is in, but {path.parent} is held by "
        f"{holder or 'another process'}: wait for its end, or give another run_dir{otherwise}."
    )
