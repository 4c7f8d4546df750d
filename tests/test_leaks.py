"""Under the clean protocol nothing that comes from the truth of the test split reaches a result."""

import shutil

import numpy as np

from tests.conftest import TINY_COLOURS
from tests.steps import TEST, experiment
from tools.labels import load_label, save_label


def test_step_7_reads_no_image_level_label_of_the_test_split(copy, run_script):
    """The labels of test images come from their truth: with false ones, and without any, every byte is the same."""
    test, folder = copy / "datasets" / "tiny" / "test", experiment(copy) / "refined_segmentation"
    for id in TEST:  # a segmentation with several classes, which an untrained model may not give
        label = np.roll(load_label(test / "labels" / f"{id}.png", 3), 5, axis=(0, 1))
        save_label(experiment(copy) / "segmentation" / f"{id}.png", label, TINY_COLOURS)
    true_labels = (test / "image_labels.csv").read_text()
    false_labels = "id,ground,roof,tree\n" + "".join(f"{id},0,0,1\n" for id in TEST)

    def results(protocol, labels):
        (test / "image_labels.csv").write_text(labels) if labels else (test / "image_labels.csv").unlink()
        words = ["--protocol", protocol, "--tau", 0.3, "--overwrite", "--workers", 0]
        run_script("generate_refined_seg.py", "--dataset", "tiny", "--root", copy, *words)
        return [(folder / f"{id}.png").read_bytes() for id in TEST]

    assert results("released", false_labels) != results("released", true_labels)  # false labels can be felt
    expected = results("clean", true_labels)
    assert results("clean", false_labels) == expected
    shutil.rmtree(test / "labels")
    assert results("clean", None) == expected
