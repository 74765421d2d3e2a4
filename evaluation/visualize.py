"""What the encoder sees, in pictures: features as colors, where patches look, and where the decoder looks as it says each word.

pca.png        patch tokens along their three strongest directions over all pictures, as red, green and blue: alike is alike
attention.png  where one patch (framed; the one with the most contrast) looks, in each layer, mean over heads
words.png      where the caption decoder looks while it writes each word, mean over its layers and heads; all patches are given

Bright is where the looks go; each map is scaled to its own greatest. Only the first two need no decoder.

Letters: B pictures, N patches, G = sqrt(N) grid side, L layers, H heads, T text positions, R pixels a side.
"""
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import decoder
import vit
from caption import Captioner
from interop.encoder import Encoder

SIDE, GAP, LINE = 136, 8, 20  # pixels of a tile, between tiles, of a line of text
FRAME = (255, 60, 60)


def pca_colors(tokens: np.ndarray) -> np.ndarray:
    """tokens (B,N,D) to (B,N,3) in 0..1: their coordinates along the three strongest directions of all B*N, each between its own 2nd
    and 98th percentile. A direction's sign is that of its greatest weight, so that colors do not depend on the solver."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    directions = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :3]
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(3)])
    along = flat @ directions
    low, high = np.percentile(along, (2, 98), axis=0)
    return np.clip((along - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(*tokens.shape[:2], 3)


def patch_attention(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """images (B,R,R,3) uint8 to (B,L,N,N) fp32: how much each patch looks at each, mean over heads. With a CLS token, what goes to it is left out,
    and the rest scaled to sum to 1."""
    run = jax.jit(lambda params, x: vit.vit(params, x, encoder.cfg, attention=True)["attention"].mean(2))
    looks = np.asarray(run(encoder.params, images), np.float32)[..., int(encoder.cfg.cls_token):, int(encoder.cfg.cls_token):].swapaxes(0, 1)
    return looks / looks.sum(-1, keepdims=True)


def word_attention(captioner: Captioner, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoder tokens (B,N,E) to greedy captions (B,T) int32; how much of its looks each word's prediction spends on each patch (B,T-1,N), mean over
    layers and heads; and of all patches together (B,T-1), the rest going to the words before. Row t is of word t + 1; a row of the
    former sums to 1."""
    cfg, N = captioner.decoder, tokens.shape[1]

    @jax.jit
    def run(params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = decoder.generate(params, tokens, cfg, captioner.settings.max_text_len)
        x, mask = decoder.embed_sequence(params, tokens, text[:, :-1], cfg), decoder.attention_mask(N, N + text.shape[1] - 1, cfg.prefix_attention)
        _, extra = vit.transformer_stack(x, params["blocks"], cfg, wanted=("attention_weights",), mask=mask, exact_gelu=False)
        return text, extra["attention_weights"].mean((0, 2))[:, N:, :N]
    text, looks = map(np.asarray, run(captioner.params["decoder"], tokens))
    share = looks.sum(-1)
    return text, looks / share[..., None], share


def grid(values: np.ndarray, covered: float = 1.0) -> Image.Image:
    """(N,) or (N,3) in 0..1 as a tile of G x G squares. covered: the share of the picture's side that patches fill; what is beyond is white."""
    G = int(len(values) ** 0.5)
    squares = Image.fromarray((values.reshape(G, G, *values.shape[1:]) * 255).astype(np.uint8))
    tile, inner = Image.new("RGB", (SIDE, SIDE), "white"), round(SIDE * covered)
    tile.paste(squares.resize((inner, inner), Image.Resampling.NEAREST), (0, 0))
    return tile


def image_tile(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def spotlight(pixels: np.ndarray, looks: np.ndarray, covered: float) -> Image.Image:
    """The picture, in its own colors where looks (N,) go, and dark where they do not."""
    light = grid(looks / max(looks.max(), 1e-9), covered).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    dark = Image.eval(image_tile(pixels).convert("L"), lambda v: 20 + v // 6).convert("RGB")
    return Image.composite(image_tile(pixels), dark, light)


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], path: str) -> None:
    """Rows of tiles, each with a line of text below it."""
    font, wide, high = ImageFont.load_default(13), SIDE + GAP, SIDE + LINE + GAP
    found = Image.new("RGB", (max(map(len, rows)) * wide + GAP, len(rows) * high + GAP), "white")
    pen = ImageDraw.Draw(found)
    for y, row in enumerate(rows):
        for x, (tile, text) in enumerate(row):
            at = GAP + x * wide, GAP + y * high
            found.paste(tile, at)
            pen.text((at[0] + SIDE / 2, at[1] + SIDE + 2), text, fill="black", font=font, anchor="ma")
    found.save(path)


def draw_all(encoder: Encoder, images: np.ndarray, folder: str, captioner: Captioner | None = None) -> list[str]:
    """pca.png, attention.png and, with a captioner, words.png of images (B,R,R,3) uint8 in `folder`; the paths written."""
    os.makedirs(folder, exist_ok=True)
    tokens, P, R = encoder(images).tokens, encoder.cfg.patch_size, encoder.resolution
    G = R // P
    covered = G * P / R
    paths = [os.path.join(folder, name) for name in ("pca.png", "attention.png", "words.png")[:3 if captioner else 2]]

    tiles = [pair for pixels, found in zip(images, pca_colors(tokens)) for pair in ((image_tile(pixels), ""), (grid(found, covered), ""))]
    sheet([tiles[n:n + 8] for n in range(0, len(tiles), 8)], paths[0])

    rows, looks = [], patch_attention(encoder, images[:6])                                       # (B,L,N,N)
    for pixels, mine in zip(images, looks):
        patches = np.asarray(vit.patchify(pixels[None].astype(np.float32), P))[0]
        chosen = int(patches.std(1).argmax())
        y, x = (int(i * P * SIDE / R) for i in divmod(chosen, G))
        frame = functools.partial(ImageDraw.ImageDraw.rectangle, xy=(x, y, x + P * SIDE // R - 1, y + P * SIDE // R - 1), outline=FRAME, width=3)
        row = [(image_tile(pixels), "the framed patch"), *((spotlight(pixels, layer[chosen], covered), f"layer {n + 1}") for n, layer in enumerate(mine))]
        for tile, _ in row:
            frame(ImageDraw.Draw(tile))
        rows.append(row if len(row) <= 8 else [row[0], *row[-7:]])                               # the last layers of a deep encoder
    sheet(rows, paths[1])

    if captioner:
        rows = []
        for pixels, words, maps, share in zip(images[:3], *word_attention(captioner, tokens[:3])):
            said = [captioner.tokenizer.decode(words[t:t + 1]) or "(end)" for t in range(1, int((words != decoder.PAD).sum()))]
            row = [(image_tile(pixels), "the picture")]
            row += [(spotlight(pixels, m, covered), f"{w} ({s:.0%})") for w, m, s in zip(said, maps, share)]
            rows += [row[n:n + 9] for n in range(0, len(row), 9)]
        sheet(rows, paths[2])
    return paths
