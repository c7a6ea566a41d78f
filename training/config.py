"""What a run is made of."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from .ranges import (
    Amount,
    Batch,
    Count,
    CountOr0,
    Factor,
    Fraction,
    Many,
    MaybeCount,
    MaybeFlag,
    MaybePart,
    MaybePixels,
    MaybePositive,
    MaybeRate,
    MaybeSide,
    Part,
    Positive,
    Rate,
    Scales,
    Seed,
    Side,
    Stages,
    check_all,
)

# Of settings that may change when a run goes on, since nothing that is computed depends on them.
FREE = {"free": True}

# What the history calls the measure that a task is judged by.
MEASURES = {"classification": "accuracy", "segmentation": "mean_iou", "detection": "map"}
# Settings that a task does not have: they must be what they are by default.
FOREIGN = {
    "classification": (
        "weights_backbone", "output_stride", "aspp", "rescale", "box_scales", "reduce_lowest", "iou_crop", "zoom_out",
        "photometric",
    ),
    "segmentation": (
        "data_dir", "stem_stride", "stages", "head_epochs", "unfreeze_from", "label_smoothing", "class_weights",
        "shift", "pad", "crop_area", "trivial_augment", "mixup", "cutmix", "erase", "resize", "quantize_epochs",
        "box_scales", "reduce_lowest", "iou_crop", "zoom_out", "photometric",
    ),
    "detection": (
        "data_dir", "stem_stride", "stages", "dropout", "output_stride", "aspp", "head_epochs", "unfreeze_from",
        "label_smoothing", "class_weights", "shift", "pad", "crop_area", "rescale", "trivial_augment", "mixup",
        "cutmix", "erase", "evaluation_size", "resize", "quantize_epochs",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A recipe's settings; each is a flag of the command line, and is checked when it is made.

    Raises:
        ValueError: on a setting that is not allowed; it names the setting, its value and what is allowed.
    """

    recipe: str
    """Name of the recipe, which the run folder is named after."""
    dataset: str = field(metadata=FREE)
    """`digits`, a folder of class folders (or of `train`, `validation` and `test` folders of them), a `.npz` file with
    `x_train`, `y_train` and so on, or a data set of TFDS; for segmentation `scenes`, or a folder of `images` and
    `masks` folders (or of `train`, `validation` and `test` folders of them); for detection `scenes`, or a folder of
    COCO's layout (`annotations/train.json` beside a folder `train` of images) or Pascal VOC's."""
    image_size: Side
    """Side of the training images, in pixels."""
    epochs: CountOr0
    """Passes over the training images; in a transfer, those of the fine-tuning."""
    batch_size: Batch
    """Images a step, of all workers together; see `scale_with_devices`."""
    learning_rate: Positive
    """Peak of the learning rate."""
    task: Literal["classification", "segmentation", "detection"] = "classification"
    """What the network gives: a class for each image, a class for each pixel (`DeepLabV3`), or boxes (`SSDLite`)."""
    data_dir: Path | None = field(default=None, metadata=FREE)
    """Where TFDS keeps its data sets; by default ~/tensorflow_datasets."""
    held_out: bool = True
    """Whether a tenth of the training images stands in for validation images that are missing; if not, the test images
    are the validation."""
    alpha: MaybePositive = None
    """Width multiplier; by default that of the weights, or 1."""
    stem_stride: Literal[1, 2] = 2
    """Stride of the first convolution, 1 or 2."""
    stages: Stages = None
    """Expansion, channels, repeats and stride of each stage; by default Table 2 of the paper."""
    dropout: Rate = 0.2
    """Rate before the classifier."""
    weights: str | None = None
    """What the model starts with: a published checkpoint's name, or a file; by default random weights."""
    weights_backbone: str | None = None
    """Segmentation and detection without `weights`: what the backbone starts with, a classifier's published checkpoint
    or file."""
    output_stride: Literal[8, 16] = 16
    """Segmentation: pixels of the image per pixel of the head, along one side."""
    aspp: bool = False
    """Segmentation: whether the head has its three dilated branches."""
    box_scales: Scales = None
    """Detection: sizes of the default boxes on each of the six maps and one more, as parts of the image's side; by
    default 0.2 to 0.95, and 1."""
    reduce_lowest: bool = True
    """Detection: whether the first map has three default boxes a place, and not six."""
    head_epochs: CountOr0 = 0
    """Epochs in which only a new classifier is trained, on the features of the frozen network."""
    head_learning_rate: Positive = 0.01
    """Peak of the learning rate of those epochs."""
    cache_features: bool = True
    """Whether those features are computed once, from images that are not augmented."""
    unfreeze_from: str | None = None
    """First block that is trained, such as `block_12`, after the head epochs; those before it stay frozen, and all
    batch norms work as in inference. By default the whole network is trained, batch norms too."""
    optimizer: Literal["adamw", "sgd", "rmsprop"] = "adamw"
    """AdamW, SGD with momentum, or RMSprop with momentum."""
    momentum: Rate = 0.9
    """Of SGD and RMSprop."""
    nesterov: bool = False
    """Whether SGD's momentum is Nesterov's."""
    weight_decay: Amount = 0.0
    """Of kernels alone, norms and biases have none: AdamW's decoupled decay; for SGD and RMSprop the factor L2 of
    L2 / 2 times the squared weights in the loss, as PyTorch's SGD means it."""
    schedule: Literal["cosine", "poly", "exponential", "constant"] = "cosine"
    """How the learning rate goes on from its peak: to 0 by a cosine or a power of what is left, times `decay_rate` each
    epoch, or on the level."""
    power: Positive = 0.9
    """Of the poly schedule."""
    decay_rate: Part = 0.98
    """Factor of the exponential schedule, at the end of each epoch."""
    warmup_epochs: Amount = 1.0
    """Epochs of the linear rise from 0, for each schedule."""
    label_smoothing: Rate = 0.0
    """Fraction of each label that is spread over all classes."""
    class_weights: bool = False
    """Whether images of rare classes count more: by the mean over the number of images of their class."""
    early_stopping: CountOr0 = 0
    """Epochs without a better validation accuracy, mean IoU or mAP, after which training ends, with the best weights;
    0 trains all."""
    ema: MaybeRate = None
    """Fraction of the average of the weights that a step keeps; the average is what is validated, tested and saved."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the activations; variables stay float32."""
    shift: Fraction = 0.0
    """Largest random shift and change of scale of a training image, as a fraction of its side."""
    pad: CountOr0 = 0
    """Zeros around a training image, of which a random window is cut out; 0 does not."""
    crop_area: MaybePart = None
    """Smallest fraction of a photograph that a random crop covers (Inception's is 0.08); by default the centre crop of
    the evaluation."""
    rescale: Factor = 1.0
    """Segmentation: largest factor by which a training image is enlarged or reduced at random, before a random window
    of it is cut out."""
    iou_crop: bool = False
    """Detection: whether training images are cropped as SSD's are, by what a crop overlaps (Liu et al. 2016)."""
    zoom_out: Factor = 1.0
    """Detection: largest factor by which half of the training images lie on a larger grey canvas (SSD's is 4)."""
    photometric: bool = False
    """Detection: whether brightness, contrast, saturation and hue of the training images change at random, as SSD's."""
    flip: bool = False
    """Whether half of the training images are mirrored."""
    trivial_augment: bool = False
    """One random operation on each training image (Mueller and Hutter 2021)."""
    mixup: Amount = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 leaves it out. With `cutmix` each batch gets one of the two."""
    cutmix: Fraction = 0.0
    """Alpha of cutmix (Yun et al. 2019); 0 leaves it out."""
    erase: Fraction = 0.0
    """Fraction of the training images in which a rectangle is erased (Zhong et al. 2020)."""
    evaluation_size: MaybeSide = None
    """Side of the images in validation and test; by default `image_size`. In segmentation larger images are reduced to
    it, and smaller ones have pixels around them that do not count."""
    resize: MaybePixels = None
    """Shorter side of a photograph before the centre crop of the evaluation; by default what the weights were
    evaluated with, or 256 for each 224 pixels."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images and their random changes."""
    workers: Many = field(default=None, metadata=FREE)
    """Threads that read and change images; by default one a core, at most 16."""
    run_dir: Path | None = field(default=None, metadata=FREE)
    """Folder for the results, new or empty, or with `resume` that of the run; by default runs/RECIPE-BACKEND-TIME."""
    resume: bool = field(default=False, metadata=FREE)
    """Whether the run in `run_dir` goes on from its last checkpoint, or starts if there is none."""
    checkpoint_seconds: Amount = field(default=30.0, metadata=FREE)
    """Seconds of training after which a checkpoint is written, at the end of a step."""
    checkpoint_steps: MaybeCount = field(default=None, metadata=FREE)
    """Steps after which a checkpoint is written, besides; by default the seconds alone count."""
    keep_checkpoints: Count = field(default=3, metadata=FREE)
    """Checkpoints that are kept, the newest ones."""
    devices: Many = field(default=None, metadata=FREE)
    """Devices that this process trains on, on JAX and TensorFlow; by default all GPUs or TPU cores, or one CPU. More
    than there are CPUs are made of one."""
    scale_with_devices: Literal["no", "linear", "sqrt"] = field(default="no", metadata=FREE)
    """What more devices change. `no`: nothing, they share a batch. Otherwise each has `batch_size`
    images, and the learning rate is multiplied by their number (Goyal et al. 2017, section 2.1) or by its root, after
    at least five epochs of warm-up (section 2.2)."""
    deterministic: bool = False
    """Whether a GPU computes in a fixed order, which is slower; a CPU does anyhow."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Whether to write TensorBoard's files into `tensorboard/`, which needs TensorFlow on every backend."""
    saved_model: MaybeFlag = field(default=None, metadata=FREE)
    """Whether to export a SavedModel, which needs TensorFlow on every backend; by default where that is installed."""
    steps_per_epoch: MaybeCount = None
    """Steps of an epoch, for a short try; by default all images."""
    quantize_epochs: CountOr0 = 0
    """Epochs of quantisation-aware training after the others; the run folder then gets `model_float32.tflite`,
    `model_int8.tflite` (quantised without it) and `model_int8_aware.tflite`, and their accuracies."""
    quantize_learning_rate: Positive = 1e-4
    """Peak of the learning rate of those epochs."""

    def __post_init__(self):
        check_all(self)
        if self.pad >= self.image_size:
            raise ValueError(f"pad must be less than image_size, {self.image_size}, got {self.pad}.")
        if self.resume and self.run_dir is None:
            raise ValueError("resume needs run_dir, the folder of the run that goes on.")
        if self.weights is not None and self.weights_backbone is not None:
            raise ValueError(
                "weights_backbone must be left out where weights are given, which have one, got "
                f"{self.weights_backbone!r}."
            )
        defaults = {one.name: one.default for one in fields(self)}
        for name in FOREIGN[self.task]:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name} must be left at {defaults[name]!r} for the task {self.task}, which does not have it, got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def measure(self) -> str:
        """What the history calls the measure that the task is judged by."""
        return MEASURES[self.task]

    @classmethod
    def fixed(cls) -> list[str]:
        """The settings that a run that goes on must have as before."""
        return [one.name for one in fields(cls) if not one.metadata.get("free")]
