"""The operations on PyTorch: channels-last views instead of copies, and the fused batch norm.

An NHWC tensor whose axes are permuted to NCHW is PyTorch's channels-last memory format: Keras's own
backend copies here. The figures are of alpha 1.0 at 224x224 in float32 on two x86 cores.
"""

import operator
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, final

import keras
import torch
import torch.nn.functional as F
from torch.nn.modules import module as _modules
from torch.utils._pytree import tree_map_only

from keras_mnv2.ops import default, torch_block
from keras_mnv2.ops.padding import Padding, spatial_padding

# Hidden activations of this size stay in the cache, and below the 32 MB from which glibc maps and unmaps
# the memory of each tensor (20 ms for 100 MB).
CHUNK_BYTES = 20e6


def runs_directly(layer: Any, inputs: Any) -> bool:
    for x in inputs if isinstance(inputs, list) else (inputs,):
        if type(x) is not Later and (type(x) is not torch.Tensor or x.dtype is not torch.float32):
            return False
    return layer.compute_dtype == layer.variable_dtype == "float32"


def is_watched(layer: Any) -> bool:
    """PyTorch has no other way to ask for a module's hooks."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    ) or bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def run_later(call: Any) -> torch.Tensor | None:
    """Without gradients, where a block is run as a whole."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not _has_own_values(call.layer):
        return None
    call.versions = versions(call)
    return Later(call)


def compiled(function: Any, x: torch.Tensor) -> Callable[..., Any]:
    if torch.compiler.is_compiling() or x.is_meta:
        return function  # As part of what is being compiled or exported; for shapes alone.
    if function not in _compiled:
        _compiled[function] = torch.compile(function.__call__)
    return _compiled[function]


_compiled: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()


def is_compiling() -> bool:
    """Keras's functional models call layers in a loop, which `torch.compile` (2.14) takes apart: each layer is compiled
    by itself, for any size once a second layer comes, and Inductor then fails on the strides.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    warnings.warn(
        "The layers of MobileNetV2 that a model calls one by one run uncompiled inside torch.compile. The model that "
        "MobileNetV2 gives is compiled where it is called as a whole.",
        stacklevel=2,
    )
    return function(*args, **kwargs)


def versions(call: Any) -> int:
    """PyTorch counts the changes of each tensor, if not those by `.data`."""
    total = 0
    for tensor in call.layer.cache.tensors:
        total += tensor._version
    for x in call.inputs:
        if type(x) is not Later and not x.is_inference():
            total += x._version
    return total


def take_of_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See `keras_mnv2.ops.default.take_of_rows`. Keras's own (3.15) fixes the batch size in exported programs."""
    return torch.gather(x, 1, indices.long())


def _has_own_values(layer: Any) -> bool:
    """Whether a layer's variables have their own values: inside of `keras.StatelessScope` they may have others."""
    cache = layer.cache
    values = [variable.value for variable in cache.variables]
    if len(cache.tensors) != len(values):
        if not set(map(id, layer.parameters())).issuperset(map(id, values)):
            return False
        cache.tensors = values
    return all(map(operator.is_, values, cache.tensors))


def call_of(x: object) -> Any:
    return x.call if type(x) is Later else None


def numbers(x: Any) -> Any:
    """As when it was called, without gradients."""
    if type(x) is not Later:
        return x
    if not torch.is_grad_enabled():
        return x.call.evaluate()
    with torch.no_grad():
        return x.call.evaluate()


settled = numbers
known = numbers


class Later(torch.Tensor):
    """The output of a layer that runs once somebody looks at it.

    Layers of one operation hand these on, and whoever else reads one gets the numbers: a block is then run as a whole,
    with its batch norms folded, in chunks that stay in the cache. It exists only where no gradient is wanted.

    Args:
        call: of `keras_mnv2.layers.fusing`.
    """

    @staticmethod
    def __new__(cls, call: Any) -> "Later":
        return torch.Tensor._make_wrapper_subclass(cls, call.shape, dtype=torch.float32, device=call.device)

    def __init__(self, call: Any) -> None:
        self.call = call

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's stub is short.
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What reaches it from C++, where nobody has passed by `__torch_function__`.
        return cls.__torch_function__(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return numbers(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return numbers(self).__reduce_ex__(protocol)


def fold(
    kernel: torch.Tensor,
    depthwise: bool,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = gamma * torch.rsqrt(variance + epsilon)
    return kernel * (scale[:, None] if depthwise else scale), torch.addcmul(beta, mean, scale, value=-1)


@final
class Kernel:
    """A kernel of Keras and, once asked for, its copy (out, in / groups, height, width), which convolutions read."""

    __slots__ = ("_axes", "_weight", "kernel")

    def __init__(self, kernel: torch.Tensor, depthwise: bool) -> None:
        self.kernel = kernel
        self._axes = (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)
        self._weight: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """(out, in / groups, height, width)."""
        if self._weight is None:
            weight = self.kernel.permute(self._axes)
            # PyTorch's convolutions read height and width last; they would copy a kernel of other strides slowly. Of
            # 1x1 kernels with gradients they make the copy that they need.
            as_it_lies = tuple(self.kernel.shape[:2]) == (1, 1) and torch.is_grad_enabled()
            self._weight = weight if as_it_lies else weight.contiguous()
        return self._weight


lay_out = Kernel


def moving_average(moving: torch.Tensor, value: torch.Tensor, momentum: float) -> torch.Tensor:
    return torch.lerp(moving, value.to(moving.dtype), 1 - momentum)


def block_in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, hidden_size: int
) -> torch.Tensor:
    # Blocks only: the whole network in chunks would call each layer again for each, at 5 ms a chunk.
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    count = max(1, int(CHUNK_BYTES / (hidden_size * x.element_size())))
    if count >= len(x):
        return function(x)
    chunks = x.split(count)
    first = function(chunks[0])
    y = first.new_empty((len(x), *first.shape[1:]))
    y[:count] = first
    for i, chunk in enumerate(chunks[1:], 1):
        y[i * count : i * count + len(chunk)] = function(chunk)
    return y


# Nothing else tells whether a variable's value is its own to change.
_in_stateless_scope = sys.modules[keras.StatelessScope.__module__].in_stateless_scope


def train_block(units: Any, x: torch.Tensor, shortcut: bool) -> torch.Tensor | None:
    if type(x) is not torch.Tensor or x.device.type not in ("cpu", "cuda") or x.dim() != 4 or not len(x):
        return None
    if not torch.is_grad_enabled() or _is_transformed(x.device.type) or _in_stateless_scope():
        return None
    steps, parameters = [], []
    for unit in units:
        conv, norm = unit.conv, unit.norm
        if not unit.plain_norm or not norm.trainable or unit.data_format != "channels_last":
            return None
        if conv.bias is not None or not isinstance(conv.kernel, keras.Variable):
            return None  # With LoRA the kernel is a tensor that is computed at each step.
        relu6 = unit.activation is not None and unit.activation.is_relu6
        if norm.synchronized or norm.momentum == 1 or (unit.activation is not None and not relu6):
            return None
        *own, moving_mean, moving_variance = _tensors_of(unit)
        if own[0].device != x.device or (x.dtype is not own[0].dtype and conv.compute_dtype == conv.variable_dtype):
            return None
        parameters += own
        settings = unit.depthwise, unit.stride, unit.padding, unit.dilation, relu6, norm.epsilon, norm.momentum
        steps.append(torch_block.Step(*settings, moving_mean, moving_variance))
    return torch_block.train(steps, shortcut, x, parameters)


def _tensors_of(unit: Any) -> list[torch.Tensor]:
    """The tensors of kernel, scale, shift and moving statistics, which last as long as Keras's variables."""
    norm = unit.norm
    variables = (unit.conv.kernel, norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    if unit.tensors is None or not all(map(operator.is_, unit.tensors[0], variables)):
        unit.tensors = variables, [variable.value for variable in variables]
    return unit.tensors[1]


def relu6(x: torch.Tensor) -> torch.Tensor:
    """ReLU6 of a tensor that nobody else holds: without gradients it is overwritten.

    51 MB take 0.9 ms in place and 10 ms out of place. With gradients out of place is the faster one.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return F.hardtanh(x, 0.0, 6.0)
    return F.hardtanh_(x, 0.0, 6.0)


def convolution(
    x: torch.Tensor,
    kernel: torch.Tensor | Kernel,
    bias: torch.Tensor | None = None,
    *,
    depthwise: bool = False,
    stride: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    data_format: str = "channels_last",
) -> torch.Tensor:
    laid = kernel if type(kernel) is Kernel else Kernel(kernel, depthwise)
    kernel = laid.kernel
    pointwise = bias is not None and not depthwise and kernel.shape[0] == kernel.shape[1] == 1 and stride == 1
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if pointwise and eager and len(x) == 1 and data_format == "channels_last":
        assert bias is not None
        # 20 to 30 microseconds less than the convolution, of 50 to 120.
        y = torch.addmm(bias, x.reshape(-1, x.shape[3]), kernel[0, 0])
        return y.view(*x.shape[:3], -1)
    return _convolve(x, laid.weight, bias, stride, padding, dilation, data_format)


def batch_normalization(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    epsilon: float,
    data_format: str = "channels_last",
    synchronized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if synchronized and torch.distributed.is_available() and torch.distributed.is_initialized():
        return _synchronized_batch_normalization(x, gamma, beta, epsilon, data_format)
    channels_last = data_format == "channels_last"
    images = x.permute(0, 3, 1, 2) if channels_last else x
    y, mean, scale = torch.native_batch_norm(images, gamma, beta, None, None, True, 0.0, epsilon)
    # `scale` is 1 / sqrt(variance + epsilon), of the biased variance that Keras keeps.
    mean, scale = (_at_least_float32(statistic.detach()) for statistic in (mean, scale))
    variance = (scale.pow(-2) - epsilon).clamp_(min=0)
    return y.permute(0, 2, 3, 1) if channels_last else y, mean, variance


def normalize(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
    data_format: str = "channels_last",
) -> torch.Tensor:
    if x.dtype is not torch.float32:
        return default.normalize(x, gamma, beta, mean, variance, epsilon, data_format)
    channels_last = data_format == "channels_last"
    images = x.permute(0, 3, 1, 2) if channels_last else x
    y = F.batch_norm(images, mean, variance, gamma, beta, False, 0.0, epsilon)
    return y.permute(0, 2, 3, 1) if channels_last else y


def fake_quantize(x: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return default.fake_quantize(x, minimum, maximum)  # `torch.export` does not know the operation.
    scale = ((maximum - minimum).detach() / 255).clamp_(min=1e-12)
    zero_point = torch.round(-minimum.detach() / scale).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)


def _is_transformed(device_type: str) -> bool:
    """Whether PyTorch transforms what is computed: traces it, or differentiates it forward or by `torch.func`."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled(device_type)
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _synchronized_batch_normalization(
    x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, epsilon: float, data_format: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels_last = data_format == "channels_last"
    images = _at_least_float32(x.permute(0, 3, 1, 2) if channels_last else x)
    gamma, beta = (keras.ops.convert_to_tensor(parameter).to(images.dtype) for parameter in (gamma, beta))
    y, mean, variance = _SynchronizedBatchNorm.apply(images, gamma, beta, epsilon)
    y = y.to(x.dtype)
    return y.permute(0, 2, 3, 1) if channels_last else y, mean, variance


class _SynchronizedBatchNorm(torch.autograd.Function):
    """Batch norm of NCHW images over all processes; torch.nn.SyncBatchNorm runs on GPUs only.

    Gradients are Ioffe and Szegedy's (2015, section 3) with sums over all processes, written as a number of each
    channel for the gradient, one for the input and a constant: two passes over the images instead of autograd's ten.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = x.new_full((x.shape[1],), x.numel() // x.shape[1])
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), pixels])
        torch.distributed.all_reduce(sums)
        total, squares, count = sums
        mean = total / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        ctx.save_for_backward(x, gamma, mean, torch.rsqrt(variance + epsilon), count)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, gamma, mean, scale, count = ctx.saved_tensors
        by_beta = gradient.sum((0, 2, 3))
        by_gamma = ((gradient * x).sum((0, 2, 3)) - mean * by_beta) * scale
        sums = torch.stack([by_beta, by_gamma])
        torch.distributed.all_reduce(sums)
        mean_gradient, mean_product = sums / count
        of_gradient = gamma * scale
        of_x = -of_gradient * scale * mean_product
        constant = -of_gradient * mean_gradient - of_x * mean
        of_gradient, of_x, constant = (factor.view(1, -1, 1, 1) for factor in (of_gradient, of_x, constant))
        return torch.addcmul(constant, x, of_x).addcmul_(gradient, of_gradient), by_gamma, by_beta, None


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: Padding,
    dilation: int,
    data_format: str,
) -> torch.Tensor:
    channels_last = data_format == "channels_last"
    images = x.permute(0, 3, 1, 2) if channels_last else x
    pairs = spatial_padding(padding, weight.shape[2:], images.shape[2:], stride, dilation)
    assert pairs is not None
    (top, bottom), (left, right) = pairs
    if (top, left) != (bottom, right):
        # While a graph for any size is traced, the paddings are symbols.
        static = isinstance(bottom, int) and isinstance(right, int)
        if images.device.type == "cpu" and dilation == 1 and static and top <= bottom and left <= right:
            # TensorFlow pads more at the end. A zero row and column before the kernel do the same without
            # copying the images: at 32x112x112x96, stride 2, 16 ms instead of 62.
            weight = F.pad(weight, (right - left, 0, bottom - top, 0))
            top, left = bottom, right
        else:
            images = F.pad(images, (left, right, top, bottom))
            top = left = 0
    groups = images.shape[1] // weight.shape[1]
    y = F.conv2d(images, weight, bias, stride, (top, left), dilation, groups)
    return y.permute(0, 2, 3, 1) if channels_last else y
