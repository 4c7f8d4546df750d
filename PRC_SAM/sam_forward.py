"""SAM's forward pass on segment-anything's modules and weights, arranged for a grid of points on many images.

The results are SAM's up to rounding; what differs is the order of the arithmetic:
- The encoder's attention never holds a matrix of all pairs: the relative position bias becomes further channels of
  queries and keys, and scaled_dot_product_attention does the rest.
- In the decoder the prompt has 7 tokens and the image thousands of pixels. Before pixels have met the prompt they are
  the same for all prompts and are projected once; after that the projections are moved over to the few tokens,
  (W_q t)^T (W_k p) = (W_k^T W_q t)^T p, and values are projected after they were averaged.
- Masks are upscaled only for prompts of which a mask passed the predicted IoU, by matrix products in place of
  transposed convolutions, whose kernels do not overlap.
"""

from typing import NamedTuple

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from segment_anything.modeling.image_encoder import Attention as PixelAttention
from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F


class Positions(NamedTuple):
    """SAM's decomposed relative positions for an attention over h x w pixels of C channels a head."""

    rows: Tensor  # (h,h,C): of each row of a query to each row of a key
    columns: Tensor  # (w,w,C)
    one_hot: Tensor  # (h*w,h+w): each pixel's row and column


def relative_positions(encoder: ImageEncoderViT, dtype: torch.dtype = torch.float32) -> list[Positions]:
    """The positions of every block. They depend on the weights alone; computing them for each image delays a GPU."""
    side = encoder.img_size // encoder.patch_embed.proj.kernel_size[0]
    positions = []
    for block in encoder.blocks:
        length = block.window_size or side
        place = torch.arange(length**2, device=block.attn.rel_pos_h.device)
        pair = F.one_hot(place // length, length), F.one_hot(place % length, length)
        tables = block.attn.rel_pos_h, block.attn.rel_pos_w
        rows, columns = (get_rel_pos(length, length, table).to(dtype) for table in tables)
        positions.append(Positions(rows, columns, torch.cat(pair, dim=-1).to(dtype)))
    return positions


def encode_images(encoder: ImageEncoderViT, images: Tensor, positions: list[Positions]) -> Tensor:
    """(B,3,S,S) normalised and padded images, `relative_positions` -> (B,C,h,w) float32 embeddings, h = w = S / 16."""
    x = encoder.patch_embed(images) + encoder.pos_embed
    for block, place in zip(encoder.blocks, positions, strict=True):
        y, size = block.norm1(x), x.shape[1:3]
        if block.window_size > 0:
            y, padded = window_partition(y, block.window_size)
            y = window_unpartition(_attention(block.attn, y, place), block.window_size, padded, size)
        else:
            y = _attention(block.attn, y, place)
        x = x + y
        x = x + block.mlp(block.norm2(x))
    with torch.autocast(x.device.type, enabled=False):
        return encoder.neck(x.float().permute(0, 3, 1, 2))


def _attention(attention: PixelAttention, x: Tensor, positions: Positions) -> Tensor:
    """Self-attention over the pixels of x (B,h,w,C), with SAM's decomposed relative positions."""
    batch, height, width, _ = x.shape
    q, k, v = attention.qkv(x).view(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    channels = v.shape[-1]
    # bias(q, k) = r_h[row of k] + r_w[column of k]: a dot product of (r_h, r_w) with two one-hot vectors
    pixels = q.reshape(-1, height, width, channels)
    rows = torch.einsum("bhwc,hkc->bhwk", pixels, positions.rows.to(q.dtype))
    columns = torch.einsum("bhwc,wkc->bhwk", pixels, positions.columns.to(q.dtype))
    bias = torch.cat([rows, columns], dim=-1).view(*q.shape[:3], height + width)
    q = torch.cat([q * attention.scale, bias], dim=-1)
    k = torch.cat([k, positions.one_hot.to(q.dtype).expand(*k.shape[:2], -1, -1)], dim=-1)
    pad = -q.shape[-1] % 8  # what the fused kernels want: equal widths, in steps of 8
    q, k, v = (F.pad(t, (0, q.shape[-1] + pad - t.shape[-1])) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :channels]
    return attention.proj(y.transpose(1, 2).reshape(batch, height, width, -1))


class PointDecoder:
    """SAM's prompt encoder and mask decoder for single positive points with three masks each."""

    def __init__(self, sam: Sam):
        self.prompts, self.decoder = sam.prompt_encoder, sam.mask_decoder
        self.positions = self.prompts.get_dense_pe()[0].flatten(1).T  # (N,C)
        self.no_mask = self.prompts.no_mask_embed.weight[0]

    def tokens(self, points: Tensor) -> Tensor:
        """(P,2) x, y in pixels of the encoder's input -> (P,T,C) tokens; they do not depend on the image."""
        labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        sparse, _ = self.prompts(points=(points[:, None], labels), boxes=None, masks=None)
        output = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        return torch.cat([output.expand(len(points), -1, -1), sparse], dim=1)

    def transform(self, embedding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(C,h,w) embedding of an image, (P,T,C) tokens -> predicted IoU (P,3), mask tokens (P,3,C), pixels (P,N,C)."""
        transformer = self.decoder.transformer
        queries, keys = tokens, (embedding.flatten(1).T + self.no_mask)[None]
        for layer in transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.self_attn(q=queries, k=queries, v=queries)
            else:
                q = queries + tokens
                queries = queries + layer.self_attn(q=q, k=q, v=queries)
            queries = layer.norm1(queries)
            placed = keys + self.positions
            queries = queries + _tokens_to_pixels(layer.cross_attn_token_to_image, queries + tokens, placed, keys)
            queries = layer.norm2(queries)
            queries = layer.norm3(queries + layer.mlp(queries))
            keys = _pixels_to_tokens(layer.cross_attn_image_to_token, keys, placed, queries + tokens, queries)
            keys = layer.norm4(keys)
        last, placed = transformer.final_attn_token_to_image, keys + self.positions
        queries = transformer.norm_final_attn(queries + _tokens_to_pixels(last, queries + tokens, placed, keys))
        masks = queries[:, 2 : 1 + self.decoder.num_mask_tokens]  # after the IoU token and that of the single mask
        return self.decoder.iou_prediction_head(queries[:, 0])[:, 1:], masks, keys

    def masks(self, mask_tokens: Tensor, pixels: Tensor) -> Tensor:
        """(P,3,C) mask tokens, (P,N,C) pixels -> (P,3,4h,4w) logits."""
        first, norm, act1, second, act2 = self.decoder.output_upscaling
        x = act1(F.layer_norm(_upscale(first, pixels), norm.weight.shape, norm.weight, norm.bias, norm.eps))
        x = act2(_upscale(second, x))
        networks = self.decoder.output_hypernetworks_mlps[1:]
        weights = torch.stack([network(mask_tokens[:, i]) for i, network in enumerate(networks)], dim=1)
        logits = weights @ x.flatten(1, -2).transpose(1, 2)  # pixels in the order y x, dy dx, dy dx
        height, width = self.prompts.image_embedding_size
        logits = logits.view(*logits.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return logits.reshape(*logits.shape[:2], 4 * height, 4 * width)


def _upscale(convolution: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """A 2 x 2 transposed convolution of stride 2 on channels-last pixels: (...,C) -> (...,4,C')."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = convolution.bias
    return F.linear(x, weight, None if bias is None else bias.repeat(4)).unflatten(-1, (4, -1))


def _heads(layer: nn.Linear, heads: int) -> Tensor:
    """The weight of a projection by head: (heads, channels of a head, C)."""
    return layer.weight.unflatten(0, (heads, -1))


def _tokens_to_pixels(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens (P,T,C) attend to pixels (P or 1,N,C)."""
    heads = attention.num_heads
    q = attention.q_proj(tokens).unflatten(-1, (heads, -1))  # P,T,heads,D
    q = q * q.shape[-1] ** -0.5
    if len(keys) == 1:
        k = attention.k_proj(keys[0]).unflatten(-1, (heads, -1)).permute(1, 2, 0)  # heads,D,N
        v = attention.v_proj(values[0]).unflatten(-1, (heads, -1)).transpose(0, 1)  # heads,N,D
        weights = torch.softmax(q.permute(2, 0, 1, 3).flatten(1, 2) @ k, dim=-1)
        y = (weights @ v).unflatten(1, tokens.shape[:2]).permute(1, 2, 0, 3)
    else:  # the bias of k shifts all pixels of a token alike, which softmax does not see
        folded = torch.einsum("pthd,hdc->pthc", q, _heads(attention.k_proj, heads)).flatten(1, 2)
        weights = torch.softmax(folded @ keys.transpose(1, 2), dim=-1)
        mixed = (weights @ values).unflatten(1, (-1, heads))
        y = torch.einsum("pthc,hdc->pthd", mixed, _heads(attention.v_proj, heads))
        y = y + attention.v_proj.bias.unflatten(0, (heads, -1))
    return attention.out_proj(y.flatten(2))


def _pixels_to_tokens(attention: Attention, pixels: Tensor, placed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Pixels (P or 1,N,C), `placed` with their positions, plus what they gather from tokens (P,T,C) -> (P,N,C)."""
    heads = attention.num_heads
    k = attention.k_proj(keys).unflatten(-1, (heads, -1)).transpose(1, 2)  # P,heads,T,D
    k = k * k.shape[-1] ** -0.5
    v = attention.v_proj(values).unflatten(-1, (heads, -1)).transpose(1, 2)
    if len(placed) == 1:
        q = attention.q_proj(placed[0]).unflatten(-1, (heads, -1)).permute(1, 2, 0)  # heads,D,N
        scores = (k.transpose(0, 1).flatten(1, 2) @ q).unflatten(1, (len(k), -1)).transpose(0, 1)  # P,heads,T,N
    else:
        folded = torch.einsum("phtd,hdc->phtc", k, _heads(attention.q_proj, heads)).flatten(1, 2)
        bias = torch.einsum("phtd,hd->pht", k, attention.q_proj.bias.unflatten(0, (heads, -1)))
        scores = (folded @ placed.transpose(1, 2)).unflatten(1, (heads, -1)) + bias[..., None]
    weights = torch.softmax(scores, dim=2).flatten(1, 2)  # P,heads*T,N
    projected = torch.einsum("phtd,chd->phtc", v, attention.out_proj.weight.unflatten(1, (heads, -1)))
    projected = (projected + attention.out_proj.bias / heads).flatten(1, 2)  # the weights of each head sum to 1
    return torch.baddbmm(pixels.expand(len(keys), -1, -1), weights.transpose(1, 2), projected)
