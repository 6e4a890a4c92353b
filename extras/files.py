"""Opens a volume: NIfTI, HDF5, or one PNG or npy file a slice. Voxels are read when asked for.

What is wrong with a file is one line: the file, the fault, the remedy. `prepare.py` and
`predict.py` read all their scans by this module.
"""

import gzip
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from data import BadInput

# They print guesses about a file; what is wrong with one is refused below.
nib.imageglobals.logger.disabled = True
warnings.filterwarnings("ignore", module="PIL|nibabel|numpy")
NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
HDF5 = re.compile(r"\.(h5|hdf5)$", re.I)
PNG = re.compile(r"\.png$", re.I)
NPY = re.compile(r"\.npy$", re.I)
FOREIGN = re.compile(r"\.(nrrd|nhdr|mha|mhd|dcm|dicom|ima|hdr|img|mgz|mgh|mnc)$", re.I)


class Volume(NamedTuple):
    """A volume that is still on disk."""

    shape: tuple[int, int, int]  # (Z,H,W)
    read: Callable[[int, int], np.ndarray]  # slices a to b: (b-a,H,W)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # (z,y,x) in mm
    affines: tuple[np.ndarray, ...] = ()  # voxel (x,y,z,1) -> mm, by the sform and by the qform
    axes: str = ""  # RAS, LPS, ...


def voxels(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` takes from this file, or one line about what is wrong with it."""
    try:
        found = np.asarray(read())
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {fault(path, error)}") from None
    if found.dtype.kind not in "iufb" or not np.isfinite(found).all():
        raise BadInput(f"{path}: holds voxels that are not finite numbers; replace them")
    return found


def fault(path: Path, error: Exception) -> str:
    """Why a file cannot be read, and the remedy."""
    if path.is_dir():
        return "is a folder; name the file in it, or rename the folder"
    if not path.exists():
        return "no such file; correct the path" + (" of the link" if path.is_symlink() else "")
    if not os.access(path, os.R_OK):
        return "cannot be read; allow it, or copy the file"
    reason = str(error).split("\n")[0] or type(error).__name__
    return f"damaged ({reason}); copy the file again, or convert it"


def opened(path: Path):
    """A file, through gzip where its content is compressed, whatever its name says."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")


def check_whole(path: Path) -> None:
    """Raises where a compressed file is damaged: nibabel does not look at the checksum."""
    try:
        with opened(path) as file:
            while file.read(2**22):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: {fault(path, error)}") from None


def load_nifti(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The opened file, its voxels not read yet, and the sides of a voxel in mm: (x,y,z)."""
    try:
        file = opened(path)  # kept open, or each slab is unpacked from the start
        start = file.read(540)
        kinds = [kind for kind in (nib.Nifti1Image, nib.Nifti2Image)
                 if kind.header_class.may_contain_header(start)]
        if not kinds:
            raise ValueError("not NIfTI, by its first bytes")
        file.seek(0)
        image = kinds[0].from_file_map({"image": nib.FileHolder(fileobj=file)})
        # The header as it is: nibabel makes 1 mm of a voxel size of 0.
        header = kinds[0].header_class(start[: image.header.sizeof_hdr], check=False)
        if not np.isfinite(image.affine).all():
            raise ValueError("the affine is not finite")
        sform = image.header.get_sform(coded=True)[0]
        image.header.get_qform(coded=True)  # fails where the quaternion is not valid
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {fault(path, error)}") from None
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # meters, micrometers
    choices = [np.asarray(header["pixdim"][1:4], float)]
    if sform is not None:
        choices.append(np.linalg.norm(sform[:3, :3], axis=0))
        # Where the two disagree the affine counts, but not unit scales: ACDC has them.
        if not np.allclose(choices[1], 1, 1e-3) and not np.allclose(*choices, 1e-3):
            choices.reverse()
    for sides in choices:
        if np.isfinite(sides).all() and (sides > 0).all():
            return image, sides * unit
    raise BadInput(f"{path}: its header has no voxel size; correct pixdim or the affine")


def open_nifti(path: Path) -> Volume:
    file, sides = load_nifti(path)
    shape = file.shape[:3] if file.shape[3:] == (1,) else file.shape
    if len(shape) != 3 or 0 in shape:  # one slice, a series, or a one-hot mask
        remedy = "store one volume a file (a slice as (x, y, 1)), of a mask its class numbers"
        raise BadInput(f"{path}: has shape {shape}, not (x, y, z); {remedy}")
    qform = file.header.get_qform(coded=True)[0]
    affines = (file.affine,) if qform is None else (file.affine, qform)

    def read(a: int, b: int) -> np.ndarray:
        return voxels(path, lambda: file.dataobj[:, :, a:b]).reshape(*shape[:2], -1).T

    axes = "".join(map(str, nib.aff2axcodes(file.affine)))
    return Volume(shape[::-1], read, tuple(sides[::-1].tolist()), affines, axes)


def slice_axis(shape: tuple[int, ...], spacing: tuple[float, ...]) -> str:
    """The axis along which slices seem to lie, by the voxels and their sides in (x,y,z)."""
    # Not z where another axis is 1.5 times as coarse, or has less than an eighth of its voxels:
    # nearly cubic voxels and short stacks are no reason to warn.
    if max(spacing) > 1.5 * spacing[2]:
        return "xyz"[int(np.argmax(spacing))]
    return "xyz"[int(np.argmin(shape))] if 8 * min(shape[:2]) < shape[2] else "z"


def hdf5_file(path: Path):
    try:
        import h5py

        return h5py.File(path)
    except ImportError:
        raise BadInput(f"{path}: HDF5 needs a package; pip install h5py") from None
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {fault(path, error)}") from None


def open_hdf5(path: Path, key: str) -> Volume:
    """SSL4MIS: key is image or label; (Z,H,W), or one slice (H,W)."""
    with hdf5_file(path) as file:
        shape = getattr(file.get(key), "shape", None)
    if shape is None:
        raise BadInput(f"{path}: has no array {key}; store one under that name")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadInput(f"{path}: {key} has shape {shape}, not (z, y, x) or (y, x); store it so")

    def read(a: int, b: int) -> np.ndarray:
        with hdf5_file(path) as file:
            return file[key][a:b] if len(shape) == 3 else file[key][()][None]

    return Volume((1, *shape)[-3:], lambda a, b: voxels(path, lambda: read(a, b)))


def open_slice(path: Path) -> Volume:
    """One gray slice in PNG, or one mask in npy."""
    from PIL import Image  # comes with matplotlib

    def read() -> np.ndarray:
        if NPY.search(path.name):
            with open(path, "rb") as file:
                return np.lib.format.read_array(file)
        Image.open(path).verify()  # the checksums, at which reading does not look
        image = Image.open(path)
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)

    shape = voxels(path, read).shape
    if len(shape) != 2:
        raise BadInput(f"{path}: has shape {shape}; save it as one gray slice (y, x)")
    return Volume((1, *shape), lambda a, b: voxels(path, read)[None])


def open_volume(files: tuple[Path, ...], key: str = "image") -> Volume:
    """One file, or slices that become one volume."""
    if NIFTI.search(files[0].name):
        return open_nifti(files[0])
    opened = [open_hdf5(f, key) if HDF5.search(f.name) else open_slice(f) for f in files]
    if len(opened) == 1:
        return opened[0]
    shape = opened[0].shape[1:]
    for file, volume in zip(files, opened):
        if volume.shape != (1, *shape):
            differ = f"has shape {volume.shape[1:]}, other slices {shape}; give all one size"
            raise BadInput(f"{file}: {differ}")
    return Volume((len(files), *shape),
                  lambda a, b: np.concatenate([volume.read(0, 1) for volume in opened[a:b]]))


def slabs(volume: Volume) -> Iterator[np.ndarray]:
    """A few slices at a time, about 4 million voxels."""
    Z, H, W = volume.shape
    step = max(1, 2**22 // (H * W))
    for a in range(0, Z, step):
        yield volume.read(a, min(a + step, Z))
