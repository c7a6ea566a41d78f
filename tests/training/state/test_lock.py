import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from training.state import lock

# Takes a folder, says so, and holds it until it is told to end.
CHILD = """
import sys
from pathlib import Path
from training.state import lock
if sys.argv[2] == "without":
    lock.fcntl = None
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""
BOTH = pytest.mark.parametrize("how", ["with", "without"])


def child(folder, how="with"):
    """Another process that is ready to take the folder; `without` locks of the file system."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process):
    process.stdin.write("\n")
    process.stdin.flush()


def holding(folder, how="with"):
    """Another process that holds the folder."""
    process = child(folder, how)
    tell(process)
    assert process.stdout.readline() == "held\n"
    return process


def finish(process):
    tell(process)
    process.communicate(timeout=10)
    assert process.returncode == 0


def write(folder, **changes):
    """A lock of a process that has ended, but for the changes."""
    folder.mkdir(exist_ok=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    holder = dataclasses.replace(lock.this_process(), **{"pid": gone.pid, "started": "1", **changes})
    (folder / lock.NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


@pytest.fixture
def unlocked(monkeypatch):
    """A file system that has no locks."""

    def fail(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)


def test_the_folder_is_made_and_removed_if_nothing_comes_into_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    with lock.held(folder):
        content = json.loads((folder / lock.NAME).read_text())
        assert content["pid"] == os.getpid()
        assert content["started"] == lock.started(os.getpid())
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    with lock.held(folder):
        pass
    assert folder.exists()
    with lock.held(folder):
        (folder / "config.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@BOTH
def test_a_second_one_is_refused_in_one_sentence_and_changes_nothing(how, tmp_path, monkeypatch):
    if how == "without":
        monkeypatch.setattr(lock, "fcntl", None)
    first = holding(tmp_path / "run", how)
    before = (tmp_path / "run" / lock.NAME).read_bytes()
    with (
        pytest.raises(ValueError, match=f"run is held by process {first.pid} on ") as caught,
        lock.held(tmp_path / "run"),
    ):
        raise AssertionError("two have it")
    assert "wait for its end, or give another run_dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / lock.NAME).read_bytes() == before
    finish(first)
    assert not (tmp_path / "run").exists()
    with lock.held(tmp_path / "run"):
        pass


@BOTH
@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_of_several_that_start_at_once_exactly_one_has_it(how, stale, tmp_path):
    if stale:
        write(tmp_path / "run")
    processes = [child(tmp_path / "run", how) for _ in range(4)]
    for process in processes:
        tell(process)
    said = []
    for process in processes:
        line = process.stdout.readline()
        said.append(process.stdout.readline() if "is taken over" in line else line)
    assert said.count("held\n") == 1
    assert sum("is held by" in line for line in said) == 3
    for process, line in zip(processes, said, strict=True):
        if line == "held\n":
            assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == process.pid
            tell(process)
        process.communicate(timeout=10)


def test_one_after_the_other_never_share_it(tmp_path):
    """Each ends and removes the file while the next ones try."""
    code = """
import sys, time
from pathlib import Path
from training.state import lock
folder, got, end = Path(sys.argv[1]), 0, time.monotonic() + 1
while time.monotonic() < end:
    try:
        with lock.held(folder):
            inside = folder / "inside"
            inside.touch(exist_ok=False)
            inside.unlink()
            got += 1
    except ValueError:
        pass
print(got)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert sum(int(process.communicate(timeout=20)[0]) for process in processes) > 10
    assert all(process.returncode == 0 for process in processes)


@BOTH
def test_what_a_killed_process_leaves_is_taken_over(how, tmp_path, monkeypatch, capsys):
    if how == "without":
        monkeypatch.setattr(lock, "fcntl", None)
        monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    first = holding(tmp_path / "run", how)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with lock.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()
    told = capsys.readouterr().out
    assert told.startswith(f"The lock of {tmp_path / 'run'} is taken over from process {first.pid} on ")
    assert told.count("\n") == 1


def test_the_lock_of_another_machine_is_refused(tmp_path):
    holder = write(tmp_path / "run", host="node7", boot="another")
    before = (tmp_path / "run" / lock.NAME).read_bytes()
    told = f"held by process {holder.pid} on node7, since "
    with pytest.raises(ValueError, match=told) as caught, lock.held(tmp_path / "run"):
        raise AssertionError("taken")
    assert str(caught.value).endswith(f"and if it has ended, remove {tmp_path / 'run' / lock.NAME}.")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / lock.NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "locked", "expected"),
    [
        ({}, True, True),
        ({}, False, True),
        ({"pid": os.getpid()}, False, True),  # The id is used again.
        ({"pid": os.getpid(), "started": lock.started(os.getpid())}, False, False),
        ({"boot": "earlier"}, True, True),
        ({"boot": "earlier"}, False, True),
        ({"boot": "its own", "host": "node7"}, True, False),
        ({"boot": "its own", "host": "node7"}, False, False),
        # Two containers of one machine: the kernel knows them both, but here only one's processes are seen.
        ({"host": "container", "pid_space": "pid:[1]"}, True, True),
        ({"host": "container", "pid_space": "pid:[1]"}, False, False),
        ({"pid_space": "pid:[1]"}, False, False),
    ],
)
def test_who_has_ended(changes, locked, expected):
    own = dataclasses.replace(lock.this_process(), boot="this", started="5")
    holder = dataclasses.replace(own, **{"pid": 2**22 + 1, "started": "1", **changes})
    assert lock.ended(holder, own, locked) is expected


def test_where_processes_cannot_be_seen_none_is_taken_for_ended():
    own = dataclasses.replace(lock.this_process(), boot="", started="", pid_space="")
    assert not lock.ended(dataclasses.replace(own, pid=2**22 + 1), own, False)
    assert lock.ended(dataclasses.replace(own, pid=2**22 + 1), own, True)
    assert not lock.ended(dataclasses.replace(own, host="node7"), own, True)


def test_without_locks_a_living_process_is_not_taken_for_an_earlier_one(tmp_path, unlocked):
    write(tmp_path / "run", pid=os.getpid(), started=lock.started(os.getpid()), since="then")
    with pytest.raises(ValueError, match="since then"), lock.held(tmp_path / "run"):
        raise AssertionError("taken")
    write(tmp_path / "run", pid=os.getpid(), started="1")
    with lock.held(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff" * 5000])
def test_a_file_that_names_nobody_is_no_lock(content, tmp_path):
    (tmp_path / lock.NAME).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_bytes()[: lock.FILE_BYTES])["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("all my work")
    (tmp_path / lock.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"run\.lock could not be written"), lock.held(tmp_path):
        raise AssertionError("taken")
    assert (tmp_path / "mine").read_text() == "all my work"


def test_the_lock_of_a_folder_that_was_moved_stays_with_it(tmp_path):
    with lock.held(tmp_path / "run"):
        os.rename(tmp_path / "run", tmp_path / "moved")
        write(tmp_path / "run", since="of another run")
    assert "of another run" in (tmp_path / "run" / lock.NAME).read_text()
    with lock.held(tmp_path / "moved"):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path, why in (("file/run", "Not a directory"), ("file", "File exists"), ("nowhere", "File exists")):
        with pytest.raises(OSError, match=f"could not be written: {why}"), lock.held(tmp_path / path):
            raise AssertionError("taken")


def test_a_process_is_told_by_when_it_started():
    assert lock.started(os.getpid()).isdigit()
    assert lock.started(2**22 + 1) == ""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.05)
    assert int(lock.started(other.pid)) >= int(lock.started(os.getpid()))
    other.kill()
    other.wait()
