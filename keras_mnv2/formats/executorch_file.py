"""A `.pt2` file as a `.pte` file of ExecuTorch, whose convolutions XNNPACK runs; without Keras and this package."""

import logging
import warnings
from pathlib import Path
from typing import Any


def convert(source: Path, target: Path, output_names: list[str], **_: Any) -> None:
    """Lowers a program to ExecuTorch's edge dialect, hands what it can to XNNPACK, and writes the rest beside it.

    Args:
        source: the `.pt2` file, for one image.
        target: file to write.
        output_names: in their order; the file keeps them as what its method `output_names` gives.

    Raises:
        ValueError: where XNNPACK does not take a convolution or a product of matrices: ExecuTorch's own kernels take a
            hundred times as long.
    """
    import torch

    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.load(source)
        _keep_axes_of_means(program)
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={"output_names": "\n".join(output_names)}
        )
        left = [str(name) for name in operations(lowered.exported_program())]
        heavy = [name for name in left if any(word in name for word in ("convolution", "mm", "linear"))]
        if heavy:
            raise ValueError(f"XNNPACK takes all but {len(heavy)} convolutions and products, such as {heavy[0]!r}")
        target.write_bytes(lowered.to_executorch().buffer)


def operations(program: Any) -> list[str]:
    """What is called in a lowered program itself, not in what it hands on."""
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [getattr(call, "name", lambda: "")() if hasattr(call, "_schema") else str(call) for call in calls]
    return [name for name in names if "getitem" not in name and "executorch_call_delegate" not in name]


def _keep_axes_of_means(program: Any) -> None:
    """XNNPACK takes a mean over height and width that keeps them with one pixel; a reshape then leaves them out."""
    import torch

    aten, graph = torch.ops.aten, program.graph
    for node in list(graph.nodes):
        if node.target is not aten.mean.dim or node.args[1:] != ([2, 3],) or node.kwargs:
            continue
        with graph.inserting_after(node):
            mean = graph.call_function(aten.mean.dim, (node.args[0], [-1, -2], True))
        mean.meta = {**node.meta, "val": node.meta["val"][:, :, None, None]}
        with graph.inserting_after(mean):
            reshaped = graph.call_function(aten.squeeze.dims, (mean, [-1, -2]))
        reshaped.meta = node.meta
        node.replace_all_uses_with(reshaped)
        graph.erase_node(node)
    program.graph_module.recompile()
