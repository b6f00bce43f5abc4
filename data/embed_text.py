"""
A prompt's embeddings for Wan: umT5-XXL's features, computed once and kept, so that sampling and training need no text
encoder. Needs `pip install transformers`; the encoder is the folder of any Wan model, its own (that is, in it
models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/) or diffusers' (text_encoder/ and tokenizer/), or its name on the
Hub. It takes 11 GB of memory; on a CPU, where bf16 is slow, twice as much if there is.

    python data/embed_text.py --prompt="a red ball falls onto a wooden floor" --out=prompt.safetensors
    python data/embed_text.py --encoder=Wan2.2-TI2V-5B --prompt="..." --negative="blurry, static"
    python data/embed_text.py --captions=CLIPS/clips.jsonl --out=captions.safetensors     # to train with --text_emb
    python data/embed_text.py --commands="sft.py --preset=wan5b; dpo.py --preset=wan5b; eval.py --preset=wan5b" \
        --out=captions.safetensors               # all captions that these commands will read

The first two files hold text and negative, (length, 4096) each, without padding: the DiT pads with zeros, as Wan was
trained. The others hold one such tensor a caption, and the captions; more are added to a file that is there. One file
serves all stages: as captions.safetensors in their --data, from where each takes it along, or as --text_emb=FILE.
"""
import importlib
import json
import os
import shlex
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from common import InputError
from sample import UMT5

HUB = "Wan-AI/Wan2.2-TI2V-5B"
STAGES = ("sft.py", "dpo.py", "eval.py")           # what reads captions


@dataclass
class Config:
    prompt: str = ""                # what shall happen
    captions: str = ""              # or many: a clips.jsonl (see simdata.py), or a text file with a caption a line
    commands: str = ""              # or all that these will read, with semicolons between: "sft.py ...; eval.py ..."
    negative: str = ""              # what shall not
    encoder: str = ""               # a folder of Wan's own or of diffusers', or a name on the Hub; empty: HUB
    out: str = "prompt.safetensors"  # the file to write
    length: int = 512               # tokens at most; longer prompts are cut
    device: str = "auto"            # auto, cuda, mps or cpu


def official(path, dtype, device):
    """Wan's own umT5 file -> transformers' UMT5EncoderModel. How large it is, the tensors say.
    Raises InputError if it is another kind of file."""
    from transformers import UMT5Config, UMT5EncoderModel
    with common.open_weights(path) as (found, _):
        shape = {k: s for k, (s, _) in found.items()}
    layers = sum(k.endswith(".attn.q.weight") for k in shape)
    try:
        (vocab, width), (buckets, heads), (inner, _), (ffn, _) = (shape[f"{k}.weight"] for k in (
            "token_embedding", "blocks.0.pos_embedding.embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1"))
    except (KeyError, ValueError):
        raise InputError(f"{path} is no umT5 as Wan keeps it: it lacks blocks.0.pos_embedding and others") from None
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(
            vocab_size=vocab, d_model=width, d_kv=inner // heads, d_ff=ffn, num_layers=layers, num_heads=heads,
            relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu"))

    model.RENAMES = [
        (r"^token_embedding", "shared"), (r"^norm", "encoder.final_layer_norm"),
        (r"^blocks\.(\d+)\.(attn|pos|norm1)", r"encoder.block.\1.layer.0.\2"),
        (r"^blocks\.(\d+)\.(ffn|norm2)", r"encoder.block.\1.layer.1.\2"), (r"norm[12]", "layer_norm"),
        (r"attn", "SelfAttention"), (r"pos_embedding\.embedding", "SelfAttention.relative_attention_bias"),
        (r"ffn\.gate\.0", "DenseReluDense.wi_0"), (r"ffn\.fc1", "DenseReluDense.wi_1"),
        (r"ffn\.fc2", "DenseReluDense.wo")]
    model.encoder.embed_tokens = None              # the same tensor as shared, and large
    common.load_weights(model, path, dtype, device)
    model.encoder.embed_tokens = model.shared
    return model


def precision(path, device):
    """In which a umT5 is run: fp32 on a CPU, where bf16 is slow, if there is the memory for it, else bf16, as Wan does.
    Raises InputError if there is none for that either."""
    with common.open_weights(path) as (found, _):
        billions = 1e-9 * sum(shape.numel() for shape, _ in found.values())
    free = 1e-9 * common.free_memory(device)
    if device.type == "cpu" and 4 * billions < free:
        return torch.float32
    if 2 * billions < free:
        return torch.bfloat16
    raise InputError(f"umT5 in {path} needs {2 * billions:.1f} GB, --device={device} has {free:.1f} GB free; expected "
                     "a device with more, or --text_emb=FILE, embeddings that data/embed_text.py made elsewhere")


@torch.no_grad()
def embed(prompts, encoder, length=512, device="cpu"):
    """Strings -> a list of features (L_i, width), float32 on the CPU, L_i <= length with the end token.

    encoder: a folder with text_encoder/ and tokenizer/, one with Wan's own file and google/umt5-xxl/, or a name on the
    Hub; "" or a folder of weights without any is HUB.
    Raises InputError without transformers, without an encoder and its tokenizer at that place, or without memory."""
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError:
        raise InputError("a prompt for Wan needs umT5, and that the package transformers: pip install transformers; or "
                         "--text_emb=FILE, embeddings that data/embed_text.py made elsewhere") from None
    holds = lambda part: os.path.exists(f"{encoder}/{part}")
    bare = os.path.isdir(encoder) and not holds(UMT5) and not holds("text_encoder")
    if bare or not os.path.isdir(encoder):
        from data.fetch import download
        encoder = download(HUB if bare or not encoder else encoder, "text_encoder/*", "tokenizer/*", UMT5,
                           "google/umt5-xxl/*")
    own = holds(UMT5)
    dtype = precision(f"{encoder}/{UMT5 if own else 'text_encoder'}", device)
    try:
        if own:
            tokenizer = AutoTokenizer.from_pretrained(f"{encoder}/google/umt5-xxl")
            model = official(f"{encoder}/{UMT5}", dtype, device)
        else:
            tokenizer = AutoTokenizer.from_pretrained(encoder, subfolder="tokenizer")
            with open(f"{encoder}/text_encoder/config.json") as f:                   # another T5 would load as well
                kind = json.load(f).get("model_type")
            if kind != "umt5":
                raise ValueError(f"text_encoder/config.json is of a {kind}")
            model = UMT5EncoderModel.from_pretrained(encoder, subfolder="text_encoder", torch_dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        where = f"{UMT5} and google/umt5-xxl/" if own else "text_encoder/ and tokenizer/"
        raise InputError(f"{encoder} has no umT5 in {where}: {str(error).splitlines()[0]}; expected a folder that has, "
                         "or embeddings, which data/embed_text.py --encoder=FOLDER makes with another's") from None
    model.eval()
    out = []
    for prompt in prompts:
        tokens = tokenizer(" ".join(prompt.split()), truncation=True, max_length=length, return_tensors="pt").to(device)
        out.append(model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0].float().cpu())
    return out


def read_captions(path, width=None, wanted=None):
    """A file of captions' features -> {caption: (L, width)}: of those that are wanted, by default of all.
    Raises InputError if it is another kind of file, or of another width."""
    with common.open_weights(path) as (found, config):                   # of thousands only those that are wanted
        names = {caption: f"caption{i}" for i, caption in enumerate(config.get("captions", []))}
        shapes = [found[k][0] if k in found else () for k in names.values()]
        known = {c: found[k][1]() for c, k in names.items() if k in found and (wanted is None or c in wanted)}
    if not shapes or any(len(shape) != 2 or shape[1] != (width or shapes[0][1]) for shape in shapes):
        raise InputError(f"{path} holds no features of captions, (length, {width or 'width'}) each; make it with "
                         "python data/embed_text.py --captions=clips.jsonl")
    return known


def write_captions(path, captions, encoder, device, length=512):
    """Embed captions and add them to those that the file has, if it is there. -> {caption: (L, width) bf16}."""
    known = read_captions(path) if os.path.exists(path) else {}
    found = dict(zip(captions, (x.bfloat16() for x in embed(captions, encoder, length, device))))
    both = known | found
    widths = [x.shape[1] for x in both.values()]
    if widths[0] != widths[-1]:
        raise InputError(f"{path} holds features of width {widths[0]}, this text encoder's are {widths[-1]} wide; "
                         "expected another file or another encoder")
    common.save_weights(path, {f"caption{i}": v for i, v in enumerate(both.values())}, dict(captions=list(both)))
    return found


def read_by(commands):
    """Command lines of STAGES, with semicolons between -> the captions that they will read, as they say themselves."""
    captions = []
    for command in commands.split(";"):
        try:
            script, *flags = shlex.split(command) or [""]
        except ValueError as error:
            raise InputError(f"--commands: {command.strip()}: {error}") from None
        if script not in STAGES:
            raise InputError(f"--commands: {command.strip()!r} begins with none of {', '.join(STAGES)}")
        stage = importlib.import_module(script[:-3])
        captions += stage.captions(common.parse_config(stage.Config, flags, stage.PRESETS))
    return captions


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, length=(1, 512))
    if len([x for x in (cfg.prompt, cfg.captions, cfg.commands) if x.strip()]) != 1:
        raise InputError('expected a prompt, a file of captions or commands; for example --prompt="a red ball falls"')
    common.check_writable(cfg.out)
    device, _, _ = common.setup(cfg.device)
    if cfg.captions or cfg.commands:
        if cfg.captions and not os.path.isfile(cfg.captions):
            raise InputError(f"--captions={cfg.captions}: no such file; expected a clips.jsonl or a text file")
        if cfg.commands:
            captions = read_by(cfg.commands)
        elif cfg.captions.endswith(".jsonl"):
            captions = {str(line.get("caption", "")) for line in common.read_lines(cfg.captions)}
        else:
            with open(cfg.captions, encoding="utf-8", errors="replace") as f:
                captions = {line.strip() for line in f}
        known = read_captions(cfg.out) if os.path.exists(cfg.out) else {}
        captions = sorted({"", *captions} - known.keys())
        if captions:
            write_captions(cfg.out, captions, cfg.encoder, device, cfg.length)
        print(f"wrote {cfg.out}: {len(known) + len(captions)} captions")
        return
    text, negative = embed([cfg.prompt, cfg.negative], cfg.encoder, cfg.length, device)
    common.save_weights(cfg.out, dict(text=text, negative=negative), dict(prompt=cfg.prompt, negative=cfg.negative))
    print(f"wrote {cfg.out}: text {tuple(text.shape)}, negative {tuple(negative.shape)}")


if __name__ == "__main__":
    common.run(main)
