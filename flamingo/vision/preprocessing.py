"""How a tower wants its images, as the files beside its weights say it."""

from pathlib import Path
from typing import Any

from flamingo.pretrained import read_json

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True}


def read_preprocessing(folder: Path | str) -> dict[str, Any]:
    """The arguments of `Processor` that an image processor of transformers stands for.

    Args:
        folder: of a tower, with its `preprocessor_config.json`.

    Returns:
        `image_size`, `mean`, `std`, `fit` and `resample`: "crop" where the shorter side is resized and the
        rest cut off, as CLIP's, "stretch" where both sides are resized, as SigLIP's.

    Raises:
        ValueError: if there is no such file, or it says what `Processor` does not do.

    >>> import tempfile
    >>> from transformers import SiglipImageProcessor
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    ...     Processor(**read_preprocessing(folder)).fit
    'stretch'
    """
    path, found = _read(Path(folder))
    for name, value in _FIXED.items():
        if found.get(name, value) is not value:
            raise ValueError(f"{path}: expected {name} to be true, got {found[name]}.")
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{path}: expected rescale_factor to be 1 / 255, got {found['rescale_factor']}.")
    if found.get("resample", 3) not in _RESAMPLE:
        raise ValueError(
            f"{path}: expected resample to be 2 (bilinear) or 3 (bicubic), got {found['resample']}."
        )
    for name in ("size", "image_mean", "image_std"):
        if name not in found:
            raise ValueError(f"{path}: expected {name}, got none.")
    fit, image_size = _fit(path, found)
    return {
        "image_size": image_size,
        "mean": tuple(found["image_mean"]),
        "std": tuple(found["image_std"]),
        "fit": fit,
        "resample": _RESAMPLE[found.get("resample", 3)],
    }


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        raise ValueError(
            f"{folder}: expected a preprocessor_config.json, which says how the tower wants its images, got "
            "none. Save the image processor of its checkpoint there: "
            "AutoImageProcessor.from_pretrained(name).save_pretrained(folder)."
        )
    return path, read_json(path)


def _fit(path: Path, found: dict[str, Any]) -> tuple[str, int]:
    """How an image becomes a square, and its side; older files have an integer for a side."""
    size, crop = found["size"], found.get("crop_size")
    if not found.get("do_center_crop", crop is not None):
        side = size if isinstance(size, int) else size.get("height")
        if side is None or (isinstance(size, dict) and size.get("width") != side):
            raise ValueError(f"{path}: expected size to be a square where nothing is cropped, got {size}.")
        return "stretch", side
    shorter = size if isinstance(size, int) else size.get("shortest_edge")
    sides = {crop} if isinstance(crop, int) else set((crop or {}).values())
    if shorter is None or sides != {shorter}:
        raise ValueError(
            f"{path}: expected the shorter side of an image to be resized to what is cropped, got size "
            f"{size} and crop_size {crop}."
        )
    return "crop", shorter
