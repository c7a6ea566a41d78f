"""What reads exported files: each program with its version, what it needs, and the files that it is given."""

from dataclasses import dataclass

# Arguments of `keras_mnv2.export` for each file that a consumer may be given.
FILES: dict[str, tuple[str, dict[str, object]]] = {
    "ONNX": ("nhwc.onnx", {"format": "onnx"}),
    "ONNX, NCHW": ("nchw.onnx", {"format": "onnx", "layout": "NCHW"}),
    "ONNX float16": ("float16.onnx", {"format": "onnx", "precision": "float16"}),
    "ONNX int8": ("int8.onnx", {"format": "onnx", "precision": "int8"}),
    "LiteRT": ("float32.tflite", {"format": "litert"}),
    "LiteRT float16": ("float16.tflite", {"format": "litert", "precision": "float16"}),
    "LiteRT dynamic int8": ("dynamic.tflite", {"format": "litert", "precision": "dynamic_int8"}),
    "LiteRT int8": ("int8.tflite", {"format": "litert", "precision": "int8"}),
    "LiteRT uint8": ("uint8.tflite", {"format": "litert", "precision": "int8", "io_dtype": "uint8"}),
    ".pt2": ("program.pt2", {"format": "torch"}),
    "ExecuTorch": ("xnnpack.pte", {"format": "executorch"}),
    "Core ML": ("ml.mlpackage", {"format": "coreml"}),
}
ONNX = ("ONNX", "ONNX, NCHW", "ONNX float16", "ONNX int8")
LITERT = ("LiteRT", "LiteRT float16", "LiteRT dynamic int8", "LiteRT int8", "LiteRT uint8")
OLD_NUMPY = "numpy<2"


@dataclass(frozen=True)
class Consumer:
    """A program, at one version.

    Attributes:
        name: as its makers write it.
        version: the one that is installed.
        reads: the files that it is given, names of `FILES`.
        runner: the function of `runners.py` that runs it.
        packages: what pip installs.
        npm: what npm installs, for one that runs in Node.js.
        large: whether its environment needs gigabytes.
    """

    name: str
    version: str
    reads: tuple[str, ...]
    runner: str
    packages: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    large: bool = False


def _onnxruntime(version: str, *more: str) -> Consumer:
    return Consumer("ONNX Runtime", version, ONNX, "onnxruntime", (f"onnxruntime=={version}", *more))


def _opencv(version: str) -> Consumer:
    # The number of the wheel follows the version.
    packages = (f"opencv-python-headless=={version}.*",)
    return Consumer("OpenCV", version, ("ONNX", "ONNX, NCHW", "ONNX int8", "LiteRT"), "opencv", packages)


def _openvino(version: str) -> Consumer:
    return Consumer("OpenVINO", version, (*ONNX, "LiteRT", "LiteRT int8"), "openvino", (f"openvino=={version}",))


CONSUMERS = (
    _onnxruntime("1.16.3", OLD_NUMPY),
    _onnxruntime("1.18.1", OLD_NUMPY),
    _onnxruntime("1.20.1"),
    _onnxruntime("1.22.1"),
    _onnxruntime("1.32.0"),
    Consumer("onnxruntime-node", "1.30.0", ONNX, "node", npm=("onnxruntime-node@1.30.0", "onnxruntime-common@1.30.0")),
    Consumer("onnxruntime-web", "1.30.0", ONNX, "node", npm=("onnxruntime-web@1.30.0",)),
    Consumer("onnxsim", "0.8.1", ("ONNX", "ONNX int8"), "onnxsim", ("onnxsim==0.8.1", "onnxruntime==1.32.0")),
    Consumer("onnxslim", "0.1.98", ("ONNX", "ONNX int8"), "onnxslim", ("onnxslim==0.1.98", "onnxruntime==1.32.0")),
    Consumer(
        "onnx2torch",
        "1.5.15",
        ("ONNX", "ONNX, NCHW"),
        "onnx2torch",
        ("onnx2torch==1.5.15", "torch", "torchvision"),
        large=True,
    ),
    Consumer(
        "onnx2tf",
        "1.29.24",
        ("ONNX, NCHW",),
        "onnx2tf",
        ("onnx2tf==1.29.24",),
        large=True,
    ),
    _opencv("4.12.0"),
    _opencv("5.0.0"),
    Consumer("tract", "0.23.9", ("ONNX", "ONNX, NCHW", "ONNX int8"), "tract", ("tract==0.23.9", "numpy")),
    Consumer("MNN", "3.6.1", ("ONNX", "ONNX, NCHW", "LiteRT"), "mnn", ("MNN==3.6.1", "numpy")),
    Consumer(
        "ncnn, by pnnx",
        "1.0.20261020",
        ("ONNX, NCHW",),
        "ncnn",
        ("ncnn==1.0.20261020", "pnnx==20261020"),
    ),
    _openvino("2024.0.0"),
    _openvino("2026.4.1"),
    Consumer("tflite-runtime", "2.14.0", LITERT, "tflite_runtime", ("tflite-runtime==2.14.0", OLD_NUMPY)),
    Consumer(
        "TensorFlow Lite Micro",
        "0.dev20261023182759",
        ("LiteRT", "LiteRT int8"),
        "tflite_micro",
        ("tflite-micro==0.dev20261023182759",),
    ),
    Consumer("Vela (Ethos-U)", "5.2.0", ("LiteRT int8",), "vela", ("ethos-u-vela==5.2.0",)),
    Consumer("MediaPipe", "1.2.3", ("LiteRT", "LiteRT int8", "LiteRT uint8"), "mediapipe", ("mediapipe==1.2.3",)),
    Consumer("PyTorch", "2.14.1", (".pt2",), "pytorch", ("torch==2.14.1", "numpy"), large=True),
    Consumer("ExecuTorch", "1.5.1", ("ExecuTorch",), "executorch", ("executorch==1.5.1", "torch==2.14.1"), large=True),
    Consumer("coremltools", "9.0", ("Core ML",), "coreml", ("coremltools==9.0",)),
)
