"""SAM models: the three official checkpoints by name, and files of other sizes that hold their sizes themselves."""

import hashlib
import urllib.request
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, validate_call
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from tqdm import tqdm

from tools.command import UserError, check
from tools.files import write_whole

URL = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {  # model -> file, SHA-256
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
}
SIZES: dict[str, dict[str, Any]] = {
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_attention": [7, 15, 23, 31]},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attention": [5, 11, 17, 23]},
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attention": [2, 5, 8, 11]},
}
HASHES = {file: sha256 for file, sha256 in OFFICIAL.values()}
STAND_IN = "use --generator felzenszwalb, a stand-in that needs no checkpoint"
OTHER_FILE = "choose the --model that the file was made for, or another file"


@validate_call
def build_sam(
    *,
    embed_dim: Annotated[int, Field(ge=1, le=4096)],
    depth: Annotated[int, Field(ge=1, le=128)],
    num_heads: Annotated[int, Field(ge=1, le=128)],
    global_attention: list[int],
    image_size: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] = 1024,
    window_size: Annotated[int, Field(ge=1, le=256)] = 14,
    prompt_dim: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = 256,
    decoder_mlp_dim: Annotated[int, Field(ge=1, le=16384)] = 2048,
) -> Sam:
    """A `Sam` of segment-anything with random weights: the encoder's sizes, and SAM's own for everything else.

    `global_attention` lists the encoder blocks that attend to the whole image; the others attend to windows of
    `window_size` x `window_size` cells of 16 x 16 pixels. Raises `ValueError` for sizes that do not make a model.
    """
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim is {embed_dim}, which num_heads, {num_heads}, does not divide")
    if not set(global_attention) <= set(range(depth)):
        raise ValueError(f"global_attention is {global_attention}, but the blocks are numbered 0 to {depth - 1}")
    patch = 16
    embedding_size = (image_size // patch, image_size // patch)
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=patch,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=4,
            out_chans=prompt_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window_size,
            global_attn_indexes=tuple(global_attention),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=prompt_dim,
            image_embedding_size=embedding_size,
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=prompt_dim,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=prompt_dim, num_heads=8, mlp_dim=decoder_mlp_dim),
        ),
    ).eval()


def save_sam(path: Path, model: Sam, sizes: dict[str, Any]) -> None:
    """Write a model of any sizes (the arguments of `build_sam`) as one file for --model custom."""
    with write_whole(path) as temporary:
        torch.save({"sizes": sizes, "model": model.state_dict()}, temporary)


def find_checkpoint(model: str, checkpoint: str, root: Path, download: bool = False) -> Path:
    """The checkpoint file of a model; `download` fetches a missing one. Files of official names are checked by SHA-256.

    Raises `UserError` when the file is missing (saying where to get it), or is not the file that its name promises.
    """
    check(model != "custom" or checkpoint != "", "model is custom, so --checkpoint must name a file of save_sam")
    name, sha256 = OFFICIAL.get(model, ("", ""))
    path = Path(checkpoint) if checkpoint else Path(root) / "weights" / name
    if not path.exists():
        check(model in OFFICIAL, f"{path} is missing: --checkpoint must name an existing file")
        check(
            download, f"{path} is missing: get it from {URL}{name} (SHA-256 {sha256}), or add --download, or {STAND_IN}"
        )
        _fetch(URL + name, path, sha256)
    elif path.name in HASHES:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        check(
            found == HASHES[path.name],
            f"{path} is damaged or another file (its SHA-256 is {found}, not {HASHES[path.name]}): delete it and get "
            f"it again from {URL}{path.name}",
        )
    return path


def _fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file; it appears at `path` only when it is complete and has this SHA-256."""
    digest = hashlib.sha256()
    try:
        with write_whole(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                length = int(answer.headers.get("Content-Length") or 0)
                with tqdm(total=length, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        bar.update(len(block))
            check(
                digest.hexdigest() == sha256,
                f"the file from {url} has the SHA-256 {digest.hexdigest()}, not {sha256}: try again, or download it "
                f"by other means to {path}",
            )
    except OSError as error:
        raise UserError(
            f"{url} could not be fetched ({error}): download it by other means to {path}, or {STAND_IN}"
        ) from None


def load_sam(model: str, path: Path) -> Sam:
    """The model of a checkpoint file on the CPU, in eval mode; only tensors and numbers are loaded from it.

    `model` is an official name, or "custom" for a file {"sizes": arguments of build_sam, "model": state dict}.
    Raises `UserError` when the file cannot be read, holds a model of other sizes, or names sizes that make no model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for damaged and hostile files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint of tensors ({reason[:120]}): get it again") from None
    sizes: Any = SIZES.get(model)
    if model == "custom":
        check(
            isinstance(state, dict) and {"sizes", "model"} <= state.keys(),
            f"{path} has no keys sizes and model, which --model custom needs: write it with save_sam",
        )
        sizes, state = state["sizes"], state["model"]
    try:
        with torch.device("meta"):  # compares names and shapes before any memory is taken
            build_sam(**sizes).load_state_dict(state, assign=True)
        sam = build_sam(**sizes)
        sam.load_state_dict(state)
    except ValidationError as error:
        first = error.errors()[0]
        name, found = ".".join(map(str, first["loc"])), str(first["input"])[:60]
        raise UserError(f"{path}: its sizes are wrong ({name} is {found}: {first['msg']}): {OTHER_FILE}") from None
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} does not hold a {model} model ({reason}): {OTHER_FILE}") from None
    return sam
