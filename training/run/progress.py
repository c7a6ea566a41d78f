"""Progress bars, and what each epoch cost."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import keras

from ..data.batches import Batches
from ..report.summary import duration


@dataclass(eq=False)
class Progress:
    """Keras's progress bar with images/s, and what each epoch cost.

    Args:
        batches: what the training reads.
        model: compiled, for its learning rate.
        epochs: last epoch.
        steps: of an epoch.
    """

    batches: Batches
    model: keras.Model
    epochs: int
    steps: int

    def begin(self, epoch: int, first: int) -> None:
        """An epoch, of which `first` steps are done."""
        self.epoch, self.first = epoch, first
        print(f"Epoch {epoch + 1}/{self.epochs}", flush=True)
        self.start = time.perf_counter()
        self.waited = self.batches.waited
        self.seconds = 0.0
        self.bar = keras.utils.Progbar(self.steps)

    def show(self, done: int, logs: Mapping[str, float]) -> None:
        """The bar after so many steps; the last one is shown with the epoch's end, when the validation is known."""
        self.seconds = time.perf_counter() - self.start
        if done < self.steps:
            self._update(done, logs)

    def end(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Shows the end of an epoch with these logs, and gives what it cost.

        Returns:
            `images_per_second`; `waiting`, the fraction of the training's seconds in which it waited for a batch;
            `learning_rate`; and `seconds`, validation included.
        """
        waited = self.batches.waited - self.waited
        cost = {
            "images_per_second": self._speed(self.steps),
            "waiting": waited / self.seconds if self.seconds else 0.0,
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
            "seconds": time.perf_counter() - self.start,
        }
        self._update(self.steps, {**logs, "waiting": cost["waiting"], "learning_rate": cost["learning_rate"]})
        if left := (self.epochs - self.epoch - 1) * cost["seconds"]:
            print(f"{duration(left)} left if no epoch is left out", flush=True)
        return cost

    def _update(self, done, logs):
        # Keras's logs are means already.
        self.bar.stateful_metrics = {*logs, "images/s"}
        self.bar.update(done, [*logs.items(), ("images/s", self._speed(done))], finalize=done == self.steps)

    def _speed(self, done):
        return (done - self.first) * self.batches.batch_size / self.seconds if self.seconds else 0.0
