"""Data set descriptions and image-level labels: what they mean, and one sentence for every slip."""

import csv
import hashlib
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.command import UserError
from tools.dataset import load_dataset
from tools.image_labels import read_image_labels, write_image_labels

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


ISPRS = {
    "ImSurf": (255, 255, 255),
    "Building": (0, 0, 255),
    "LowVeg": (0, 255, 255),
    "Tree": (0, 255, 0),
    "Car": (255, 255, 0),
    "Clutter": (255, 0, 0),
}
ISAID = {
    "background": (0, 0, 0),
    "Ground_Track_Field": (0, 63, 255),
    "Soccer_ball_field": (0, 127, 191),
    "Small_Vehicle": (0, 0, 127),
    "ship": (0, 0, 63),
    "Bridge": (0, 127, 63),
    "basketball_court": (0, 63, 191),
    "baseball_diamond": (0, 63, 0),
    "Roundabout": (0, 191, 127),
    "plane": (0, 127, 255),
    "tennis_court": (0, 63, 127),
    "Large_Vehicle": (0, 127, 127),
    "storage_tank": (0, 63, 63),
    "Harbor": (0, 100, 155),
    "Swimming_pool": (0, 0, 255),
    "Helicopter": (0, 0, 191),
}
AREAS = (
    "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37",
    "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38",
)
TILES = (
    "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 6_8 6_9 6_10 6_11 6_12 7_7 7_8 7_9 7_11 7_12",
    "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13",
)
CROPS = {"rare_class": "Car", "rare_share": 0.1, "crop_side": [0.375, 0.5]}
DROPS = {"min_share": 0.1, "min_share_of": {"Car": 0.025}}
PATCHES = {
    "background": "background",
    "patches_per_scene": [6, 7, 8],
    "tries": 100,
    "max_background": {"train": 0.98, "test": 0.9},
}


@pytest.mark.parametrize(
    ("name", "classes", "patch", "scenes", "rules"),
    [
        ("vaihingen", ISPRS, 128, AREAS, CROPS),
        ("potsdam", ISPRS, 256, TILES, DROPS),
        ("isaid", ISAID, 512, None, PATCHES),
        ("demo", ISPRS, 128, ("1 2 3 4 5 6 7 8 9", "10 11 12"), CROPS),
    ],
)
def test_the_descriptions_that_come_with_the_project(tmp_path, name, classes, patch, scenes, rules):
    """As literals: a slip in a shipped file would change every result without a word."""
    dataset = load_dataset(name, tmp_path)
    assert dict(zip(dataset.classes, map(tuple, dataset.colours.tolist()), strict=True)) == classes
    assert list(classes) == list(dataset.classes)  # the order gives the ids
    assert dataset.patch_size == dataset.stride == patch and dataset.rules == rules
    assert [name for name, scored in zip(dataset.classes, dataset.scored, strict=True) if not scored] == (
        ["Clutter"] if classes is ISPRS else []
    )
    assert dataset.ignore_colours.tolist() == ([[0, 0, 0]] if classes is ISPRS else [])
    expected = {split: names.split() for split, names in zip(("train", "test"), scenes, strict=True)} if scenes else {}
    assert dataset.scenes == expected
    assert not set(expected.get("train", [])) & set(expected.get("test", []))


def test_shipped_constants_of_the_method(tmp_path):
    """Literals of the method's facts, second edition."""
    for name, values in {
        "isaid": (0.6, 0.9, 0.1),
        "vaihingen": (0.7, 0.9, 0.85),
        "potsdam": (0.7, 0.9, 0.85),
        "demo": (0.7, 0.9, 0.85),
    }.items():
        method = load_dataset(name, tmp_path).method
        assert (method.gamma, method.tau_pseudo_labels, method.tau_segmentation) == values, name


def test_constants_of_the_method(describe):
    dataset = describe(DESCRIPTION + "method = {tau_segmentation = 0.3}")
    assert dataset.method_value("tau_segmentation", None) == (0.3, "dataset.toml")
    assert dataset.method_value("tau_segmentation", 0.0) == (0.0, "constant")
    assert dataset.method_value("tau_pseudo_labels", None) == (0.9, "default")
    assert dataset.method_value("gamma", None) == (0.7, "default")
    derived = describe('base = "isaid"\nmethod = {tau_segmentation = 0.3}', "derived")  # key by key
    assert derived.method_value("tau_segmentation", None) == (0.3, "dataset.toml")
    assert derived.method_value("gamma", None) == (0.6, "dataset.toml")
    again = pickle.loads(pickle.dumps(derived))  # as a worker process gets it
    assert again.method_value("gamma", None) == (0.6, "dataset.toml") and again.classes == derived.classes


def test_both_spellings_of_a_colour(describe):
    dataset = describe(
        'patch_size = 32\nclasses = [{name = "a", color = [60, 16, 152]}, {name = "b", colour = "#FEDD3A"}]\n'
        'ignore_colors = ["#000000", [1, 2, 3]]'
    )
    assert dataset.colours.tolist() == [[60, 16, 152], [0xFE, 0xDD, 0x3A]]
    assert dataset.ignore_colours.tolist() == [[0, 0, 0], [1, 2, 3]] and dataset.ignore_colours.dtype == np.uint8
    assert dataset.legend == [("a", [60, 16, 152]), ("b", [254, 221, 58])]


def test_the_background_class(describe, tmp_path):
    assert load_dataset("isaid", tmp_path).background == 0
    assert load_dataset("vaihingen", tmp_path).background is None
    assert describe(DESCRIPTION + 'rules = {background = "tree"}').background == 2
    own_classes = DESCRIPTION.split("classes")[1]
    assert describe('base = "isaid"\nclasses' + own_classes, "derived").background is None  # no such class any more


def test_the_paper_s_figures_are_not_inherited(describe, tmp_path):
    assert load_dataset("vaihingen", tmp_path).paper == {
        "miou": 63.85,
        "share_of_supervised": 89.25,
        "supervised": 71.54,
    }
    assert load_dataset("potsdam", tmp_path).paper["miou"] == 71.20
    assert load_dataset("demo", tmp_path).paper == {} == describe('base = "isaid"').paper


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
    with refused('there is no data set "nothing".*demo, isaid, potsdam, vaihingen.*write .*dataset.toml'):
        describe('base = "nothing"', "e")


def test_a_mistyped_name_lists_the_user_s_own_data_sets_first(describe):
    describe(DESCRIPTION, "fields")
    describe(DESCRIPTION, "roofs")
    with refused(r'no data set "feilds", did you mean fields\? Your own: fields, roofs. With the project: demo, '):
        load_dataset("feilds", describe.root)
    with refused(r'no data set "Vaihingen", did you mean vaihingen\?'):
        load_dataset("Vaihingen", describe.root)
    with refused(r'no data set "zzz". Your own: fields, roofs'):
        load_dataset("zzz", describe.root)


@pytest.mark.parametrize("name", ["../tiny", "a/b", "", ".", "a.b", "tiny\n"])
def test_names_that_leave_the_folder(describe, name):
    with refused("dataset is .* the name of a data set has only letters"):
        load_dataset(name, describe.root)
    with refused("dataset.toml: base is .* the name of a data set has only letters"):
        describe(f"base = {name!r}" if "\n" not in name else 'base = "tiny\\n"', "other")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("patch_size = ", "is not valid TOML"),
        (b"title = \xff\xfe", "is not valid TOML in UTF-8"),
        ("title = " + "[" * 5000, "is not valid TOML"),
        ("x" * 5000 + "." * 5000, "is not valid TOML"),
        ("patch_size = " + "9" * 5000, "is not valid TOML"),
        ("patchsize = 3\n" + DESCRIPTION, r"there is no key patchsize, did you mean patch_size\?"),
        ("depth = 3\n" + DESCRIPTION, "there is no key depth, the keys are base, title, patch_size"),
        ("patch_size = 32", "classes is missing"),
        ("", r"patch_size is missing.*\n.*classes is missing"),
        ("base = 3", "base is 3, but the name of a data set has only letters"),
        ("patch_size = 32\nclasses = []", r"classes is \[\], but it must hold at least 1 value"),
        ('patch_size = 32\nclasses = ["road"]', r'classes\[0\] is "road", but it must be a table'),
        ('patch_size = 32\nclasses = "road"', 'classes is "road", but it must be a list'),
        ('patch_size = 32\nclasses = [{name = "road"}]', r"classes\[0\].colour is missing"),
        (
            'patch_size = 32\nclasses = [{name = "road", colour = [1, 2]}]',
            r"classes\[0\].colour is \[1, 2\], but it must be three whole numbers from 0 to 255",
        ),
        ('patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 256]}]', r"colour is \[1, 2, 256\], but it must be"),
        ('patch_size = 32\nclasses = [{name = "a", colour = [1, 2, true]}]', r"colour is \[1, 2, true\], but it must"),
        ('patch_size = 32\nclasses = [{name = "road", color = "red"}]', 'color is "red", but it must .* "#3C1098"'),
        ('patch_size = 32\nclasses = [{name = "road", color = "#3C109"}]', 'color is "#3C109", but it must be three'),
        (
            'patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 3], color = [1, 2, 3]}]',
            r"there is no key classes\[0\].color",
        ),
        (
            'patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 3]}, {name = "a", colour = [1, 2, 4]}]',
            "two classes are called a: every class needs its own name",
        ),
        (
            'patch_size = 32\nclasses = [{name = "a", colour = [1, 2, 3]}, {name = "b", colour = "#010203"}]',
            r"a and b share the colour \[1, 2, 3\]: every class needs its own colour",
        ),
        ('patch_size = 32\nclasses = [{name = "id", colour = [1, 2, 3]}]', r'name is "id", but a class needs a name'),
        ('patch_size = 32\nclasses = [{name = " a", colour = [1, 2, 3]}]', 'name is " a", but a class needs a name'),
        ('patch_size = 32\nclasses = [{name = "", colour = [1, 2, 3]}]', 'name is "", but a class needs a name'),
        ('patch_size = 32\nclasses = [{name = "a\\nb", colour = [1, 2, 3]}]', "a class needs a name"),
        ("patch_size = 32\nclasses = [{name = 3, colour = [1, 2, 3]}]", "name is 3, but it must be text"),
        (DESCRIPTION + "ignore_colours = [[0, 0, 255]]", r"roof and ignore_colours share the colour \[0, 0, 255\]"),
        (DESCRIPTION + "ignore_colours = [[0, 0]]", r"ignore_colours\[0\] is \[0, 0\], but it must be three"),
        (DESCRIPTION + "ignore_colours = 5", "ignore_colours is 5, but it must be a list"),
        (
            DESCRIPTION + 'left_out_of_mean = ["Clutter"]',
            "left_out_of_mean is Clutter, but it must name some of the classes and not all of them: road, roof, tree",
        ),
        (DESCRIPTION + 'left_out_of_mean = ["road", "roof", "tree"]', "left_out_of_mean is road, roof, tree, but"),
        (DESCRIPTION + "left_out_of_mean = 5", "left_out_of_mean is 5, but it must be a list"),
        (DESCRIPTION + "left_out_of_mean = [[1]]", r"left_out_of_mean\[0\] is \[1\], but it must be text"),
        (DESCRIPTION + "scenes = 5", "scenes is 5, but it must be a table"),
        (DESCRIPTION + "scenes = {train = [1]}", r"scenes.train\[0\] is 1, but it must be text"),
        (DESCRIPTION + "scenes = {val = []}", "there is no key scenes.val, the keys are train, test"),
        (DESCRIPTION + "rules = 5", "rules is 5, but it must be a table"),
        (DESCRIPTION + "rules = {tries = 0}", "rules.tries is 0, but it must be at least 1"),
        (DESCRIPTION + 'rules = {crop_side = "a"}', 'rules.crop_side is "a", but it must be a list'),
        (DESCRIPTION + "rules = {max_background = {val = 1}}", "no key rules.max_background.val, the keys are train"),
        (DESCRIPTION + "rules = {rare_clas = 1}", r"no key rules.rare_clas, did you mean rare_class\?"),
        (DESCRIPTION + "method = {tau = 1}", "there is no key method.tau, the keys are gamma, tau_pseudo"),
        (DESCRIPTION + "method = {gamma = 1.0}", "method.gamma is 1.0, but it must be at most 0.999"),
        (DESCRIPTION + "method = {gamma = nan}", "method.gamma is NaN, but it must be a finite number"),
        (DESCRIPTION + "method = {tau_segmentation = -0.1}", "tau_segmentation is -0.1, but it must be at least"),
        (DESCRIPTION + 'method = {tau_pseudo_labels = "0.9"}', 'labels is "0.9", but it must be a number'),
        (DESCRIPTION + "paper = []", r"paper is \[\], but it must be a table"),
        (DESCRIPTION + "paper = {miou = 60, supervised = 70}", "paper.share_of_supervised is missing"),
        (DESCRIPTION.replace("32", "8"), "patch_size is 8, but it must be at least 16"),
        (DESCRIPTION.replace("32", '"32"'), 'patch_size is "32", but it must be a whole number'),
        (DESCRIPTION.replace("32", "32.5"), "patch_size is 32.5, but it must be a whole number"),
        (DESCRIPTION.replace("32", "true"), "patch_size is true, but it must be a whole number"),
        (DESCRIPTION + "stride = 0", "stride is 0, but it must be at least 16"),
        (DESCRIPTION + "stride = 1979-05-27", 'stride is "1979-05-27", but it must be a whole number'),
    ],
    ids=lambda value: "" if len(value) > 300 else None,
)
def test_slips_in_a_description(describe, text, sentence):
    with refused(sentence) as caught:
        describe(text)
    assert "tiny" in str(caught.value) and len(str(caught.value)) < 700  # the file is named


def test_a_slip_in_the_base_names_the_file_of_the_base(describe):
    describe(DESCRIPTION.replace("32", "8"), "first", load=False)
    with refused("first.dataset.toml: patch_size is 8"):
        describe('base = "first"\nstride = 16', "second")
    assert describe('base = "first"\npatch_size = 24', "second").patch_size == 24


def image(folder, id):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / f"{id}.png")


def test_ids_are_sorted_and_never_hidden_files(describe):
    dataset = describe(DESCRIPTION)
    with refused(r"train.images holds no png images: cut the scenes"):
        dataset.ids("train")
    (dataset.images("train")).mkdir(parents=True)
    with refused(r"train.images holds no png images: cut the scenes"):
        dataset.ids("train")
    for id in ("b", "a 1", "ä", ".a.123.tmp", "._a", "x.y"):  # a killed writer's leftover, a Mac's shadow file
        image(dataset.images("train"), id)
    assert dataset.ids("train") == ["a 1", "b", "x.y", "ä"]
    with refused('split is "val", but it must be one of train, test'):
        dataset.ids("val")


def test_files_that_a_later_step_cannot_use(describe):
    """Refused where every step asks for its images; each with what to do."""
    dataset = describe(DESCRIPTION)
    folder = dataset.images("train")
    image(folder, "good")
    longest = os.pathconf(folder, "PC_NAME_MAX") - len("..4194304.tmp.npz")
    image(folder, "l" * longest)
    assert dataset.ids("train") == ["good", "l" * longest]
    write_image_labels(folder / f"{'l' * longest}.npz", CLASSES, {})  # a result of this name can be written
    folder.joinpath(f"{'l' * longest}.npz").unlink()
    image(folder, "Contact_Sheet")
    image(folder, "l" * (longest + 1))
    (folder / "good.png").rename(folder / "good.PNG")
    (folder / "a folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to(folder / "missing")
    with open(os.path.join(os.fsencode(folder), b"latin \xe4.png"), "wb"):
        pass
    with refused("has files that the steps cannot use") as caught:
        dataset.ids("train")
    faults = str(caught.value).split("\n  ")[1:]
    for part in (
        "Contact_Sheet.png has the name that every step gives to its overview picture: rename the file",
        f"the name {'l' * 40}... has {longest + 1} bytes, but at most {longest} are possible: shorten it",
        "good.PNG ends in .PNG: rename it to good.png",
        "a folder.png is not a regular file",
        "pipe.png is not a regular file: replace it by an image, or remove it",
        "nowhere.png is not a regular file",
        r"the name 'latin \udce4.png' is not UTF-8: rename the file",
    ):
        assert sum(part in fault for fault in faults) == 1, part
    assert len(faults) == 7


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
        ("", "must begin with the line id,road,roof,tree, but it begins with nothing"),
        (
            "id;road;roof;tree\na;1;0;0\n",
            "must begin with the line id,road,roof,tree, but it begins with id;road;roof;tree",
        ),
        ("id,road,roof\na,1,0\n", "must begin with .*: the column of tree is missing"),
        ("id,road,Roof,tree\na,1,0,0\n", ": Roof is called roof in dataset.toml; change the name in one of the two"),
        ("id,tree,path,roof\na,1,0,0\n", ": path is called road in dataset.toml; change"),  # in another order
        ("id,Road,roof,Tree\n", ": Road is called road and Tree is called tree in dataset.toml"),
        ("id,tree,path,dach\n", ": the column of road, roof is missing; dataset.toml has no class path, dach"),
        ("id,road,roof,tree,road\n", ": a class has two columns"),
        ("id,road,roof,tree,car\na,1,0,0,0\n", "but it begins with id,road,roof,tree,car"),
        ("id,road,roof,roof\na,1,0,0\n", "must begin with"),
        ("name,road,roof,tree\na,1,0,0\n", "must begin with"),
        ("a,1,0,0\nb,0,1,1\n", "must begin with"),
        ("id,road,roof,tree\na,1,0,0\na,1,0,0\n", "line 3: a is listed a second time"),
        ("id,road,roof,tree\na,1,0,0\n", "has no line for 1 of the images, for example b: add the lines"),
        ("id,road,roof,tree\n", "has no line for 2 of the images, for example a"),
        ("id,road,roof,tree\na,1,0,0\nb,0,1,1\nc,1,1,1\n", "line 4: there is no image images/c.png"),
        ("id,road,roof,tree\na,1,0,0\nb,0,0,0\n", "line 3: b has no class"),
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
    with refused("image_labels.csv, line 3: there is no image images/c.png") as caught:
        read("\n".join(["id,road,roof,tree", *lines]))
    told = str(caught.value).split("\n  ")
    assert len(told) == 11 and told[1] == "line 4: b has no class: give it at least one, or remove the image"
    assert told[2].startswith("line 5: expected an id and 3 values") and told[-1] == "and 12 more"


def test_a_missing_csv(tmp_path):
    for make in (lambda path: None, os.mkfifo):  # a pipe would be read for ever
        make(tmp_path / "image_labels.csv")
        with refused("is missing: run python datasetsprocess/process.py"):
            read_image_labels(tmp_path / "image_labels.csv", CLASSES, ["a"])


def test_the_hash_of_the_labels(describe):
    dataset = describe(DESCRIPTION)
    with refused("image_labels.csv is missing: run python"):
        dataset.image_labels_hash("train")
    file = dataset.image_labels_file("train")
    file.parent.mkdir()
    file.write_bytes(b"id,road\n")
    assert dataset.image_labels_hash("train") == hashlib.sha256(b"id,road\n").hexdigest()


def test_the_csv_is_plain(tmp_path):
    write_image_labels(tmp_path / "x.csv", CLASSES, {"b": np.array([0, 1, 1], bool), "a": np.array([1, 0, 0], bool)})
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", *CLASSES], ["a", "1", "0", "0"], ["b", "0", "1", "1"]]
    assert (tmp_path / "x.csv").read_bytes().count(b"\n") == 3
