"""Small trees of files in the layouts of the real data sets, traps included."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIPAKMED = ("Dyskeratotic", "Koilocytotic", "Metaplastic", "Parabasal", "Superficial-Intermediate")
HERLEV = (
    "carcinoma_in_situ",
    "light_dysplastic",
    "moderate_dysplastic",
    "normal_columnar",
    "normal_intermediate",
    "normal_superficiel",
    "severe_dysplastic",
)
HEP2 = ("homogeneous", "coarse_speckled", "fine_speckled", "nucleolar", "centromere", "cytoplasmatic")
PBC = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
MULTI_CANCER = ("cervix_dyk", "cervix_koc", "cervix_mep", "cervix_pab", "cervix_sfi")


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """A smooth picture unlike that of any other seed: uint8 [height, width, 3] for a size of (width, height)."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def write(path: Path, pixels: np.ndarray) -> Path:
    """An image file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_rows(path: Path, rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    """A table; the first row is its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def class_folders(root: Path, classes: Sequence[str] = PBC, count: int = 4, suffix: str = ".png") -> Path:
    """`<class>/NAME.png`."""
    for label, name in enumerate(classes):
        for number in range(count):
            write(root / name / f"{name[:2].upper()}_{number:06d}{suffix}", picture(1000 * label + number))
    return root


def pbc(root: Path, count: int = 4) -> Path:
    """PBC: `<class>/*.jpg`."""
    return class_folders(root, PBC, count, ".jpg")


def sipakmed(root: Path, clusters: int = 3, cells: int = 2, form: str = "nested") -> Path:
    """SIPaKMeD: the clusters, the cells cut from them and the outlines; the numbers start again in every class.

    Args:
        root: where it goes.
        clusters: of each class.
        cells: of each cluster.
        form: "nested" im_X/im_X/CROPPED/, "single" im_X/CROPPED/ or "flat" im_X/.
    """
    for label, name in enumerate(SIPAKMED):
        folder = root / f"im_{name}" / f"im_{name}" if form == "nested" else root / f"im_{name}"
        cropped = folder if form == "flat" else folder / "CROPPED"
        for cluster in range(1, clusters + 1):
            write(folder / f"{cluster:03d}.bmp", picture(label * 100 + cluster, (64, 48)))
            (folder / f"{cluster:03d}_cyt01.dat").write_text("1,2\n")
            for cell in range(1, cells + 1):
                write(cropped / f"{cluster:03d}_{cell:02d}.bmp", picture(10_000 * label + 100 * cluster + cell))
                (cropped / f"{cluster:03d}_{cell:02d}_nuc.dat").write_text("1,2\n")
    (root / "Thumbs.db").write_bytes(b"\0")
    return root


def herlev(root: Path, scans: int = 4, cells: int = 2, copies: bool = False) -> Path:
    """Herlev: cells A-B-NNN.BMP with masks A-B-NNN-d.bmp; re-hosted copies hold augmented A-B-NNN-c1.BMP."""
    for label, name in enumerate(HERLEV):
        for scan in range(scans):
            for cell in range(1, cells + 1):
                stem = f"{149056300 + scan}-{149056400 + label}-{cell:03d}"
                write(root / name / f"{stem}.BMP", picture(1000 * label + 10 * scan + cell))
                write(root / name / f"{stem}-d.bmp", picture(7))
                if copies:
                    write(root / name / f"{stem}-c1.BMP", picture(1000 * label + 10 * scan + cell)[::-1])
                    write(root / name / f"{stem}-d-c1.bmp", picture(7))
    return root


def disc(size: tuple[int, int], high: int) -> np.ndarray:
    """A mask: an ellipse of `high` on 0, uint8 [height, width]."""
    width, height = size
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.where(rows**2 + columns**2 < 0.7, high, 0).astype(np.uint8)


def hep2(root: Path, specimens: int = 2, cells: int = 2, mask: str = "_mask", high: int = 255) -> Path:
    """HEp-2, the contest's release: training/ and test/, each with `specimens` images of every pattern.

    Args:
        root: where it goes.
        specimens: of each pattern, in each part.
        cells: of each specimen.
        mask: ending of the masks' names.
        high: the masks' bright value; releases have 1 or 255.
    """
    rows: list[Sequence[object]] = [("id", "set", "image", "intensity", "mitotic", "pattern")]
    specimen = 0
    for part in ("training", "test"):
        truth: list[Sequence[object]] = [("id", "pattern")]
        number = 0
        for label, pattern in enumerate(HEP2):
            for _ in range(specimens):
                specimen += 1
                for _ in range(cells):
                    number += 1
                    pixels = picture(100_000 * (part == "test") + 1000 * label + number, (22, 26))
                    write(root / part / f"{number:03d}.png", pixels)
                    write(root / part / f"{number:03d}{mask}.png", disc((22, 26), high))
                    truth.append((number, pattern))
                    rows.append((number, part, specimen, "positive", 0, pattern))
        write_rows(root / part / f"gt_{part}.csv", truth, ";")
        write_rows(root / part / f"{part}.csv", [("id", "intensity"), (1, "positive")], ";")
    write_rows(root / "cells.csv", rows, ";")
    return root


def hep2_main(root: Path, specimens: int = 2, cells: int = 3) -> Path:
    """HEp-2, the later release: Main_Dataset/Images/NN/ with the field of view, its mask, cells and their masks."""
    number = 0
    rows: list[Sequence[object]] = [("Image", "Intensity", "Pattern")]
    for label, pattern in enumerate(HEP2):
        for _ in range(specimens):
            number += 1
            folder = root / "Main_Dataset" / "Images" / f"{number:02d}"
            write(folder / f"{number:02d}.bmp", picture(number, (90, 70)))
            write(folder / f"{number:02d}_Mask.bmp", disc((90, 70), 255))
            for cell in range(1, cells + 1):
                write(folder / f"{number:02d}_{cell:03d}.png", picture(1000 * label + 10 * number + cell, (22, 26)))
                write(folder / f"{number:02d}_{cell:03d}_Mask.png", disc((22, 26), 1))
            rows.append((number, "Positive", pattern.replace("_", " ").title()))
    write_rows(root / "Main_Dataset" / "images.csv", rows, ";")
    return root


def multi_cancer(root: Path, cells: int = 3, copies: int = 3) -> Path:
    """Kaggle's Multi Cancer: `copies` of each cell, turned and mirrored, beside another organ."""
    folder = root / "Multi Cancer" / "Multi Cancer"
    for label, name in enumerate(MULTI_CANCER):
        number = 0
        for cell in range(cells):
            pixels = picture(1000 * label + cell, (64, 64))
            for copy in range(copies):
                number += 1
                turned = np.rot90(pixels, copy)
                path = folder / "Cervical Cancer" / name / f"{name}_{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(turned[:, ::-1] if copy % 2 else turned).save(path, quality=92)
    write(folder / "Breast Cancer" / "breast_benign" / "breast_benign_0001.jpg", picture(1))
    return root


def cric(root: Path, parents: int = 5, crops: int = 3) -> Path:
    """CRIC: crops.csv and crops/<class>/ID.png."""
    rows: list[Sequence[object]] = [("file", "class", "cell_id", "parent_image", "image_doi")]
    number = 0
    for label, name in enumerate(("ASC-H", "ASC-US", "HSIL", "LSIL", "NILM", "SCC")):
        for parent in range(parents):
            for _ in range(crops):
                number += 1
                write(root / "crops" / name / f"{number}.png", picture(1000 * label + number, (40, 40)))
                rows.append((f"crops/{name}/{number}.png", name, number, f"parent{parent}_{label % 3}.png", "10.0/0"))
    write_rows(root / "crops.csv", rows)
    return root


def table(root: Path, count: int = 12, columns: Sequence[str] = ("path", "label", "group")) -> Path:
    """A CSV of images of two classes in groups of two; returns the file."""
    rows: list[Sequence[object]] = [columns]
    for number in range(count):
        write(root / "pictures" / f"{number}.png", picture(number))
        values = {
            "path": f"pictures/{number}.png",
            "label": "ab"[number % 4 // 2],
            "group": f"g{number // 2}",
            "split": "train" if number < count // 2 else "test",
        }
        rows.append([values[column] for column in columns])
    return write_rows(root / "cells.csv", rows)
