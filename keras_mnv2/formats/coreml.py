"""A `.pt2` file as a package of Core ML, for Apple's devices; without Keras and this package."""

import sys
from pathlib import Path
from typing import Any


def convert(
    source: Path,
    target: Path,
    input_name: str,
    output_names: list[str],
    precision: str = "float32",
    pixels: bool = False,
    labels: list[str] | None = None,
    detects: bool = False,
    **_: Any,
) -> None:
    """Converts a program with coremltools, which runs on each system; the package runs on Apple's alone.

    Args:
        source: the `.pt2` file, for one image; NCHW if it takes `pixels`.
        target: the `.mlpackage` folder to write.
        input_name: of the image.
        output_names: in their order.
        precision: of what the package computes with, `"float32"` or `"float16"`.
        pixels: whether the input is an image for Core ML: RGB pixels of 0..255, or grey ones.
        labels: names of the classes; the package is then a classifier, which also gives the best one, `classLabel`.
        detects: whether the program decodes boxes behind its convolutions: that stays in float32.
    """
    # coremltools would import TensorFlow, after which PyTorch's CUDA build crashes.
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    import coremltools
    import torch

    program = torch.export.load(source).run_decompositions({})
    (image,) = (node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
    shape = tuple(image.meta["val"].shape)
    if pixels:
        colours = coremltools.colorlayout.RGB if shape[1] == 3 else coremltools.colorlayout.GRAYSCALE
        taken = coremltools.ImageType(name=input_name, shape=shape, color_layout=colours)
    else:
        taken = coremltools.TensorType(name=input_name, shape=shape)
    how = getattr(coremltools.precision, precision.upper())
    if detects and precision == "float16":
        how = coremltools.transform.FP16ComputePrecision(op_selector=_leads_to_convolution)
    model = coremltools.convert(
        program,
        inputs=[taken],
        outputs=[coremltools.TensorType(name=name) for name in output_names],
        classifier_config=None if labels is None else coremltools.ClassifierConfig(labels),
        convert_to="mlprogram",
        compute_precision=how,
        minimum_deployment_target=coremltools.target.iOS16,
        skip_model_load=True,
    )
    _check(model.get_spec(), program, input_name, output_names, pixels, labels)
    model.save(str(target))


def _leads_to_convolution(operation: Any) -> bool:
    """Whether an operation is a convolution, or some way from it leads to one."""
    seen, waiting = set(), [operation]
    while waiting:
        one = waiting.pop()
        if one.op_type == "conv":
            return True
        if id(one) not in seen:
            seen.add(id(one))
            waiting += [child for output in one.outputs for child in output.child_ops]
    return False


def _check(
    spec: Any, program: Any, input_name: str, output_names: list[str], pixels: bool, labels: list[str] | None
) -> None:
    """Reads the package's description back: what was asked for, and each convolution of the program once.

    Raises:
        ValueError: where something else came out.
    """
    (image,) = spec.description.input
    kind = image.type.WhichOneof("Type")
    outputs = {output.name for output in spec.description.output}
    operations = [op.type for block in _blocks(spec) for op in block.operations]
    convolutions = sum(str(node.target) == "aten.conv2d.default" for node in program.graph.nodes)
    wanted = (input_name, "imageType" if pixels else "multiArrayType", convolutions)
    found = (image.name, kind, operations.count("conv"))
    if found != wanted:
        raise ValueError(f"the package must have the input and convolutions {wanted}, got {found}")
    if labels is None and outputs != set(output_names):
        raise ValueError(f"the package must have the outputs {sorted(output_names)}, got {sorted(outputs)}")


def _blocks(spec: Any) -> list[Any]:
    return [block for f in spec.mlProgram.functions.values() for block in f.block_specializations.values()]
