"""SAM's models from checkpoint files: the three official files, or other weights of the same three sizes."""

import hashlib
import socket
import sys
from pathlib import Path

from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch.hub import download_url_to_file

from tools.checkpoints import read_tensors
from tools.command import UserError, check

URL = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {  # model -> file, SHA-256
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
}
HASHES = dict(OFFICIAL.values())
STAND_IN = "use --generator felzenszwalb, a stand-in that needs no checkpoint"


def find_checkpoint(model: str, checkpoint: str, root: Path, download: bool = False) -> Path:
    """The checkpoint file of a model; `download` fetches a missing one. Files of official names are checked by SHA-256.

    Raises `UserError` when the file is missing (saying where to get it), or is not the file that its name promises.
    """
    name, sha256 = OFFICIAL[model]
    path = Path(checkpoint) if checkpoint else Path(root) / "weights" / name
    if not path.exists():
        check(
            download,
            f"{path} is missing: get it from {URL}{name} (SHA-256 {sha256}), or add --download, or {STAND_IN}",
        )
        fetch(URL + name, path, sha256)
    elif path.name in HASHES:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        check(
            actual == HASHES[path.name],
            f"{path} is damaged or another file (its SHA-256 is {actual}, not {HASHES[path.name]}): "
            f"delete it and get it again from {URL}{path.name}",
        )
    return path


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file; it appears at `path` only when it is complete and has this SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60)  # else a connection that stalls is waited for without end
    try:
        download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: another SHA-256
        raise UserError(
            f"{url} could not be fetched ({error}): try again, download it by other means to {path}, or {STAND_IN}"
        ) from None


def load_sam(model: str, path: Path) -> Sam:
    """The model of a checkpoint file on the CPU, in eval mode. `model`: vit_h, vit_l or vit_b.

    Raises `UserError` when the file cannot be read or holds a model of another size.
    """
    state = read_tensors(path, "get it again")
    sam = sam_model_registry[model]()
    try:
        sam.load_state_dict(state)
    except (TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path} does not hold a {model} model ({reason}): choose the --model that the file was made for, or "
            "another file"
        ) from None
    return sam
