"""Where zeros go around an image before a convolution: two conventions, made explicit."""

from collections.abc import Sequence

Pairs = Sequence[tuple[int, int]]
# "same", "symmetric", "valid", or the zeros themselves.
Padding = str | Pairs
PADDINGS = ("same", "symmetric")


def spatial_padding(
    padding: Padding, kernel_size: Sequence[int], size: Sequence[int | None], stride: int, dilation: int
) -> Pairs | None:
    """Zeros before and after each spatial axis.

    Args:
        padding: `"same"`, TensorFlow's: just enough for ceil(size / stride) outputs, the odd zero at the
            end; `"symmetric"`, PyTorch's: `(k - 1) // 2 * dilation` on both sides; `"valid"`, none; or the zeros
            themselves.
        kernel_size: (height, width).
        size: (height, width) of the image; None where it is not known yet.
        stride: of both sides.
        dilation: of both sides.

    Returns:
        [(top, bottom), (left, right)], or None where `"same"` depends on a size that is not known yet.

    Examples:
        >>> spatial_padding("same", (3, 3), (224, 224), 2, 1), spatial_padding("symmetric", (3, 3), (224, 224), 2, 1)
        ([(0, 1), (0, 1)], [(1, 1), (1, 1)])
    """
    if not isinstance(padding, str):
        return padding
    if padding == "symmetric":
        return [((k - 1) // 2 * dilation,) * 2 for k in kernel_size]
    if padding == "valid":
        return [(0, 0) for _ in kernel_size]
    pairs = []
    for k, n in zip(kernel_size, size, strict=True):
        if stride == 1:
            total = (k - 1) * dilation
        elif n is None:
            return None
        else:
            total = (k - 1) * dilation + 1 - stride + -n % stride
            # Only then can it be below 0; the comparison would cost a graph for any size much to trace.
            if (k - 1) * dilation + 1 < stride:
                total = max(total, 0)
        pairs.append((total // 2, total - total // 2))
    return pairs


def output_size(size: int | None, kernel_size: int, stride: int, dilation: int, padding: Padding) -> int | None:
    """Length of one side after the convolution; None stays None."""
    if size is None:
        return None
    pairs = spatial_padding(padding, (kernel_size,), (size,), stride, dilation)
    assert pairs is not None
    return (size + sum(pairs[0]) - (kernel_size - 1) * dilation - 1) // stride + 1
