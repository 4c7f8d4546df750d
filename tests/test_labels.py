"""Label maps and images as files: exact colours, exact round trips, and a sentence for what cannot be read."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tests.tiffs import png
from tools.command import UserError
from tools.labels import IGNORE, ColourDecoder, load_image, load_label, palette, save_image, save_label

COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)


@given(ids=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 255)))
@settings(max_examples=50, deadline=None)
def test_label_round_trip(tmp_path_factory, ids):
    path, ids = tmp_path_factory.mktemp("labels") / "a.png", np.where(ids >= 250, IGNORE, ids).T  # a view of any kind
    colours = np.random.default_rng(0).integers(0, 256, (250, 3)).astype(np.uint8)
    save_label(path, ids, colours)
    label = load_label(path, 250)
    assert label.dtype == np.uint8 and np.array_equal(label, ids)
    with Image.open(path) as image:  # in colour in any viewer
        assert image.mode == "P" and np.array_equal(np.array(image.convert("RGB")), palette(colours)[ids])


def test_palette():
    table = palette(COLOURS)
    assert table.shape == (256, 3) and table.dtype == np.uint8 and np.array_equal(table[:4], COLOURS)
    assert table[255].tolist() == [128] * 3 and not table[4:255].any()


def decode_in_a_loop(rgb, colours, ignored):
    ids, counts = np.full(rgb.shape[:2], IGNORE, np.uint8), {}
    table = {tuple(colour): k for k, colour in enumerate(colours.tolist())}
    table |= {tuple(colour): IGNORE for colour in ignored.tolist()}
    for y, x in np.ndindex(ids.shape):
        colour = tuple(rgb[y, x].tolist())
        if colour in table:
            ids[y, x] = table[colour]
        else:
            counts[colour] = counts.get(colour, 0) + 1
    return ids, counts


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_colours_are_decoded_exactly(seed):
    """Also the neighbours of the class colours, one grey value away, which a careless decoder takes for the class."""
    rng = np.random.default_rng(seed)
    colours = np.unique(rng.integers(0, 256, (18, 3), dtype=np.uint8), axis=0)
    rng.shuffle(colours)
    colours, ignored = colours[:-2], colours[-2:]
    near = (colours.astype(int) + rng.integers(-1, 2, colours.shape)).clip(0, 255).astype(np.uint8)
    rgb = np.concatenate([colours, ignored, near, colours[:, ::-1]])[rng.integers(0, 2 * len(colours), (30, 31))]
    counts = {(1, 2, 3): 7}
    ids, unknown = decode_in_a_loop(rgb, colours, ignored)
    assert np.array_equal(ColourDecoder(colours, ignored)(rgb, counts), ids)
    assert counts == {**unknown, (1, 2, 3): unknown.get((1, 2, 3), 0) + 7}
    assert np.array_equal(ColourDecoder(colours, ignored)(rgb), ids)


def test_no_ignored_colours():
    decoder = ColourDecoder(COLOURS, np.empty((0, 3), np.uint8))
    assert decoder(np.array([[[0, 0, 0], [0, 0, 255]]], np.uint8)).tolist() == [[255, 1]]


def refused(words):
    return pytest.raises(UserError, match=words)


def load_id(path):
    return load_label(path, 4)


@pytest.mark.parametrize("load", [load_image, load_id])
def test_files_that_cannot_be_read_at_all(tmp_path, load):
    with refused(r"none\.png is missing"):
        load(tmp_path / "none.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with refused(r"pipe\.png is not a regular file"):
            load(tmp_path / "pipe.png")
    with refused("is not a regular file"):
        load(tmp_path)


def test_images_of_another_kind(tmp_path):
    path = tmp_path / "a.png"
    for mode, bits in (("L", 8), ("RGBA", 8), ("P", 1), ("1", 1), ("I;16", 16)):
        Image.new(mode, (5, 5)).save(path)
        with refused(rf"a\.png has mode {mode} and {bits} bits, but RGB"):
            load_image(path)


def test_labels_of_another_kind(tmp_path):
    path = tmp_path / "a.png"
    for mode, bits in (("RGB", 8), ("RGBA", 8), ("I;16", 16), ("1", 1), ("LA", 8)):
        Image.new(mode, (5, 5)).save(path)
        with refused(rf"a\.png has mode {mode} and {bits} bits, .*class ids"):
            load_label(path, 4)
    Image.fromarray(np.array([[0, 3, 255]], np.uint8)).save(path)  # plain grey serves as well
    assert load_label(path, 4).tolist() == [[0, 3, 255]]
    with refused(r"a\.png .*class id 3, .*3 classes"):
        load_label(path, 3)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "image.png")
    save_label(folder / "label.png", rng.integers(0, 4, (40, 40)).astype(np.uint8), COLOURS)
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["image.png", "label.png"]))
def test_damaged_files_never_end_in_a_traceback(good, tmp_path, data, name):
    """Cut or with bytes changed anywhere: it is read as something of a legal kind, or refused with the file's name."""
    content = bytearray((good / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 80)) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    file = tmp_path / name
    file.write_bytes(content[: data.draw(st.just(None) | st.integers(0, len(content)))])
    try:
        array = load_image(file) if name == "image.png" else load_id(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert array.dtype == np.uint8 and array.ndim == (3 if name == "image.png" else 2)


def test_a_cut_file_is_refused_at_every_length(good, tmp_path):
    content, file = (good / "image.png").read_bytes(), tmp_path / "cut.png"
    for length in range(0, len(content) - 20, 97):  # the last bytes carry no pixel
        file.write_bytes(content[:length])
        with refused(r"cut\.png cannot be read as a PNG image"):
            load_image(file)


@pytest.mark.parametrize("side", [100_000, 12_000])
@pytest.mark.parametrize(("kind", "load"), [(2, load_image), (0, load_id)])
def test_an_image_of_giant_size_is_refused_before_it_is_unpacked(tmp_path, side, kind, load):
    (tmp_path / "giant.png").write_bytes(png(side, side, 8, kind, bytes(10_000)))
    with refused(r"giant\.png (cannot be read as a PNG image|has)"):
        load(tmp_path / "giant.png")


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_other_depths_are_refused_and_not_scaled_to_8_bits(tmp_path, bits):
    file = tmp_path / "a.png"
    file.write_bytes(png(8, 1, bits, 0, b"\0" + b"\x1b" * bits))
    with refused(rf"a\.png has mode .* and {bits} bits"):
        load_label(file, 250)
    file.write_bytes(png(1, 1, 16, 2, b"\0" + bytes(6)))
    with Image.open(file) as image:
        assert image.mode == "RGB"  # so the mode does not show it
    with refused(r"a\.png has mode RGB and 16 bits"):
        load_image(file)


def test_a_palette_of_few_bits_holds_whole_class_ids(tmp_path):
    ids = np.array([[0, 1, 2, 1]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(COLOURS[:3].tobytes())
    image.save(tmp_path / "a.png", bits=2)
    assert load_label(tmp_path / "a.png", 3).tolist() == ids.tolist()


@pytest.mark.parametrize("load", [load_image, load_id])
def test_no_other_format_is_opened_under_the_name_of_a_png(tmp_path, monkeypatch, load):
    """For an EPS, Pillow would start Ghostscript, which runs the program in the file."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **named: pytest.fail("Ghostscript"))
    for format in ("EPS", "JPEG", "TIFF", "GIF"):
        Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "a.png", format=format)
        with refused(r"a\.png cannot be read as a PNG image"):
            load(tmp_path / "a.png")


def test_images_are_written_small_and_exact(tmp_path):
    """Of a smooth image with noise, as photographs are, the file is no larger than Pillow's usual one."""
    random, ramp = np.random.default_rng(0), np.linspace(0, 200, 256)
    image = (ramp[:, None, None] / 2 + ramp[None, :, None] / 2 + random.normal(0, 4, (256, 256, 3))).clip(0, 255)
    image = image.astype(np.uint8)
    save_image(tmp_path / "a.png", image)
    Image.fromarray(image).save(tmp_path / "b.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), image)
    assert (tmp_path / "a.png").stat().st_size < 1.05 * (tmp_path / "b.png").stat().st_size
    save_image(tmp_path / "a.png", image[::-2, ::3])  # a view of any kind
    assert np.array_equal(load_image(tmp_path / "a.png"), image[::-2, ::3])
