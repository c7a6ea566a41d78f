"""ImageNet from scratch as torchvision trained its first checkpoint (references/classification, MobileNetV2).

SGD with momentum 0.9, 0.045 falling by 0.98 each epoch, weight decay 4e-5, 300 epochs; 8 workers of 32 images. The
decay is PyTorch's L2 term of the gradient. Keras's own `weight_decay` is decoupled: after a momentum of 0.9 the same
number would decay ten times less. torchvision decays norms and biases too; here they have none, as in the paper.

Command: `python -m training torchvision --dataset imagenet2012 --data-dir DIR`.
Expected: 71.878 % top-1 (torchvision's IMAGENET1K_V1). Not measured here: ImageNet needs days on a GPU.
"""

from ..config import Config

CONFIG = Config(
    recipe="torchvision",
    dataset="imagenet2012",
    image_size=224,
    epochs=300,
    batch_size=256,
    optimizer="sgd",
    learning_rate=0.045,
    schedule="exponential",
    decay_rate=0.98,
    warmup_epochs=0,
    weight_decay=4e-5,
    crop_area=0.08,
    flip=True,
    held_out=False,
)
