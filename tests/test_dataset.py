"""Data set descriptions and image-level labels: what they mean, and one sentence for every slip."""

import csv
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tools.command import UserError
from tools.dataset import load_dataset
from tools.description import Method
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
        return load_dataset(name, tmp_path) if load else None

    write.root = tmp_path
    return write


def refused(words):
    """The error has these words in this order."""
    return pytest.raises(UserError, match=rf"(?s){words}")


def test_a_description(describe):
    dataset = describe(
        DESCRIPTION + 'left_out_of_mean = ["tree"]\nignore_colours = [[0, 0, 0]]\nscenes = {train = ["1"]}'
    )
    assert (dataset.name, dataset.title, dataset.patch_size, dataset.stride) == ("tiny", "Tiny", 32, 32)
    assert dataset.classes == CLASSES and dataset.num_classes == 3 and dataset.colours.dtype == np.uint8
    assert dataset.colours.tolist() == [[255, 255, 255], [0, 0, 255], [0, 255, 0]]
    assert dataset.ignore_colours.tolist() == [[0, 0, 0]]
    assert dataset.scored.tolist() == [True, True, False] and dataset.scenes == {"train": ["1"]}
    assert dataset.images("test") == describe.root / "datasets" / "tiny" / "test" / "images"


def test_constants_of_the_method(describe):
    dataset = describe(DESCRIPTION + "method = {tau_segmentation = 0.3}")
    assert dataset.method_value("tau_segmentation", None) == (0.3, "dataset.toml")
    assert dataset.method_value("tau_segmentation", 0.0) == (0.0, "constant")
    assert dataset.method_value("tau_pseudo_labels", None) == (0.9, "default") and Method().tau_segmentation == 0.9
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


def test_the_paper_s_figures_are_not_inherited(describe):
    assert describe('base = "isaid"').paper == {}


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
    describe('base = "a"', "b", load=False)
    with refused(r"a -> b -> a"):
        load_dataset("a", describe.root)
    with refused(r"d -> d"):
        describe('base = "d"', "d")
    with refused('"nothing".*demo, isaid, potsdam, vaihingen.*dataset.toml'):
        describe('base = "nothing"', "e")


def test_a_mistyped_name_lists_the_user_s_own_data_sets_first(describe):
    for name in ("fields", "roofs"):
        describe(DESCRIPTION, name)
    for name, words in (("feilds", "fields.*fields, roofs.*demo"), ("Vaihingen", "vaihingen"), ("zzz", "roofs")):
        with refused(words):
            load_dataset(name, describe.root)


@pytest.mark.parametrize("name", ["../tiny", "a/b", "", ".", "tiny\n"])
def test_names_that_leave_the_folder(describe, name):
    with refused("dataset is .* letters"):
        load_dataset(name, describe.root)
    with refused("dataset.toml: base is .* letters"):
        describe(f"base = {json.dumps(name)}", "other")


def one_class(**keys):
    """A description whose first class has these keys, a TOML value each."""
    entry = {"name": '"a"', "colour": "[1, 2, 3]"} | keys
    return f"patch_size = 32\nclasses = [{{{', '.join(f'{key} = {value}' for key, value in entry.items())}}}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patch_size = ", "TOML"),
        (b"title = \xff\xfe", "TOML in UTF-8"),
        ("title = " + "[" * 5000, "TOML"),
        ("x" * 5000 + "." * 5000, "TOML"),
        ("patch_size = " + "9" * 5000, "TOML"),
        ("patchsize = 3\n" + DESCRIPTION, "patchsize, .*patch_size"),
        ("depth = 3\n" + DESCRIPTION, "depth, .*base, title, patch_size"),
        ("", "patch_size is missing.*classes is missing"),
        ("base = 3", "base is 3.*letters"),
        ("patch_size = 32\nclasses = []", r"classes is \[\].*1 value"),
        ('patch_size = 32\nclasses = ["road"]', r'classes\[0\] is "road".*table'),
        ('patch_size = 32\nclasses = [{name = "road"}]', r"classes\[0\].colour is missing"),
        *((one_class(colour=value), "colour is .*0 to 255") for value in ("[1, 2]", "[1, 2, 256]", "[1, 2, true]")),
        *((one_class(colour=value), "colour is .*#") for value in ('"red"', '"#3C109"')),
        (one_class(color="[1, 2, 3]"), r"key classes\[0\].color"),
        (one_class()[:-1] + ', {name = "a", colour = [1, 2, 4]}]', "two classes are called a"),
        (one_class()[:-1] + ', {name = "b", colour = "#010203"}]', r"a and b .*\[1, 2, 3\]"),
        *((one_class(name=name), "name is .*a name") for name in ('"id"', '" a"', '""', '"a\\nb"')),
        (one_class(name="3"), "name is 3.*text"),
        (DESCRIPTION + "ignore_colours = [[0, 0, 255]]", "roof and ignore_colours"),
        (DESCRIPTION + "ignore_colours = [[0, 0]]", r"ignore_colours\[0\]"),
        (DESCRIPTION + 'left_out_of_mean = ["Clutter"]', "left_out_of_mean is Clutter.*road, roof, tree"),
        (DESCRIPTION + 'left_out_of_mean = ["road", "roof", "tree"]', "left_out_of_mean is road, roof, tree"),
        (DESCRIPTION + "scenes = {train = [1]}", r"scenes.train\[0\] is 1"),
        (DESCRIPTION + "scenes = {val = []}", "scenes.val, .*train, test"),
        (DESCRIPTION + "rules = {tries = 0}", "rules.tries is 0.*at least 1"),
        (DESCRIPTION + "rules = {max_background = {val = 1}}", "rules.max_background.val, .*train"),
        (DESCRIPTION + "rules = {rare_clas = 1}", "rules.rare_clas, .*rare_class"),
        (DESCRIPTION + "method = {tau = 1}", "method.tau, .*gamma, tau_pseudo"),
        (DESCRIPTION + "method = {gamma = 1.0}", "method.gamma is 1.0.*0.999"),
        (DESCRIPTION + "method = {gamma = nan}", "method.gamma is NaN.*finite"),
        (DESCRIPTION + "paper = {miou = 60, supervised = 70}", "paper.share_of_supervised is missing"),
        (DESCRIPTION.replace("32", "8"), "patch_size is 8.*at least 16"),
        (DESCRIPTION.replace("32", '"32"'), 'patch_size is "32".*whole number'),
        (DESCRIPTION + "stride = 1979-05-27", 'stride is "1979-05-27".*whole number'),
    ],
    ids=lambda value: "" if len(value) > 300 else None,
)
def test_slips_in_a_description(describe, text, words):
    with refused(words) as caught:
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
    with refused("train.images holds no png images"):
        dataset.ids("train")
    for id in ("b", "a 1", "ä", ".a.123.tmp", "._a", "x.y"):  # a killed writer's leftover, a Mac's shadow file
        image(dataset.images("train"), id)
    assert dataset.ids("train") == ["a 1", "b", "x.y", "ä"]
    with refused('split is "val".*train, test'):
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
    with refused("files that the steps cannot use") as caught:
        dataset.ids("train")
    faults = sorted(str(caught.value).split("\n  ")[1:])
    parts = ("Contact_Sheet.png", "a folder.png", "good.png", "nowhere.png", "pipe.png", f"at most {longest}", "UTF-8")
    assert len(faults) == 7 and all(sum(part in fault for fault in faults) == 1 for part in parts)


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
    result = read_image_labels(path, tuple(classes), ids)
    assert result.keys() == labels.keys()
    assert all(np.array_equal(result[id], labels[id]) and result[id].dtype == bool for id in ids)


@pytest.fixture
def read(tmp_path):
    """read(text, ids) as the labels of road, roof, tree."""

    def read_text(text, ids=("a", "b")):
        (tmp_path / "image_labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_image_labels(tmp_path / "image_labels.csv", CLASSES, list(ids))

    return read_text


def plain(labels):
    return {id: "".join(map(str, row.astype(int))) for id, row in labels.items()}


def test_a_csv_that_a_person_wrote(read):
    expected = {"a": "100", "b": "011"}
    for text in (
        "id,road,roof,tree\na,1,0,0\nb,0,1,1\n",
        "id,tree,road,roof\na,0,1,0\nb,1,0,1",  # columns in another order, no line at the end
        "\ufeffid,road,roof,tree\r\nb,0,1,1\r\n\r\na,1,0,0\r\n",  # as Excel saves it
        "\ufeffid,road,roof,tree,,\r\na,1,0,0,,\r\nb,0,1,1\r\n,,,,,\r\n",  # with columns and lines that it adds
        'id, road, roof ,tree\n"a", 1,0,0\nb ,0,1,1\n\n',
    ):
        assert plain(read(text)) == expected


FIRST = "id,road,roof,tree\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with the line id,road,roof,tree, .*nothing"),
        ("id;road;roof;tree\na;1;0;0\n", "semicolons"),
        ("id\troad\troof\ttree\n", "tabs"),
        ("sep=,\n" + FIRST, "sep="),
        ("id,road,roof\na,1,0\n", "column of tree is missing"),
        ("id,road,Roof,tree\na,1,0,0\n", "Roof is called roof"),
        ("id,tree,path,roof\na,1,0,0\n", "path is called road"),  # in another order
        ("id,Road,roof,Tree\n", "Road is called road and Tree is called tree"),
        ("id,tree,path,dach\n", "column of road, roof is missing.*no class path, dach"),
        ("id,road,roof,tree,car\na,1,0,0,0\n", "no class car"),
        *((f"id,road,roof,{names}\n", "two columns|column of tree") for names in ("tree,road", "roof")),
        ("name,road,roof,tree\na,1,0,0\n", "must begin with"),
        ("a,1,0,0\nb,0,1,1\n", "must begin with"),
        (FIRST + "a,1,0,0\na,1,0,0\n", "line 3: a .*second time"),
        (FIRST + "a,1,0,0\n", "no line for 1 .*example b"),
        (FIRST + "a,1,0,0\nb,0,1,1\nc,1,1,1\n", "line 4: .*images/c.png"),
        (FIRST + "a.png,1,0,0\n", "line 2: .*write a without the suffix"),
        (FIRST + "01. Jan,1,0,0\n", "line 2: .*spreadsheet"),
        (FIRST + "a,1,0,0\nb,0,0,0\n", "line 3: b has no class"),
        *((FIRST + f"{row}\nb,0,1,1\n", "line 2: expected .*a,1,0") for row in ("a,1,0,2", "a,1,0,", "a,1,0")),
        *((FIRST + f"{row}\nb,0,1,1\n", "line 2: expected .*write 1") for row in ("a;1;0;0", "a,True,0,0")),
        (FIRST.encode() + b"\xe4,1,0,0\n", "UTF-8"),
        (FIRST.encode("utf-16"), "UTF-8"),
        (b"\x80\x04\x95 a pickle", "UTF-8"),
        (FIRST + "a" * 200_000 + ",1,0,0\n", "not a csv"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[-18:],
)
def test_slips_in_a_csv(read, text, words):
    with refused(words) as caught:
        read(text)
    assert "image_labels.csv" in str(caught.value) and len(str(caught.value)) < 700


def test_all_slips_of_a_csv_are_reported_at_once(read):
    lines = ["a,1,0,0", "c,1,0,0", "b,0,0,0", *["d,2,0,0"] * 20]
    with refused("line 3: .*line 4: b .*line 5: .*and 12 more") as caught:
        read("\n".join(["id,road,roof,tree", *lines]))
    assert str(caught.value).count("\n") == 10


def test_a_missing_csv(tmp_path):
    for make in (lambda path: None, os.mkfifo):  # a pipe would be read for ever
        make(tmp_path / "image_labels.csv")
        with refused("is missing: run python datasetsprocess/process.py"):
            read_image_labels(tmp_path / "image_labels.csv", CLASSES, ["a"])


def test_the_csv_is_plain(tmp_path):
    write_image_labels(tmp_path / "x.csv", CLASSES, {"b": np.array([0, 1, 1], bool), "a": np.array([1, 0, 0], bool)})
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.reader(file)) == [["id", *CLASSES], ["a", "1", "0", "0"], ["b", "0", "1", "1"]]
    assert (tmp_path / "x.csv").read_bytes().count(b"\n") == 3
