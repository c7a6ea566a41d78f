"""ImageNet from scratch as in the paper (Sandler et al. 2018, section 6.1).

RMSprop with decay and momentum 0.9, 0.045 falling by 0.98 each epoch, batches of 96 a worker (the authors had 16 of
them), weight decay 4e-5, and Inception's crops. The decay is an L2 term of the loss, whose gradient RMSprop divides as
every other; norms and biases have none. The paper gives no number of epochs: 300 is torchvision's.

Command: `python -m training paper --dataset imagenet2012 --data-dir DIR`.
Expected: 72.0 % top-1 (paper, Table 4). Not measured here: ImageNet needs days on a GPU.
"""

from ..config import Config

CONFIG = Config(
    recipe="paper",
    dataset="imagenet2012",
    image_size=224,
    epochs=300,
    batch_size=96,
    optimizer="rmsprop",
    learning_rate=0.045,
    schedule="exponential",
    decay_rate=0.98,
    warmup_epochs=0,
    weight_decay=4e-5,
    crop_area=0.08,
    flip=True,
    held_out=False,
)
