"""Layouts of the real data sets, on small trees: what is read, what is left out and said, and what is refused."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trees

from cellops.models.data import CellData, LayoutError, Sample, open_data, scan


def counts(data: CellData) -> set[int]:
    """The numbers of images of the classes."""
    return set(data.class_counts.values())


def noted(data: CellData, text: str) -> bool:
    """Whether a note says so."""
    return any(text in note for note in data.notes)


@pytest.mark.parametrize("form", ["nested", "single", "flat"])
def test_sipakmed_leaves_the_clusters_out(tmp_path: Path, form: str) -> None:
    data = open_data(trees.sipakmed(tmp_path, clusters=3, cells=2, form=form))
    assert (data.name, data.classes, len(data), counts(data)) == ("sipakmed", trees.SIPAKMED, 30, {6})
    assert noted(data, "15 cluster images, which contain the cells, were left out")
    assert all("_" in Path(sample.id).name for sample in data.samples)
    # The cluster is the group; cluster 001 of one class is not that of another.
    assert data.grouped and len(set(data.groups)) == 15
    assert data.samples[0].group == "Dyskeratotic/001"


def test_sipakmed_counts_second_copies(tmp_path: Path) -> None:
    trees.sipakmed(tmp_path, form="nested")
    trees.sipakmed(tmp_path, form="single")
    data = open_data(tmp_path)
    assert len(data) == 30 and noted(data, "30 second copies of cells were left out")
    shutil.rmtree(tmp_path / "im_Parabasal")
    assert noted(open_data(tmp_path), "No images of Parabasal")


@pytest.mark.parametrize("copies", [False, True])
def test_herlev_leaves_masks_and_copies_out(tmp_path: Path, copies: bool) -> None:
    data = open_data(trees.herlev(tmp_path, scans=3, cells=2, copies=copies))
    assert (data.name, len(data), counts(data)) == ("herlev", 42, {6})
    assert set(data.classes) == set(trees.HERLEV) and data.classes[0] == "normal_superficiel"
    assert noted(data, "42 masks (-d) were not read as images")
    assert noted(data, "84 augmented copies (-c1, -c2, ...) were left out") == copies
    assert set(data.groups) == {"149056300", "149056301", "149056302"}


@pytest.mark.parametrize(("mask", "high"), [("_mask", 255), ("_Mask", 1), ("_mask", 1)])
def test_hep2_masks_splits_and_specimens(tmp_path: Path, mask: str, high: int) -> None:
    data = open_data(trees.hep2(tmp_path, specimens=2, cells=2, mask=mask, high=high))
    assert (data.name, data.classes, len(data), counts(data)) == ("hep2", trees.HEP2, 48, {8})
    assert data.prescribed and sum(sample.split == "train" for sample in data.samples) == 24
    assert data.grouped and len(set(data.groups)) == 24
    sample = data.samples[0]
    assert sample.mask is not None and sample.mask.name.endswith(f"{mask}.png")
    pixels = data.read(0)
    outside = trees.disc((22, 26), 1) == 0
    assert not pixels[outside].any() and pixels[~outside].any()
    whole = open_data(tmp_path, masks=False)
    assert whole.read(0)[outside].any() and noted(whole, "The masks were not used")


def test_hep2_of_tables_that_lie_beside_or_number_on(tmp_path: Path) -> None:
    """gt_training.csv beside the folders too; test cells numbered on from fewer training cells in cells.csv."""
    trees.hep2(tmp_path)
    for part in ("training", "test"):
        shutil.copy(tmp_path / part / f"gt_{part}.csv", tmp_path / f"gt_{part}.csv")
    for cell in range(21, 25):
        (tmp_path / "training" / f"{cell:03d}.png").unlink()
    for table in (tmp_path / "training" / "gt_training.csv", tmp_path / "gt_training.csv"):
        table.write_text("\n".join(table.read_text().splitlines()[:21]))
    before = open_data(tmp_path)
    assert len(before) == 44 and len(set(before.groups)) == 22
    lines = (tmp_path / "cells.csv").read_text().splitlines()
    moved = [
        ";".join([str(int(line.split(";")[0]) + 20), *line.split(";")[1:]]) if ";test;" in line else line
        for line in lines
    ]
    (tmp_path / "cells.csv").write_text("\n".join(moved))
    assert open_data(tmp_path).groups == before.groups


def test_hep2_without_cells_csv_says_so(tmp_path: Path) -> None:
    trees.hep2(tmp_path)
    (tmp_path / "cells.csv").unlink()
    (tmp_path / "test" / "001_mask.png").unlink()
    data = open_data(tmp_path)
    assert not data.grouped and noted(data, "48 cells have no specimen in cells.csv")
    assert noted(data, "1 image without a mask keeps its background")
    shutil.rmtree(tmp_path / "test")
    half = open_data(tmp_path)
    assert not half.prescribed and noted(half, "no split is prescribed")


def test_hep2_tables_that_do_not_agree_are_an_error(tmp_path: Path) -> None:
    trees.hep2(tmp_path)
    (tmp_path / "training" / "003.png").unlink()
    with pytest.raises(LayoutError, match=r"gt_training.csv and the images of training/ do not agree: 1 cells .* 3"):
        open_data(tmp_path)
    trees.hep2(tmp_path)
    trees.write_rows(tmp_path / "training" / "gt_training.csv", [("id", "pattern"), (1, "striped")], ";")
    with pytest.raises(LayoutError, match=r"gt_training.csv: no column holds patterns only"):
        open_data(tmp_path)


def test_hep2_later_release(tmp_path: Path) -> None:
    data = open_data(trees.hep2_main(tmp_path, specimens=2, cells=3))
    assert (data.name, data.classes, len(data), counts(data)) == ("hep2_main", trees.HEP2, 36, {6})
    assert noted(data, "12 whole fields of view, which contain the cells, were left out")
    assert data.grouped and len(set(data.groups)) == 12 and not data.prescribed
    assert not data.read(0)[0, 0].any() and all(sample.mask is not None for sample in data.samples)
    assert open_data(tmp_path / "Main_Dataset").name == "hep2_main"
    (tmp_path / "Main_Dataset" / "images.csv").unlink()
    with pytest.raises(LayoutError, match="no table gives the pattern of 36 cells"):
        open_data(tmp_path)


def test_multi_cancer_groups_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / ".cache"))
    data = open_data(trees.multi_cancer(tmp_path, cells=4, copies=3))
    assert (data.name, data.classes, len(data), counts(data)) == ("multi_cancer", trees.SIPAKMED, 60, {12})
    assert noted(data, "1 images of other organs were left out")
    cells = {sample.id: (int(Path(sample.id).stem[-4:]) - 1) // 3 for sample in data.samples}
    for label in range(5):
        groups: dict[str, set[int]] = {}
        for sample in data.samples:
            if sample.label == label:
                groups.setdefault(sample.group, set()).add(cells[sample.id])
        assert sorted(map(sorted, groups.values())) == [[0], [1], [2], [3]]
    calls: list[tuple[int, int]] = []
    again = open_data(tmp_path, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert again == data and not calls  # from the cache
    image = tmp_path / data.samples[0].id
    os.utime(image, (1, 1))
    assert open_data(tmp_path, workers=2, progress=lambda done, total: calls.append((done, total))) == data
    assert calls[-1] == (60, 60)
    apart = open_data(tmp_path / "Multi Cancer" / "Multi Cancer" / "Cervical Cancer", hash_groups=False)
    assert apart.name == "multi_cancer" and not apart.grouped and noted(apart, "not looked for")


def test_cric_groups_by_parent(tmp_path: Path) -> None:
    data = open_data(trees.cric(tmp_path))
    assert (data.name, len(data), counts(data), data.grouped) == ("cric", 90, {15}, True)
    assert data.samples[0].group.startswith("parent") and len(set(data.groups)) == 15
    assert open_data(tmp_path / "crops.csv") == data
    # The folder of crops alone has classes but no parents.
    assert not open_data(tmp_path / "crops").grouped
    (tmp_path / "crops" / "SCC" / "90.png").unlink()
    with pytest.raises(LayoutError, match=r"crops.csv names 1 files that do not exist, e.g. crops/SCC/90.png"):
        open_data(tmp_path)


def test_pbc_says_that_there_are_no_patients(tmp_path: Path) -> None:
    data = open_data(trees.pbc(tmp_path))
    assert (data.name, data.classes, len(data), data.grouped) == ("pbc", trees.PBC, 32, False)
    assert noted(data, "No patient ids exist")


def test_any_class_folders(tmp_path: Path) -> None:
    root = trees.class_folders(tmp_path / "cells", ("b", "a"))
    trees.write(root / "a" / "deeper" / "one.TIF", trees.picture(5))
    trees.write(root / "a" / "A_000000_mask.png", trees.picture(6)[..., 0])
    trees.write(root / "stray.png", trees.picture(7))
    (root / "empty").mkdir()
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / ".hidden.png").write_bytes(b"x")
    (root / "__MACOSX" / "a").mkdir(parents=True)
    (root / "__MACOSX" / "a" / "x.png").write_bytes(b"x")
    data = open_data(root)
    assert (data.name, data.classes, data.class_counts) == ("cells", ("a", "b"), {"a": 5, "b": 4})
    for text in (
        "Class folders without images: empty.",
        "1 mask was not read as an image.",
        "1 image outside the class folders was left out.",
        "Files that are no images: 1 of .txt.",
    ):
        assert text in data.notes
    (root / "stray.png").unlink()
    assert open_data(tmp_path).classes == ("a", "b")  # folders that wrap the others are passed over


def test_train_and_test_folders_prescribe_the_split(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        trees.class_folders(tmp_path / part, ("a", "b"), count=2)
    data = open_data(tmp_path)
    assert data.classes == ("a", "b") and data.prescribed
    assert [sample.split for sample in data.samples].count("test") == 4
    assert noted(data, "4 images of the part val became training images; data.validation takes a validation part")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ("train", "val"),
            "train/, val/ would be a class, .* no test/ is there. Rename what is the test part to test/",
        ),
        (("Training", "valid"), "Training/, valid/ would be a class, .* no test/ is there"),
        (("val", "testing"), None),
        (("test", "one"), "test/ would be a class, .* no train/ is there"),
        (
            ("train", "test", "more", "old"),
            "more/, old/ beside .*, which are parts of a split, would be classes",
        ),
        (("train", "one"), "train/ would be a class"),
    ],
)
def test_parts_of_a_split_are_no_classes(tmp_path: Path, parts: tuple[str, ...], message: str | None) -> None:
    for part in parts:
        trees.class_folders(tmp_path / "cells" / part, ("a", "b"), count=2)
    if message is None:
        assert open_data(tmp_path).classes == ("a", "b")
    else:
        for layout in ("auto", "folders"):
            with pytest.raises(LayoutError, match=message):
                open_data(tmp_path, layout=layout)
    assert open_data(tmp_path / "cells" / parts[0]).classes == ("a", "b")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables(tmp_path: Path, delimiter: str) -> None:
    path = trees.table(tmp_path, columns=("path", "label", "group", "split"))
    path.write_text("\ufeff" + path.read_text().replace(",", delimiter).replace("path", "Path"), encoding="utf-8")
    data = open_data(path)
    assert (data.name, data.classes, len(data), len(set(data.groups))) == ("cells", ("a", "b"), 12, 6)
    assert data.grouped and data.prescribed
    assert open_data(tmp_path) == data


def test_several_tables_are_not_guessed_among(tmp_path: Path) -> None:
    table = trees.table(tmp_path)
    shutil.copy(table, tmp_path / "other.csv")
    for layout in ("auto", "table"):
        with pytest.raises(
            LayoutError, match=r"has 2 tables with the columns label, path: cells.csv, other.csv\. Give one"
        ):
            open_data(tmp_path, layout=layout)
    assert open_data(table).grouped and open_data(tmp_path / "other.csv").name == "other"
    root = trees.cric(tmp_path / "cric")
    (root / "old").mkdir()
    shutil.copy(root / "crops.csv", root / "old")
    with pytest.raises(LayoutError, match=r"has 2 tables with the columns .*: crops.csv, old/crops.csv"):
        open_data(root)
    assert open_data(root / "crops.csv").grouped


def test_a_validation_part_of_a_table_is_noted(tmp_path: Path) -> None:
    path = trees.table(tmp_path, columns=("path", "label", "group", "split"))
    path.write_text(path.read_text().replace("0.png,a,g0,train", "0.png,a,g0,valid"))
    data = open_data(path)
    assert noted(data, "1 image of the part valid became training images") and data.prescribed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,label\n", "has a header and no rows"),
        ("path,class\npictures/0.png,a\n", "lacks the column label; it has class, path"),
        ("path,label\npictures/0.png,\n", "line 2: empty label"),
        ("path,label\npictures/0.png,a\npictures/0.png,b\n", "line 3: pictures/0.png is listed twice"),
        ("path,label\npictures/0.png,a\n../x.png,b\n", "line 3: ../x.png leads to .*, outside"),
        ("path,label\npictures/0.png,a\n/etc/hostname,b\n", "line 3: /etc/hostname leads to .*, outside"),
        ("path,label\npictures/99.png,a\n", "names 1 files that do not exist, e.g. pictures/99.png"),
        ("path,label,split\npictures/0.png,a,train\npictures/1.png,b,later\n", "line 3: split is 'later'"),
        ("path,label,split\npictures/0.png,a,train\npictures/1.png,b,\n", "the column split is empty in some rows"),
        ("path,label\npictures/0.png,a\npictures/1.png,a\n", "only one class has images"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = trees.table(tmp_path)
    path.write_text(text)
    with pytest.raises(LayoutError, match=message):
        open_data(path)


def test_binary_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(LayoutError, match="is not a text file in UTF-8"):
        open_data(path)


def one_class(root: Path) -> None:
    trees.class_folders(root, ("a",))


def no_images(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "notes.txt").write_text("x")


def images_without_folders(root: Path) -> None:
    trees.write(root / "1.png", trees.picture(1))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda root: None, "the folder is empty"),
        (lambda root: (root / "a").mkdir(), "only empty folders, e.g. a/"),
        (no_images, "1 files, 0 of them images, e.g. a/notes.txt"),
        (images_without_folders, "1 files, 1 of them images, e.g. 1.png"),
        (one_class, "4 files, 4 of them images"),
    ],
    ids=["empty", "empty folders", "no images", "no folders", "one class"],
)
def test_other_folders_say_what_is_expected_and_found(
    tmp_path: Path, make: Callable[[Path], object], found: str
) -> None:
    make(tmp_path)
    with pytest.raises(LayoutError) as error:
        open_data(tmp_path)
    assert found in str(error.value)
    for expected in ("sipakmed: im_<Class>/", "herlev: ", "hep2: ", "cric: ", "pbc: ", "folders: <class>/"):
        assert expected in str(error.value)


def test_missing_path_and_other_layout(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"nowhere does not exist(.|\n)*Expected one of(.|\n)*synthetic"):
        open_data(tmp_path / "nowhere")
    trees.pbc(tmp_path)
    with pytest.raises(LayoutError, match=r"no data set recognised; found: 32 files(.|\n)*herlev"):
        open_data(tmp_path, layout="herlev")
    with pytest.raises(ValueError, match="layout must be auto or one of sipakmed"):
        open_data(tmp_path, layout="hrelev")
    with pytest.raises(ValueError, match="data option colour is not known for pbc; known: classes"):
        open_data(tmp_path, colour=1)
    with pytest.raises(LayoutError, match="is a file"):
        open_data(tmp_path / "ig" / "IG_000000.jpg")


def test_links_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    """Those to images are listed with what cannot be read; folders and tables would be missed without a word."""
    outside = trees.write(tmp_path / "outside" / "secret.png", trees.picture(1))
    root = trees.pbc(tmp_path / "data")
    os.symlink(outside, root / "ig" / "linked.png")
    os.symlink(root / "nothing", root / "ig" / "dangling.png")
    listed = {item.id: item.reason for item in scan(open_data(root))}
    assert set(listed) == {"ig/linked.png", "ig/dangling.png"}
    assert "outside the data folder" in listed["ig/linked.png"] and "no such file" in listed["ig/dangling.png"]
    for name in ("linked", "dangling"):
        (root / "ig" / f"{name}.png").unlink()
    os.symlink(outside.parent, root / "more")
    with pytest.raises(LayoutError, match=r"more is a symbolic link to .*outside, outside the data folder"):
        open_data(root)
    (root / "more").unlink()
    for target, message in (("/etc/hostname", "outside the data folder"), (root / "gone", "which does not exist")):
        os.symlink(target, root / "cells.csv")
        with pytest.raises(LayoutError, match=rf"cells.csv is a symbolic link to .*{message}"):
            open_data(root)
        (root / "cells.csv").unlink()
    os.symlink(root / "ig", root / "again")  # inside, and a second way to the same files
    data = open_data(root)
    assert len(data) == 32 and noted(data, "1 links to folders inside the data folder were not followed")
    os.symlink(root, tmp_path / "link")  # the way to the folder itself may be a link
    assert len(open_data(tmp_path / "link")) == 32


def test_links_to_other_files_do_not_matter(tmp_path: Path) -> None:
    root = trees.pbc(tmp_path / "data")
    (root / "venv" / "bin").mkdir(parents=True)
    os.symlink("/etc/hostname", root / "README")
    os.symlink(sys.executable, root / "venv" / "bin" / "python")
    os.symlink(tmp_path / "nothing", root / "older")
    data = open_data(root)
    assert len(data) == 32 and noted(data, "Links that lead nowhere were left out: older.")
    table = trees.table(tmp_path / "table")
    os.symlink(trees.write(tmp_path / "secret.png", trees.picture(1)), table.parent / "pictures" / "x.png")
    assert noted(open_data(table), "1 images are not in cells.csv and were left out")
    table.write_text(table.read_text() + "pictures/x.png,a,g9\n")
    with pytest.raises(LayoutError, match=r"line 14: pictures/x.png leads to .*secret.png, outside"):
        open_data(table)


@pytest.mark.parametrize("name", [b"Pr\xf6be.png", b"Pr\xf6ben/1.png", b"B\xe4r.txt"])
def test_names_that_are_not_utf8_are_shown(tmp_path: Path, name: bytes) -> None:
    trees.class_folders(tmp_path, ("a", "b"))
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "a"), name)))
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    with pytest.raises(LayoutError, match=r"the name of a/(Pr\\xf6be|B\\xe4r).* is not in UTF-8.* Rename it") as error:
        open_data(tmp_path)
    str(error.value).encode()


def test_classes_are_selected_and_joined(tmp_path: Path) -> None:
    trees.sipakmed(tmp_path)
    two = open_data(tmp_path, classes={"normal": ["Parabasal", "Superficial-Intermediate"], "abnormal": "Dyskeratotic"})
    assert two.class_counts == {"normal": 12, "abnormal": 6}
    assert noted(two, "12 images of other classes were left out")
    assert open_data(tmp_path, classes=["Parabasal", "Metaplastic"]).classes == ("Parabasal", "Metaplastic")
    for classes, message in (
        (["Parabasal", "Round"], "sipakmed has no class 'Round'; its classes: Dyskeratotic"),
        ({"a": ["Parabasal"], "b": ["Parabasal"]}, "'Parabasal' is used twice"),
        (["Parabasal"], "at least two are needed"),
        (5, "data.options.classes must be a list of names, .*; got 5"),
        ("Parabasal", "data.options.classes must be a list of names, .*; got 'Parabasal'"),
        (
            [["Parabasal", "Metaplastic"], "Dyskeratotic"],
            r"data.options.classes must .*; got \['Parabasal', 'Metaplastic'\]",
        ),
        ([1, 2], "data.options.classes must .*; got 1; a name that is a number goes in quotes"),
        ({"normal": None, "abnormal": "Dyskeratotic"}, "data.options.classes must .*; got None"),
        (["Parabasal", "Parabasal"], "data.options.classes has 'Parabasal' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(tmp_path, classes=classes)


def test_a_class_of_one_image_is_noted(tmp_path: Path) -> None:
    trees.class_folders(tmp_path, ("a", "b"))
    trees.write(tmp_path / "c" / "1.png", trees.picture(1))
    assert noted(open_data(tmp_path), "Only one image: c.")


def test_samples_are_checked() -> None:
    sample = Sample("a/1.png", None, 0, "g")
    with pytest.raises(ValueError, match=r"1 ids appear more than once, e.g. 'a/1.png'"):
        CellData("x", None, ("a", "b"), (sample, sample))
    with pytest.raises(ValueError, match="label 3 is none of the 2 classes"):
        CellData("x", None, ("a", "b"), (Sample("a/1.png", None, 3, "g"),))
    data = CellData("x", None, ("a", "b"), (sample, Sample("b/1.png", None, 1, "g")))
    assert data.without(["a/1.png"]).labels.tolist() == [1]
    with pytest.raises(ValueError, match="no sample 'c'"):
        data.without(["c"])
    assert data.labels.dtype == np.int64


def shared(name: str) -> Path:
    """A real data set, or a skip that says why."""
    root = Path(os.environ.get("CELLOPS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"no real images: {root / name} is absent (CELLOPS_DATA names another folder)")
    return root / name


def test_the_real_pbc() -> None:
    data = open_data(shared("pbc"))
    assert (data.name, data.classes, counts(data), data.grouped) == ("pbc", trees.PBC, {200}, False)


def test_the_real_cric() -> None:
    data = open_data(shared("cric"))
    assert data.name == "cric" and data.grouped and len(set(data.groups)) == 167
    assert data.class_counts == {"ASC-H": 78, "ASC-US": 291, "HSIL": 136, "LSIL": 374, "NILM": 371, "SCC": 67}
