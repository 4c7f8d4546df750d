"""Label maps and images as files: exact colours, exact round trips, and a sentence for what cannot be read."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tools.command import UserError
from tools.labels import IGNORE, ColourDecoder, colour_keys, load_image, load_label, palette, save_image, save_label

COLOURS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)


@given(
    ids=hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.sampled_from([0, 1, 2, 3, IGNORE])
    )
)
@settings(max_examples=50, deadline=None)
def test_label_round_trip(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("labels") / "a.png"
    save_label(path, ids, COLOURS)
    found = load_label(path, 4)
    assert found.dtype == np.uint8 and np.array_equal(found, ids)
    with Image.open(path) as image:  # in colour in any viewer
        assert image.mode == "P" and np.array_equal(np.array(image.convert("RGB")), palette(COLOURS)[ids])


def test_palette():
    table = palette(COLOURS)
    assert table.shape == (256, 3) and table.dtype == np.uint8 and np.array_equal(table[:4], COLOURS)
    assert table[255].tolist() == [128] * 3 and not table[4:255].any()


def test_every_id_survives(tmp_path):
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ids[ids >= 250] = IGNORE
    save_label(tmp_path / "a.png", ids.T, np.zeros((250, 3), np.uint8))  # a transposed view is no hindrance
    assert np.array_equal(load_label(tmp_path / "a.png", 250), ids.T)


def decode_in_a_loop(rgb, colours, ignored):
    ids, counts = np.full(rgb.shape[:2], IGNORE, np.uint8), {}
    table = {tuple(colour): k for k, colour in enumerate(colours.tolist())} | {
        tuple(colour): IGNORE for colour in ignored.tolist()
    }
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
    found = ColourDecoder(colours, ignored)(rgb, counts)
    ids, expected = decode_in_a_loop(rgb, colours, ignored)
    assert np.array_equal(found, ids)
    assert counts == {**expected, (1, 2, 3): expected.get((1, 2, 3), 0) + 7}
    assert np.array_equal(ColourDecoder(colours, ignored)(rgb), ids)


def test_no_ignored_colours():
    decoder = ColourDecoder(COLOURS, np.empty((0, 3), np.uint8))
    assert decoder(np.array([[[0, 0, 0], [0, 0, 255]]], np.uint8)).tolist() == [[255, 1]]
    assert colour_keys(np.array([255, 1, 2], np.uint8)) == 255 << 16 | 1 << 8 | 2


def refused(sentence):
    return pytest.raises(UserError, match=sentence)


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    found = load_image(path)
    assert np.array_equal(found, pixels) and found.dtype == np.uint8
    for mode, bits in (("L", 8), ("RGBA", 8), ("P", 1), ("1", 1), ("I;16", 16)):
        Image.new(mode, (5, 5)).save(path)
        with refused(rf"a\.png has mode {mode} and {bits} bits, but RGB of 8 bits is expected: convert"):
            load_image(path)
    with refused(r"none\.png is missing"):
        load_image(tmp_path / "none.png")
    with refused("is not a regular file"):
        load_image(tmp_path)


def test_labels_of_another_kind(tmp_path):
    path = tmp_path / "a.png"
    for mode, bits in (("RGB", 8), ("RGBA", 8), ("I;16", 16), ("1", 1), ("LA", 8)):
        Image.new(mode, (5, 5)).save(path)
        with refused(rf"a\.png has mode {mode} and {bits} bits, so it is no map of class ids: make it with"):
            load_label(path, 4)
    Image.fromarray(np.array([[0, 3, 255]], np.uint8)).save(path)  # plain grey serves as well
    assert load_label(path, 4).tolist() == [[0, 3, 255]]
    with refused(r"a\.png holds the class id 3, but there are 3 classes \(0 to 2, and 255 for ignore\)"):
        load_label(path, 3)
    with refused(r"none\.png is missing"):
        load_label(tmp_path / "none.png", 4)


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
        content[data.draw(st.integers(0, min(len(content) - 1, 80)) | st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    file = tmp_path / name
    file.write_bytes(content[: data.draw(st.just(None) | st.integers(0, len(content)))])
    try:
        found = load_image(file) if name == "image.png" else load_label(file, 4)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert found.dtype == np.uint8 and found.ndim == (3 if name == "image.png" else 2)


def test_a_cut_file_is_refused_at_every_length(good, tmp_path):
    content, file = (good / "image.png").read_bytes(), tmp_path / "cut.png"
    for length in range(0, len(content) - 20, 97):  # the last bytes carry no pixel
        file.write_bytes(content[:length])
        with refused(r"cut\.png cannot be read as a PNG image"):
            load_image(file)


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG file by the standard, so that a test may choose what no library writes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (12_000, 12_000)])
def test_an_image_of_giant_size_is_refused_before_it_is_unpacked(tmp_path, width, height):
    file = tmp_path / "giant.png"
    for kind, load in ((2, load_image), (0, lambda path: load_label(path, 4))):
        file.write_bytes(png(width, height, 8, kind, bytes(10_000)))
        with refused(r"giant\.png (cannot be read as a PNG image|has)"):
            load(file)


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_other_depths_are_refused_and_not_scaled_to_8_bits(tmp_path, bits):
    file = tmp_path / "a.png"
    file.write_bytes(png(8, 1, bits, 0, b"\0" + b"\x1b" * bits))
    with refused(rf"a\.png has mode .* and {bits} bits, so it is no map of class ids"):
        load_label(file, 250)
    file.write_bytes(png(1, 1, 16, 2, b"\0" + bytes(6)))
    with Image.open(file) as image:
        assert image.mode == "RGB"  # so the mode does not show it
    with refused(r"a\.png has mode RGB and 16 bits, but RGB of 8 bits"):
        load_image(file)


def test_a_palette_of_few_bits_holds_whole_class_ids(tmp_path):
    ids = np.array([[0, 1, 2, 1]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(COLOURS[:3].tobytes())
    image.save(tmp_path / "a.png", bits=2)
    assert load_label(tmp_path / "a.png", 3).tolist() == ids.tolist()


def test_no_other_format_is_opened_under_the_name_of_a_png(tmp_path, monkeypatch):
    """For an EPS, Pillow would start Ghostscript, which runs the program in the file."""
    file = tmp_path / "a.png"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **named: pytest.fail("Ghostscript"))
    for format in ("EPS", "JPEG", "TIFF", "GIF"):
        Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(file, format=format)
        for load in (load_image, lambda path: load_label(path, 4)):
            with refused(r"a\.png cannot be read as a PNG image"):
                load(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for load in (load_image, lambda path: load_label(path, 4)):
        with refused(r"pipe\.png is not a regular file"):
            load(tmp_path / "pipe.png")


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


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_label(tmp_path / "a.png", np.zeros((2, 2), np.uint8), None)
    assert list(tmp_path.iterdir()) == []
