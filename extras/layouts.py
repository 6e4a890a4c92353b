"""Lists the volumes below a folder, for each layout of folders that is known.

NIfTI in images/ and labels/, nnU-Net's and the Decathlon's folders, ACDC as downloaded, HDF5 of
SSL4MIS, the authors' PNG. What is left alone is named; what is ambiguous is refused.
"""

import re
from pathlib import Path
from typing import NamedTuple

from data import BadInput
from extras.files import FOREIGN, HDF5, NIFTI, NPY, PNG, hdf5_file


class Source(NamedTuple):
    """A volume where it lies: one file, or one file for each slice, in order."""

    name: str
    patient: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    part: str = ""  # train, val or test where the layout says so


def listing(folder: Path | None) -> list[Path]:
    """The files below a folder, hidden ones left out; folders that are links are followed."""
    files, seen = [], set()
    todo = [folder] if folder else []
    while todo:
        place = todo.pop()
        if place.resolve() in seen:
            raise BadInput(f"{place}: links lead here twice, or in a circle; remove one")
        seen.add(place.resolve())
        for entry in sorted(place.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not entry.exists():
                raise BadInput(f"{entry}: is a link to nothing; correct it, or remove it")
            (todo if entry.is_dir() and not NIFTI.search(entry.name) else files).append(entry)
    return sorted(files)


def child(root: Path | None, *names: str) -> Path | None:
    """The folder of one of these names, upper or lower case; None if there is none."""
    entries = sorted(root.iterdir()) if root else []
    found = [entry for entry in entries if entry.is_dir() and entry.name.lower() in names]
    if len(found) > 1:
        listed = " and ".join(folder.name for folder in found)
        raise BadInput(f"{root}: {listed} hold the same kind of files; keep one of them")
    return found[0] if found else None


def add(found: dict, key, file: Path) -> None:
    """found[key] = file, where no file has that place already."""
    if key in found:
        raise BadInput(f"{file}: {found[key]} has the same name; remove one of the two")
    found[key] = file


def leave(files: list[Path], why: str) -> None:
    """Says which files are not used."""
    if files:
        names = ", ".join(str(file) for file in files[:5]) + (", ..." if len(files) > 5 else "")
        print(f"left alone, {why}: {len(files)} files ({names})")


def of_kind(files: list[Path], ending: re.Pattern, kind: str) -> list[Path]:
    """The files with this ending; the others are named and left alone."""
    leave([file for file in files if not ending.search(file.name)], f"no {kind}")
    return [file for file in files if ending.search(file.name)]


def nifti_files(folder: Path | None) -> dict[str, Path]:
    """Name below the folder, without ending -> file."""
    found: dict[str, Path] = {}
    files = listing(folder)
    for file in files:
        if FOREIGN.search(file.name):
            raise BadInput(f"{file}: is not NIfTI; convert it to .nii.gz")
    for file in of_kind(files, NIFTI, "NIfTI"):
        add(found, NIFTI.sub("", file.relative_to(folder).as_posix()), file)
    return found


def paired(images: dict[str, Path], masks: dict[str, Path], part: str = "") -> list[Source]:
    """An image without a mask is unlabeled; a mask without an image is an error."""
    for name in sorted(masks.keys() - images.keys()):
        raise BadInput(f"{masks[name]}: has no image of that name; give both one name")
    sources = []
    for name, image in images.items():
        mask = (masks[name],) if name in masks else None
        patient = name.split("/")[0] if "/" in name else name.split("_frame")[0]
        sources.append(Source(name.replace("/", "-"), patient, (image,), mask, part))
    return sources


def pairs_layout(root: Path) -> list[Source]:
    masks = child(root, "labels", "masks", "segmentations")
    others = [f.name for f in sorted(root.iterdir()) if f.is_dir() and f.name[0] != "."]
    if len(others) > 1 and not masks:
        raise BadInput(f"{root}: masks are looked for in labels/, masks/ or segmentations/; rename "
                       f"the folder that holds them ({', '.join(others)})")
    return paired(nifti_files(child(root, "images")), nifti_files(masks))


def nnunet_layout(root: Path) -> list[Source]:
    sources = []
    for end, part in (("tr", ""), ("ts", "test")):
        images = nifti_files(child(root, f"images{end}"))
        for name, file in images.items():
            if re.search(r"_000[1-9]$", name):
                raise BadInput(f"{file}: is a second channel; only one (_0000) can be read")
        masks = nifti_files(child(root, f"labels{end}"))
        if part and images and not masks:
            leave(list(images.values()), "without masks in labelsTs")
            continue
        sources += paired({re.sub("_0000$", "", n): f for n, f in images.items()}, masks, part)
    return sources


def acdc_layout(root: Path) -> list[Source]:
    """patientNNN/patientNNN_frameXX[_gt].nii.gz, at any depth, as in training/ and database/."""
    pattern = re.compile(r"(?:^|.*/)patient\d+/(patient\d+_frame\d+)(_gt)?")
    if not any(pattern.match(file.relative_to(root).as_posix()) for file in listing(root)):
        return []
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    other = []
    for name, file in nifti_files(root).items():
        match = pattern.fullmatch(name)
        if match:
            add(masks if match[2] else images, match[1], file)
        else:
            other.append(file)
    leave(other, "no frame of a patient")
    return paired(images, masks)


def hdf5_layout(root: Path) -> list[Source]:
    """NAME.h5, or NAME_slice_K.h5 of each slice; a volume that is there whole is read whole."""
    files = listing(root)
    if not any(HDF5.search(file.name) for file in files):
        return []
    found: dict[str, dict[int, Path]] = {}
    for file in of_kind(files, HDF5, "HDF5"):
        match = re.fullmatch(r"(.+?)(?:_slice_(\d+))?", HDF5.sub("", file.name))
        add(found.setdefault(match[1], {}), int(match[2] or -1), file)
    sources = []
    for name, slices in found.items():
        order = [-1] if -1 in slices else sorted(slices)
        if len(order) > 1 and order[-1] - order[0] + 1 != len(order):
            raise BadInput(f"{slices[order[0]]}: other slices are missing; copy them again")
        images = tuple(slices[k] for k in order)
        with hdf5_file(images[0]) as file:
            masks = images if "label" in file else None
        sources.append(Source(name, name.split("_frame")[0], images, masks))
    return sources


def png_layout(root: Path) -> list[Source]:
    """The authors' tree. Their loader drops images without a mask, and puts slice 10 before 2."""
    sources = []
    for part in ("train-label", "train-unlabel", "val", "test"):
        folder = child(root, part)
        masks: dict[str, Path] = {}
        for file in of_kind(listing(child(folder, "mask", "masks")), NPY, "npy"):
            add(masks, file.stem, file)
        volumes: dict[str, dict[int, Path]] = {}
        images = of_kind(listing(child(folder, "image", "images")), PNG, "PNG")
        for file in images:
            match = re.fullmatch(r"(.+?)_(?:slice_?)?(\d+)", file.stem, re.I)
            if not match:
                raise BadInput(f"{file}: name it like patient001_frame01_slice_1.png")
            add(volumes.setdefault(match[1], {}), int(match[2]), file)
            if part != "train-unlabel" and file.stem not in masks:
                remedy = "add it, or move the image to train-unlabel"
                raise BadInput(f"{file}: has no mask {file.stem}.npy; {remedy}")
        for stem in sorted(masks.keys() - {image.stem for image in images}):
            raise BadInput(f"{masks[stem]}: has no image of that name; give both one name")
        for name, slices in volumes.items():
            files = tuple(slices[k] for k in sorted(slices))
            if max(slices) - min(slices) + 1 != len(slices):
                print(f"WARNING: {files[0]}: other slices are missing, numbers have gaps; its "
                      "volume and distances come out too small")
            labeled = None
            if part != "train-unlabel":
                labeled = tuple(masks[file.stem] for file in files)
            sources.append(Source(name, name.split("_frame")[0], files, labeled,
                                  part.split("-")[0]))
    return sources


LAYOUTS = {
    "images": ("images/ and labels/ of NIfTI", pairs_layout),
    "imagestr": ("nnU-Net's imagesTr/ and labelsTr/", nnunet_layout),
    "train-label": ("the authors' train-label/, val/ and test/", png_layout),
}


def find(root: Path, patient: str = "") -> list[Source]:
    """All volumes below a folder, in whatever layout. patient: the expression of --patient."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; correct the path")
    layouts = [LAYOUTS[name] for name in LAYOUTS if child(root, name)]
    layouts += [("patientNNN/ of NIfTI, as ACDC", acdc_layout), ("HDF5, as SSL4MIS", hdf5_layout)]
    for name, layout in layouts:
        sources = layout(root)
        if sources:
            break
    else:
        holds = ", ".join(file.name for file in sorted(root.iterdir())[:5]) or "nothing"
        raise BadInput(f"{root}: holds {holds}; put NIfTI files into images/ and labels/")
    print(f"{root}: {name}; {len(sources)} volumes, "
          f"{sum(s.masks is not None for s in sources)} with masks")
    named: dict[str, Path] = {}
    for source in sources:
        add(named, source.name, source.images[0])
    return [with_patient(source, patient) for source in sources] if patient else sources


def with_patient(source: Source, pattern: str) -> Source:
    """The patient is what --patient finds in the name of a file."""
    try:
        found = re.search(pattern, source.name)
    except re.error as error:
        raise BadInput(f"--patient {pattern}: {error}; give a regular expression") from None
    if not found or not found[0]:
        raise BadInput(f"--patient {pattern}: is not in {source.name}; give what all names have")
    return source._replace(patient=found[0])
