"""Write a web page on which a person labels the train patches by clicking. It needs no server and no network.

The page lies beside the images that it shows and opens in any browser. The work is kept in the browser and leaves it
as image_labels.csv, which process.py checks. An image_labels.csv that already exists is loaded into the page.

With --review the page also shows what the classifier of an experiment says about every patch, and lists first the
patches where the classifier contradicts the label. A classifier agrees with the labels that it was trained on, wrong
ones included; docs/own_data.md says how many of them it finds.

Reads   <root>/datasets/<dataset>/train/images/<id>.png and, if it exists, image_labels.csv
        <root>/experiments/<dataset>/<review>/cams/<id>.npz, with --review
Writes  <root>/datasets/<dataset>/train/label_images.html

Command: python datasetsprocess/label_page.py --dataset fields
"""

import base64
import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.command import run
from tools.constants import ROOT, checked_constants
from tools.dataset import Dataset, load_dataset
from tools.files import write_whole
from tools.image_labels import read_image_labels
from tools.pages import page_template
from tools.steps import command_line


@checked_constants
class Constants:
    dataset: str = "fields"  # the name of your own dataset.toml
    review: str = ""  # an experiment whose classifier checks the labels; empty: none
    root: Path = ROOT  # folder that holds datasets/ and experiments/


def digest(content: str) -> str:
    """The hash by which a Content-Security-Policy allows one script or style and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def page_data(dataset: Dataset, labels: dict[str, np.ndarray], logits: dict[str, np.ndarray], command: str) -> dict:
    """What the page holds: the patches in the order of image_labels.csv, and what is known of each.

    labels: id -> (K,) bool, of some patches; logits: id -> (K,) float, of some patches, empty without a review;
    command: the one that checks the exported labels.
    """
    ids = dataset.ids("train")
    values = [logits[id].astype(float).round(2).tolist() if id in logits else None for id in ids]
    written = ["".join(map(str, labels[id].astype(int))) if id in labels else "" for id in ids]
    return {
        "name": dataset.name,
        "classes": dataset.classes,
        "colours": dataset.colours.tolist(),
        "patch_size": dataset.patch_size,
        "stride": dataset.stride,
        "ids": ids,
        "labels": written,
        "version": digest("\n".join(written)),  # by which the page recognises a changed image_labels.csv
        "logits": values if logits else None,
        "command": command,
    }


def main(args: Constants) -> None:
    dataset = load_dataset(args.dataset, args.root)
    ids, file = dataset.ids("train"), dataset.image_labels_file("train")
    labels = read_image_labels(file, dataset.classes, ids, unfinished=True) if file.exists() else {}
    logits = {}
    if args.review:
        from tools.review import read_logits  # only here: torch takes seconds to load
        from tools.step import experiment_folder, require

        cams = experiment_folder(args.root, args.dataset, args.review) / "cams"
        require(cams, args, experiment=args.review)
        logits = read_logits(cams, ids, dataset.num_classes)
    data = page_data(dataset, labels, logits, command_line("datasetsprocess/process.py", args))
    page = page_template(Path(__file__).with_name("label_page.html.j2"), digest=digest).render(
        title=dataset.title, data=data
    )
    path = dataset.folder / "train" / "label_images.html"
    with write_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{path}: {len(ids)} patches, {len(labels)} of them labelled")
    print(f"open it in a browser: {path.resolve().as_uri()}")


if __name__ == "__main__":
    run(main, Constants, __doc__, one_process=True)
