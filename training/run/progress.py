"""Progress bars, and what each epoch cost."""

import time

import keras

from ..data.batches import Batches


class Progress(keras.callbacks.Callback):
    """Keras's progress bar with images/s, and for each epoch its learning rate, seconds and waiting for input.

    It stands before the callbacks that write logs, so that they write its entries too: `learning_rate`, `seconds`
    (validation included), `images_per_second` and `waiting`, the share of the training's seconds in which it waited for
    its next batch.

    Args:
        batches: what the training reads.
        epochs: last epoch.
        steps: of an epoch.
    """

    def __init__(self, batches: Batches, epochs: int, steps: int):
        super().__init__()
        self.batches = batches
        self.epochs = epochs
        self.steps = steps
        self.first = 0
        """Step at which this start of the run takes up the epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        print(f"Epoch {epoch + 1}/{self.epochs}", flush=True)
        self.start = time.perf_counter()
        self.waited = self.batches.waited
        self.seconds = 0.0
        self.bar = keras.utils.Progbar(self.steps)

    def on_train_batch_end(self, batch, logs=None):
        self.seconds = time.perf_counter() - self.start
        # The last step is shown with the epoch's end, when the validation is known.
        if batch + 1 < self.steps:
            self._show(batch + 1, logs)

    def on_epoch_end(self, epoch, logs=None):
        waited = self.batches.waited - self.waited
        logs["images_per_second"] = self._speed(self.steps)
        logs["waiting"] = waited / self.seconds if self.seconds else 0.0
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logs["seconds"] = time.perf_counter() - self.start
        shown = {name: value for name, value in logs.items() if name not in ("images_per_second", "seconds")}
        self._show(self.steps, shown)
        if left := (self.epochs - epoch - 1) * logs["seconds"]:
            print(f"{duration(left)} left if no epoch is left out", flush=True)

    def _show(self, done, logs):
        # Keras's logs are means already.
        self.bar.stateful_metrics = {*logs, "images/s"}
        self.bar.update(done, [*logs.items(), ("images/s", self._speed(done))], finalize=done == self.steps)

    def _speed(self, done):
        return (done - self.first) * self.batches.batch_size / self.seconds if self.seconds else 0.0


def duration(seconds: float) -> str:
    """Seconds as people say them: `1 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
