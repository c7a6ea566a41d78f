"""What a `.tflite` file says about itself: how an image becomes its input, and the names of its classes.

The public schema of TFLite's metadata (`metadata_schema.fbs`, identifier M001), which MediaPipe, Android Studio and the
Task Library read. The metadata lies in the model's flatbuffer, the file of names in a zip archive behind it.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_mnv2.formats.litert_file import file_of, read_file

NAME = "TFLITE_METADATA"
LABELS = "labels.txt"
# Numbers of the schema's unions and enumerations.
_IMAGE, _FEATURE, _NORMALIZATION, _RGB, _AXIS_LABELS = 2, 1, 1, 1, 2


def with_metadata(
    content: bytes, mean: Sequence[float], std: Sequence[float], labels: Sequence[str] | None = None
) -> bytes:
    """Adds metadata to a file with one image in, and with names of classes to one with one score a class out.

    Args:
        content: of a `.tflite` file.
        mean: of each channel, or one for all: subtracted from pixels of 0..255.
        std: what they are divided by then.
        labels: names of the classes, of one line each.

    Returns:
        A `.tflite` file.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = read_file(content)
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer = NAME.encode(), len(model.buffers)
    buffer.data = np.frombuffer(_metadata(len(model.subgraphs[0].outputs), mean, std, labels is not None), "uint8")
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or ()), entry]
    packed = file_of(model)
    if labels is None:
        return packed
    file = io.BytesIO(packed)
    # Not compressed: readers map it. A fixed date, so that one model gives one file.
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(zipfile.ZipInfo(LABELS), "".join(f"{label}\n" for label in labels))
    return file.getvalue()


def _metadata(outputs: int, mean: Sequence[float], std: Sequence[float], labelled: bool) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    table = _tables(builder)

    normalization = table(2, {0: _floats(builder, mean), 1: _floats(builder, std)})
    unit = table(2, {0: ("byte", _NORMALIZATION), 1: normalization})
    properties = table(2, {0: ("byte", _RGB)})
    content = table(3, {0: ("byte", _IMAGE), 1: properties})
    image = table(
        7,
        {
            0: builder.CreateString("image"),
            1: builder.CreateString("An image in RGB, (batch, height, width, 3)."),
            3: content,
            4: _vector(builder, [unit]),
        },
    )
    scores = []
    for number in range(outputs):
        fields: dict[int, Any] = {0: builder.CreateString("probability" if outputs == 1 else f"output_{number}")}
        fields[3] = table(3, {0: ("byte", _FEATURE), 1: table(0, {})})
        if labelled:
            file = {0: builder.CreateString(LABELS), 2: ("byte", _AXIS_LABELS)}
            file[1] = builder.CreateString("A class a line.")
            fields[6] = _vector(builder, [table(5, file)])
        scores.append(table(7, fields))
    graph = table(10, {2: _vector(builder, [image]), 3: _vector(builder, scores)})
    fields = {0: builder.CreateString("MobileNetV2"), 3: _vector(builder, [graph])}
    fields[7] = builder.CreateString("1.0.0")
    builder.Finish(table(8, fields), b"M001")
    return bytes(builder.Output())


def _tables(builder: Any) -> Callable[[int, dict[int, Any]], int]:
    """A function that writes a table of so many fields: offsets of what was written, or small numbers."""

    def table(count: int, fields: dict[int, Any]) -> int:
        builder.StartObject(count)
        for slot, value in fields.items():
            if isinstance(value, tuple):
                builder.PrependInt8Slot(slot, value[1], 0)
            else:
                builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        return builder.EndObject()

    return table


def _floats(builder: Any, values: Sequence[float]) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependFloat32(value)
    return builder.EndVector()


def _vector(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()
