# %% [markdown]
# # OpenVision 2, from an image to a trained encoder
#
# This tutorial trains a small vision encoder from captions alone, and shows every step of the
# method in figures. It calls the functions of this project: what you see is what `train.py` does.
# It takes a few minutes on two CPU cores and downloads nothing.
#
# The paper is *OpenVision 2: A Family of Generative Pretrained Visual Encoders for Multimodal
# Learning* ([arXiv:2509.01644](https://arxiv.org/abs/2509.01644)). Its method in one line:
#
# ```text
# image -> ViT -> N patch tokens -> keep int(0.35 N) at random -> causal decoder -> caption loss
# ```
#
# The encoder is the product. A multimodal model such as LLaVA can read its patch tokens. The
# decoder exists only to train the encoder, and is not needed afterwards. Unlike CLIP and the first
# OpenVision, the method has no text encoder and no contrastive loss. So one image needs one pass
# through two networks, and no image is compared with the other images of its batch.
#
# Each section but the last ends with an exercise. Its answer is hidden: click on it.
#
# Letters: B images, R pixels per side, P patch size, N patches, K kept patches, T text positions,
# D width, V vocabulary size.

# %%
import dataclasses
import os
import sys

sys.path[:0] = [".", ".."]  # the clone: this file runs in it, or in its folder tutorial/

import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import show

import data
import decoder
import vit
from caption import Captioner
from config import RECIPES
from evaluation import visualize
from evaluation.neighbors import l2_normalize
from inputs.images import Augment
from inputs.opening import open_tokenizer
from inputs.sources import SceneSource
from interop.encoder import Encoder, random_encoder, raw_pixel_encoder
from masking import keep_random_tokens, num_kept_tokens, sample_keep_indices
from objectives.registry import flops, init_params, model_spec, param_counts
from runtime import plots
from runtime.cpu_tuning import enable_compilation_cache, tune_cpu
from runtime.curriculum import make_optimizer, parse_stages
from runtime.devices import DataParallel
from runtime.validation import ValidationSet, caption_metrics
from train import make_step, openvision2_loss

# %% [markdown]
# ## 0. The model and its data
#
# The settings are those of the recipe `toy` without its text positions, and with a shorter training
# on simpler images: synthetic scenes with one object. The program that draws a scene also writes
# its caption. So each caption is correct and complete, and a generated caption can be graded. The
# environment variable `TUTORIAL_LENGTH` scales the length of the training: 1 is what is shown here.
#
# Two losses show whether a model uses the image. The *blind loss* is the best possible loss without
# the image. The program that draws scenes gives each caption a known probability. The blind loss is
# the negative logarithm of that probability (`caption_nats`), summed over the captions and divided
# by the number of their tokens. A model that never sees the image cannot do better on average. The
# *shuffled loss* (`val_loss_shuffled`) is the loss when each image has the caption of another.
#
# **What to expect.** The sizes of a tiny model, and three images with their captions.

# %%
LENGTH = float(os.environ.get("TUTORIAL_LENGTH", "1"))
STEPS = [max(4, round(LENGTH * steps)) for steps in (400, 150)]
stage_texts = [f"resolution={side} steps={steps} batch=32 lr=2e-3 warmup={steps // 10}"
               for side, steps in zip((24, 32), STEPS)]
cfg = dataclasses.replace(
    RECIPES["toy"], stages=", ".join(stage_texts), max_text_len=14,
    val_samples=max(64, round(min(LENGTH, 1) * 128)),  # 128 validation images
    text_pos_embed=False,                              # as in the paper's recipes
    scan_unroll=1)                                     # compiles faster
stages = parse_stages(cfg.stages)
resolution = stages[0].resolution


class SimpleScenes(SceneSource):
    """The scenes with one object and no written word: a sixth of all."""

    def scene(self, i):
        for attempt in range(1000):
            scene = super().scene(1000 * i + attempt)
            if len(scene["objects"]) == 1 and not scene["word"]:
                return scene

    def caption_nats(self, i):
        return super().caption_nats(i) - np.log(6)  # given that it is one of these


# For speed only: two CPU devices, where there are two cores, share each batch, as GPUs would.
enable_compilation_cache()
tune_cpu(sum(param_counts(cfg).values()), [stage.batch for stage in stages])
parallel = DataParallel()

train_source = SimpleScenes(cfg.seed, "train")
val_source = SimpleScenes(cfg.seed, "val", cfg.val_samples)
tokenizer = open_tokenizer(cfg, train_source)
# min_crop_area is 1, so no crop can cut off the object or make "top left" untrue
loader = data.Loader(train_source, tokenizer, cfg.max_text_len, cfg.seed,
                     Augment(min_crop_area=cfg.min_crop_area), cfg.workers)
val_loader = data.Loader(val_source, tokenizer, cfg.max_text_len, cfg.seed, None, cfg.workers)
model = model_spec(cfg)
params = init_params(cfg, model)
untrained = params

P = model.encoder.patch_size
N = (resolution // P) ** 2
K = num_kept_tokens(N, model.keep_ratio)
for name, part in {"encoder": model.encoder, "decoder": model.decoder}.items():
    print(f"{name}: {part.depth} blocks, width {part.width}, {part.num_heads} heads, "
          f"{param_counts(cfg)[name]:,} parameters")
print(f"tokenizer: {len(tokenizer)} tokens")
for stage in stages:
    num_patches = (stage.resolution // P) ** 2
    print(f"stage {stage.number}: {stage.steps} steps at {stage.resolution} px: {num_patches} "
          f"patches, {num_kept_tokens(num_patches, model.keep_ratio)} kept")

# %%
batch = val_loader.batch(range(64), resolution)
for name in ("images", "text", "position"):
    print(f"{name}: {batch[name].shape} {batch[name].dtype}")
SHOWN = (13, 5, 23)  # three validation images
MAIN = SHOWN[-1]     # the one that most figures show
for i in SHOWN:
    print(f"caption {i}: {val_source.caption(i)}")
tiles = [(visualize.image_tile(np.asarray(val_source.image(i))), f"image {i}, as drawn")
         for i in SHOWN]
tiles += [(figures.pixel_tile(batch["images"][i]), f"image {i}, {resolution} px") for i in SHOWN]
_ = show("00-scenes", visualize.draw_sheet([tiles]))

# %% [markdown]
# **Exercise.** For real captions the probability is unknown, and so is the blind loss. What can the
# shuffled loss tell in its place, and what not?
#
# <details><summary>Answer</summary>
#
# If it is above the loss with the right captions, the model uses the image. But it is not the blind
# loss: a model that relies on the image has a much higher loss with a wrong image than a blind
# model has. At its lowest, early in training, it is nearest (1.10 against 0.79 in section 8). So
# where the blind loss is unknown, `train.py` reports the lowest shuffled loss of the run.
# </details>

# %% [markdown]
# ## 1. An image as patches
#
# A vision transformer (ViT) reads an image as a sequence. `vit.patchify` cuts it into squares of
# P x P pixels, row by row. Each patch is a vector of P * P * 3 numbers. One matrix, the same for
# all patches, projects it to the width D: a convolution of kernel and stride P, without a bias.
#
# **What to expect.** A grid of patches. Each one is too small to show an object: the encoder has
# to combine them.

# %%
grid = resolution // P
pixels = batch["images"][MAIN:MAIN + 1]
normalized = vit.normalize(pixels)
patches = vit.patchify(normalized, P)
projected = patches @ params["encoder"]["patch"]["kernel"]
print(f"pixels {pixels.shape} -> patches {patches.shape} -> vectors {projected.shape}")

raw_patches = np.asarray(vit.patchify(pixels, P))[0].reshape(N, P, P, 3)
tiles = [(figures.pixel_tile(pixels[0], P), f"{N} patches")]
tiles += [(figures.pixel_tile(raw_patches[n]), f"patch {n}") for n in (0, grid, grid + 1, N - 1)]
_ = show("01-patches", visualize.draw_sheet([tiles]))

# %% [markdown]
# **Exercise.** The paper's encoder L/14 (24 blocks, width 1024) has patches of 14 pixels. How many
# patch tokens does an image of 224 pixels per side have? And an image of 84 pixels, as in the first
# stage of the released recipe?
#
# <details><summary>Answer</summary>
#
# (224 / 14)² = 256, and (84 / 14)² = 36, a seventh. This is why training at low resolution is
# cheap. `python train.py l14 --dry-run` prints both numbers.
# </details>

# %% [markdown]
# ## 2. Positions
#
# Attention treats its inputs as a set. So a vector that depends only on the row and the column is
# added to each patch vector: `vit.position_embedding`, sines and cosines of several wavelengths. It
# is a formula and not a learned table, so it exists for any grid. Section 10 relies on that.
#
# **What to expect.** First the table: one row per patch, one column per number; orange is above 0
# and blue below. Then the cosine of one patch's vector (framed) with that of each patch, brighter
# where it is larger: neighbors are most similar.

# %%
# the parameters matter only for an imported encoder with a learned position table
table = vit.position_embedding(params["encoder"], grid, model.encoder)
print(f"table {table.shape}: added to the {projected.shape} vectors of the patches")
similarity = l2_normalize(table) @ l2_normalize(table).T
_ = show("02-table", figures.heatmap(table, 4))
tiles = []
for patch in (0, grid // 2 * grid + grid // 2, N - 1):
    lowest = similarity[patch].min()
    tile = visualize.patch_tile((similarity[patch] - lowest) / (1 - lowest))
    tiles.append((figures.framed(tile, patch, grid), f"like patch {patch}"))
_ = show("02-similarity", visualize.draw_sheet([tiles]))

# %% [markdown]
# **Exercise.** What would the encoder lose without positions? Shuffle the vectors in `projected`,
# pass them through the encoder's blocks without the table, and compare with the unshuffled ones.
# `vit.transformer_stack(vectors, params["encoder"]["blocks"], model.encoder)[0]` is all blocks.
#
# <details><summary>Answer</summary>
#
# ```python
# def blocks(vectors):
#     return vit.transformer_stack(vectors, params["encoder"]["blocks"], model.encoder)[0]
# order = np.random.default_rng(0).permutation(N)
# print(abs(blocks(projected)[:, order] - blocks(projected[:, order])).max())
# ```
#
# The difference is only rounding. Without positions, each token is the same wherever its patch
# lies. The encoder could tell which colors occur, but not what shape the patches form, nor where.
# </details>

# %% [markdown]
# ## 3. Attention before training
#
# A block of the transformer does two things: attention mixes the tokens of an image, then an MLP
# changes each token on its own. In attention, each token gives a weight to every token, itself
# included. The weights sum to 1, and the token receives the weighted mean of all tokens' values.
# Several heads do this side by side; we look at the mean of their weights. In the encoder, every
# patch may attend to every patch.
#
# **What to expect.** For the framed patch of two images, the weights in each layer, each map scaled
# to its own maximum. With random parameters they are nearly equal. The *effective number of
# patches*, below each map as the mean over all tokens, says over how many patches a token spreads
# its attention: all N if the weights are equal, 1 if one patch has all of the weight.


# %%
def effective_patches(weights):
    """Attention weights (..., N) to exp(entropy), the number of patches that share the weight."""
    return np.exp(-(weights * np.log(weights + 1e-9)).sum(-1))


def attention_row(params, pixels, resolution, name):
    """One image, and the attention of its patch with the most contrast in each layer."""
    encoder = Encoder(params["encoder"], model.encoder, resolution)
    weights = visualize.patch_attention(encoder, pixels[None])[0]           # (layers,N,N)
    contrast = np.asarray(vit.patchify(pixels[None].astype(np.float32), P))[0].std(1)
    patch, grid = int(contrast.argmax()), resolution // P
    tiles = [(figures.pixel_tile(pixels), name)]
    for n, layer in enumerate(weights):
        number = effective_patches(layer).mean()
        tile = visualize.attention_tile(pixels, layer[patch], covered=1.0)  # no pixel left out
        tiles.append((tile, f"layer {n + 1}: {number:.0f} of {grid * grid}"))
    return [(figures.framed(tile, patch, grid), text) for tile, text in tiles]


rows = [attention_row(untrained, batch["images"][i], resolution, "untrained") for i in SHOWN[1:]]
_ = show("03-attention", visualize.draw_sheet(rows))

# %% [markdown]
# **Exercise.** Attention compares each token with each token. By how much does its cost grow if
# the resolution doubles? And the cost of the MLP?
#
# <details><summary>Answer</summary>
#
# Twice the pixels per side are 4 times the patches. The MLP works on each token on its own: 4 times
# the cost. So do the four projections of attention (query, key, value, output): 4 times. But
# attention has a weight for each pair of tokens: this part grows 16 times. `vit.block_flops` has
# both terms. At 24 px the pairs are only 7% of a block.
# </details>

# %% [markdown]
# ## 4. Random keep
#
# The encoder reads all N patches. Then `masking.keep_random_tokens` draws K of its N tokens, and
# only these go to the decoder, in the order of their patches (the released recipes shuffle them).
# The paper keeps 35%. The key of a draw is made from the seed and `position`, which counts all
# images of a run, over all epochs. So an image gets a new draw each time it is used.
#
# Two reasons. The decoder's sequence is shorter, so a step costs less. And the features get better:
# in the paper's Table 7, keeping 25% or 35% is better than keeping all, in all columns but one (the
# second score of MME). The paper's explanation is that the model must rely on fewer, more
# informative tokens (section 3.3). A way to see it: the encoder cannot know which tokens will be
# kept, so each has to say something about its surroundings, not only about its own patch.
#
# **What to expect.** Four draws for one image; what the decoder does not receive is dimmed. Over
# many draws, all patches are kept about equally often.

# %%
keys = jax.random.split(jax.random.key(0), 2000)  # any keys; training makes its own (section 7)
keep_indices = np.asarray(sample_keep_indices(keys, N, K))
print(f"K = int({model.keep_ratio} * {N}) = {K} of {N} patches")
print(f"first draw: {keep_indices[0].tolist()}")
counts = np.bincount(keep_indices.reshape(-1), minlength=N) / len(keys)
print(f"a patch is kept in {counts.min():.2f} to {counts.max():.2f} of the draws; "
      f"K / N = {K / N:.2f}")


def kept_tile(pixels, keep_indices):
    sample = plots.CaptionedImage(pixels, keep_indices, P, "", None, False)
    return figures.pixel_tile(plots.dim_dropped_patches(sample), P)


tiles = [(figures.pixel_tile(pixels[0]), "all patches")]
tiles += [(kept_tile(pixels[0], keep_indices[n]), f"draw {n + 1}") for n in range(4)]
_ = show("04-keep", visualize.draw_sheet([tiles]))

# %% [markdown]
# **Exercise.** An object can lie in dropped patches only. How can the decoder name it?
#
# <details><summary>Answer</summary>
#
# The drop comes *after* the encoder. There, every token has attended to every patch, so the kept
# tokens can carry what the dropped patches show. This differs from a masked autoencoder (MAE),
# which drops patches before its encoder. Section 7 shows that the gradient reaches every pixel.
# </details>

# %% [markdown]
# ## 5. The sequence and its mask
#
# The decoder is a transformer over one sequence: the kept image tokens, projected to the decoder's
# width, then the caption tokens. There is no cross-attention, unlike in CapPa (arXiv:2306.07915),
# from which the method derives. The mask is causal: a token attends to itself and to what comes
# before it. So each caption token attends to all kept image tokens and to the caption so far, and
# predicts the next token. The decoder adds no positions of its own, as released: the mask alone
# orders the caption, and the image tokens hold the encoder's positions.
#
# The token `[bos]` begins a caption: it is an input and never a target. `[eos]` ends it: it is a
# target, and nothing is predicted after it. Shorter captions are padded to T positions. The decoder
# reads `text[:, :-1]` and predicts `text[:, 1:]`, the same tokens one position later. So its
# sequence has K + T - 1 = 25 tokens.
#
# **What to expect.** A triangle. Each row is a token of the sequence, each column a token that it
# may attend to. The padding is left out.

# %%
text = batch["text"][MAIN]
text = text[text != decoder.PAD]
names = ["[bos]", *(tokenizer.decode(text[t:t + 1]) for t in range(1, len(text) - 1)), "[eos]"]
inputs, targets = names[:-1], names[1:]
print(f"inputs:  {' '.join(inputs)}")
print(f"targets: {' '.join(targets)}")
# vit.vit normalizes uint8 pixels itself. It takes float images as already normalized (section 7).
tokens = vit.vit(params["encoder"], batch["images"], model.encoder)["tokens"]
kept, kept_indices = keep_random_tokens(keys[:64], tokens, model.keep_ratio, model.shuffle_kept)
sequence = decoder.embed_sequence(params["decoder"], kept, batch["text"][:, :-1], model.decoder)
S = K + len(inputs)
print(f"tokens {tokens.shape} -> kept {kept.shape} -> sequence {sequence.shape}; of this image {S} "
      "without padding")
mask = decoder.attention_mask(K, S, model.decoder.prefix_attention)
row_names = [f"patch {i}" for i in kept_indices[MAIN].tolist()] + inputs
_ = show("05-mask", figures.draw_mask(np.asarray(mask), row_names, K))

# %% [markdown]
# **Exercise.** What would happen if caption tokens could attend to later caption tokens?
#
# <details><summary>Answer</summary>
#
# The target of a position is the next token. If the position could see it, the decoder would copy
# it. The loss would fall to nearly 0 without the image, and the encoder would learn nothing.
#
# Image tokens have no target, so they could attend to each other in both directions without
# harm: `--prefix-attention bidirectional`, as the first OpenVision does.
# </details>

# %% [markdown]
# ## 6. The loss of one caption
#
# The loss of a token is minus the logarithm of the probability that the decoder gave it, in nats.
# The loss of a batch is the mean over all caption tokens, the end token included. Image tokens and
# padding have no loss. There is no other loss: no contrastive one as in CLIP, and no prediction of
# image patches as in AIMv2 (arXiv:2411.14402).
#
# To see what the image contributes, we compute each token's loss twice: with the tokens of its own
# image, and with those of each of the 63 other images of the batch (the mean of 63 losses).
#
# **What to expect.** Without training the loss is above ln V, that of a uniform guess, because
# random logits are not uniform. V is 192: the embedding has room for more than the tokenizer's 138
# tokens. The image makes hardly any difference, and not a useful one: here the other images give
# the lower loss.


# %%
@jax.jit
def token_losses(params, images, text, keys):
    """(B,T-1): the loss of each token of the captions, in nats."""
    tokens = vit.vit(params["encoder"], images, model.encoder)["tokens"]
    kept, _ = keep_random_tokens(keys, tokens, model.keep_ratio, model.shuffle_kept)
    # caption_logits takes the inputs; caption_loss (section 7) splits inputs and targets itself
    logits = decoder.caption_logits(params["decoder"], kept, text[:, :-1], model.decoder)
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, text[:, 1:, None], axis=-1)[..., 0]


def two_losses(params, images, row):
    """The losses of one caption's tokens: with its image, and with the other images."""
    length = int((batch["text"][row] != decoder.PAD).sum()) - 1
    text = np.broadcast_to(batch["text"][row], batch["text"].shape)
    losses = np.asarray(token_losses(params, images, text, keys[:len(images)]))[:, :length]
    others = np.arange(len(images)) != row
    return {"its own image": losses[row], "the other images (mean)": losses[others].mean(0)}


losses = two_losses(params, batch["images"], MAIN)
print(f"ln V = {np.log(model.decoder.vocab_size):.2f} nats")
for name, values in losses.items():
    print(f"{name}: {values.mean():.2f} nats per token")
_ = show("06-losses", figures.draw_token_losses(targets, losses))

# %% [markdown]
# **Exercise.** Which tokens can a trained decoder predict without the image? Check in section 9.
#
# <details><summary>Answer</summary>
#
# Those that grammar fixes: commas, "on", "background", `[eos]`. Colors, shapes, sizes and places
# need the image. These tokens teach the encoder. So captions should say much about the image: the
# paper trains on dense synthetic captions. In its Table 6, the alt text of web pages is worse on
# all benchmarks but SQA. The first token is special: it says which of three wordings follows. No
# image shows that, so it costs at least ln 3 = 1.1 nats on average.
# </details>

# %% [markdown]
# ## 7. One training step
#
# A step computes the loss of a batch and its gradient for all parameters of encoder and decoder,
# limits the norm of the gradient to 1 (`grad_clip`; the paper's recipes do not), and updates the
# parameters with AdamW. Matrices have weight decay; biases, norms and the token embedding do not.
# `train.make_step` makes this step for any number of devices. Here we do it by hand, and compare.
#
# **What to expect.** The same loss and gradient norm, and the same parameters within 1e-6 for more
# than 99%. For the rest rounding decides: the first step of Adam moves each entry by about the
# learning rate, however tiny its gradient is. Then two figures of the gradient's size for one
# image. For the encoder's *tokens* it is zero where the token was dropped. For the *pixels* it is
# zero nowhere: through the encoder's attention, the kept tokens depend on all patches.

# %%
step_stage = parse_stages(f"resolution={resolution} steps=10 batch=64 lr=1e-3")[0]  # no warm-up
optimizer = make_optimizer(cfg, step_stage)
root_key = jax.random.key(cfg.seed)  # as training makes its keys:
step_keys = jax.vmap(lambda i: jax.random.fold_in(root_key, i))(batch["position"])


@jax.jit
def step_by_hand(params, batch):
    def mean_loss(params):
        total, num_tokens = openvision2_loss(params, batch, step_keys, model)
        return total / num_tokens
    loss, grads = jax.value_and_grad(mean_loss)(params)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, cfg.grad_clip / norm), grads)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), loss, norm


arrays = {name: batch[name] for name in ("images", "text", "position")}
stepped, loss, norm = step_by_hand(params, arrays)
print(f"by hand:   loss {loss:.3f}, gradient norm {norm:.3f}")

train_step = make_step(model, optimizer, cfg.seed, devices=parallel.pmap_devices,
                       grad_clip=cfg.grad_clip)
copies = parallel.replicate(params)
copies, _, metrics = train_step(copies, parallel.pmap(optimizer.init)(copies),
                                parallel.shard_batch(batch))
metrics = parallel.unreplicate(metrics)
print(f"make_step: loss {metrics['loss']:.3f}, gradient norm {metrics['grad_norm']:.3f}")
pairs = zip(jax.tree.leaves(stepped), jax.tree.leaves(parallel.unreplicate(copies)))
equal = [np.isclose(a, b, rtol=0, atol=1e-6).mean() * a.size for a, b in pairs]
share = sum(equal) / sum(leaf.size for leaf in jax.tree.leaves(stepped))
print("more than 99% of the parameters agree:", share > 0.99)


# %%
main_key = step_keys[MAIN:MAIN + 1]


def loss_of_tokens(tokens):
    kept, _ = keep_random_tokens(main_key, tokens, model.keep_ratio, model.shuffle_kept)
    return decoder.caption_loss(params["decoder"], kept, text[None], model.decoder).sum()


def loss_of_pixels(normalized):
    return loss_of_tokens(vit.vit(params["encoder"], normalized, model.encoder)["tokens"])


token_grads = jax.jit(jax.grad(loss_of_tokens))(tokens[MAIN:MAIN + 1])[0]          # (N,D)
pixel_grads = jax.jit(jax.grad(loss_of_pixels))(normalized)                        # (1,R,R,3)
size_of_token = np.asarray(jnp.linalg.norm(token_grads, axis=-1))
size_of_patch = np.asarray(jnp.linalg.norm(vit.patchify(pixel_grads, P)[0], axis=-1))
print(f"tokens with a gradient: {(size_of_token > 0).sum()} of {N}")
print(f"patches whose pixels have a gradient: {(size_of_patch > 0).sum()} of {N}")
kept_here = np.flatnonzero(size_of_token)
tiles = [(kept_tile(pixels[0], kept_here), "kept"),
         (visualize.patch_tile(size_of_token / size_of_token.max()), "gradient of tokens"),
         (visualize.patch_tile(size_of_patch / size_of_patch.max()), "gradient of pixels")]
_ = show("07-gradients", visualize.draw_sheet([tiles]))

# %% [markdown]
# **Exercise.** By how much does a single step change a parameter? Compare `stepped` with
# `untrained`.
#
# <details><summary>Answer</summary>
#
# ```python
# change = jax.tree.map(lambda a, b: float(jnp.median(jnp.abs(a - b))), stepped, untrained)
# print(change)
# ```
#
# Each number is the median change of one array. In the blocks it is about the learning rate, 0.001:
# nearly every entry moves by that. In its first step, Adam divides each gradient by its own
# absolute value. Gradient clipping does not change that. Rows of the embedding whose token is in no
# caption do not move at all: their gradient is 0, and they have no weight decay. Nor does the
# encoder's final norm: the decoder reads the tokens before it.
# </details>

# %% [markdown]
# ## 8. Training
#
# The loop makes a batch, calls the step, and measures the validation loss now and then. `train.py`
# has the same loop, and around it what long runs need: checkpoints, resuming, several hosts,
# graceful shutdown. The learning rate rises during a warm-up and falls to 0 along a cosine.
#
# Every evaluation keeps the same patches of an image, whatever the seed. Captions are greedy.
#
# **What to expect.** A minute or two. First the decoder learns the grammar: the loss falls fast,
# toward the dashed line, the blind loss. Then it crosses the line, because the decoder now uses the
# image tokens. The shuffled loss stays above the line. It is lowest at its first measurement, then
# rises far above the line.

# %% tags=["trained"]
validation = {stage.resolution: ValidationSet(cfg, val_loader, stage.resolution, 64, model,
                                              parallel, openvision2_loss)
              for stage in stages}
blind_loss = validation[resolution].blind_loss()
training, validated, shuffled = (plots.Line([], [], marked) for marked in (False, True, True))
EVERY = max(2, STEPS[0] // 10)
SNAPSHOTS = [2 * EVERY, 4 * EVERY, STEPS[0], sum(STEPS)]  # and one before the first step
history, learned = [], []


def snapshot(params, step, resolution):
    """Adds the captions of three validation images to the history, and the grades of 64."""
    grades, captions = [], []
    for i, caption, _ in validation[resolution].generate_captions(params, 64):
        grades.append(val_source.grade(caption, i))
        captions.append((caption, grades[-1]["exact"][0] == 1))
    history.append((f"step {step}, {resolution} px", [captions[i] for i in SHOWN]))
    learned.append(f"step {step}")
    for name in ("color", "place", "size", "shape"):
        learned[-1] += f", {name} {np.mean([grade[name][0] for grade in grades]):.2f}"


def train(params, stage):
    """The parameters after a stage. params: one copy per device."""
    optimizer = make_optimizer(cfg, stage)
    train_step = make_step(model, optimizer, cfg.seed, devices=parallel.pmap_devices,
                           grad_clip=cfg.grad_clip)
    opt_state = parallel.pmap(optimizer.init)(params)
    positions = range(stage.first_image, stage.first_image + stage.steps * stage.batch, stage.batch)
    requests = [(range(first, first + stage.batch), stage.resolution) for first in positions]
    batches = loader.prefetch_batches(requests, parallel.shard_batch)  # a thread works ahead
    curve = None
    for step, (batch, _) in enumerate(batches, stage.start + 1):
        params, opt_state, metrics = train_step(params, opt_state, batch)
        training.x.append(step)
        training.y.append(float(parallel.unreplicate(metrics["loss"])))
        if step % EVERY == 0 or step == stage.end:
            losses = validation[stage.resolution].losses(params)
            for name, line in (("val_loss", validated), ("val_loss_shuffled", shuffled)):
                line.x.append(step)
                line.y.append(losses[name])
            chart = plots.line_chart({"training": training, "validation": validated,
                                      "shuffled": shuffled}, {"blind": blind_loss},
                                     {s.start: f"{s.resolution} px" for s in stages[:stage.number]})
            curve = curve or show(f"08-curve-{stage.number}", chart)
            curve.update(chart)
        if step in SNAPSHOTS:
            snapshot(params, step, stage.resolution)
    return params


on_devices = parallel.replicate(params)
snapshot(on_devices, 0, resolution)
on_devices = train(on_devices, stages[0])
params = parallel.unreplicate(on_devices)
print(f"validation loss {validated.y[-1]:.2f}, blind loss {blind_loss:.2f}, shuffled loss "
      f"{shuffled.y[-1]:.2f}, at its lowest {min(shuffled.y):.2f} nats per token")

# %% [markdown]
# **Exercise.** Print the learning rate over the first stage, with
# `runtime.curriculum.learning_rate(stage, step)`. Why does it begin at 0, and why does it end at 0?
#
# <details><summary>Answer</summary>
#
# ```python
# from runtime.curriculum import learning_rate
# print([f"{learning_rate(stages[0], step):.1e}" for step in [*range(0, 400, 10), 399]])
# ```
#
# In the first steps, Adam's averages of the gradient rest on few batches, and each entry moves by
# about the learning rate, whatever its gradient. A warm-up keeps these steps small. At the end,
# small steps average out the noise of the batches.
# </details>

# %% [markdown]
# ## 9. Captions that become right
#
# The decoder generates a caption token by token, each the most probable one: `decoder.generate`.
# It reads K of the N tokens, as in training.
#
# **What to expect.** First nothing sensible, then correct grammar with a wrong scene, then more and
# more of the right scene. Green captions are right in every detail, in any wording. Color and place
# are learned before shape: after so short a training, about half of the captions name a wrong
# shape. Below, the losses of section 6: the tokens of color, place and size are cheap only with the
# scene's own image. The shape is only a little cheaper, because it is hardly learned yet. The
# first token costs the same with any image: no image shows the wording.

# %% tags=["trained"]
print("share of 64 captions with the right ...", *learned, sep="\n")
captions = [tokenizer.decode(batch["text"][i]) for i in SHOWN]
shown_images = batch["images"][list(SHOWN)]
_ = show("09-history", figures.draw_history(shown_images, captions, history))
losses = two_losses(params, batch["images"], MAIN)
_ = show("09-losses", figures.draw_token_losses(targets, losses))

# %% [markdown]
# **Exercise.** With another image, tokens such as the color can cost *more* than they did before
# training. Why is that no contradiction?
#
# <details><summary>Answer</summary>
#
# The decoder now relies on the image. Given an image with a red circle, it is sure of "red", and a
# caption that says "blue" is very improbable. Before training, no token was favored for a reason.
# So the shuffled loss grows with how much a model relies on the image.
# </details>

# %% [markdown]
# ## 10. The switch of resolution
#
# The paper trains long at a low resolution, then shortly at a high one, as CLIPA does
# (arXiv:2305.07017). The parameters fit both: the patch projection and the blocks do not depend on
# the number of patches, and the position formula gives a table for any grid. So the second stage
# continues from them, with a new warm-up and a new optimizer state.
#
# **What to expect.** At the new resolution the loss is higher at first: patches show smaller parts
# of the objects, and there are positions that the encoder has never seen. A short training adapts
# it. Here the loss ends where the first stage did, and fewer shapes are right: 150 steps are too
# few to gain from the higher resolution. `object_accuracy` is the share of captions with the right
# color, shape and place together. `background_accuracy` is the share with the right background
# color and pattern, `exact_match` the share with everything right.

# %% tags=["trained"]
high = stages[1].resolution
for r in (resolution, high):
    value = validation[r].losses(on_devices)["val_loss"]
    print(f"after the stage at {resolution} px: validation loss {value:.2f} at {r} px")
on_devices = train(on_devices, stages[1])
params = parallel.unreplicate(on_devices)
after = validation[high].losses(on_devices)
print(f"after the stage at {high} px: validation loss {after['val_loss']:.2f} at {high} px, "
      f"shuffled loss {after['val_loss_shuffled']:.2f}")
print(f"share of 64 captions with the right ...\n{learned[-1]}")
scores = caption_metrics(validation[high], on_devices)
for name in ("exact_match", "object_accuracy", "color_accuracy", "shape_accuracy",
             "size_accuracy", "place_accuracy", "background_accuracy"):
    print(f"{name}: {scores[name]:.2f}")
batch_high = val_loader.batch(range(64), high)
shown_images = batch_high["images"][list(SHOWN)]
_ = show("10-history", figures.draw_history(shown_images, captions, history[-2:]))

# %%
for stage in stages:
    parts = flops(model, stage.resolution, cfg.max_text_len)
    whole = flops(model._replace(keep_ratio=1.0), stage.resolution, cfg.max_text_len)
    print(f"{stage.resolution} px, MFLOPs per image forward: encoder {parts['encoder'] / 1e6:.1f}, "
          f"decoder {parts['decoder'] / 1e6:.1f}, without the drop {whole['decoder'] / 1e6:.1f}")

# %% [markdown]
# **Exercise.** Compute the same for the recipe `l14` at its two resolutions. How much does the
# curriculum save, if 12.8 of 13.8 billion images are seen at 84 pixels? And how much if no token is
# dropped (`large._replace(keep_ratio=1.0)`)?
#
# <details><summary>Answer</summary>
#
# ```python
# large = model_spec(RECIPES["l14"])
# for m in (large, large._replace(keep_ratio=1.0)):
#     cost = {r: sum(flops(m, r, RECIPES["l14"].max_text_len).values()) for r in (84, 224)}
#     print(cost, 13.8 * cost[224] / (12.8 * cost[84] + 1.0 * cost[224]))
# ```
#
# It is a factor of 3.2, and 3.4 if no token is dropped. The paper's Table 5 measures hours: 190
# without and 55 with the curriculum, a factor of 3.5. If no token is dropped, 217 (CapPa) and 67, a
# factor of 3.2. So by hours the order of the two is the other way round.
# </details>

# %% [markdown]
# ## 11. Attention after training
#
# **What to expect.** The effective number of patches falls in every layer. The first figure shows
# one image before and after training. The second shows the decoder: where it attends in the image
# while it predicts each token (mean over layers and heads; here it reads all patch tokens). The
# number is the share of its attention that goes to the image; the rest goes to the caption so far.

# %% tags=["trained"]
rows = []
for name, weights in {"untrained": untrained, "trained": params}.items():
    rows.append(attention_row(weights, batch_high["images"][MAIN], high, name))
    encoder = Encoder(weights["encoder"], model.encoder, high)
    numbers = effective_patches(visualize.patch_attention(encoder, batch_high["images"]))
    per_layer = ", ".join(f"{number:.0f}" for number in numbers.mean((0, 2)))
    print(f"{name}: effective patches of {(high // P) ** 2}, by layer, in 64 images: {per_layer}")
_ = show("11-attention", visualize.draw_sheet(rows))

captioner = Captioner(params, model.encoder, model.decoder, tokenizer, cfg, high)
trained = Encoder(params["encoder"], model.encoder, high)
tokens_high = trained(batch_high["images"][MAIN:MAIN + 1]).tokens
text, maps, shares = visualize.caption_attention(captioner, tokens_high)
tiles = []
for t in range(min(12, int((text[0] != decoder.PAD).sum()) - 1)):
    token = tokenizer.decode(text[0, t + 1:t + 2]) or "(end)"
    tile = visualize.attention_tile(batch_high["images"][MAIN], maps[0, t], covered=1.0)
    tiles.append((tile, f"{token} ({shares[0, t]:.0%})"))
_ = show("11-words", visualize.draw_sheet([tiles[:6], tiles[6:]]))

# %% [markdown]
# **Exercise.** In training, the decoder names objects whose patches it did not receive. So what
# does its attention to a patch mean?
#
# <details><summary>Answer</summary>
#
# It attends to a *token*, which stands at the place of a patch, but contains what the encoder put
# there. After four blocks of attention among patches, the token can describe any part of the
# image. So a bright square need not lie on the object that the token names. Attention maps are a
# view of the computation, not a proof of where the information is from.
# </details>

# %% [markdown]
# ## 12. What the features contain
#
# The decoder has done its work. What remains is the encoder, and the question what its features are
# good for. The *pooled* feature is one vector (D,) per image: the mean of its N tokens, then the
# encoder's final layer norm. First nearest neighbors: for each image the one whose pooled feature
# has the largest cosine. How often do both have the same color, shape, place ...? For comparison:
# an encoder with random parameters, plain pixels (their mean over patches), and random pairs.
#
# **What to expect.** The trained features find the same color or place much more often. In size
# they are no better than pixels, and in shape not far from chance. Random features and pixels find
# the same background and pattern, which fill most of an image. The trained features lose pattern,
# although captions name it: a neighbor shows what dominates a feature, not all that it contains.
#
# In the second figure each patch is colored by the three strongest principal components of the
# tokens of 64 images: similar colors, similar tokens. Each encoder has components of its own.

# %% tags=["trained"]
gallery = validation[high].batches
images = np.concatenate([b["images"] for b, _ in gallery])
scenes = [val_source.scene(i) for i in range(len(images))]


def content_of(scene):
    """What two scenes can have in common."""
    return {**scene["objects"][0], "background": scene["background_color"],
            "pattern": scene["pattern"]}


def nearest(encoder):
    """(number of images,) the nearest other image of each."""
    features = l2_normalize(encoder(images, batch=64).pooled)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -2)
    return cosines.argmax(1)


encoders = {"trained": trained, "random": random_encoder(trained, 0),
            "pixels": raw_pixel_encoder(trained)}
contents = [content_of(scene) for scene in scenes]
chosen = {name: nearest(e) for name, e in encoders.items()}
print(f"share of {len(images)} images whose nearest neighbor has the same ...")
for what in contents[0]:
    row, values = [], np.array([content[what] for content in contents])
    for name, neighbors in chosen.items():
        row.append(f"{name} {np.mean(values[neighbors] == values):.2f}")
    pairs_alike = (values[:, None] == values).sum() - len(values)  # without each with itself
    row.append(f"chance {pairs_alike / len(values) / (len(values) - 1):.2f}")
    print(f"{what}: " + ", ".join(row))

tiles = []
for i in range(4):
    tiles += [(figures.pixel_tile(images[i]), f"image {i}"),
              (figures.pixel_tile(images[chosen["trained"][i]]), "its neighbor")]
_ = show("12-neighbors", visualize.draw_sheet([tiles]))

# %% tags=["trained"]
rows = []
for name in ("trained", "random"):
    colors = visualize.pca_colors(encoders[name](images[:64]).tokens)
    tiles = []
    for i in range(4):
        tiles += [(figures.pixel_tile(images[i]), ""), (visualize.patch_tile(colors[i]), name)]
    rows.append(tiles)
_ = show("12-pca", visualize.draw_sheet(rows))

# %% [markdown]
# **Exercise.** Which should a multimodal model read: the tokens or the pooled feature? Why?
#
# <details><summary>Answer</summary>
#
# The tokens: they are what the loss trained, and they keep places apart. The pooled feature is
# handy for nearest neighbors and linear classifiers, but its norm was never trained.
# `python evaluate.py RUN probe knn vqa` measures a frozen encoder with linear classifiers, nearest
# neighbors, and a small reader of the tokens that learns to answer questions.
# </details>

# %% [markdown]
# ## 13. Where to go from here
#
# - **Train the toy in full**: `make run`. Its scenes have up to three objects and a written word,
#   and nearly all of its captions are right in every detail.
# - **Your own images**, as `cat.jpg` and `cat.txt` side by side ([data](../docs/data.md)):
#   `python train.py images --data photos/ --workdir runs/photos`
# - **Change the method**: `--keep-ratio 1`, `--prefix-attention bidirectional`,
#   `--objective clip`. [results](../docs/results.md) shows what such changes did on the toy.
# - **A larger model, a GPU, a TPU pod**: the same `train.py` with a recipe such as `l14`; with
#   `--dry-run` it prints the cost first ([training](../docs/training.md)). `--data photos/` gives
#   it your images, and `--vocab` a tokenizer; else one is built from the captions. On a pod, start
#   the same command on every host ([scaling](../docs/scaling.md)).
# - **Use an encoder**: `train.py` saves it as `encoder.npz` in the run's folder. Then, in Python:
#   `from interop.encoder import load_encoder`,
#   `tokens, pooled = load_encoder("runs/toy")(["cat.jpg"])`. How another folder imports it, and how
#   other libraries read it, is in [encoder](../docs/encoder.md).
# - **Look at a run** in the browser: `python demo.py runs/toy` ([demo](../docs/demo.md)).
# - **Read the code** in the order of the [reading guide](../docs/reading_guide.md), which maps the
#   sections of the paper to functions.
