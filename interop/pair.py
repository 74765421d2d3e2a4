"""Export of a pair, an encoder and its text encoder, in classes of transformers or open_clip, whose
own code then classifies without training.

transformers: VisionTextDualEncoderModel, of a SiglipVisionModel, whose head is that of --image-pool
map, and a CLIPTextModel. open_clip: CustomTextCLIP, of timm's VisionTransformer, which pools by the
same head or by the mean, and open_clip's own text encoder. Neither has a pool with eight queries.

Letters: E width of the encoder, D of the text encoder, V vocabulary size, T text positions.
"""
import math
import os

import jax
import numpy as np

from evaluation.pair import Pair, read_pair
from interop.layouts import LAYOUTS, block_arrays, to_library
from interop.model_card import model_card, read_metrics
from interop.tokenizer_files import TokenizerFiles, tokenizer_files
from interop.transfer import (
    check_out_folder,
    mlp_ratio,
    open_clip_preprocessing,
    require,
    timm_files,
    transformers_files,
    write_safetensors,
)
from layers import LAYER_NORM_EPS
from objectives.contrastive import logit_scale
from runtime import checkpoint
from runtime.errors import ConvertError

Arrays = dict[str, np.ndarray]


def named(name: str, w: dict) -> Arrays:
    """A linear layer or a norm, as PyTorch names and lays it out."""
    weight = w["kernel"].T if "kernel" in w else w["scale"]
    return {f"{name}.weight": weight, f"{name}.bias": w["bias"]}


def prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: x for name, x in arrays.items()}


# ------------------------------------------------------------------------------------ pools
def siglip_head(pool: dict) -> Arrays:
    """The pool as transformers' SiglipMultiheadAttentionPoolingHead. That projects the query, by
    the identity here."""
    memory, E = pool["memory"], len(pool["query"]["embedding"][0])
    kernel = np.concatenate([np.eye(E), memory["kernel"].T])                           # (3E,E)
    arrays = {"head.probe": pool["query"]["embedding"][None],
              "head.attention.in_proj_weight": kernel,
              "head.attention.in_proj_bias": np.concatenate([np.zeros(E), memory["bias"]])}
    names = {"out": "attention.out_proj", "norm2": "layernorm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for part, name in names.items():
        arrays |= named(f"head.{name}", pool[part])
    return arrays


def timm_head(pool: dict) -> Arrays:
    """The pool as timm's AttentionPoolLatent."""
    E = len(pool["query"]["embedding"][0])
    arrays = {"attn_pool.latent": pool["query"]["embedding"][None], "attn_pool.q.weight": np.eye(E),
              "attn_pool.q.bias": np.zeros(E)}
    names = {"memory": "kv", "out": "proj", "norm2": "norm", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for part, name in names.items():
        arrays |= named(f"attn_pool.{name}", pool[part])
    return arrays


# ----------------------------------------------------------------------------- transformers
def transformers_pair(pair: Pair, resolution: int, tokens: TokenizerFiles) -> tuple:
    """(arrays, {file: configuration})."""
    params, cfg, dec = pair.params, pair.model.encoder, pair.model.decoder
    if "pool" not in params or cfg.cls_token:
        raise ConvertError("transformers has no class for this encoder's pool: export the pair to "
                           "open_clip, or train with --objective lit --image-pool map and without "
                           "--cls-token")
    encoder = params["encoder"] | {"norm": params["pool"]["norm"]}
    image = to_library(encoder, cfg, resolution // cfg.patch_size, LAYOUTS["siglip"])
    text = {"embeddings.token_embedding.weight": params["text"]["embed"]["embedding"][tokens.rows],
            "embeddings.position_embedding.weight": params["text"]["positions"]["table"]}
    text |= block_arrays(params["text"]["blocks"], LAYOUTS["siglip"])
    text |= named("final_layer_norm", params["text"]["norm"])
    arrays = prefixed("vision_model.", image | siglip_head(params["pool"]))
    arrays |= prefixed("text_model.", text)
    arrays["visual_projection.weight"] = params["pair"]["image"]["kernel"].T
    arrays["text_projection.weight"] = params["text"]["project"]["kernel"].T
    _, _, files = transformers_files(cfg, resolution)
    ids = {f"{name}_token_id": i for name, i in tokens.ids.items()}
    text_config = {
        "model_type": "clip_text_model", "vocab_size": dec.vocab_size, "hidden_size": dec.width,
        "intermediate_size": dec.mlp_dim, "num_hidden_layers": dec.depth,
        "num_attention_heads": dec.num_heads, "max_position_embeddings": pair.model.max_text_len,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": LAYER_NORM_EPS,
        "projection_dim": dec.width} | ids
    config = {"architectures": ["VisionTextDualEncoderModel"], "projection_dim": dec.width,
              "model_type": "vision-text-dual-encoder", "torch_dtype": "float32",
              "vision_config": files["config.json"] | {"vision_use_head": True},
              "text_config": text_config}
    return arrays, files | {"config.json": config}


# -------------------------------------------------------------------------------- open_clip
def open_clip_pair(pair: Pair, resolution: int, tokens: TokenizerFiles) -> tuple:
    """(arrays, {file: configuration}). config.json is timm's, from which open_clip builds the
    encoder."""
    params, cfg, dec = pair.params, pair.model.encoder, pair.model.decoder
    encoder, layout, head, pool = params["encoder"], LAYOUTS["timm"], {}, "avg"
    _, _, files = timm_files(cfg, resolution)
    if "pool" in params:
        encoder = encoder | {"norm": params["pool"]["norm"]}
        layout, head, pool = layout._replace(norm="norm.*"), timm_head(params["pool"]), "map"
        files["config.json"]["model_args"] |= {"global_pool": pool, "fc_norm": False}
    image = to_library(encoder, cfg, resolution // cfg.patch_size, layout)
    text = {"token_embedding.weight": params["text"]["embed"]["embedding"][tokens.rows],
            "positional_embedding": params["text"]["positions"]["table"],
            "text_projection": params["text"]["project"]["kernel"]}
    text |= block_arrays(params["text"]["blocks"], LAYOUTS["open_clip"])
    text |= named("ln_final", params["text"]["norm"])
    arrays = prefixed("visual.trunk.", image | head) | prefixed("text.", text)
    arrays["visual.head.proj.weight"] = params["pair"]["image"]["kernel"].T
    vision_cfg = {"image_size": resolution, "timm_model_name": "local-dir:.", "timm_pool": pool,
                  "timm_proj": "linear"}
    text_cfg = {
        "context_length": pair.model.max_text_len, "vocab_size": dec.vocab_size,
        "width": dec.width, "heads": dec.num_heads, "layers": dec.depth,
        "mlp_ratio": mlp_ratio(dec), "hf_tokenizer_name": ".", "pool_type": "eos",
        "eos_id": tokens.ids["eos"], "pad_id": tokens.ids["pad"],
        "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": LAYER_NORM_EPS}}
    model_cfg = {"embed_dim": dec.width, "custom_text": True, "vision_cfg": vision_cfg,
                 "text_cfg": text_cfg}
    files["open_clip_config.json"] = {"model_cfg": model_cfg,
                                      "preprocess_cfg": open_clip_preprocessing(resolution)}
    return arrays, files


# ---------------------------------------------------------------------------------- writing
LIBRARIES = {  # {library: (function, weights file)}
    "transformers": (transformers_pair, "model.safetensors"),
    "open_clip": (open_clip_pair, "open_clip_model.safetensors")}


def export_pair(path: str, library: str, out: str, resolution: int = 0) -> list[str]:
    """Writes both encoders of a run's folder or checkpoint, and the tokenizer, to the folder `out`.
    library: of LIBRARIES. resolution: in pixels, 0 for the run's. Returns the paths written.
    ConvertError if no class of the library holds this pair."""
    if library not in LIBRARIES:
        raise ConvertError(f"--pair is written for {' or '.join(LIBRARIES)}, not for {library}")
    check_out_folder(out)
    pair = read_pair(path)
    cfg, resolution = pair.model.encoder, resolution or pair.resolution
    check(path, pair, resolution)
    tokens = tokenizer_files(pair.tokenizer, pair.model.decoder.vocab_size,
                             pair.model.max_text_len)
    build, weights = LIBRARIES[library]
    pair = pair._replace(params=jax.tree.map(np.asarray, pair.params))
    arrays, configs = build(pair, resolution, tokens)
    arrays["logit_scale"] = np.array(math.log(logit_scale(pair.params)))
    texts = dict(tokens.texts)
    for name, config in configs.items():
        texts[name] = checkpoint.to_json(config, indent=1) + "\n"
    _, _, meta = checkpoint.read_encoder(path)
    metrics = read_metrics(path, meta.get("step"))
    texts["README.md"] = model_card(f"{library} pair", cfg, resolution, meta, metrics)
    file = os.path.join(out, weights)
    require("safetensors.numpy", f"writing {file}")  # before a folder is made
    os.makedirs(out, exist_ok=True)
    write_safetensors(file, arrays)
    for name, text in texts.items():
        checkpoint.write_text(os.path.join(out, name), text)
    return [file, *(os.path.join(out, name) for name in texts)]


def check(path: str, pair: Pair, resolution: int) -> None:
    """ConvertError for what no library holds."""
    objective, cfg = pair.model.objective, pair.model.encoder
    if objective not in ("lit", "clip"):
        raise ConvertError(f"{path} is a run of --objective {objective}: only pairs of lit and "
                           "clip can be exported")
    if objective == "lit" and pair.model.image_pool in ("attention", "grid"):
        raise ConvertError(f"{path} was trained with --image-pool {pair.model.image_pool}, for "
                           "which no library has a class: train the text encoder with --image-pool "
                           "map")
    if cfg.gated_attention:
        raise ConvertError(f"{path} has gated attention, for which no library has a place")
    if resolution < cfg.patch_size:
        raise ConvertError(f"--resolution {resolution} is below the patch size {cfg.patch_size}")
