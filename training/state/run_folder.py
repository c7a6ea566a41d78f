"""A run and its folder: new, or that of a run that goes on."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras

from .. import files
from ..config import Config
from ..data.sets import Dataset
from ..parallel.channel import Channel
from ..parallel.engines import Engine
from . import lock
from .checkpoints import Checkpoints, State
from .signals import Stop


@dataclasses.dataclass
class Run:
    """What all parts of a run share.

    Attributes:
        config: the settings, the learning rate and the batch as the workers have scaled them.
        folder: of the run.
        engine: of the backend.
        channel: to the other processes.
        stop: the signals.
        checkpoints: of the run.
        resumed: the checkpoint that the run goes on from, until its phase has taken it.
        done: what the phases that have ended have found, by their names.
        fingerprint: of the data set.
        before: seconds of the run before this start.
    """

    config: Config
    folder: Path
    engine: Engine
    channel: Channel
    stop: Stop
    checkpoints: Checkpoints
    resumed: State | None = None
    done: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
    before: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Of the run until now, over all its starts."""
        return self.before + time.perf_counter() - self.started

    def position(self, phase: str, epoch: int, step: int, **more: Any) -> dict[str, Any]:
        """What a checkpoint says of where it was taken."""
        own = {"backend": keras.backend.backend(), "seconds": self.seconds, "fingerprint": self.fingerprint}
        return {"phase": phase, "epoch": epoch, "step": step, "done": self.done, **own, **more}

    def taken(self, phase: str) -> State | None:
        """The checkpoint that the run goes on from, where it is of this phase; once."""
        if self.resumed is None or self.resumed.position["phase"] != phase:
            return None
        state, self.resumed = self.resumed, None
        return state

    def phase(self, name: str, make: Callable[[], Any]) -> Any:
        """What the phase `name` found: of an earlier start, or of `make` now."""
        if name not in self.done:
            self.done[name] = make()
        return self.done[name]


def look(config: Config) -> dict[str, Any] | None:
    """Checks the run folder before anything is loaded, and gives the metrics of a run that is complete.

    Raises:
        ValueError: where the folder is neither new nor that of the run that shall go on.
    """
    path = config.run_dir
    if path is None or not path.exists() or (path.is_dir() and {part.name for part in path.iterdir()} <= {lock.NAME}):
        return None
    if not config.resume:
        raise ValueError(f"run_dir must be a new or empty folder, or resume given to go on in it, got {str(path)!r}.")
    try:
        before = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"run_dir must be new or the folder of a run to go on, got {str(path)!r}: {error}.") from error
    now = json.loads(_encoded(config))
    differing = [name for name in Config.fixed() if now[name] != before.get(name)]
    if "recipe" in differing:
        raise ValueError(f"{path} holds a run of the recipe {before.get('recipe')!r}, not of {config.recipe!r}.")
    if differing:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing)
        raise ValueError(f"The run in {path} can only go on as it was: {told}.")
    if (path / "metrics.json").is_file():
        return json.loads((path / "metrics.json").read_text())
    return None


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[Config]:
    """Holds the run folder, for this process alone; without `run_dir` a new one under `runs/`.

    Yields:
        The settings, with the folder as their `run_dir`.

    Raises:
        ValueError: where another run holds it, or has made another thing of it since `look`.
        OSError: where it cannot be made.
    """
    path = config.run_dir or _new_folder(config)
    new, config = config.run_dir is None, dataclasses.replace(config, run_dir=path)
    try:
        with lock.held(path):
            if look(config) is not None:
                raise ValueError(f"The run in {path} has just been completed by another process.")
            yield config
    finally:
        if new:
            # What has no content.
            with contextlib.suppress(OSError):
                path.rmdir()
                path.parent.rmdir()


def _new_folder(config):
    first = Path("runs") / f"{config.recipe}-{keras.backend.backend()}-{time.strftime('%Y%m%d-%H%M%S')}"
    for path in itertools.chain([first], (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))):
        # Another run may have started within the same second.
        with files.told(path), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path


def open_run(config: Config, engine: Engine, channel: Channel, stop: Stop, dataset: Dataset) -> Run:
    """Gives the run folder, which the first process holds, its `config.json`, or reads its last checkpoint.

    Raises:
        ValueError: where the data set has changed since, or differs between the workers, or where there are checkpoints
            but none that can be read.
        OSError: where the folder cannot be written.
    """
    fingerprint = dataset.fingerprint()
    for number, part in enumerate(channel.gather(json.dumps(fingerprint).encode())):
        if told := _difference(fingerprint, json.loads(part)):
            raise ValueError(f"dataset must be the same for all workers: for worker {number} {told}.")
    path = config.run_dir or Path("runs")  # Without a name only in the others, which do not write.
    run = Run(config, path, engine, channel, stop, Checkpoints(path / "checkpoints", config.keep_checkpoints))
    run.fingerprint = fingerprint
    found = None
    if channel.main:
        found = run.checkpoints.newest()
        left = run.checkpoints.passed_over()
        if found is None and left:
            file, what = list(left.items())[-1]
            raise ValueError(
                f"There is no checkpoint that the run in {path} can go on from, since {file} is {what}: "
                "go on with what can read it, or give another run_dir to start anew."
            )
        if found is None:
            files.write_json(path / "config.json", dataclasses.asdict(config) | {"run_dir": str(path)})
        elif told := _difference(found.position["fingerprint"], fingerprint):
            raise ValueError(f"dataset must be what it was when the run stopped: {told}.")
    # The first process reads, so that the others need not see its files.
    content = channel.broadcast(found.encode() if found and channel.of > 1 else b"")
    if content and not channel.main:
        found = State.decode(content)
    if found is not None:
        position = found.position
        run.resumed, run.done, run.before = found, position["done"], position["seconds"]
        print(
            f"Goes on after step {position['step']} in epoch {position['epoch'] + 1} of {position['phase']}, "
            f"saved on {position['backend']}.",
            flush=True,
        )
    return run


def _encoded(config):
    return json.dumps(dataclasses.asdict(config), default=str)


def _difference(before, now):
    """What of two fingerprints differs first, in words."""
    for name, value in before.items():
        if now.get(name) != value:
            (old, _), (new, _) = value.split(", "), now[name].split(", ")
            counts = f"there were {old} and are {new}" if old != new else f"they are {new} as before, but others"
            return f"the {name} data differ: {counts}"
    return ""
