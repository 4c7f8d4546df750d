"""Data set descriptions and image-level labels: what they mean, and one sentence for every slip."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.command import UserError
from tools.dataset import load_dataset, read_image_labels, write_image_labels

CLASSES = ("road", "roof", "tree")
DESCRIPTION = """
title = "Tiny"
patch_size = 32
classes = [
  {name = "road", colour = [255, 255, 255]},
  {name = "roof", colour = [0, 0, 255]},
  {name = "tree", colour = [0, 255, 0]},
]
"""


@pytest.fixture
def describe(tmp_path):
    """describe(text, name) writes datasets/<name>/dataset.toml and loads it."""

    def write(text, name="tiny", load=True):
        folder = tmp_path / "datasets" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_dataset(name, tmp_path) if load else folder

    write.root = tmp_path
    return write


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


def test_a_description(describe):
    dataset = describe(
        DESCRIPTION + 'left_out_of_mean = ["tree"]\nignore_colours = [[0, 0, 0]]\nscenes = {train = ["1"]}'
    )
    assert (dataset.name, dataset.title, dataset.patch_size, dataset.stride) == ("tiny", "Tiny", 32, 32)
    assert dataset.classes == CLASSES and dataset.num_classes == 3 and dataset.colours.dtype == np.uint8
    assert dataset.colours.tolist() == [
        [255, 255, 255],
        [0, 0, 255],
        [0, 255, 0],
    ] and dataset.ignore_colours.tolist() == [[0, 0, 0]]
    assert dataset.scored.tolist() == [True, True, False] and dataset.scenes == {"train": ["1"]}
    assert dataset.images("test") == describe.root / "datasets" / "tiny" / "test" / "images"


@pytest.mark.parametrize(
    ("name", "classes", "patch"), [("vaihingen", 6, 128), ("potsdam", 6, 256), ("isaid", 16, 512), ("demo", 6, 128)]
)
def test_the_descriptions_that_come_with_the_project(tmp_path, name, classes, patch):
    dataset = load_dataset(name, tmp_path)
    assert (dataset.num_classes, dataset.patch_size) == (classes, patch)
    assert len(np.unique(dataset.colours, axis=0)) == classes
    if name == "isaid":
        assert dataset.classes[0] == "background" and dataset.colours[:3].tolist() == [
            [0, 0, 0],
            [0, 63, 255],
            [0, 127, 191],
        ]
        assert dataset.scored.all()
    else:
        assert dataset.classes == ("ImSurf", "Building", "LowVeg", "Tree", "Car", "Clutter")
        assert dataset.scored.tolist() == [True] * 5 + [False]


def test_base_gives_what_is_not_said(describe):
    dataset = describe('base = "vaihingen"\ntitle = "mine"\nleft_out_of_mean = []')
    other = load_dataset("vaihingen", describe.root)
    assert dataset.title == "mine" and dataset.classes == other.classes and dataset.scored.all()
    assert dataset.patch_size == other.patch_size and dataset.scenes == other.scenes
    describe(DESCRIPTION + "stride = 16", "first", load=False)
    assert describe('base = "first"', "second").stride == 16
    assert describe('base = "first"\npatch_size = 24', "second").stride == 24  # a stride belongs to its patch size
    assert describe('base = "second"\nstride = 20', "third").stride == 20
    assert describe('base = "second"', "third").patch_size == 24  # over two steps


def test_own_descriptions_go_before_the_project_s(describe):
    assert describe(DESCRIPTION, "vaihingen").classes == CLASSES


def test_base_in_a_circle(describe):
    describe('base = "b"', "a", load=False)
    describe('base = "c"', "b", load=False)
    with refused(r"base leads back to itself \(a -> b -> c -> a\)"):
        describe('base = "a"', "c", load=False) and load_dataset("a", describe.root)
    with refused(r"base leads back to itself \(d -> d\)"):
        describe('base = "d"', "d")
    with refused('there is no data set "nothing": write .*dataset.toml.*demo, isaid, potsdam, vaihingen'):
        describe('base = "nothing"', "e")


@pytest.mark.parametrize("name", ["../tiny", "a/b", "", ".", "a.b", "tiny\n"])
def test_names_that_leave_the_folder(describe, name):
    with refused("data set's name holds only letters"):
        load_dataset(name, describe.root)
    with refused("data set's name holds only letters"):
        describe(f"base = {name!r}" if "\n" not in name else 'base = "tiny\\n"', "other")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("patch_size = ", "is not valid TOML"),
        (b"title = \xff\xfe", "is not valid TOML"),
        ("patchsize = 3\n" + DESCRIPTION, "holds the unknown patchsize; known are base, classes"),
        ("patch_size = 32", "lacks classes"),
        ("", "lacks classes and patch_size"),
        ("base = 3", "data set's name holds only letters"),
        ("patch_size = 32\nclasses = []", "has 0 classes, but 1 to 250"),
        ('patch_size = 32\nclasses = ["road"]', "classes must be a list of"),
        ('patch_size = 32\nclasses = "road"', "classes must be a list of"),
        ('patch_size = 32\nclasses = [{name = "road"}]', "classes must be a list of"),
        ('patch_size = 32\nclasses = [{name = "road", colour = [1, 2]}]', r"the colour of road is \[1, 2\], not three"),
        (
            'patch_size = 32\nclasses = [{name = "road", colour = [1, 2, 256]}]',
            "the colour of road is .* from 0 to 255",
        ),
        ('patch_size = 32\nclasses = [{name = "road", colour = "red"}]', "the colour of road is red"),
        (
            'patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 3]}, {name = "a", colour = [1, 2, 4]}]',
            "share a name or a colour",
        ),
        (
            'patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 3]}, {name = "b", colour = [1, 2, 3]}]',
            "share a name or a colour",
        ),
        ('patch_size = 32\nclasses = [{name = "id", colour = [1, 2, 3]}]', 'class "id" .*another name'),
        ('patch_size = 32\nclasses = [{name = " a", colour = [1, 2, 3]}]', 'class " a" .*another name'),
        ('patch_size = 32\nclasses = [{name = "", colour = [1, 2, 3]}]', 'class "" .*another name'),
        ('patch_size = 32\nclasses = [{name = "a\\nb", colour = [1, 2, 3]}]', "another name"),
        (DESCRIPTION + "ignore_colours = [[0, 0, 255]]", "share a name or a colour"),
        (DESCRIPTION + "ignore_colours = [[0, 0]]", r"the colour of ignore is \[0, 0\]"),
        (DESCRIPTION + "ignore_colours = 5", "ignore_colours is 5, but it must be a list"),
        (
            DESCRIPTION + 'left_out_of_mean = ["Clutter"]',
            "left_out_of_mean names Clutter, but it must name some of the classes, not all: road, roof, tree",
        ),
        (DESCRIPTION + 'left_out_of_mean = ["road", "roof", "tree"]', "left_out_of_mean names road, roof, tree, but"),
        (DESCRIPTION + "left_out_of_mean = 5", "left_out_of_mean is 5, but it must be a list"),
        (DESCRIPTION + "left_out_of_mean = [[1]]", "left_out_of_mean names"),
        (DESCRIPTION + "scenes = 5", "scenes is 5, but it must be a table"),
        (DESCRIPTION + "rules = 5", "rules is 5, but it must be a table"),
        (DESCRIPTION + "paper = []", r"paper is \[\], but it must be a table"),
        (DESCRIPTION.replace("32", "8"), "patch_size is 8, but it must be a whole number of at least 16"),
        (DESCRIPTION.replace("32", '"32"'), "patch_size is 32, but it must be a whole number"),
        (DESCRIPTION.replace("32", "32.5"), "patch_size is 32.5, but it must be a whole number"),
        (DESCRIPTION + "stride = 0", "stride is 0, but it must be a whole number of at least 16"),
    ],
)
def test_slips_in_a_description(describe, text, sentence):
    with refused(sentence) as caught:
        describe(text)
    if "letters" not in sentence:
        assert "tiny" in str(caught.value)  # the file is named


def image(folder, id):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / f"{id}.png")


def test_ids_are_sorted_and_never_hidden_files(describe):
    dataset = describe(DESCRIPTION)
    with refused(r"train.images holds no png images: cut the scenes"):
        dataset.ids("train")
    for id in ("b", "a 1", "ä", ".a.123.tmp", "._a", "x.y"):  # a killed writer's leftover, a Mac's shadow file
        image(dataset.images("train"), id)
    assert dataset.ids("train") == ["a 1", "b", "x.y", "ä"]
    with refused('split is "val", but it must be one of train, test'):
        dataset.ids("val")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_image_labels_round_trip(tmp_path_factory, data):
    """Any class names and ids that a file system allows: commas, quotes, spaces, unicode, line separators."""
    characters = st.characters(exclude_characters="/\0\r", exclude_categories=["Cs"])
    ids = data.draw(st.lists(st.text(characters, min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
    names = st.text(min_size=1, max_size=8).filter(
        lambda name: name.isprintable() and name == name.strip() and name != "id"
    )
    classes = data.draw(st.lists(names, min_size=1, max_size=5, unique=True))
    rows = st.lists(st.booleans(), min_size=len(classes), max_size=len(classes)).filter(any)
    labels = {id: np.array(data.draw(rows)) for id in ids}
    path = tmp_path_factory.mktemp("csv") / "image_labels.csv"
    write_image_labels(path, tuple(classes), labels)
    found = read_image_labels(path, tuple(classes), ids)
    assert found.keys() == labels.keys()
    assert all(np.array_equal(found[id], labels[id]) and found[id].dtype == bool for id in ids)


@pytest.fixture
def read(tmp_path):
    """read(text, ids) as the labels of road, roof, tree."""

    def read_text(text, ids=("a", "b")):
        (tmp_path / "image_labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_image_labels(tmp_path / "image_labels.csv", CLASSES, list(ids))

    return read_text


def plain(labels):
    return {id: "".join(str(int(value)) for value in row) for id, row in labels.items()}


def test_a_csv_that_a_person_wrote(read):
    expected = {"a": "100", "b": "011"}
    for text in (
        "id,road,roof,tree\na,1,0,0\nb,0,1,1\n",
        "id,tree,road,roof\na,0,1,0\nb,1,0,1",  # columns in another order, no line at the end
        "\ufeffid,road,roof,tree\r\nb,0,1,1\r\n\r\na,1,0,0\r\n",  # as Excel saves it
        'id, road, roof ,tree\n"a", 1,0,0\nb ,0,1,1\n\n',
    ):
        assert plain(read(text)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must begin with the line id,road,roof,tree, but begins with nothing"),
        (
            "id;road;roof;tree\na;1;0;0\n",
            "must begin with the line id,road,roof,tree, but begins with id;road;roof;tree",
        ),
        ("id,road,roof\na,1,0\n", "must begin with"),
        ("id,road,roof,tree,car\na,1,0,0,0\n", "but begins with id,road,roof,tree,car"),
        ("id,road,roof,roof\na,1,0,0\n", "must begin with"),
        ("name,road,roof,tree\na,1,0,0\n", "must begin with"),
        ("a,1,0,0\nb,0,1,1\n", "must begin with"),
        ("id,road,roof,tree\na,1,0,0\na,1,0,0\n", "line 3: a is given a second time"),
        ("id,road,roof,tree\na,1,0,0\n", "lacks 1 of the images, b for one"),
        ("id,road,roof,tree\n", "lacks 2 of the images, a for one"),
        ("id,road,roof,tree\na,1,0,0\nb,0,1,1\nc,1,1,1\n", "line 4: there is no image c.png"),
        ("id,road,roof,tree\na,1,0,0\nb,0,0,0\n", "line 3: b has no class at all"),
        ("id,road,roof,tree\na,1,0,2\nb,0,1,1\n", "line 2: expected an id and 3 values 0 or 1, found a,1,0,2"),
        ("id,road,roof,tree\na,1,0,\nb,0,1,1\n", "line 2: expected"),
        ("id,road,roof,tree\na,1,0\nb,0,1,1\n", "line 2: expected"),
        ("id,road,roof,tree\na;1;0;0\nb,0,1,1\n", "line 2: expected"),
        ("id,road,roof,tree\na,True,0,0\n", "line 2: expected"),
        (b"id,road,roof,tree\n\xe4,1,0,0\n", "is not a csv text file in UTF-8"),
        (b"\x80\x04\x95 a pickle", "is not a csv text file in UTF-8"),
        ("id,road,roof,tree\n" + "a" * 200_000 + ",1,0,0\n", "is not a csv text file"),
    ],
)
def test_slips_in_a_csv(read, text, sentence):
    with refused(sentence) as caught:
        read(text)
    assert "image_labels.csv" in str(caught.value) and len(str(caught.value)) < 700


def test_all_slips_of_a_csv_are_told_at_once(read):
    lines = ["a,1,0,0", "c,1,0,0", "b,0,0,0", *["d,2,0,0"] * 20]
    with refused("image_labels.csv, line 3: there is no image c.png") as caught:
        read("\n".join(["id,road,roof,tree", *lines]))
    told = str(caught.value).split("\n  ")
    assert len(told) == 11 and told[1] == "line 4: b has no class at all; give it one or remove the image"
    assert told[2].startswith("line 5: expected an id and 3 values") and told[-1] == "and 12 lines more"


def test_a_missing_csv(tmp_path):
    with refused("is missing: run python datasetsprocess/process.py"):
        read_image_labels(tmp_path / "image_labels.csv", CLASSES, ["a"])


def test_the_csv_is_plain(tmp_path):
    write_image_labels(tmp_path / "x.csv", CLASSES, {"b": np.array([0, 1, 1], bool), "a": np.array([1, 0, 0], bool)})
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", *CLASSES], ["a", "1", "0", "0"], ["b", "0", "1", "1"]]
    assert (tmp_path / "x.csv").read_bytes().count(b"\n") == 3
