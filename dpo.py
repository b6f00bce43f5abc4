"""
Stages II and III: direct preference optimisation of the DiT (LoRA) and then of the PhysEncoder's physical head, on
pairs that the simulator judges, so that no human labels are needed.

    python dpo.py                                 # pairs, Stage II and Stage III, from the weights in data/
    python dpo.py --name=paper --stages=2 --best_only=True --mirror=False --sft=0    # the paper's pairs and loss alone
    python dpo.py --name=winners --stages=2 --beta=0      # a control: the same steps on the winners, no preference
    python dpo.py --name=truth --truth=True --best_only=True --pool=out/pairs_truth  # the truth wins
    python dpo.py --name=two --rounds=2           # then the same again with pairs of the policy that came out
    torchrun --nproc_per_node=8 dpo.py --pairs=8192 --steps=1000 --batch=256
    torchrun --nproc_per_node=8 dpo.py --preset=wan5b         # after sft.py --preset=wan5b

Pairs: for each scene the Stage-I model draws K clips from K noise seeds; the parser finds the bodies, the simulator
says where they should be, and any two clips a margin apart become a pair, once as they are and once in a mirror. They
lie in out/pairs/, in shards: NAME.safetensors with N pairs beside NAME.jsonl with a line for each. The tensors are
first (N, z, 1, h, w), the latent of frame 0, and winner, loser (N, z, k, h, w), those of the rest, as VideoVAE.encode
gives them, bf16; photo (N, 3, H, W) uint8, frame 0 for the encoder; text (N, 1024) int16, model.bytes_to_tokens of the
caption. A line has caption, winner_score, loser_score (higher is better), scenario, seed and index of the scene,
mirrored, source, and winner and loser ("sample 2", "truth"); all of it may be missing. Any pairs in that format can be
added, or stand alone with --pairs=0: of other models, people's choices. Pairs with "truth" count with --truth=True
alone, so a pool that was made with it serves without it as well. What the scenes look like and what judges them is kept
in out/scenes/.

Flow-DPO (PhysMaster Eq. 3), v = eps - x0, the same t and eps for winner and loser, constant beta:
    L = -log sigmoid(-beta / 2 * [(e_w - e_w_ref) - (e_l - e_l_ref)]),    e = mean (v - v_theta)^2,
where the mean weighs each latent channel by how much of it a picture shows (vae.visibility), also with --sft=0.
A falling loss alone proves nothing: both errors may grow. So metrics2.jsonl and metrics3.jsonl have winner and loser
error against the reference, the margin and the implicit accuracy apart, and the outcome, traj_l2 and IoU on held-out
scenes, along the way. What is kept is the checkpoint of lowest traj_l2, which may be the one that a stage began with;
where it paints bodies worse (IoU), only a part of the way to it.
"""
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import eval as judge
import model as M
import sample
import simdata
from vae import visibility


@dataclass
class Config:
    name: str = "dpo"               # the run's folder under out/
    data: str = "data"              # folder with vae, backbone, dit, head1
    stages: str = "2,3"             # 2, 3, head, both, 2,3 or 2,both (see STAGES)
    rounds: int = 1                 # how often: new pairs, all stages
    pool: str = "out/pairs"         # folder of preference pairs; made if it lacks shards
    scenes: str = "out/scenes"      # folder where scenes and what judges them are kept for other policies
    scenarios: str = ",".join(simdata.SCENARIOS)  # which of the world's, separated by commas; they take turns
    pairs: int = 1280               # scenes to draw candidates for, all pairs a margin apart; 0: only what is there
    height: int = 64                # pixels of the clips
    width: int = 64                 # likewise
    frames: int = 25                # of a clip, 1 + 4k
    fps: int = 16                   # of the clips
    text_emb: str = ""              # captions' embeddings for a Wan DiT (data/embed_text.py); empty: made with umT5
    candidates: int = 4             # K, clips per scene
    best_only: bool = False         # of a scene's pairs only the best against the worst, as PhysMaster has it
    mirror: bool = True             # of pairs the mirror images, too
    heat: float = 1.0               # temperature of the candidates: scale of their initial noise
    truth: bool = False             # the simulator's own clip is one candidate more
    margin: float = 0.3             # least difference of scores, in pixels
    sampler_steps: int = 12         # of candidates and val clips; neither is guided by the text
    sampler_shift: float = 3.0      # > 1 spends more of them near noise
    solver: str = "ab2"             # ab2, euler or unipc
    beta: float = 500.0             # how closely the policy stays to the reference; 0: the winner's loss is all
    sft: float = 0.1                # weight of the winner's flow-matching loss; 0 is the paper's loss
    shift: float = 5.0              # of the training times, as in Stage I
    rank: int = 16                  # of the LoRA
    alpha: int = 32                 # of the LoRA
    steps: int = 500                # optimizer steps per stage; 0 only makes the pairs
    batch: int = 16                 # pairs a step, over all ranks
    lr: float = 1e-4                # peak learning rate of Stage II
    lr_head: float = 3e-5           # peak learning rate of Stage III
    warmup: int = 20                # steps
    log_every: int = 5              # steps
    eval_every: int = 125           # steps between val scores and checkpoints
    eval_clips: int = 160           # val clips that are sampled then
    temperature: float = sample.DEFAULT_TEMPERATURE  # scale of their initial noise; that of candidates is --heat
    checkpointing: bool = False     # compute activations again in the backward pass instead of keeping them
    in_turn: bool = False           # clips one after the other through the network: less memory, a quarter more work
    seed: int = 0                   # of the first LoRA, the order of pairs, the noise; candidates are always the same
    resume: bool = False            # go on from the run folder
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {},
           "gpu": dict(name="dpo_gpu", pool="out/pairs_gpu", pairs=2560, steps=200, batch=256, lr=2e-4, lr_head=6e-5,
                       eval_every=100),
           "small": dict(data="out/small", name="dpo_small", pool="out/pairs_small", height=128, width=128, frames=33,
                         temperature=1.0)}
PRESETS |= {name: dict(data=f"out/{name}", name=f"dpo_{name}", pool=f"out/pairs_{name}", height=512, width=512,
                       frames=49, fps=fps, sampler_steps=25, sampler_shift=shift, solver="unipc", temperature=1.0,
                       checkpointing=True, in_turn=True, best_only=True, eval_clips=64)
            for name, fps, shift in (("wan5b", 24, 5.0), ("wan1.3b", 16, 8.0))}
SHARD = 64                                         # scenes per shard of pairs, on a GPU more
SLACK = 0.002                                      # IoU that may be lost on val: 160 clips do not tell less apart
SEED = 1                                           # of these scenes, which neither the backbone nor Stage I has seen
# What a stage trains. Of the rows in PhysMaster's Table 1, 4 and 5 are --stages=2, 6 is head, 7 both, 8 is 2,3 and 9 is
# 2,both. A lone 3 begins with data's lora2.
STAGES = {"2": "LoRA", "3": "head", "head": "head", "both": "LoRA and head"}


# ----------------------------------------------------------------------------------------------------------------------
# the loss

def dpo_loss(err_w, err_l, ref_w, ref_l, beta):
    """Flow-DPO (PhysMaster Eq. 3; Diffusion-DPO, arXiv 2311.12908, for a flow): all arguments (B,) mean squared errors
    of the velocity -> (B,). At step 0 the policy is the reference and every entry is ln 2."""
    gap = (err_w - ref_w) - (err_l - ref_l)        # < 0: the winner has gained more than the loser
    return -F.logsigmoid(-beta / 2 * gap)


class Policy(nn.Module):
    """DiT and physical head as one module: the policy as it is, or the reference through functional_call.

    visible (C, 1, 1, 1) weighs the channels: what no picture shows cannot be what one clip is preferred for."""
    def __init__(self, dit, head, visible=1.0):
        super().__init__()
        self.dit, self.head, self.visible = dit, head, visible

    def forward(self, seen, first, clips, text, t, eps):
        """seen: PhysEncoder.features of the photo; first (B, C, 1, h, w); clips: [winner, loser] or one of them, each
        (B, C, k, h, w), in one forward, so that rounding is theirs alike -> an error (B,) for each."""
        many = lambda x: torch.cat([x] * len(clips))
        phys = None if self.head is None else many(self.head(*seen, self.head.grid(first), clips[0].shape[2]))
        error = M.flow_loss(self.dit, torch.cat(clips), many(text), many(first), phys, many(t), many(eps), self.visible)
        return error.chunk(len(clips))


# ----------------------------------------------------------------------------------------------------------------------
# preference pairs

@torch.no_grad()
def chaos_weights(scene, path, frames, fps, start=0, sims=4, parser_noise=0.25):
    """How much a frame may say about each body (B, T, N): 1 / (spread of jittered re-simulations + parser noise), 1/px.

    Half a pixel and five degrees cannot be seen in the first frame. Where they decide what happens, so late after a
    tumbling box's first contact, no clip is right or wrong, and a preference there would label chaos."""
    index = torch.arange(start, start + len(path["position"]), device=path["position"].device)
    draw = simdata.Draws("train", 10**6, index)
    draw.key = torch.cat([simdata.Draws("train", 10**6 + i, index).key for i in range(sims)])
    # all re-simulations as one batch: its time hardly grows with the size
    many = lambda d: {k: many(v) if isinstance(v, dict) else torch.cat([v] * sims) for k, v in d.items()}
    scene = many(scene)
    again = simdata.simulate(simdata.jitter(scene, scene["camera"], draw), frames, fps, scene["gravity"])
    center, _ = simdata.project(torch.cat([path["position"]] * sims), scene["camera"])              # (sims B, T, N, 2)
    moved = (simdata.project(again["position"], scene["camera"])[0] - center).square().sum(-1)
    spread = moved.unflatten(0, (sims, -1)).mean(0).sqrt()                                          # (B, T, N) px
    return 1 / (spread + parser_noise)


def score(video, batch, weights):
    """Minus the weighted mean distance in px from found to true centroids of what falls -> (B,), higher is better."""
    _, _, found, true, shown = judge.tracks(video, batch)
    w = weights * (shown & batch["falls"][:, None])
    error = judge.distance(found, torch.nan_to_num(true), math.hypot(*video.shape[3:]))
    return -(error * w).sum((1, 2)) / w.sum((1, 2)).clamp_min(1e-6)


def pair_stamp(cfg, models):
    """What simulated pairs depend on; pairs from elsewhere only need the same VAE."""
    return {"vae": common.fingerprint(models.vae), "policy": common.fingerprint(models.dit, models.encoder),
            "size": common.clip_size(cfg), **{k: getattr(cfg, k) for k in (
                "scenarios", "candidates", "heat", "truth", "margin", "sampler_steps", "sampler_shift", "solver",
                "frames", "fps")}}


def form(cfg, models):
    """What the clips are like, for simdata.make_batch."""
    size = common.clip_size(cfg)
    return dict(size=size, frames=cfg.frames, fps=cfg.fps, photo=judge.photo_size(size, models.encoder))


def shards_of(pool):
    return sorted(f[:-len(".safetensors")] for f in os.listdir(pool) if f.endswith(".safetensors") and f[0] != ".")


def pools(cfg):
    """-> of each round the pool of pairs and the number of its first scene: every round has scenes of its own."""
    return [(f"{cfg.pool}_{r + 1}" if r else cfg.pool, r * cfg.pairs) for r in range(cfg.rounds)]


def shard_plan(cfg, pool, scene, device):
    """The shards of a pool of simulated pairs, from scene number `scene` on -> {name: see common.shard_plan}."""
    size = sample.at_once(cfg, SHARD, device)
    parts = common.shard_plan(cfg.scenarios.split(","), pool, cfg.pairs, size, scene)
    return {f"{i:04d}": part for i, part in enumerate(parts)}


def check_pool(cfg, models, pool, scene, device):
    """-> shard_plan. Raises InputError if a shard that lies in the pool does not belong there."""
    common.make_dir(pool)
    stamp, plan = pair_stamp(cfg, models), shard_plan(cfg, pool, scene, device)
    for name in shards_of(pool):
        path = f"{pool}/{name}.safetensors"
        made, wanted = common.read_config(path), stamp | plan.get(name, {})
        if not os.path.exists(f"{pool}/{name}.jsonl"):
            raise common.InputError(f"{pool}/{name}.jsonl is missing; it belongs to {name}.safetensors")
        if "start" in made and name not in plan:
            raise common.InputError(f"{path} has pairs of more scenes than --pairs={cfg.pairs}; expected as many as "
                                    "there are in the pool, or another --pool")
        told = all("winner" in line for line in common.read_lines(f"{pool}/{name}.jsonl"))
        for key in [key for key in wanted if key in made]:                           # what it knows of itself
            # where the truth is a candidate, there are the pairs without it as well, if their lines say who is who
            if made[key] != wanted[key] and not (key == "truth" and made[key] and told):
                raise common.InputError(f"{path} was made with another {key}; delete {pool} or choose another --pool")
    return plan


def ranked(scores, margin):
    """All pairs of K candidates a margin apart: scores (K, B) -> lists (scene, better, worse) of indices, by scene."""
    order = scores.argsort(0, descending=True)                                       # (K, B)
    found = [(i, *order[[a, b], i].tolist()) for i in range(scores.shape[1])
             for a in range(len(scores)) for b in range(a + 1, len(scores))]
    return [(i, w, l) for i, w, l in found if scores[w, i] - scores[l, i] >= margin]


def scenes_with_weights(scenario, count, start, form, device, whole):
    """Some training scenes and what judges them: of a make_batch dict what make_pairs needs (whole: the films, not only
    the first frames), and chaos_weights."""
    batch = simdata.make_batch(scenario, count, SEED, "train", start=start, device=device, **form)
    batch = {k: batch[k] for k in ("video", "photo", "mask", "alive", "falls", "position", "caption")}
    video = batch["video"] if whole else batch["video"][:, :, :1]
    batch["video"] = common.to_bytes(video)         # as in a file
    begin, _ = simdata.make_scene(scenario, count, SEED, "train", form["size"], device, start)
    return batch | dict(weights=chaos_weights(begin, batch, form["frames"], form["fps"], start))


@torch.no_grad()
def make_pairs(cfg, models, pool, scene, stop, device, rank, world):
    """Fill the folder `pool` with shards of pairs for cfg.pairs scenes, the first of which is number `scene`. -> True
    if stopped.

    Every rank makes its own; a killed run goes on with the next missing shard."""
    plan, stamp = check_pool(cfg, models, pool, scene, device), pair_stamp(cfg, models)
    missing = [name for name in [*plan][rank::world] if not os.path.exists(f"{pool}/{name}.safetensors")]
    made = common.side_by_side(common.disk_cache, [
        (cfg.scenes, scenes_with_weights, *(plan[name][k] for k in ("scenario", "count", "start")), form(cfg, models),
         str(device), cfg.truth) for name in missing], device)
    bar = tqdm(missing, "pairs, shards of scenes", disable=rank > 0 or not missing)
    for name in bar:
        if stop.now:
            break
        scenario, count, start = (plan[name][k] for k in ("scenario", "count", "start"))
        batch = common.tree_map(next(made), lambda v: v.to(device))
        photo, text = batch["photo"], models.read(batch["caption"]).to(device)
        film, chunk = common.from_bytes(batch["video"]), 0 if sample.small(cfg.height, cfg.width) else 2
        batch["video"] = frame = film[:, :, :1]
        latents, scores = [], []
        with common.autocast(device):
            firsts = [models.vae.encode(x) for x in (frame, frame.flip(-1))]         # as it is, and in a mirror
            phys = models.encoder and models.encoder(photo, models.encoder.head.grid(firsts[0]), (cfg.frames - 1) // 4)
            keys = [[("pairs", SEED, start + i, k) for i in range(count)] for k in range(cfg.candidates)]
            clips = [sample.generate_latent(models, firsts[0], text, phys, key, cfg.frames, cfg.sampler_steps,
                                            cfg.sampler_shift, solver=cfg.solver, temperature=cfg.heat) for key in keys]
            if cfg.truth:
                clips.append(models.vae.encode(film, chunk)[:, :, 1:])
            for x0 in clips:
                video = models.vae.decode(torch.cat([firsts[0], x0], 2), chunk)
                with torch.autocast(device.type, enabled=False):
                    scores.append(score(video.float(), batch, batch["weights"]).cpu())
                # gravity has no left or right, and an encoded mirror image is what the DiT would have to make there
                flipped = torch.cat([frame, video[:, :, 1:].to(frame)], 2).flip(-1)
                latents.append(torch.stack([x0, models.vae.encode(flipped, chunk)[:, :, 1:]]).cpu())
        latents, firsts = torch.stack(latents), torch.stack(firsts).cpu()            # (K, 2, B, ...), (2, B, ...)
        pairs = [(*pair, m) for pair in ranked(torch.stack(scores), cfg.margin) for m in (0, 1)]
        scene_of, better, worse, mirrored = torch.tensor(pairs, dtype=torch.long).view(-1, 4).unbind(1)
        who = [f"sample {k}" for k in range(cfg.candidates)] + ["truth"]
        with common.atomic(f"{pool}/{name}.jsonl") as tmp, open(tmp, "w") as f:
            for i, w, l, m in pairs:
                f.write(json.dumps({"scenario": scenario, "seed": SEED, "index": start + i,
                                    "caption": batch["caption"][i], "winner_score": round(scores[w][i].item(), 4),
                                    "loser_score": round(scores[l][i].item(), 4), "winner": who[w],
                                    "loser": who[l], "mirrored": bool(m), "source": "simulator"}) + "\n")
        photos = common.to_bytes(torch.stack([photo, photo.flip(-1)])).cpu()
        # the tensors last: their file says that the shard is complete
        common.save_weights(f"{pool}/{name}.safetensors", dict(
            first=firsts[mirrored, scene_of].bfloat16(), winner=latents[better, mirrored, scene_of].bfloat16(),
            loser=latents[worse, mirrored, scene_of].bfloat16(), photo=photos[mirrored, scene_of],
            text=M.bytes_to_tokens(batch["caption"], M.LONG)[scene_of].short()),
            stamp | plan[name] | dict(world=common.source_hash()))
    made.close()
    return stop.agreed(device)                     # once all ranks are done


def chosen(lines, best_only, mirror, truth):
    """Which pairs are learned from, by their lines in .jsonl -> their numbers. Best against worst is the widest margin
    of its scene; a line that names no scene (pairs from elsewhere) stands for itself."""
    kept = [i for i, line in enumerate(lines) if (mirror or not line.get("mirrored"))
            and (truth or "truth" not in (line.get("winner"), line.get("loser")))]
    if not best_only:
        return kept
    widest = {}
    for i in kept:
        line = lines[i]
        key = tuple(map(line.get, ("scenario", "seed", "index", "mirrored"))) if "index" in line else i
        margin = line.get("winner_score", 0) - line.get("loser_score", 0)
        if margin > widest.get(key, (-math.inf, i))[0]:
            widest[key] = margin, i
    return [i for _, i in widest.values()]


def check_pairs(cfg, models, path, tensors):
    """Raises InputError unless the tensors of a shard are pairs of this run's size, see the top of this file."""
    stride, z, T = models.vae.stride, models.vae.config["z_dim"], (cfg.frames - 1) // 4
    h, w = cfg.height // stride, cfg.width // stride
    expected = dict(first=(z, 1, h, w), winner=(z, T, h, w), loser=(z, T, h, w), text=(M.LONG,),
                    photo=(3, *simdata.sides(form(cfg, models)["photo"])))
    if lacking := expected.keys() - tensors.keys():
        raise common.InputError(f"{path} has no {', '.join(sorted(lacking))}; expected {', '.join(expected)}")
    N = len(tensors["winner"])
    for key, shape in expected.items():
        if tensors[key].shape != (N, *shape):
            raise common.InputError(f"{path}: {key} is {tuple(tensors[key].shape)}; expected {(N, *shape)}, with "
                                    f"--height={cfg.height} --width={cfg.width} --frames={cfg.frames} and this VAE")


def load_pairs(cfg, models, pool, rank):
    """All shards in a folder -> dict of tensors, a pair a row. Raises InputError when they do not belong together."""
    parts, lines, worlds = [], [], {common.source_hash()}
    for name in shards_of(pool):
        tensors, made = common.read_weights(f"{pool}/{name}.safetensors")
        worlds |= {made["world"]} if "world" in made else set()
        check_pairs(cfg, models, f"{pool}/{name}.safetensors", tensors)
        notes = common.read_lines(f"{pool}/{name}.jsonl")
        if len(notes) != len(tensors["winner"]):
            raise common.InputError(f"{pool}/{name}: {len(notes)} lines in .jsonl, "
                                    f"{len(tensors['winner'])} pairs in .safetensors")
        for note in notes:
            for key in {"winner_score", "loser_score"} & note.keys():
                if not isinstance(note[key], (int, float)):
                    raise common.InputError(f"{pool}/{name}.jsonl: {key} is {note[key]!r}; expected a number")
        keep = chosen(notes, cfg.best_only, cfg.mirror, cfg.truth)
        parts.append({k: tensors[k][keep] for k in ("first", "winner", "loser", "photo", "text")})
        lines.extend(notes[i] for i in keep)
    if any(other != shards_of(pool) for other in common.gather(shards_of(pool))):
        raise common.InputError(f"{pool} is not the same folder on all machines; expected one that they share")
    if not lines:
        raise common.InputError(f"{pool} holds no pairs" + (
            f": every margin was under --margin={cfg.margin}; lower it, or raise --candidates" if cfg.pairs else
            "; expected shards as described in dpo.py, or --pairs=N to make some"))
    if rank == 0 and len(worlds) > 1:
        print(f"note: simdata.py has changed since {pool} was made; another --pool would be of the world as it is now")
    if rank == 0:
        w, l = ([line[k] for line in lines if k in line] for k in ("winner_score", "loser_score"))
        print(f"{len(lines)} pairs" + (f"; chaos-weighted distance to the truth in px: winners {-sum(w) / len(w):.2f}, "
                                       f"losers {-sum(l) / len(l):.2f}" if w and l else ""))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


# ----------------------------------------------------------------------------------------------------------------------
# one stage: the same loop, only what is trained differs

def pair_errors(net, given, clips, in_turn=False):
    """The errors of winners and losers, (B,) each: net(seen, first, clips, text, t, eps) of `given`, (seen, first,
    text, t, eps), and clips, [winner, loser]; in_turn: pair by pair, which takes the memory of one."""
    about, first, text, t, eps = given
    if not in_turn:
        return net(about, first, clips, text, t, eps)
    turns = [pair_errors(net, common.tree_map(given, lambda x: x[i:i + 1]), [clip[i:i + 1] for clip in clips])
             for i in range(len(first))]
    return [torch.cat(errors) for errors in zip(*turns)]


def train(cfg, stage, round_number, models, pairs, held_out, folder, stop, device, rank, world):
    """Train what STAGES[stage] says in one round; everything else is frozen. -> True if it was stopped before
    its end."""
    dit, encoder = models.dit, models.encoder
    head = encoder.head if encoder is not None else None
    for module in (dit, head):
        if module is not None:
            module.requires_grad_(False)
    if "LoRA" in STAGES[stage]:
        if not M.lora_state(dit):                  # a later stage or round goes on with the one that is there
            M.add_lora(dit, cfg.rank, cfg.alpha, cfg.seed)
        for name, p in dit.named_parameters():
            p.requires_grad_(name.endswith(("lora_A", "lora_B")))
    if "head" in STAGES[stage]:
        head.requires_grad_(True)
        head.scratch.refinenet4.resConfUnit1.requires_grad_(False)                   # in every DPT, used by none
    some = common.evenly(len(pairs["first"]), 16)
    latent = torch.cat([pairs["first"][some], pairs["winner"][some, :, :1]], 2)
    raw = Policy(dit, head, visibility(models.vae, latent.to(device))).to(device).train()
    trained = {k: p for k, p in raw.named_parameters() if p.requires_grad}
    reference = {k: p.detach().clone() for k, p in trained.items()}                  # no second model, just tensors
    model = DistributedDataParallel(raw) if world > 1 else raw
    groups = [dict(params=[p for k, p in trained.items() if k.startswith(part)], peak=peak)
              for part, peak in (("dit.", cfg.lr), ("head.", cfg.lr_head))]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.0)
    name = f"{stage}_{round_number}" if round_number > 1 else stage
    log, state = f"{folder}/metrics{name}.jsonl", f"{folder}/state{name}.safetensors"
    best = {k: p.clone() for k, p in reference.items()}
    best |= {k: torch.tensor([math.inf, 0.0]) for k in ("first_scores", "scores")}   # traj_l2 and IoU, see validate
    parts = {"model": trained, "reference": reference, "best": best}
    start = common.load_state(state, parts, optimizer) if cfg.resume else 0
    if rank == 0:
        common.trim_log(log, start)
        print(f"Stage {stage}, round {round_number}, {STAGES[stage]}: "
              f"{sum(p.numel() for p in trained.values()):,} trained parameters, from step {start}")

    @torch.no_grad()
    def validate(done, share=1.0):
        """The outcome on val scenes, as cold as sample.py's (the candidates are not: they should differ). This, not the
        loss, is what the stage is for. -> (2,) traj_l2, IoU"""
        raw.eval()
        scores, _ = judge.outcome(models, held_out.result(), device, steps=cfg.sampler_steps,
                                  shift=cfg.sampler_shift, solver=cfg.solver, temperature=cfg.temperature)
        raw.train()
        if rank == 0:
            common.log_line(log, {"step": max(done - 1, 0), "share": share} | scores)
            bar.write(f"stage {stage}, " + (f"step {done}" if share == 1 else f"{share:.0%} of the way to the best")
                      + f": val traj_l2 {scores['val_traj_l2']:.4f}, IoU {scores['val_iou']:.3f}")
        return torch.tensor([*scores.values()])

    def keep_if_best(scores):
        if scores[0] < best["scores"][0]:
            for k, v in (trained | {"scores": scores}).items():
                best[k].copy_(v.detach())

    began = time.time()
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=rank > 0, desc=f"stage {stage}")
    if start == 0:
        best["first_scores"] = validate(0)
        keep_if_best(best["first_scores"])
    for step in bar:
        scale = min((step + 1) / (cfg.warmup + 1), 0.1 + 0.45 * (1 + math.cos(math.pi * step / cfg.steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        g = common.generator(cfg.seed, "dpo", name, step)
        index = torch.randint(len(pairs["winner"]), (cfg.batch,), generator=g)
        t = M.sample_t(cfg.batch, g, cfg.shift).to(device)
        eps = common.noise((cfg.batch, *pairs["winner"].shape[1:]), cfg.seed, "dpo noise", name, step, device=device)
        mine = slice(rank * cfg.batch // world, (rank + 1) * cfg.batch // world)
        row = {k: v[index[mine].to(v.device)].to(device) for k, v in pairs.items()}
        photo = common.from_bytes(row["photo"])
        with common.autocast(device):
            seen = encoder.features(photo) if encoder is not None else None
            said = models.read(M.tokens_to_strings(row["text"])) if models.text else row["text"][:, :M.BYTES].long()
            pair = row["winner"].float(), row["loser"].float()
            given = seen, row["first"].float(), said.to(device), t[mine], eps[mine]
            with torch.no_grad():                  # the reference: the same module and precision, the tensors of step 0
                ref_w, ref_l = pair_errors(lambda *x: torch.func.functional_call(raw, reference, x), given, pair,
                                           cfg.in_turn)
            with torch.set_grad_enabled(not cfg.in_turn):
                err_w, err_l = pair_errors(raw if cfg.in_turn else model, given, pair, cfg.in_turn)
        err_w, err_l = err_w.requires_grad_(), err_l.requires_grad_()
        preference = dpo_loss(err_w, err_l, ref_w, ref_l, cfg.beta)
        loss = preference.mean() + cfg.sft * err_w.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.in_turn:                            # so far down to all errors; now through the network, one by one
            for i in range(len(photo)):
                for clip, slope in zip(pair, (err_w.grad, err_l.grad)):
                    with common.autocast(device):
                        error, = pair_errors(model, common.tree_map(given, lambda x: x[i:i + 1]), [clip[i:i + 1]])
                    (error * slope[i]).sum().backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()

        done = step + 1
        if step % cfg.log_every == 0:
            gap = (err_w - ref_w) - (err_l - ref_l)
            margin = -cfg.beta / 2 * gap
            values = torch.stack([preference.mean(), (gap < 0).float().mean(), margin.mean(), (err_w - ref_w).mean(),
                                  (err_l - ref_l).mean(), ref_w.mean(), ref_l.mean()]).detach()
            names = ("loss", "implicit_accuracy", "margin", "winner_vs_reference", "loser_vs_reference",
                     "ref_w", "ref_l")
            entry = {"step": step} | dict(zip(names, common.average(values, device).tolist()))
            if rank == 0:
                common.log_line(log, entry | {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                                              "seconds": round(time.time() - began, 1)})
                bar.set_postfix(loss=f"{entry['loss']:.3f}", accuracy=f"{entry['implicit_accuracy']:.2f}",
                                winner=f"{entry['winner_vs_reference']:+.1e}",
                                loser=f"{entry['loser_vs_reference']:+.1e}")
        ending = stop.agreed(device)
        if done % cfg.eval_every == 0 or done == cfg.steps:
            keep_if_best(validate(done))
        if done % cfg.eval_every == 0 or done == cfg.steps or ending:
            common.save_state(state, done, parts, optimizer)
        if ending and done < cfg.steps:
            return True
    # Preferences are about where things go, and may cost how these look. So from the best back towards the beginning,
    # by quarters, until neither is worse than it was there
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        with torch.no_grad():
            for k, p in trained.items():
                p.copy_(torch.lerp(reference[k], best[k], share))
        scores = best["scores"] if share == 1 else validate(cfg.steps + 1, share)
        if scores[0] <= best["first_scores"][0] and scores[1] >= best["first_scores"][1] - SLACK:
            break
    if rank == 0:
        made = {}
        if "LoRA" in STAGES[stage]:
            made["lora2"] = M.lora_state(dit), {"rank": cfg.rank, "alpha": cfg.alpha, "base": dit.base}
        if "head" in STAGES[stage]:
            made["head3"] = head, encoder.config
        if round_number == 1 and stage == cfg.stages.split(",")[0] != "3":           # an earlier run's do not fit these
            for old in {"lora2", "head3"} - made.keys():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(f"{folder}/{old}.safetensors")
        for file, (tensors, config) in made.items():
            common.save_weights(f"{folder}/{file}.safetensors", tensors, config, torch.bfloat16)
        print(f"wrote the {STAGES[stage]} of val traj_l2 {scores[0]:.4f}, IoU {scores[1]:.3f}, to {folder}")
    return False


def captions(cfg):
    """Of all scenes that a run may draw candidates for, and of the val clips."""
    names = common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    parts = {tuple(part.values()) for pool, first in pools(cfg) for kind in ("cpu", "cuda")          # on a GPU others
             for part in shard_plan(cfg, pool, first, torch.device(kind)).values()}
    return judge.val_captions(names, cfg.eval_clips) + [
        c for name, count, start in sorted(parts)
        for c in simdata.captions(simdata.make_scene(name, count, SEED, "train", start=start)[0])]


def main():
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS)
    common.check_range(cfg, rounds=(1, 10**4), pairs=(0, 10**8), candidates=(2, 256), margin=(0, 1e3), beta=(0, 1e7),
                       sft=(0, 1e3), rank=(1, 1024), alpha=(1, 4096), steps=(0, 10**7), batch=(1, 10**6),
                       eval_clips=(1, 10**5), log_every=(1, 10**7), eval_every=(1, 10**7), sampler_steps=(1, 1000),
                       lr=(0, 1), lr_head=(0, 1), warmup=(0, 10**7), shift=(0.01, 100), sampler_shift=(0.01, 100),
                       temperature=(0, 2), heat=(0, 2), height=(16, 2048), width=(16, 2048), frames=(5, 1001),
                       fps=(1, 240))
    common.check_frames(cfg)
    common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    common.check_choice(cfg, solver=M.SOLVERS, stages=("2", "3", "head", "both", "2,3", "2,both"))
    stages = cfg.stages.split(",")
    if os.path.abspath(cfg.pool) == os.path.abspath(f"out/{cfg.name}"):
        raise common.InputError(f"--pool={cfg.pool}: expected another folder than the run's, which has weights")
    device, rank, world = common.setup(cfg.device)
    if cfg.batch % world:
        raise common.InputError(f"--batch={cfg.batch} must be a multiple of the {world} ranks")
    reads, text = common.read_config(f"{cfg.data}/dit.safetensors"), {}

    def understand(texts):
        """What an outside text encoder says about them, if the DiT needs one, computed once."""
        if reads.get("text") == "features":
            path = cfg.text_emb or f"{cfg.data}/captions.safetensors"
            text.update(sample.text_features(path, texts, reads["text_dim"], cfg.data, device))
    understand(captions(cfg))                      # before the DiT takes the memory
    models = sample.load_models(cfg.data, 1, device=device)                          # Stage I makes the pairs
    models.text = text or None
    common.check_sides(cfg, ("height", "width"), 2 * models.vae.stride)
    if stages != ["2"] and models.encoder is None:
        raise common.InputError(f"--stages={cfg.stages} trains the physical head, but this DiT was trained without "
                                "one; expected --stages=2")
    sample.check_foretelling(models.encoder, cfg)
    if cfg.stages == "3" and not os.path.exists(f"{cfg.data}/lora2.safetensors"):
        raise common.InputError(f"--stages=3 goes on from Stage II: {cfg.data} has no lora2.safetensors; expected "
                                "--stages=2,3, or the folder of a run of Stage II")
    models.dit.checkpointing = cfg.checkpointing

    check_pool(cfg, models, cfg.pool, 0, device)   # before hours of work
    common.make_dir(cfg.scenes)
    held_out = common.in_background(common.disk_cache, cfg.scenes, judge.val_scenes, cfg.scenarios.split(","),
                                cfg.eval_clips, 32 if sample.small(cfg.height, cfg.width) else 1, rank, world,
                                form(cfg, models)) if cfg.steps else None
    stop, stopped = common.Stop(), False
    for round_number, (pool, scene) in enumerate(pools(cfg), 1):                     # later ones: the policy of now
        if make_pairs(cfg, models, pool, scene, stop, device, rank, world):
            stopped = True
            break
        pairs = common.to_device_if_it_fits(load_pairs(cfg, models, pool, rank), device)
        understand(M.tokens_to_strings(pairs["text"]))                               # pairs may come from elsewhere
        if round_number == 1 and cfg.steps:        # all it reads is there
            folder = common.start_run(cfg, rank, f"out/{cfg.name}")
            if rank == 0:                          # copied first, so that with its last file the folder is whole
                sample.copy_weights(cfg.data, folder, "vae", "backbone", "readout", "dit", "head1",
                                  *["lora2"] * (stages == ["3"]), text_emb=cfg.text_emb)
        if round_number == 1 and stages == ["3"]:  # Stage III alone: Stage II's LoRA is on, in policy and reference
            models = sample.load_models(cfg.data, 2, device=device)
            models.dit.checkpointing, models.text = cfg.checkpointing, text or None
        for stage in stages if cfg.steps else ():
            stopped = stopped or stop.agreed(device) or train(
                cfg, stage, round_number, models, pairs, held_out, folder, stop, device, rank, world)
        if stopped:
            break
    if rank == 0 and stopped:
        print("stopped; go on with --resume=True")


if __name__ == "__main__":
    common.run(main)
