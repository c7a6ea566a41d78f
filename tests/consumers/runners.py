"""One exported file in one program: `python runners.py RUNNER FILE IMAGES.npy SCORES.npy`.

It runs in the program's own environment, where nothing of this project is installed. `IMAGES.npy` holds raw pixels,
float32 (images, height, width, 3); they go in one at a time, in the layout of the file. `SCORES.npy` gets the scores
(images, classes). A runner that cannot give scores prints what it saw in one line instead, behind `note: `.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Scores = np.ndarray | None


def each(images: np.ndarray, run: Callable[[np.ndarray], Any]) -> np.ndarray:
    """The scores of images that go in one at a time."""
    return np.stack([np.asarray(run(images[i : i + 1]), "float32").reshape(-1) for i in range(len(images))])


def laid_out(images: np.ndarray, shape: Iterable[Any]) -> np.ndarray:
    """The images as a file takes them: with the channels first where its input has them there."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if list(shape)[1] == 3 else images


def channels_first(file: Path) -> bool:
    return file.name.startswith("nchw")


def onnxruntime(file: Path, images: np.ndarray) -> Scores:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    return each(laid_out(images, image.shape), lambda x: session.run(None, {image.name: x})[0])


def onnxsim(file: Path, images: np.ndarray) -> Scores:
    import onnx
    from onnxsim import simplify

    model, fine = simplify(onnx.load(file))
    assert fine, "onnxsim says that the simplified model differs"
    onnx.save(model, file.with_name(f"{file.stem}-sim.onnx"))
    return onnxruntime(file.with_name(f"{file.stem}-sim.onnx"), images)


def onnxslim(file: Path, images: np.ndarray) -> Scores:
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(file)), file.with_name(f"{file.stem}-slim.onnx"))
    return onnxruntime(file.with_name(f"{file.stem}-slim.onnx"), images)


def onnx2torch(file: Path, images: np.ndarray) -> Scores:
    import torch
    from onnx2torch import convert

    module = convert(str(file)).eval()
    if channels_first(file):
        images = laid_out(images, (1, 3))
    with torch.no_grad():
        return each(images, lambda x: module(torch.from_numpy(x)).numpy())


def onnx2tf(file: Path, images: np.ndarray) -> Scores:
    folder = file.with_name(f"{file.stem}-tf")
    command = [Path(sys.executable).with_name("onnx2tf"), "-i", file, "-o", folder, "-n"]
    # It compares on photographs that it would download, if a file of their name did not lie here.
    np.save(file.with_name("calibration_image_sample_data_20x128x128x3_float32.npy"), np.zeros((20, 128, 128, 3), "f4"))
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=file.parent)
    from ai_edge_litert.interpreter import Interpreter

    return _interpreted(Interpreter, next(folder.glob("*float32.tflite")), images)


def opencv(file: Path, images: np.ndarray) -> Scores:
    import cv2

    net = cv2.dnn.readNet(str(file))

    def run(x: np.ndarray) -> np.ndarray:
        net.setInput(x)
        return net.forward()

    return each(laid_out(images, (1, 3)) if channels_first(file) else images, run)


def tract(file: Path, images: np.ndarray) -> Scores:
    import tract

    model = tract.onnx().load(str(file))
    images = laid_out(images, (1, 3)) if channels_first(file) else images
    model.set_input_fact(0, "1," + ",".join(map(str, images.shape[1:])) + ",f32")
    runnable = model.into_model().into_runnable()
    return each(images, lambda x: runnable.run([x])[0].to_numpy())


def mnn(file: Path, images: np.ndarray) -> Scores:
    import MNN

    converted = file.with_name(f"{file.name}.mnn")
    framework = "TFLITE" if file.suffix == ".tflite" else "ONNX"
    command = ["mnnconvert", "-f", framework, "--modelFile", file, "--MNNModel", converted, "--bizCode", "x"]
    command[0] = str(Path(sys.executable).with_name("mnnconvert"))
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    interpreter = MNN.Interpreter(str(converted))
    session = interpreter.createSession()
    image = interpreter.getSessionInput(session)
    images = laid_out(images, (1, 3)) if channels_first(file) else images
    shape = (1, *images.shape[1:])
    interpreter.resizeTensor(image, shape)
    interpreter.resizeSession(session)
    # The order of an ONNX file's axes is MNN's own, whatever they stand for.
    tflite = file.suffix == ".tflite"
    kind = MNN.Tensor_DimensionType_Tensorflow if tflite else MNN.Tensor_DimensionType_Caffe

    def run(x: np.ndarray) -> np.ndarray:
        image.copyFrom(MNN.Tensor(shape, MNN.Halide_Type_Float, x, kind))
        interpreter.runSession(session)
        output = interpreter.getSessionOutput(session)
        scores = MNN.Tensor(
            output.getShape(),
            MNN.Halide_Type_Float,
            np.zeros(output.getShape(), "float32"),
            MNN.Tensor_DimensionType_Caffe,
        )
        output.copyToHostTensor(scores)
        return np.array(scores.getData())

    return each(images, run)


def ncnn(file: Path, images: np.ndarray) -> Scores:
    import ncnn

    images = laid_out(images, (1, 3))
    shape = str([1, *images.shape[1:]]).replace(" ", "")
    command = [str(Path(sys.executable).with_name("pnnx")), file.name, f"inputshape={shape}", "fp16=0"]
    subprocess.run(command, check=True, capture_output=True, cwd=file.parent)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    net.load_param(str(file.with_name(f"{file.stem}.ncnn.param")))
    net.load_model(str(file.with_name(f"{file.stem}.ncnn.bin")))

    def run(x: np.ndarray) -> np.ndarray:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(np.ascontiguousarray(x[0])).clone())
            _, out = extractor.extract("out0")
            return np.array(out)

    return each(images, run)


def openvino(file: Path, images: np.ndarray) -> Scores:
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shape = compiled.inputs[0].partial_shape
    dims = [dim.get_length() if dim.is_static else None for dim in shape]
    kind, scale, zero_point = np.dtype(compiled.inputs[0].element_type.to_dtype()), 1.0, 0
    if kind != "float32":
        return note(f"input of type {kind}, whose scale OpenVINO does not tell")
    return each(laid_out(images, dims), lambda x: compiled(x / scale + zero_point)[0])


def _interpreted(interpreter_class: Any, file: Path, images: np.ndarray) -> np.ndarray:
    interpreter = interpreter_class(model_path=str(file))
    interpreter.allocate_tensors()
    (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(image["index"], quantized(x, image))
        interpreter.invoke()
        return real(interpreter.get_tensor(output["index"]), output)

    return each(images, run)


def quantized(x: np.ndarray, tensor: Any) -> np.ndarray:
    if np.issubdtype(tensor["dtype"], np.integer):
        scale, zero_point = tensor["quantization"]
        limits = np.iinfo(tensor["dtype"])
        x = np.clip(np.round(x / scale) + zero_point, limits.min, limits.max)
    return x.astype(tensor["dtype"])


def real(y: np.ndarray, tensor: Any) -> np.ndarray:
    if np.issubdtype(tensor["dtype"], np.integer):
        scale, zero_point = tensor["quantization"]
        return (y.astype("float32") - zero_point) * scale
    return y


def tflite_runtime(file: Path, images: np.ndarray) -> Scores:
    from tflite_runtime.interpreter import Interpreter

    return _interpreted(Interpreter, file, images)


def tflite_micro(file: Path, images: np.ndarray) -> Scores:
    from tflite_micro.python.tflite_micro import runtime

    interpreter = runtime.Interpreter.from_file(str(file), arena_size=64 * 2**20)
    image, output = (_micro(d) for d in (interpreter.get_input_details(0), interpreter.get_output_details(0)))

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_input(quantized(x, image), 0)
        interpreter.invoke()
        return real(interpreter.get_output(0), output)

    return each(images, run)


def _micro(details: Any) -> dict[str, Any]:
    parameters = details["quantization_parameters"]
    scales, zeros = parameters["scales"], parameters["zero_points"]
    return {"dtype": details["dtype"], "quantization": (scales[0], zeros[0]) if len(scales) else (1.0, 0)}


def vela(file: Path, images: np.ndarray) -> Scores:
    command = [Path(sys.executable).with_name("vela"), file, "--output-dir", file.parent, "--verbose-cycle-estimate"]
    command += ["--show-cpu-operations", "--accelerator-config", "ethos-u65-256"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    lines = [line.strip() for line in done.stdout.splitlines() if "operators" in line]
    return note("; ".join(lines))


def mediapipe(file: Path, images: np.ndarray) -> Scores:
    import mediapipe as mp
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=str(file)))
    names: list[str] = []
    rows = []
    with vision.ImageClassifier.create_from_options(options) as classifier:
        for image in images.astype("uint8"):
            found = classifier.classify(mp.Image(image_format=mp.ImageFormat.SRGB, data=image))
            categories = sorted(found.classifications[0].categories, key=lambda category: category.index)
            rows.append([category.score for category in categories])
            names = [category.category_name or "" for category in categories]
    print(f"also: names {', '.join(names[:3])}..." if all(names) else "also: no class names")
    return np.array(rows, "float32")


def pytorch(file: Path, images: np.ndarray) -> Scores:
    import torch

    program = torch.export.load(file).module()

    def run(x: np.ndarray) -> np.ndarray:
        y = program(torch.from_numpy(x))
        return (next(iter(y.values())) if isinstance(y, dict) else y).numpy()

    with torch.no_grad():
        # PyTorch takes a batch of one for a constant; two are the fewest that every program takes.
        return each(images, run)


def executorch(file: Path, images: np.ndarray) -> Scores:
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(file)).load_method("forward")
    return each(images, lambda x: method.execute([torch.from_numpy(x)])[0].numpy())


def coreml(file: Path, images: np.ndarray) -> Scores:
    import coremltools

    model = coremltools.models.MLModel(str(file), skip_model_load=True)
    description = model.get_spec().description
    inputs = ", ".join(f"{x.name} ({x.type.WhichOneof('Type')})" for x in description.input)
    outputs = ", ".join(x.name for x in description.output)
    return note(f"read, not run (no Core ML off macOS): input {inputs}, outputs {outputs}")


def note(text: str) -> None:
    """What is said in the place of scores."""
    print(f"note: {text}")


if __name__ == "__main__":
    runner, file, images, scores = sys.argv[1:]
    found = globals()[runner](Path(file), np.load(images))
    if found is not None:
        np.save(scores, found)
