"""Folders of class folders: which images they hold, in which order, under which label."""

import os
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def class_folders(
    folder: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Finds the images of a folder of class folders, as evaluation and training read it.

    The images are those anywhere below a class folder, by their suffix; hidden files and folders are left out, and
    links to folders below a class folder are not followed.

    Args:
        folder: with a folder for each class.
        class_names: the names of all classes, of which some may have no folder; by default those of the folders.

    Returns:
        The paths, class by class and sorted within each; the label of each, the place of its class in the names; and
        the names, sorted.

    Raises:
        ValueError: on a folder that does not exist, without class folders or images, or of other classes.

    Examples:
        >>> import pathlib
        >>> for name in ("dog", "cat"):
        ...     pathlib.Path("pets", name).mkdir(parents=True)
        ...     pathlib.Path("pets", name, "1.jpg").touch()
        >>> paths, labels, names = class_folders("pets")
        >>> [path.as_posix() for path in paths], labels, names
        (['pets/cat/1.jpg', 'pets/dog/1.jpg'], [0, 1], ('cat', 'dog'))
    """
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise ValueError(f"folder must be a path, got {folder!r}.")
    if class_names is not None and not _are_names(class_names):
        raise ValueError(f"class_names must be None or a sequence of names, got {class_names!r}.")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be an existing folder of class folders, got {str(folder)!r}.")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"folder must be a folder of class folders, got {str(folder)!r}, which has none.")
    names = tuple(found if class_names is None else class_names)
    if unknown := set(found) - set(names):
        raise ValueError(
            f"folder must have no other classes than the {len(names)} known ones, got {min(unknown)!r} "
            f"in {str(folder)!r}."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = images_below(folder / name) if name in found else []
        paths += own
        labels += [label] * len(own)
    if not paths:
        raise ValueError(
            f"folder must have images ({', '.join(SUFFIXES)}) in its class folders, got none in {str(folder)!r}."
        )
    return paths, labels, names


def _are_names(names: object) -> bool:
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def images_below(folder: str | os.PathLike[str]) -> list[Path]:
    """The images anywhere below a folder, sorted; hidden files and folders are left out.

    Raises:
        OSError: where a folder cannot be read.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error
