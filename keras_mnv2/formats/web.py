"""A folder that is a page: it names what is on photographs, in the browser, from any static server."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = PAGE, ABOUT, MODEL = "index.html", "about.json", "model.onnx"
# onnxruntime-web: its version, the SHA-256 of the npm package, and the files that the page needs, with their names
# there: not every server knows that `.mjs` is JavaScript.
VERSION = "1.30.0"
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME = {
    "ort.wasm.min.mjs": "ort.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm.js",
    "ort-wasm-simd-threaded.wasm": "ort.wasm",
}
VARIABLE = "KERAS_MNV2_ONNXRUNTIME_WEB"
# Seconds for npm to fetch 33 MB.
LONGEST = 300


def find_runtime() -> Path:
    """The folder with onnxruntime-web's files for the page.

    In this order: where `KERAS_MNV2_ONNXRUNTIME_WEB` says that the npm package lies, in `node_modules` of the current
    folder or of one above it, in Keras's cache, or by npm, which fetches it there.

    Raises:
        ImportError: where it is nowhere, or of another version; it says how to get it.
    """
    line = f"npm install onnxruntime-web@{VERSION}"
    given = os.environ.get(VARIABLE)
    folders = [Path(given)] if given else [at / "node_modules" / "onnxruntime-web" for at in _here_and_above()]
    for package in folders:
        version = _version_of(package)
        if version is None:
            continue
        # Files of another minor version have other names.
        if version.split(".")[:2] != VERSION.split(".")[:2]:
            raise ImportError(
                f'format="web" needs onnxruntime-web {VERSION}, got {version} in {str(package)!r}: {line}.'
            )
        return package / "dist"
    if given:
        raise ImportError(f"{VARIABLE} must be the folder of the npm package onnxruntime-web, got {given!r}.")
    cached = _cache() / f"onnxruntime-web-{VERSION}"
    if all((cached / name).is_file() for name in RUNTIME):
        return cached
    npm = shutil.which("npm")
    if npm is None:
        raise ImportError(
            f'format="web" needs onnxruntime-web, which is not in node_modules here or above, and npm, which is not '
            f"installed either: {line}, or set {VARIABLE} to the folder of the package."
        )
    _fetch(npm, cached)
    return cached


def write_page(
    folder: Path, runtime: Path, shape: Sequence[int | None], how: Any, takes_pixels: bool, labels: Sequence[str]
) -> None:
    """Writes all of the page but the model.

    Args:
        folder: a new one.
        runtime: of `find_runtime`.
        shape: of the model's images, (batch, height, width, 3) or (batch, 3, height, width).
        how: the `keras_mnv2.Preprocessing` of its photographs.
        takes_pixels: whether the model scales pixels of 0..255 itself.
        labels: names of the classes.
    """
    shutil.copytree(Path(__file__).parent / "page", folder)
    (folder / "runtime").mkdir()
    for name, given in RUNTIME.items():
        shutil.copyfile(runtime / name, folder / "runtime" / given)
    channels_first = shape[1] == 3 and shape[-1] != 3
    size = shape[2 if channels_first else 1] or how.crop
    about = {
        "size": size,
        "resize": how.resize * size // how.crop,
        "interpolation": how.interpolation,
        "crop_rounding": how.crop_rounding,
        "mean": [0.0] * 3 if takes_pixels else [255 * m for m in how.mean],
        "std": [1.0] * 3 if takes_pixels else [255 * s for s in how.std],
        "channels_first": channels_first,
        "labels": list(labels),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


def _here_and_above() -> list[Path]:
    here = Path.cwd()
    return [here, *here.parents]


def _version_of(package: Path) -> str | None:
    """The version of an installed package that has the files; None where it is not there."""
    try:
        version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        return None
    return version if all((package / "dist" / name).is_file() for name in RUNTIME) else None


def _cache() -> Path:
    """Keras's folder for what was downloaded."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras_mnv2"


def _fetch(npm: str, target: Path) -> None:
    """Fetches the package by npm, and moves the files that are needed to `target` when they were checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnxruntime-web.", dir=target.parent) as name:
        scratch = Path(name)
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", str(scratch)]
        try:
            subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=True, timeout=LONGEST)
            (archive,) = scratch.glob("*.tgz")
        except (subprocess.SubprocessError, ValueError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            raise ImportError(
                f'format="web" needs onnxruntime-web {VERSION}, which npm could not fetch ({"".join(told)[:200]}): '
                f"install it where there is a network, and set {VARIABLE} to the folder of the package."
            ) from error
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise ImportError(f"onnxruntime-web {VERSION} must have the SHA-256 {SHA256}, got {found} by npm.")
        (scratch / "files").mkdir()
        with tarfile.open(archive) as package:
            for file in RUNTIME:
                member = package.extractfile(f"package/dist/{file}")
                assert member is not None
                (scratch / "files" / file).write_bytes(member.read())
        if not target.exists():
            (scratch / "files").rename(target)
