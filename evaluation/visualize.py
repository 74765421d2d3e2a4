"""Images of what the encoder and the decoder attend to.

pca.png        patch tokens along the three strongest principal components of all images, as red,
               green and blue: similar tokens have similar colors
attention.png  the attention of one patch (framed; the one with the most contrast) in each layer,
               mean over heads
words.png      the attention of the caption decoder as it generates each token, mean over layers and
               heads; the decoder reads all patches

Brighter means more attention; each map is scaled to its own maximum. Only words.png needs a
decoder.

Letters: B images, N patches, G = sqrt(N) grid side, L layers, T text positions, R pixels per side.
"""
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
Tile = tuple[Image.Image, str]  # and its line of text


def pca_colors(tokens: np.ndarray) -> np.ndarray:
    """tokens (B,N,D) to (B,N,3) in 0..1: coordinates along the three strongest directions of all
    B*N tokens, scaled between their 2nd and 98th percentiles. The largest weight of a direction is
    positive, so that colors do not depend on the solver."""
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(0)
    _, directions = np.linalg.eigh(rows.T @ rows)
    directions = directions[:, :-4:-1]
    largest = np.abs(directions).argmax(0)
    coordinates = rows @ (directions * np.sign(directions[largest, np.arange(3)]))
    low, high = np.percentile(coordinates, (2, 98), axis=0)
    scaled = (coordinates - low) / np.maximum(high - low, 1e-9)
    return np.clip(scaled, 0, 1).reshape(*tokens.shape[:2], 3)


def patch_attention(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """images (B,R,R,3) uint8 to the attention weights (B,L,N,N) fp32 of patches to patches, mean
    over heads. The attention to a CLS token is left out, and the rest scaled to sum to 1."""
    @jax.jit
    def mean_weights(params: dict, images: jax.Array) -> jax.Array:
        return vit.vit(params, images, encoder.cfg, attention=True)["attention"].mean(2)
    first = int(encoder.cfg.cls_token)
    weights = np.asarray(mean_weights(encoder.params, images), np.float32)      # (L,B,N,N), + CLS
    weights = weights[..., first:, first:].swapaxes(0, 1)
    return weights / weights.sum(-1, keepdims=True)


def caption_attention(captioner: Captioner,
                      tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoder tokens (B,N,E) to (greedy captions (B,T) int32, attention to each patch (B,T-1,N),
    share of the attention that goes to the image (B,T-1)), mean over layers and heads.

    Row t belongs to the prediction of token t + 1. A row of the second sums to 1. The rest of the
    attention goes to the tokens before."""
    cfg, N = captioner.decoder, tokens.shape[1]

    @jax.jit
    def run(params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = decoder.generate(params, tokens, cfg, captioner.settings.max_text_len)
        x = decoder.embed_sequence(params, tokens, text[:, :-1], cfg)
        mask = decoder.attention_mask(N, N + text.shape[1] - 1, cfg.prefix_attention)
        _, extras = vit.transformer_stack(x, params["blocks"], cfg, ("attention_weights",),
                                          mask=mask, exact_gelu=False)
        return text, extras["attention_weights"].mean((0, 2))[:, N:, :N]
    text, weights = map(np.asarray, run(captioner.params["decoder"], tokens))
    image_share = weights.sum(-1)
    return text, weights / image_share[..., None], image_share


# ------------------------------------------------------------------------------------ tiles
def patch_tile(values: np.ndarray, covered: float = 1.0) -> Image.Image:
    """(N,) or (N,3) in 0..1 as a tile of G x G squares. covered: the share of the image's side that
    patches cover. The rest is white."""
    G = int(len(values) ** 0.5)
    squares = (values.reshape(G, G, *values.shape[1:]) * 255).astype(np.uint8)
    inner = round(SIDE * covered)
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    tile.paste(Image.fromarray(squares).resize((inner, inner), Image.Resampling.NEAREST), (0, 0))
    return tile


def image_tile(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def attention_tile(pixels: np.ndarray, weights: np.ndarray, covered: float) -> Image.Image:
    """The image, in color where the attention weights (N,) are high and dark elsewhere."""
    light = patch_tile(weights / max(weights.max(), 1e-9), covered).convert("L")
    light = light.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    dark = Image.eval(image_tile(pixels).convert("L"), lambda v: 20 + v // 6).convert("RGB")
    return Image.composite(image_tile(pixels), dark, light)


def draw_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of tiles, each with its line of text below it."""
    font, width, height = ImageFont.load_default(13), SIDE + GAP, SIDE + LINE + GAP
    size = max(map(len, rows)) * width + GAP, len(rows) * height + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (tile, text) in enumerate(row):
            x, y = GAP + j * width, GAP + i * height
            sheet.paste(tile, (x, y))
            pen.text((x + SIDE / 2, y + SIDE + 2), text, fill="black", font=font, anchor="ma")
    return sheet


# ----------------------------------------------------------------------------------- sheets
def draw_pca(images: np.ndarray, tokens: np.ndarray, covered: float, path: str) -> None:
    tiles: list[Tile] = []
    for pixels, colors in zip(images, pca_colors(tokens)):
        tiles += [(image_tile(pixels), ""), (patch_tile(colors, covered), "")]
    draw_sheet([tiles[n:n + 8] for n in range(0, len(tiles), 8)]).save(path)


def draw_attention(encoder: Encoder, images: np.ndarray, covered: float, path: str) -> None:
    P, R, rows = encoder.cfg.patch_size, encoder.resolution, []
    side = P * SIDE // R
    for pixels, layers in zip(images, patch_attention(encoder, images)):        # (L,N,N)
        patches = np.asarray(vit.patchify(pixels[None].astype(np.float32), P))[0]
        patch = int(patches.std(1).argmax())
        row: list[Tile] = [(image_tile(pixels), "the framed patch")]
        for n, weights in enumerate(layers):
            row.append((attention_tile(pixels, weights[patch], covered), f"layer {n + 1}"))
        y, x = (int(i * P * SIDE / R) for i in divmod(patch, R // P))
        for tile, _ in row:
            frame = (x, y, x + side - 1, y + side - 1)
            ImageDraw.Draw(tile).rectangle(frame, outline=FRAME, width=3)
        rows.append([row[0], *row[1:][-7:]])  # of a deep encoder the last layers
    draw_sheet(rows).save(path)


def draw_words(captioner: Captioner, images: np.ndarray, tokens: np.ndarray, covered: float,
               path: str) -> None:
    rows = []
    for pixels, text, maps, shares in zip(images, *caption_attention(captioner, tokens)):
        tiles: list[Tile] = [(image_tile(pixels), "the image")]
        for t in range(int((text != decoder.PAD).sum()) - 1):
            word = captioner.tokenizer.decode(text[t + 1:t + 2]) or "(end)"
            tile = attention_tile(pixels, maps[t], covered)
            tiles.append((tile, f"{word} ({shares[t]:.0%})"))
        rows += [tiles[n:n + 9] for n in range(0, len(tiles), 9)]
    draw_sheet(rows).save(path)


def draw_all(encoder: Encoder, images: np.ndarray, folder: str,
             captioner: Captioner | None = None) -> list[str]:
    """Writes pca.png, attention.png and, with a captioner, words.png of images (B,R,R,3) uint8 into
    `folder`. Returns the paths."""
    os.makedirs(folder, exist_ok=True)
    P, R = encoder.cfg.patch_size, encoder.resolution
    covered = R // P * P / R
    tokens = encoder(images).tokens
    names = ["pca.png", "attention.png"]
    draw_pca(images, tokens, covered, os.path.join(folder, names[0]))
    draw_attention(encoder, images[:6], covered, os.path.join(folder, names[1]))
    if captioner:
        names.append("words.png")
        draw_words(captioner, images[:3], tokens[:3], covered, os.path.join(folder, names[2]))
    return [os.path.join(folder, name) for name in names]
