"""Under the clean protocol nothing that comes from the truth of the test split reaches a result."""

import shutil

from tests.steps import STEPS, TEST, experiment, options, same_results


def test_step_7_reads_no_image_level_label_of_the_test_split(finished, copy, run_script):
    """The labels of test images come from their truth: with false ones, and without any, every byte is the same."""
    name, constants, _, suffix = STEPS["generate_refined_seg"]
    folder, file = experiment(copy) / name, copy / "datasets" / "tiny" / "test" / "image_labels.csv"
    command = ["generate_refined_seg.py", "--dataset", "tiny", "--root", copy, *options(constants), "--overwrite"]
    false_labels = "id,ground,roof,tree\n" + "".join(f"{id},0,0,1\n" for id in TEST)
    assert sorted(file.read_text()) != sorted(false_labels)
    file.write_text(false_labels)
    run_script(*command)
    assert same_results(folder, experiment(finished) / name, suffix)
    # the false labels would have been felt
    run_script(*command, "--protocol", "released")
    assert not same_results(folder, experiment(finished) / name, suffix)
    file.unlink()
    shutil.rmtree(copy / "datasets" / "tiny" / "test" / "labels")
    run_script(*command)
    assert same_results(folder, experiment(finished) / name, suffix)
