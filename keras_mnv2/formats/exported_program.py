"""What is left of an exported program of PyTorch: its constants computed, no checks, one layout inside.

Tracing a Keras model gives a graph that lays out and casts each weight at every call, checks every cast, and goes back
and forth between NHWC and PyTorch's NCHW around each convolution. Here that is done once, so that what reads the graph
(XNNPACK's partitioner, Core ML's converter, ONNX) finds weights that are constants, and convolutions one after another.
"""

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_PERMUTE = torch.ops.aten.permute.default
_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout, torch.ops.aten.to.device)
# Of one number each, though PyTorch has no such mark on them.
_POINTWISE = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)


def simplified(program: torch.export.ExportedProgram) -> GraphModule:
    """The program as a module whose graph has nothing to compute but what depends on the images.

    The next tracing of it gives the program that is saved. `program` stays as it is.
    """
    module: Any = program.module()
    graph: Graph = module.graph
    for node in reversed(graph.nodes):
        # Checks of what tracing has fixed: types, and the sizes of the input, which the next tracing checks anew.
        if node.target is torch.ops.aten._assert_tensor_metadata.default or node.target == "_guards_fn":
            graph.erase_node(node)
    _leave_out_casts(graph)
    _compute_constants(module)
    _sink_permutations(graph)
    graph.eliminate_dead_code()
    graph.lint()
    # With the tensors alone that the graph still reads.
    return GraphModule(module, graph)


def name_output(program: torch.export.ExportedProgram, name: str) -> None:
    """Gives a program's one output its name, in the graph and in the signature."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    (node,) = output.all_input_nodes
    if node.op != "call_function":
        return  # The model gives what it was given, or a constant.
    with program.graph.inserting_before(node):
        named = program.graph.create_node(node.op, node.target, node.args, node.kwargs, name)
    named.meta = node.meta
    node.replace_all_uses_with(named)
    program.graph.erase_node(node)
    program.graph_signature.replace_all_uses(node.name, named.name)
    program.graph_module.recompile()


def _compute_constants(module: GraphModule) -> None:
    """Computes what depends on the weights alone, and keeps it as tensors that lie in the order of their axes."""
    values: dict[Node, torch.Tensor] = {}
    sources: dict[Node, str] = {}
    computed: list[Node] = []
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            found = _attribute(module, node.target)
            if isinstance(found, torch.Tensor):
                values[node], sources[node] = found, node.target.replace(".", "_")
        elif node.op == "call_function" and inputs and any(x in values for x in inputs):
            tags = getattr(node.target, "tags", ())
            if getattr(node.target, "_schema", None) is not None and node.target._schema.is_mutable:
                return  # A weight may be no constant.
            if all(x in values for x in inputs) and torch.Tag.nondeterministic_seeded not in tags:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda x: values[x])
                value = node.target(*args, **kwargs)
                if isinstance(value, torch.Tensor):
                    values[node], sources[node] = value, sources[inputs[0]]
                    computed.append(node)
    for node in computed:
        if all(user in values for user in node.users):
            continue
        # Named after the weight, so that a reader of the graph finds it.
        name = f"{sources[node]}_constant"
        while hasattr(module, name):
            name += "_"
        # XNNPACK's passes (ExecuTorch 1.5) fail on kernels in another order, which would be no faster.
        module.register_buffer(name, values[node].detach().clone(memory_format=torch.contiguous_format))
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = node.meta
        node.replace_all_uses_with(constant)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _leave_out_casts(graph: Graph) -> None:
    """Casts to the type that a tensor has already."""
    for node in list(graph.nodes):
        if node.target in _CASTS:
            x: Any = node.args[0]
            before, after = x.meta["val"], node.meta["val"]
            if (before.dtype, before.device) == (after.dtype, after.device) and not node.kwargs.get("copy"):
                node.replace_all_uses_with(x)
                graph.erase_node(node)


def _sink_permutations(graph: Graph) -> None:
    """Moves permutations behind what does not care for the order of the axes, where one cancels the next.

    Permutations are views, so that operations in place compute the same behind them as before.
    """
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        permuted = [x for x in inputs if x.target is _PERMUTE]
        if node.op != "call_function" or not permuted:
            continue
        axes = _axes(permuted[0])
        if node.target is _PERMUTE:
            composed = [axes[i] for i in _axes(node)]
            if composed == sorted(composed):
                node.replace_all_uses_with(permuted[0].args[0])
            else:
                node.args = (permuted[0].args[0], composed)
        elif node.target is torch.ops.aten.sym_size.int:
            node.args = (permuted[0].args[0], axes[node.args[1]])
        elif node.target is torch.ops.aten.mean.dim:
            _mean_before(node, axes)
        elif _is_pointwise(node) and all(_axes(x) == axes for x in permuted):
            scalars = [x for x in inputs if x not in permuted]
            if all(_rank(x) == 0 for x in scalars):
                _swap(graph, node, permuted, axes)


def _axes(permutation: Node) -> list[int]:
    axes: Any = permutation.args[1]
    return [axis % len(axes) for axis in axes]


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _is_pointwise(node: Node) -> bool:
    return node.target in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _swap(graph: Graph, node: Node, permuted: list[Node], axes: list[int]) -> None:
    """`f(permute(x))` becomes `permute(f(x))`."""
    with graph.inserting_after(node):
        after = graph.call_function(_PERMUTE, (node, axes))
    after.meta = dict(node.meta)
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    for x in permuted:
        node.replace_input_with(x, x.args[0])  # type: ignore[arg-type]
    node.meta = {**node.meta, "val": node.meta["val"].permute([axes.index(i) for i in range(len(axes))])}


def _mean_before(node: Node, axes: list[int]) -> None:
    """A mean that leaves its axes out, over those that they are before the permutation."""
    arguments: Any = node.args
    x, given, *rest = arguments
    dims = [dim % len(axes) for dim in given or ()]
    left = [axis for i, axis in enumerate(axes) if i not in dims]
    if dims and left == sorted(left) and not any(rest) and not node.kwargs.get("keepdim"):
        node.args = (x.args[0], sorted(axes[dim] for dim in dims), *rest)
