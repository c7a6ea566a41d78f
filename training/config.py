"""What a run is made of."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """A recipe's settings; each is a flag of the command line."""

    recipe: str
    """Name of the recipe, which the run folder is named after."""
    dataset: str
    """Name of the data set."""
    image_size: int
    """Side of the images, in pixels."""
    alpha: float
    """Width multiplier."""
    stem_stride: int
    """Stride of the first convolution, 1 or 2."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step."""
    learning_rate: float
    """Peak of the learning rate, which warms up over one epoch and falls along a cosine to 0."""
    weight_decay: float
    """Decoupled weight decay (AdamW) of kernels; norms and biases have none."""
    label_smoothing: float
    """Share of each label that is spread over all classes."""
    dropout: float
    """Rate before the classifier."""
    shift: float = 0.0
    """Largest random shift and change of scale of a training image, as a fraction of its side."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their random changes."""
    run_dir: Path | None = None
    """Folder for the results, new or empty; by default runs/RECIPE-BACKEND-TIME."""
    saved_model: bool = True
    """Whether to export a SavedModel, which needs TensorFlow on every backend."""
    quantize_epochs: int = 0
    """Epochs of quantisation-aware training after the others; the run folder then gets `model_float32.tflite`,
    `model_int8.tflite` (quantised without it) and `model_int8_aware.tflite`, and their accuracies."""
    quantize_learning_rate: float = 1e-4
    """Peak of the learning rate of those epochs."""
