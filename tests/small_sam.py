"""A small SAM that finds discs, so that the tests of the mask generator have masks to compare.

With random weights all points of an image give one mask. This model was trained to answer a point with three discs
around it, whose outlines follow the brightness of the image. Its weights lie beside this file in small_sam.npz, because
a training in the test itself would end with other weights, and other masks, on every kind of processor.

    python -m tests.small_sam        trains it again, about two minutes on one core, and writes small_sam.npz
"""

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F

FILE = Path(__file__).with_suffix(".npz")


def build_sam(
    embed_dim: int = 32,
    num_heads: int = 2,
    global_attention: tuple[bool, ...] = (False, True),
    side: int = 128,
    window_size: int = 3,
    prompt_dim: int = 32,
    mlp_dim: int = 64,
) -> Sam:
    """A Sam with random weights, as segment_anything/build_sam.py builds its three sizes.

    global_attention: for each block of the encoder, whether it attends to the whole image; side: of the encoder's
    input, in pixels.
    """
    cells = (side // 16, side // 16)
    return Sam(
        ImageEncoderViT(
            img_size=side,
            embed_dim=embed_dim,
            depth=len(global_attention),
            num_heads=num_heads,
            out_chans=prompt_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window_size,
            global_attn_indexes=tuple(np.flatnonzero(global_attention)),
        ),
        PromptEncoder(prompt_dim, cells, (side, side), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=prompt_dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=prompt_dim, num_heads=8, mlp_dim=mlp_dim),
        ),
    ).eval()


@cache
def small_sam() -> Sam:
    """The stored model, in eval mode. Tests share it and must not change it."""
    sam = build_sam()
    state = sam.state_dict()
    with np.load(FILE) as file:
        weights = torch.from_numpy(file["weights"].astype(np.float32))
    parts = weights.split([value.numel() for value in state.values()])
    sam.load_state_dict({name: part.view_as(state[name]) for name, part in zip(state, parts, strict=True)})
    return sam.eval()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H,W,3) uint8: waves of different lengths in each channel, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / rng.uniform(3, 20) + y / rng.uniform(3, 20)) for _ in range(3)], axis=-1)
    return (127 + 90 * waves + rng.normal(0, 15, waves.shape)).clip(0, 255).astype(np.uint8)


def train(steps: int = 3000, points: int = 16) -> Sam:
    """Train on four pictures: discs of three radii around each point, and made scores that depend on the point."""
    torch.manual_seed(0)
    sam = build_sam().train()
    optimiser = torch.optim.Adam(sam.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    images = [torch.from_numpy(picture(128, 128, seed)).permute(2, 0, 1) for seed in range(4)]
    y, x = 4 * torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")) + 2
    radii = torch.tensor([16.0, 26.0, 40.0])
    for step in range(steps):
        image, at = images[step % len(images)], 128 * torch.rand(points, 2)
        distance = torch.hypot(x - at[:, 0, None, None], y - at[:, 1, None, None])
        brightness = F.interpolate(image[None].float(), (32, 32), mode="area")[0] / 255
        truth = (distance[:, None] < radii[:, None, None] * (0.5 + brightness)).float()
        scores = 0.75 + 0.25 * torch.sin(at.sum(1, keepdim=True) / 20 + torch.arange(3))
        sparse, dense = sam.prompt_encoder((at[:, None], torch.ones(points, 1)), None, None)
        embedding = sam.image_encoder(sam.preprocess(image)[None])
        logits, ious = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
        loss = F.binary_cross_entropy_with_logits(logits, truth) + F.mse_loss(ious, scores)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
    return sam.eval()


def save(sam: Sam) -> None:
    """All weights as one array in the order of the state dict; three decimals are enough."""
    weights = torch.cat([value.flatten() for value in sam.state_dict().values()])
    np.savez_compressed(FILE, weights=weights.numpy().round(3).astype(np.float16))


if __name__ == "__main__":
    save(train())
