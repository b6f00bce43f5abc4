"""
How physical is it? A parser that finds each body in a video again, metrics on what it finds, the rows that say what a
number means (truth re-parsed, VAE round trip, jittered truth, static, teleport), and 95 % intervals.

    python eval.py                                  # the table on 500 validation scenes, seen and unseen
    python eval.py --split=test --n=1000 --json=out/eval.json
    python eval.py --scenarios=drop,roll
    python eval.py --rows=plain=out/plain:1,winners=out/winners:2    # run folders, paired with the first stage
    python eval.py --table --split=test             # PhysMaster's Table 1, of what data/rows.sh has trained
    python eval.py --ckpt=out/sft/dit.safetensors --head=out/sft/head1.safetensors
    python eval.py --clips=FOLDER                   # on clips of any origin, see simdata.py
    torchrun --nproc_per_node=8 -- eval.py --n=4096  # without -- torchrun takes --n for one of its own

The parser knows the first frame and its masks, never the truth's future; its own error is the row "truth re-parsed".
Metrics that PISA (2503.09595), phyworld (2411.02385) or Physics-IQ (2501.09038) define keep their definition; the
others are defined where they are computed. Times are seconds, lengths pixels, `traj_l2` and PISA's over the diagonal.
"""
import json
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import sample
import simdata
from encoder import true_paths
from model import SOLVERS


# ----------------------------------------------------------------------------------------------------------------------
# the parser: bodies are colourful, floors and walls are grey. Every body is found by its hue, then matted.

def parse(video, image, mask, count):
    """Find the bodies of the first frame in every frame of a video.

    video (B, 3, T, H, W) in [-1, 1]; image (B, 3, H, W), the first frame; mask (B, H, W) uint8, its bodies 1..count.
    -> alpha (B, T, N, H, W) in [0, 1]: how much of each pixel is body k; zero where there is none."""
    B, _, T = video.shape[:3]
    rgb, first = (video.float().transpose(1, 2) + 1) / 2, (image.float() + 1) / 2                   # (B, T, 3, H, W)
    own = torch.stack([mask == k + 1 for k in range(count)], 1).float()                             # (B, N, H, W)
    chroma = lambda c: c - c.mean(-3, keepdim=True)
    # one hue direction and one saturation a body, from its pixels in frame 0, weighted to the clean inner ones
    inner = -F.max_pool2d(-own, 3, 1, 1)
    inner = torch.where(inner.sum((2, 3), keepdim=True) >= 4, inner, own)
    mean = torch.einsum("bnhw,bchw->bnc", inner, chroma(first)) / inner.sum((2, 3))[..., None].clamp_min(1)
    value = (inner * first.amax(1, keepdim=True)).sum((2, 3)) / inner.sum((2, 3)).clamp_min(1)      # (B, N)
    hue = F.normalize(mean, dim=-1)
    saturation = mean.norm(dim=-1) / value.clamp_min(1e-3)

    c = chroma(rgb)
    along = torch.einsum("bnc,btchw->btnhw", hue, c)                                                # (B, T, N, H, W)
    length = c.square().sum(2, keepdim=True).sqrt()                                  # norm(dim=2) is far slower
    ratio = along / rgb.amax(2, keepdim=True).clamp_min(0.02) / saturation[:, None, :, None, None].clamp_min(1e-3)
    best = along == along.amax(2, keepdim=True)
    exists = (own.sum((2, 3)) > 0)[:, None, :, None, None]
    solid = best & exists & (ratio > 0.65) & (along > 0.93 * length) & (length > 0.04)              # surely body k
    empty = ~solid.any(2, keepdim=True) & (ratio.amax(2, keepdim=True) < 0.3)                       # surely none

    # between the two lies the edge: how far is the pixel from the background's colour around it to the body's?
    def around(weight):                            # (B, T, M, H, W) -> mean colour of those pixels near by, and if any
        w = weight.float().flatten(0, 1)
        box = lambda x: F.avg_pool2d(x, 3, 1, 1)
        total = box(w)
        color = (torch.stack([box(w * rgb.flatten(0, 1)[:, i:i + 1]) for i in range(3)], 2)
                 / total[:, :, None].clamp_min(1e-6))
        return color.unflatten(0, (B, T)), (total > 0).unflatten(0, (B, T))                         # (B, T, M, 3, H, W)

    body, near = around(solid)
    ground, clear = around(empty)
    span = body - ground
    alpha = ((rgb[:, :, None] - ground) * span).sum(3) / span.square().sum(3).clamp_min(1e-4)
    return torch.where(solid, 1.0, torch.where(near & clear & ~solid.any(2, keepdim=True), alpha.clamp(0, 1), 0.0))


def centroids(alpha):
    """(..., H, W) weights -> (..., 2) centre in pixels (x, y), pixel centres at +0.5; NaN where nothing is."""
    H, W = alpha.shape[-2:]
    alpha = alpha.float()
    total = alpha.sum((-2, -1))
    x = (alpha.sum(-2) * (torch.arange(W, device=alpha.device) + 0.5)).sum(-1)
    y = (alpha.sum(-1) * (torch.arange(H, device=alpha.device) + 0.5)).sum(-1)
    return torch.stack([x, y], -1) / torch.where(total > 1, total, torch.nan)[..., None]


# ----------------------------------------------------------------------------------------------------------------------
# the published metrics

def pisa(pred, true):
    """PISA's three numbers for one body: bool masks (T, H, W) -> dict(l2, chamfer, iou), exactly as its code has them.

    "l2" is mean(|dx|, |dy|) over sqrt(2) H and skips frames in which either mask is empty (NaN if all are); chamfer is
    the sum of both mean nearest distances over sqrt(2) H, skipped likewise; iou counts 1 where both are empty."""
    scale, l2, chamfer = math.sqrt(2) * pred.shape[1], [], []
    for p, t in zip(pred, true):
        p, t = p.nonzero().float(), t.nonzero().float()                                             # (P, 2), (P', 2)
        if len(p) and len(t):
            far = torch.cdist(p, t, compute_mode="donot_use_mm_for_euclid_dist")                    # (P, P')
            l2.append((p.mean(0) - t.mean(0)).abs().mean() / scale)
            chamfer.append((far.amin(1).mean() + far.amin(0).mean()) / scale)
    union, both = (x.flatten(1).sum(1) for x in (pred | true, pred & true))                         # (T,)
    iou = torch.where(union > 0, both / union.clamp_min(1), 1.0).mean().item()
    mean = lambda x: torch.stack(x).mean().item() if x else math.nan
    return dict(l2=mean(l2), chamfer=mean(chamfer), iou=iou)


def _motion(video):
    """Physics-IQ's motion masks of videos (B, 3, T, H, W) in [-1, 1] -> bool (B, T, H, W); the first is empty.

    Theirs are then shrunk to a quarter; at 64 px that would leave nothing, so ours keep their size."""
    grey = (video.float() + 1) * 127.5
    grey = (grey * torch.tensor([0.299, 0.587, 0.114], device=video.device).view(1, 3, 1, 1, 1)).sum(1)  # (B, T, H, W)
    g = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=video.device) / 16            # OpenCV's 5-tap Gaussian
    grey = F.conv2d(F.pad(grey.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="reflect"), (g[:, None] * g)[None, None])
    grey = grey.view(video.shape[0], video.shape[2], *video.shape[3:])
    dilate = lambda m: F.max_pool2d(m, 5, 1, 2)
    erode = lambda m: -dilate(-m)
    background, masks = grey[:, 0], [torch.zeros_like(grey[:, 0], dtype=torch.bool)]
    for t in range(1, grey.shape[1]):
        background = 0.7 * background + 0.3 * grey[:, t]                             # updated first, as theirs is
        moving = ((grey[:, t] - background).abs() > 10).float()[:, None]
        masks.append(erode(dilate(dilate(erode(moving))))[:, 0] > 0.5)               # open, then close
    return torch.stack(masks, 1)


def physics_iq(pred, true, moved=None):
    """Physics-IQ's four raw measures of videos (B, 3, T, H, W) in [-1, 1] -> dict of (B,). moved: _motion(true), if it
    is known.

    mse on [0, 1] RGB; spatial_iou of "did it ever move here"; spatiotemporal_iou per frame, both empty = 1;
    weighted_spatial_iou by how often. At 64 px they are not comparable with its leaderboard."""
    a, b = _motion(pred), _motion(true) if moved is None else moved
    iou = lambda x, y, dims: torch.where((x | y).sum(dims) > 0, (x & y).sum(dims) / (x | y).sum(dims).clamp_min(1), 1.0)
    wa, wb = a.float().mean(1), b.float().mean(1)
    total = torch.maximum(wa, wb).sum((1, 2))
    return dict(mse=((pred - true).float() / 2).square().mean((1, 2, 3, 4)),
                spatial_iou=iou(a.any(1), b.any(1), (1, 2)), spatiotemporal_iou=iou(a, b, (2, 3)).mean(1),
                weighted_spatial_iou=torch.where(
                    total > 0, torch.minimum(wa, wb).sum((1, 2)) / total.clamp_min(1e-9), 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# our own, beside them

def phases(batch, fps):
    """When is each body in flight, past its first contact, at rest? -> three bool (B, T, N), from the true state."""
    v = batch["velocity"]
    time = torch.arange(v.shape[1], device=v.device) / fps
    free = batch["gravity"][:, None, None] * time[None, :, None, None]
    touched = ((v - v[:, :1] - free).norm(dim=-1) > 0.05).cummax(1).values             # left the ballistic path
    still = (v.norm(dim=-1) < 0.05) & (batch["angular_velocity"].norm(dim=-1) < 0.3) & touched
    rest = still.flip(1).int().cummin(1).values.flip(1).bool()                       # and stays so to the end
    return ~touched, touched & ~rest, rest


def laws(track, flight):
    """Of vertical tracks y (K, T), pixels down, and flight (K, T) bool (true before the first contact) ->

    g (K,) px/frame^2, a quadratic fit to the flight; contact (K,) frames, the first in which the fall has
    lost half its speed; bounce (K,), the largest upward speed just after it over the largest downward before it."""
    T = track.shape[1]
    t = torch.arange(T, dtype=torch.float64)       # the fit is made on the CPU: MPS has no float64
    w = (flight & track.isfinite()).cpu().double()
    y = torch.nan_to_num(track).cpu().double()
    A = torch.stack([t * t / 2, t, torch.ones_like(t)], -1)                                         # (T, 3)
    normal = torch.einsum("kt,ti,tj->kij", w, A, A) + 1e-9 * torch.eye(3)
    g = torch.linalg.solve(normal, torch.einsum("kt,ti,kt->ki", w, A, y))[:, 0]
    g = torch.where(w.sum(1) >= 4, g, torch.nan).float().to(track.device)            # fewer frames fit anything
    v = track[:, 1:] - track[:, :-1]                                                                # (K, T-1)
    fast = torch.nan_to_num(v, nan=-torch.inf).cummax(1).values
    turned = (v < 0.5 * fast) & (fast > 1)
    contact = torch.where(turned.any(1), turned.float().argmax(1).float(), torch.nan)
    after = torch.arange(T - 1, device=track.device) >= torch.nan_to_num(contact, nan=T)[:, None]
    down = torch.where(~after, torch.nan_to_num(v), 0.0).amax(1)
    soon = after & (torch.arange(T - 1, device=track.device) <= torch.nan_to_num(contact, nan=-9)[:, None] + 2)
    up = torch.where(soon, torch.nan_to_num(-v), 0.0).amax(1).clamp_min(0)
    return g, contact, torch.where(contact.isfinite() & (down > 1), up / down.clamp_min(1e-6), torch.nan)


def found_laws(c, c_true, counts, flight, batch, fps):
    """laws() of found and true centres (B, T, N, 2), of bodies that are in the air in frame 1 -> {g_ratio,
    restitution_error, contact_time_error: (B,)}.

    The same fit on both, so that perspective cancels. No body that should fall is left out: of one that is not found
    long enough g is 0; an error is the largest that there can be, 1 for the restitution, where a contact is missed."""
    B, T = c.shape[:2]
    which = (batch["falls"] & flight[:, 1]).nonzero()
    pick = lambda x: x[which[:, 0], :, which[:, 1]]
    known = counts | (torch.arange(T, device=c.device) == 0)[None, :, None]
    track = pick(torch.where(known, c[..., 1], torch.nan))
    track_true = pick(torch.where(known, c_true[..., 1], torch.nan))
    (g, when, bounce), (g_true, when_true, bounce_true) = laws(track, pick(flight)), laws(track_true, pick(flight))
    g_ratio = torch.where(pick(flight & counts).sum(1) >= 4, g.nan_to_num(0) / g_true, torch.nan)
    missed = when_true.isfinite() & ~when.isfinite()
    late = torch.where(when_true.isfinite(), (when - when_true).abs(), T - when)     # where there should be no contact
    contact = torch.where(missed, torch.maximum(when_true, T - when_true), late) / fps
    rebound = torch.where(missed & bounce_true.isfinite(), 1.0, (bounce - bounce_true).abs().clamp_max(1))

    def spread(x):                                 # bodies back to clips: the mean over a clip's, NaN if none counts
        good = x.isfinite()
        total = torch.zeros(B, device=x.device).index_add_(0, which[:, 0], torch.where(good, x, 0.0))
        n = torch.zeros(B, device=x.device).index_add_(0, which[:, 0], good.float())
        return torch.where(n > 0, total / n.clamp_min(1), torch.nan)

    return dict(g_ratio=spread(g_ratio), restitution_error=spread(rebound), contact_time_error=spread(contact))


def collision_laws(c, c_true, batch):
    """What a clip's first collision of two bodies keeps, of those with four steps before it and three after it ->
    {momentum_error, energy_error: (B,)}, NaN without one.

    Momentum along the picture's width and kinetic energy in its plane, from centres (B, T, N, 2) in px/frame and true
    masses, over the three steps before the contact and the three after it; how much the found change differs from the
    true one (friction, gravity and perspective change them, too), over the momentum of both (or energy) before."""
    B, T, N, _ = c.shape
    out = {k: torch.full((B,), torch.nan, device=c.device) for k in ("momentum_error", "energy_error")}
    pushed = batch["impulse"][..., :N] * batch["falls"][:, None, :, None] * batch["falls"][:, None, None]
    speed = (c_true[:, 1:] - c_true[:, :-1]).nan_to_num()                            # (B, T-1, N, 2)
    for b, t in (pushed > 0).flatten(2).any(2).nonzero().tolist():
        if not 4 <= t < T - 3 or out["momentum_error"][b].isfinite():
            continue
        i, j = divmod(pushed[b, t].argmax().item(), N)
        if (speed[b, t - 4:t - 1, i] - speed[b, t - 4:t - 1, j]).mean(0).norm() < 0.5:              # they only touch
            continue
        pair, mass = [i, j], batch["mass"][b, [i, j], None]                          # (2, 1)

        def change(c):                             # from t - 4 .. t - 1 to t .. t + 3
            before, after = ((c[b, s + 3, pair] - c[b, s, pair]) / 3 for s in (t - 4, t))           # (2, 2) px/frame
            kinetic = lambda v: 0.5 * (mass * v.square()).sum()
            scale = (mass[:, 0] * before.norm(dim=1)).sum(), kinetic(before)
            return (mass * (after - before))[:, 0].sum(), kinetic(after) - kinetic(before), *scale
        (p, e, _, _), (p_true, e_true, p_scale, e_scale) = change(c), change(c_true)
        if not (p_true + e_true).isfinite() or min(p_scale, e_scale) == 0:           # out of view
            continue
        lost = not (p + e).isfinite()              # a body that is gone has taken along all it had
        out["momentum_error"][b] = 1.0 if lost else (p - p_true).abs() / p_scale
        out["energy_error"][b] = 1.0 if lost else (e - e_true).abs() / e_scale
    return out


def penetration(c, c_true, radius, counts):
    """How far bodies are inside each other -> (B,): of pairs that are judged, the share of both radii by which found
    centres come closer than 0.7 of them, or than in the truth if that is less; a lost body is as deep inside as can be.
    radius (B, N) px, apparent."""
    N = c.shape[2]
    i, j = torch.triu_indices(N, N, 1, device=c.device)
    both, far, far_true = radius[:, None, i] + radius[:, None, j], *((x[:, :, i] - x[:, :, j]).norm(dim=-1)
                                                                    for x in (c, c_true))           # (B, T, pairs)
    inside = (torch.minimum(0.7 * both, far_true) - far.nan_to_num(0)).clamp_min(0) / both
    inside = inside.masked_fill(~(counts[:, :, i] & counts[:, :, j]), torch.nan)
    return inside.flatten(1).nanmean(1)


def tracks(video, batch):
    """Where bodies are and should be. -> found, true masks (B, T, N, H, W) bool, their centres (B, T, N, 2) in pixels,
    and shown (B, T, N): the frames in which the truth shows a body.

    Frame 0 is given, and what is mostly hidden or out of view has no position that a picture could show."""
    N, mask = batch["alive"].shape[1], batch["mask"]
    alpha = parse(video, batch["video"][:, :, 0], mask[:, 0], N)                                    # (B, T, N, H, W)
    true = torch.stack([mask == k + 1 for k in range(N)], 2)                                        # (B, T, N, H, W)
    area = true.sum((-2, -1))
    shown = (area >= 0.5 * area.amax(1, keepdim=True).clamp_min(8)) & batch["alive"][:, None]
    shown[:, 0] = False
    return alpha > 0.5, true, centroids(alpha), centroids(true), shown


def distance(c, c_true, diagonal):
    """Distance of centres (..., 2) in pixels; a body that was not found is as wrong as can be: the image's diagonal."""
    return torch.where(c.isfinite().all(-1), (c - c_true).norm(dim=-1), diagonal).clamp_max(diagonal)


def measure(video, batch, fps=16, detail=True):
    """Every metric of every clip: video (B, 3, T, H, W) against a make_batch dict -> {metric: (B,), NaN = undefined}.

    detail=False: only traj_l2 and iou_visible, for choosing among many samples."""
    B, _, _, H, W = video.shape
    N, mask, diagonal = batch["alive"].shape[1], batch["mask"], math.hypot(H, W)
    found, true, c, c_true, shown = tracks(video, batch)
    counts = shown & batch["falls"][:, None]       # where a body's place is judged
    area, true_area = found.sum((-2, -1)), true.sum((-2, -1))                                       # (B, T, N)
    error = distance(c, c_true, diagonal) / diagonal

    def mean(x, where):                            # over frames and bodies of each clip, NaN if there are none
        n = where.flatten(1).sum(1)
        return torch.where(n > 0, torch.where(where, x, 0.0).flatten(1).sum(1) / n.clamp_min(1), torch.nan)

    overlap = (found & true).sum((-2, -1)) / (found | true).sum((-2, -1)).clamp_min(1)              # (B, T, N)
    out = dict(traj_l2=mean(error, counts), iou_visible=mean(overlap, shown))
    if not detail:
        return out
    when = {}                                      # clips of other origin may have masks, but no velocities
    if all(k in batch for k in ("velocity", "angular_velocity", "gravity")):
        when = dict(zip(("flight", "contact", "rest"), phases(batch, fps)))
    out |= {f"traj_l2_{name}": mean(error, counts & phase) for name, phase in when.items()}
    # phyworld's velocity error, px/frame: from frame 3, fully in view; a missing body is put into the upper left corner
    border = torch.where(c.isfinite(), c, 0.0)
    edge = torch.stack([true[..., 0].any(-1), true[..., -1].any(-1),
                        true[..., 0, :].any(-1), true[..., -1, :].any(-1)]).any(0)
    inside = (counts & ~edge)[:, 1:] & (counts & ~edge)[:, :-1]
    inside[:, :2] = False
    speed = ((border[:, 1:] - border[:, :-1]) - (c_true[:, 1:] - c_true[:, :-1])).norm(dim=-1)
    out["velocity_error"] = mean(speed, inside)
    if when:
        out["velocity_error_before_contact"] = mean(speed, inside & when["flight"][:, 1:])
        out["velocity_error_after_contact"] = mean(speed, inside & ~when["flight"][:, 1:])

    # PISA's, per dropped body, then averaged over the clip's
    judged = batch["falls"].nonzero().tolist()
    numbers = [pisa(found[b, :, k], true[b, :, k]) for b, k in judged]
    for name in ("l2", "chamfer", "iou"):
        each = torch.full((B, N), torch.nan, device=c.device)
        for (b, k), number in zip(judged, numbers):
            each[b, k] = number[name]
        out[f"pisa_{name}"] = each.nanmean(1)

    if when:
        out |= found_laws(c, c_true, counts, when["flight"], batch, fps)
    if {"impulse", "mass"} <= batch.keys():
        out |= collision_laws(c, c_true, batch)
    out["penetration"] = penetration(c, c_true, (true_area[:, 0] / math.pi).sqrt(), counts)

    # permanence, over the frames in which the truth shows the body
    ratio = area / true_area.clamp_min(1)
    out["area_kept"] = mean(((ratio - 1).abs() <= 0.25).float(), counts)
    out["vanish"] = mean((ratio < 0.25).float(), counts)
    ys, xs = torch.arange(H, device=c.device) + 0.5, torch.arange(W, device=c.device) + 0.5

    def spread(masks, at):                         # mean squared distance of a mask's pixels from its centre
        square = ((masks.sum(-2) * (xs - at[..., :1]).square()).sum(-1)
                  + (masks.sum(-1) * (ys - at[..., 1:]).square()).sum(-1))
        return square / masks.sum((-2, -1)).clamp_min(1)
    there = counts & c.isfinite().all(-1)
    # one body in two places lies far more apart than it should
    out["duplicate"] = mean((spread(found, c) > 3 * spread(true, c_true) + 1).float(), there)
    reach = lambda p, where: torch.where(where, (p - p[:, :1]).norm(dim=-1), 0.0).amax(1)           # (B, N) px
    moves = reach(c_true, counts)
    frozen = (reach(c, there) < 0.2 * moves).float()
    out["freeze"] = mean(frozen, batch["falls"] & (moves > 1) & there.any(1))        # of what should move

    # frame 0 is given here, too
    square, body = ((video - batch["video"]) / 2).square()[:, :, 1:], (mask[:, 1:] > 0)[:, None]
    psnr = lambda e: -10 * e.clamp_min(1e-10).log10()
    out["psnr"] = psnr(square.mean((1, 2, 3, 4)))
    out["psnr_bodies"] = psnr((square * body).sum((1, 2, 3, 4)) / (3 * body.sum((1, 2, 3, 4))))
    gradient = lambda v: ((v[:, :, 1:, :, 1:] - v[:, :, 1:, :, :-1]).abs().mean((1, 2, 3, 4))
                          + (v[:, :, 1:, 1:] - v[:, :, 1:, :-1]).abs().mean((1, 2, 3, 4)))
    out["sharpness"] = gradient(video) / gradient(batch["video"])
    return out | {f"piq_{k}": v for k, v in physics_iq(video, batch["video"], batch.get("moved")).items()}


# ----------------------------------------------------------------------------------------------------------------------
# rows, intervals, the table

MEDIANS = {"g_ratio"}                              # a ratio of fits has heavy tails
# Student's t, 97.5 %, by training seeds less one; of more than eight the interval is a little too wide
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def over_seeds(values, median=False, per=None, draws=1000):
    """(S, n) values of S training seeds on the same n clips, NaN where there are none -> dict(mean, low, high, n,
    seeds): mean (or median, or mean over that of `per`) of all, and its 95 % interval over clips and seeds.

    What clips add is normal, what so few seeds add is Student's t: the bootstrap's intervals over three seeds hold the
    mean in 75 of 100 cases. Medians have a bootstrap interval over both; of one seed clips alone count."""
    (S, n), ok = values.shape, values.isfinite()
    values = values.masked_fill(~ok, torch.nan)
    if not ok.any():
        return dict(mean=None, low=None, high=None, n=0, seeds=S)
    if median:
        g = common.generator("bootstrap", S, n)
        seed, clip = torch.randint(S, (draws, S), generator=g), torch.randint(n, (draws, n), generator=g)
        mean, again = values.nanmedian(), values[seed[:, :, None], clip[:, None]].flatten(1).nanmedian(1).values
        low, high = again.nanquantile(torch.tensor([0.025, 0.975]))
    else:
        whole = ok.float() if per is None else per.masked_fill(~ok, 0)
        mean = values.nansum() / whole.sum()
        off = (values.nan_to_num() - mean * whole) / whole.mean()                    # what each adds to its error
        half = 1.96 * off.mean(0).std(correction=0) / n**0.5
        if S > 1:
            half = torch.hypot(half, T95[min(S - 1, 7)] * off.mean(1).std() / S**0.5)
        low, high = mean - half, mean + half
    return dict(mean=mean.item(), low=low.item(), high=high.item(), n=int(ok.any(0).sum()), seeds=S)


def val_clips(scenario, count, form, films):
    """Val scenes that trainings look at again and again: of a make_batch dict what `outcome` needs, and some films."""
    batch = simdata.make_batch(scenario, count, 0, "val", **form)
    return {k: batch[k] for k in ("photo", "mask", "alive", "falls", "caption")} | dict(
        video=batch["video"][:, :, :1].clone(), film=common.to_bytes(batch["video"][:films]))


def val_parts(names, clips, most):
    """`clips` val scenes in parts of at most `most`, the scenarios taking turns, so that each has its share -> [(the
    first one's number, scenario, its number among the scenario's, how many)]."""
    K = len(names)
    most = min(most, max(1, clips // K))
    return [(i, names[i // most % K], i // most // K * most, min(most, clips - i)) for i in range(0, clips, most)]


def val_scenes(names, clips, most, rank, world, form):
    """This rank's parts -> [(the first one's number, val_clips' dict)]; films are of two clips of each scenario."""
    mine = [(n, part) for n, part in enumerate(val_parts(names, clips, most))][rank::world]
    tasks = [(name, count, form | dict(start=start), 2 * (n < len(names))) for n, (_, name, start, count) in mine]
    return [(part[0], made) for (_, part), made in zip(mine, common.side_by_side(val_clips, tasks))]


def val_captions(names, clips):
    """Of all that val_scenes may take."""
    return [c for name in names for c in simdata.captions(simdata.make_scene(name, clips, 0, "val")[0])]


@torch.no_grad()
def outcome(models, scenes, device, **how):
    """dict(val_traj_l2, val_iou), means of traj_l2 and iou_visible on val_scenes, over all ranks, with the same noise
    each time; and truth and sample in turn, as uint8 videos, of this rank's scenes with films. how: options of
    sample.generate."""
    total, shown = torch.zeros(4, device=device), []
    for start, batch in scenes:
        batch = common.tree_map(batch, lambda v: v.to(device))
        video = sample.generate(models, batch["video"][:, :, 0], batch["caption"],
                                [("val", start + i) for i in range(len(batch["video"]))], batch["mask"].shape[1],
                                photo=batch["photo"], **how)
        scores = measure(video, batch, detail=False)
        total += torch.stack([f(scores[k]) for k in ("traj_l2", "iou_visible")
                              for f in (torch.nansum, lambda x: x.isfinite().sum())])
        shown += [common.to_uint8(v) for pair in zip(common.from_bytes(batch["film"]), video) for v in pair]
    error, judged, overlap, all_clips = common.average(total, device).tolist()
    return dict(val_traj_l2=error / judged, val_iou=overlap / all_clips), shown


def summary(per_clip):
    """{metric: (n,)} -> {metric: {mean, low, high, n, seeds}}; `mean` is the median for the metrics in MEDIANS."""
    return {k: over_seeds(v.float().cpu()[None], k in MEDIANS) for k, v in per_clip.items()}


def reference_rows(batch, again, vae, device):
    """Videos that say what a number means: {row: video (B, 3, T, H, W)}. again: the jittered one, None if unknown."""
    video = batch["video"]
    with common.autocast(device):
        chunk = 0 if sample.small(*video.shape[3:]) else 2
        recon = vae.decode(vae.encode(video, chunk), chunk)
    jittered = {"jittered truth": again} if again is not None else {}
    return {"truth re-parsed": video, "VAE round trip": recon, **jittered,
            "static": video[:, :, :1].expand_as(video),
            "teleport to the floor": torch.cat([video[:, :, :1], video[:, :, -1:].expand_as(video[:, :, 1:])], 2)}


# what the judge and the reference rows need of a make_batch dict
NEEDED = ("video", "photo", "photo_mask", "mask", "alive", "falls", "position", "velocity", "angular_velocity",
          "impulse", "mass", "gravity", "camera", "caption")


def scenes(scenario, count, where, photo, jittered):
    """One chunk of scenes to judge on -> dict(batch, again: the video of the jittered truth, None if not asked for)."""
    batch = simdata.make_batch(scenario, count, **where, photo=photo)
    again = simdata.make_batch(scenario, count, **where, jitter_seed=0, truth=False)["video"] if jittered else None
    return dict(batch={k: batch[k] for k in NEEDED}, again=again)


def photo_size(size, *encoders):
    """How large the encoders' picture of clips of that size is: its shorter side has as many pixels as they look at."""
    looks = [encoder.config["input_size"] for encoder in encoders if encoder is not None]
    return simdata.scaled(size, max(looks, default=simdata.PHOTO))


def film(places, models, split, chunk, jittered, form):
    """This rank's chunks of all scenes of `places`, each (n, seed, unseen, scenario), one after the other: an iterator
    over what `scenes` gives, made side by side. models: all that will look."""
    rank = common.rank()
    photo = photo_size(form["size"], *(m.encoder for m in models))
    return common.side_by_side(scenes, [
        (scenario, min(chunk, n - start), form | dict(seed=seed, split=split, start=start, unseen=unseen), photo,
         jittered) for n, seed, unseen, scenario in places for start in range(0, n, chunk)[rank::common.ranks()]])


@torch.no_grad()
def evaluate(models, split, n, seed=0, unseen=False, scenario="drop", best_of=1, references=True, chunk=64, steps=12,
             shift=3.0, cfg=1.0, solver="ab2", temperature=1.0, clips=None, size=64, frames=25, fps=16, films=None):
    """Generate and measure n scenes of a split. models: {row name: sample.Models}. -> {row: {metric: (n,) tensor}}.
    Under torchrun the ranks share the scenes, and all get all results.

    clips: a simdata.Clips, from which the scenes are taken instead; such have no jittered truth. films: an iterator
    over what `scenes` gives for each chunk, where it has been asked for already (see film).
    steps, shift, cfg, solver, temperature: as in sample.generate; models need `text` if the DiT reads features. size
    (pixels a side, or height and width), frames, fps: of the clips.
    best_of > 1 adds the row "<name>, oracle best of k": the sample of lowest traj_l2, what choosing could reach.
    references adds the rows of reference_rows and, if the first model's encoder foretells, "<name>, told the truth":
    what its DiT does when the encoder's foresight is put right, so that what is still wrong is the painting."""
    parts, first = {}, next(iter(models.values()))                                   # {first scene: {row: metrics}}
    vae, device = first.vae, next(first.vae.parameters()).device
    form, how = dict(size=size, frames=frames, fps=fps), dict(cfg=cfg, solver=solver, temperature=temperature)
    foretells = first.encoder is not None and first.encoder.readout is not None
    rank = common.rank()
    starts = range(0, n, chunk)[rank::common.ranks()]
    if clips:
        films = ({"batch": clips.read(start, min(chunk, n - start))} for start in starts)
    elif films is None:
        films = film([(n, seed, unseen, scenario)], models.values(), split, chunk, references, form)
    for start in tqdm(starts, desc=f"{split}, {'unseen' if unseen else 'seen'}", disable=rank > 0):
        filmed = common.tree_map(next(films), lambda v: v.to(device))
        batch, again, rows = filmed["batch"], filmed.get("again"), {}
        count = len(batch.get("caption", ()))      # broken clips may be left out
        if not count:
            continue
        batch["moved"] = _motion(batch["video"])   # for all rows
        if references:
            rows = {row: measure(video, batch, fps)
                    for row, video in reference_rows(batch, again, vae, device).items()}
        for name, m in models.items():             # judged at once: videos of many rows take gigabytes
            keys = [[(split, int(unseen), seed, start + i, k) for i in range(count)] for k in range(best_of)]
            image, photo = batch["video"][:, :, 0], batch["photo"]
            draws = torch.stack([sample.generate(m, image, batch["caption"], key, frames, steps, shift, photo=photo,
                                                 **how) for key in keys])
            rows[name] = measure(draws[0], batch, fps)
            if references and m is first and foretells and {"position", "camera"} <= batch.keys():
                true = true_paths(batch, size, m.encoder.config["input_size"] // m.encoder.backbone.patch)
                rows[f"{name}, told the truth"] = measure(sample.generate(
                    m, image, batch["caption"], keys[0], frames, steps, shift, photo=photo, true=true, **how), batch,
                    fps)
            if best_of > 1:
                error = torch.stack([measure(v, batch, fps, detail=False)["traj_l2"].nan_to_num(1) for v in draws])
                best = draws[error.argmin(0), torch.arange(count, device=device)]
                rows[f"{name}, oracle best of {best_of}"] = measure(best, batch, fps)
        parts[start] = common.tree_map(rows, lambda v: v.cpu())
    parts = dict(sorted((start, part) for share in common.gather(parts) for start, part in share.items()))
    rows = next(iter(parts.values()), {})
    return {row: {k: torch.cat([part[row][k] for part in parts.values()]) for k in rows[row]} for row in rows}


COLUMNS = ("traj_l2", "traj_l2_flight", "traj_l2_contact", "pisa_l2", "pisa_chamfer", "pisa_iou", "g_ratio",
           "velocity_error", "vanish", "freeze", "psnr")
LAWS = ("pisa_l2", "pisa_chamfer", "pisa_iou", "velocity_error_before_contact", "velocity_error_after_contact",
        "g_ratio", "restitution_error", "contact_time_error", "momentum_error", "energy_error", "penetration",
        "iou_visible", "area_kept", "vanish", "duplicate", "freeze", "sharpness")


def cell(metrics, name, digits=4):
    """{metric: {mean, low, high, n}} -> "mean ± half its interval", or - where the clips' truth does not allow it."""
    m = metrics.get(name, dict(n=0))
    return f"{m['mean']:.{digits}f} ± {(m['high'] - m['low']) / 2:.{digits}f}" if m["n"] else "-"


def table(result, columns=COLUMNS):
    """{row: {split: {metric: {...}}}} -> a markdown table, a line per row and split, with the intervals' half-width."""
    lines = ["| row | scenes | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for row, splits in result.items():
        for split, metrics in splits.items():
            cells = [cell(metrics, c, 1 if c == "psnr" else 4 if c.startswith(("traj", "pisa_l2")) else 3)
                     for c in columns]
            lines.append(f"| {row} | {split} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_scenario(result, names, metric="traj_l2"):
    """The same of one metric -> a line per row and split, a column per scenario."""
    lines = ["| row | scenes | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for row, splits in result.items():
        for split in ("seen", "unseen"):
            cells = [cell(splits.get(f"{name}, {split}", {}), metric) for name in names]
            lines.append(f"| {row} | {split} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Rows that data/rows.sh trains: (run folder, stage, the row it is compared with). PhysMaster's Table 1, then controls,
# then what makes the encoder matter.
ROWS = {"1 base": ("base", 1, None),
        "2 SFT DiT": ("row2", 1, "1 base"),
        "3 SFT DiT + Enc (Stage I)": ("row3", 1, "2 SFT DiT"),
        "4 SFT DiT, DPO DiT": ("row4", 2, "2 SFT DiT"),
        "5 Stage I, DPO DiT (Stage II)": ("row8", 2, "3 SFT DiT + Enc (Stage I)"),
        "6 Stage I, DPO Enc": ("row6", "head", "3 SFT DiT + Enc (Stage I)"),
        "7 Stage I, DPO DiT + Enc": ("row7", 3, "3 SFT DiT + Enc (Stage I)"),
        "8 Stage II, DPO Enc (Stage III)": ("row8", 3, "5 Stage I, DPO DiT (Stage II)"),
        "9 Stage II, DPO DiT + Enc": ("row9", 3, "5 Stage I, DPO DiT (Stage II)"),
        "Stage I goes on with truth": ("more", 1, "3 SFT DiT + Enc (Stage I)"),
        "Stage I, SFT on winners": ("winners", 2, "3 SFT DiT + Enc (Stage I)"),
        "Stage I, DPO DiT, the paper's pairs and loss": ("plain", 2, "3 SFT DiT + Enc (Stage I)"),
        "Stage I, SFT of LoRA on truth": ("truth", 2, "3 SFT DiT + Enc (Stage I)"),
        "Stage I, DPO with truth": ("best", 2, "3 SFT DiT + Enc (Stage I)"),
        "SFT DiT goes on with truth": ("row2_more", 1, "2 SFT DiT"),
        "encoder: the paper's": ("paper", 1, "2 SFT DiT"),
        "encoder: the paper's, Stage II": ("paper_dpo", 2, "encoder: the paper's"),
        "encoder: the paper's, Stage III": ("paper_dpo", 3, "encoder: the paper's, Stage II"),
        "encoder: the paper's, DPO Enc": ("paper_head", "head", "encoder: the paper's"),
        "encoder: the paper's, goes on with truth": ("paper_more", 1, "encoder: the paper's"),
        "encoder: the paper's, Stage II, four times": ("paper_full", 2, "encoder: the paper's"),
        "encoder: the paper's, Stage III, four times": ("paper_full", 3, "encoder: the paper's, Stage II, four times"),
        "encoder: the paper's, goes on with truth, four times": ("paper_full_more", 1, "encoder: the paper's"),
        "encoder: the paper's, after that Stage II": (
            "paper_late", 2, "encoder: the paper's, goes on with truth, four times"),
        "encoder: the paper's, after that Stage III": ("paper_late", 3, "encoder: the paper's, after that Stage II"),
        "encoder: the paper's, after that truth again": (
            "paper_late_more", 1, "encoder: the paper's, goes on with truth, four times"),
        "encoder: the paper's, backbone untrained": ("random", 1, "2 SFT DiT"),
        "encoder: the paper's, depth": ("depth", 1, "2 SFT DiT"),
        "encoder: depth, foretelling": ("depth_foretold", 1, "2 SFT DiT"),
        "encoder: the paper's, DINOv2": ("dino", 1, "2 SFT DiT"),
        "encoder: DINOv2, foretelling": ("dino_foretold", 1, "2 SFT DiT"),
        "960 clips: none": ("few_plain", 1, "2 SFT DiT"),
        "960 clips: the paper's": ("few_paper", 1, "960 clips: none"),
        "960 clips: foretelling": ("few_foretold", 1, "960 clips: none"),
        "tiny DiT: none": ("tiny_plain", 1, "2 SFT DiT"),
        "tiny DiT: the paper's": ("tiny_paper", 1, "tiny DiT: none"),
        "tiny DiT: foretelling": ("tiny_foretold", 1, "tiny DiT: none")}
# Preferences against as many passes through the DiT on truth, which a simulator has for nothing
CONTROLS = {"4 SFT DiT, DPO DiT": "SFT DiT goes on with truth",
            "5 Stage I, DPO DiT (Stage II)": "Stage I goes on with truth",
            "encoder: the paper's, Stage II": "encoder: the paper's, goes on with truth",
            "encoder: the paper's, Stage II, four times": "encoder: the paper's, goes on with truth, four times",
            "encoder: the paper's, after that Stage II": "encoder: the paper's, after that truth again"}
ENDS = {1: "dit", 2: "lora2", 3: "head3", "head": "head3"}                           # a row's last file


def table_one(cfg, places, options, device, rank):
    """Scores of all that lies in cfg.runs/SEED/, drawn where they are new, -> {row: {split: {metric: {...}}}}. Rows
    that have their scores need their weights no more.

    places: {"drop, seen" and so on: evaluate's n, seed, unseen, scenario}; options: the rest of its arguments."""
    seeds = sorted((s for s in os.listdir(cfg.runs) if s.isdigit()), key=int) if os.path.isdir(cfg.runs) else []
    runs = {}                                      # {"0: row": [models, path, stamp, {"row|drop, seen|metric": (n,)}]}
    for seed in seeds:
        for row, (folder, stage, _) in ROWS.items():
            place = f"{cfg.runs}/{seed}/{folder}"
            path, flat, made = f"{place}/{cfg.split}{stage}.safetensors", {}, {}
            if os.path.exists(path):
                flat, made = common.read_weights(path)
            models, weights = None, made.get("weights")
            if os.path.exists(f"{place}/{ENDS[stage]}.safetensors"):
                models = sample.load_models(place, stage, device=device)
                common.check_sides(cfg, ("height", "width"), 2 * models.vae.stride)
                sample.check_foretelling(models.encoder, cfg)
                weights = common.fingerprint(models.dit, models.encoder)
            elif not flat:
                continue
            # what choosing among Stage I's samples could reach is a row of its own
            stamp = dict(weights=weights, best_of=4 if folder in ("row3", "paper") else 1,
                         size=options["size"], **{k: getattr(cfg, k) for k in (
                             "scenarios", "n", "seed", "steps", "shift", "cfg", "solver", "temperature", "frames",
                             "fps")})
            if made:
                for key in stamp:
                    if made.get(key) != stamp[key]:
                        raise common.InputError(f"{path} was made with another {key}; delete it to judge anew")
            runs[f"{seed}: {row}"] = models, path, stamp, flat
    first = next(iter(runs), None)

    def new(place, best_of):
        return {run: models for run, (models, _, stamp, flat) in runs.items()
                if models and stamp["best_of"] == best_of and not any(f"|{place}|" in key for key in flat)}

    def own(run, place):
        """{metric: (n,)}: a row's scores there, as far as it has been judged."""
        start = f"{run.partition(': ')[2]}|{place}|"
        return {key.removeprefix(start): v for key, v in runs[run][3].items() if key.startswith(start)}
    todo = [place for place in places if new(place, 1) or new(place, 4)]
    films = todo and film([places[place] for place in todo], [models for models, *_ in runs.values() if models],
                          cfg.split, options["chunk"], True, {k: options[k] for k in ("size", "frames", "fps")})
    for place in todo:                             # all that is new shares the truth, which costs as much as a sample
        mine = [next(films) for _ in range(0, places[place][0], options["chunk"])[rank::common.ranks()]]
        for best_of in (4, 1):
            rows, draw = new(place, best_of), {}
            known = {stamp["weights"]: own(run, place) for run, (_, _, stamp, _) in runs.items() if own(run, place)}
            for run, models in rows.items():       # a row may have kept what it began with: that is drawn once
                weights = runs[run][2]["weights"]
                if run == first or best_of > 1 or weights not in known:
                    draw[run], known[weights] = models, {}
            if draw and rank == 0:
                print(f"judging {place}: {len(draw)} rows")
            found = evaluate(draw, cfg.split, *places[place], **options | dict(
                best_of=best_of, references=first in draw, films=iter(mine))) if draw else {}
            for name, metrics in found.items():
                run = next((run for run in draw if name.split(", oracle")[0] == run), first)
                flat = runs[run][3]
                flat |= {f"{name.removeprefix(run.split(': ')[0] + ': ')}|{place}|{k}": v.float().cpu()
                         for k, v in metrics.items()}
            known |= {runs[run][2]["weights"]: own(run, place) for run in draw}
            for run in rows:
                _, path, stamp, flat = runs[run]
                if run not in draw:
                    flat |= {f"{run.partition(': ')[2]}|{place}|{k}": v for k, v in known[stamp["weights"]].items()}
                if rank == 0:
                    common.save_weights(path, flat, stamp)
    scores = {}                                    # {row: {seed: {"drop, seen": {metric: (n,)}}}}
    for run, (_, _, _, flat) in runs.items():
        for key, value in flat.items():
            name, place, metric = key.split("|")
            scores.setdefault(name, {}).setdefault(run.split(": ")[0], {}).setdefault(place, {})[metric] = value
    if not scores:
        raise common.InputError(f"--runs={cfg.runs} holds no rows; train them first: sh data/rows.sh table 0")

    def pooled(values, per=None):
        """{where: {metric: (S, n)}} -> {split or where: {metric: {...}}}; per: of what traj_l2 is a share."""
        pooled = {}
        for split in ("seen", "unseen", "average"):
            wheres = [w for w in values if split == "average" or w.endswith(", " + split)]
            for name, group in [(split, wheres)] + [(w, [w]) for w in wheres if split != "average"]:
                whole = lambda of, k: torch.cat([of[w][k] for w in group], 1)        # (S, n)
                pooled[name] = {k: over_seeds(whole(values, k), k in MEDIANS) for k in values[group[0]]} \
                    if per is None else {"traj_l2": over_seeds(whole(values, "traj_l2"), per=whole(per, "traj_l2"))}
        return pooled

    def stack(row, seeds):
        """-> {where: {metric: (S, n)}}"""
        return {w: {k: torch.stack([scores[row][s][w][k] for s in seeds]) for k in metrics}
                for w, metrics in scores[row][seeds[0]].items()}
    minus = lambda a, b: {w: {k: a[w][k] - b[w][k] for k in a[w]} for w in a}
    order = lambda row: ([*ROWS].index(row.split(", oracle")[0]) if row.split(", oracle")[0] in ROWS else -1, row)
    result = {row: pooled(stack(row, [*scores[row]])) for row in sorted(scores, key=order)}
    shared_by = lambda row, other: [s for s in scores.get(row, ()) if s in scores.get(other, ())]
    for row, (_, _, parent) in ROWS.items():
        starts = {r: best for r in (parent, ROWS.get(parent, [None] * 3)[2])
                  if (best := f"{r}, oracle best of 4") in scores}                   # a Stage I, one or two rows up
        for other in dict.fromkeys((parent, CONTROLS.get(row), *starts)):
            if seeds := shared_by(row, other):
                result[f"{row} - {other}, paired"] = pooled(minus(stack(row, seeds), stack(other, seeds)))
        for start, best in starts.items():         # what choosing could gain is a gap; how much of it has been closed
            if seeds := shared_by(row, best):
                first = stack(start, seeds)
                result[f"{row}, of the gap"] = pooled(minus(first, stack(row, seeds)), minus(first, stack(best, seeds)))
    return result


def brief(result):
    """What table_one returns -> a short markdown table: a line a row, beside it the differences to its parent and to
    its control."""
    at = lambda row, split, metric, digits=4: cell(result.get(row, {}).get(split, {}), metric, digits)
    lines = ["| row | seeds | traj_l2 seen | unseen | average | to its parent, seen | unseen | to truth at equal cost, "
             "seen | unseen | PISA L2/CD/IoU, average | vanish | PSNR | of the gap to best of 4, average |",
             "|" + "---|" * 13]
    for row, splits in result.items():
        if row.endswith((", paired", ", of the gap")):
            continue
        to = [f"{row} - {other}, paired" for other in (ROWS.get(row, [None] * 3)[2], CONTROLS.get(row))]
        pisa = "/".join(at(row, "average", f"pisa_{k}", d).split(" ±")[0] for k, d in
                        (("l2", 4), ("chamfer", 3), ("iou", 3)))
        lines.append("| " + " | ".join([row, str(splits["seen"]["traj_l2"]["seeds"]),
                                        *(at(row, s, "traj_l2") for s in ("seen", "unseen", "average")),
                                        *(at(pair, s, "traj_l2") for pair in to for s in ("seen", "unseen")), pisa,
                                        at(row, "average", "vanish", 3), at(row, "average", "psnr", 1),
                                        at(f"{row}, of the gap", "average", "traj_l2", 2)]) + " |")
    return "\n".join(lines)


@dataclass
class Config:
    data: str = "data"              # folder with the weights: vae, backbone, dit, head1, lora2, head3 (.safetensors)
    stages: str = "1"               # which stages to evaluate, for example 1,2,3
    rows: str = ""                  # NAME=FOLDER:STAGE,... more rows, of run folders that hold all their weights
    table: bool = False             # the rows of Table 1 instead, as trained by data/rows.sh, over all training seeds
    runs: str = "out/rows"          # where those lie; scores are kept beside them, so that only what is new is drawn
    ckpt: str = ""                  # another DiT file instead of data/dit.safetensors
    head: str = ""                  # another physical head instead of data/head1.safetensors
    scenarios: str = ",".join(simdata.SCENARIOS)  # which of the world's, separated by commas; they share the scenes
    clips: str = ""                 # a folder of clips (see simdata.py) to judge on instead of simulated ones
    skip_broken: bool = False       # leave broken clips of the folder out, and say so, instead of stopping
    height: int = 64                # pixels of the clips
    width: int = 64                 # likewise
    frames: int = 25                # of a clip, 1 + 4k
    fps: int = 16                   # of the clips
    text_emb: str = ""              # captions' embeddings for a Wan DiT (data/embed_text.py); empty: made with umT5
    split: str = "val"              # val or test
    n: int = 500                    # scenes per split (seen, and as many unseen)
    seed: int = 0                   # which scenes
    steps: int = 12                 # sampler steps
    shift: float = 3.0              # > 1 spends more of them near noise
    solver: str = "ab2"             # ab2, euler or unipc
    cfg: float = 1.0                # guidance on the text; 1 is off
    temperature: float = sample.DEFAULT_TEMPERATURE  # scale of the initial noise
    best_of: int = 1                # > 1 adds the oracle row: the best of k seeds by the truth
    references: bool = True         # the rows that say what a number means
    chunk: int = 50                 # scenes at a time
    json: str = ""                  # write {row: {split: {metric: {mean, low, high, n}}}} here
    device: str = "auto"            # auto, cuda, mps or cpu


PRESETS = {"nano": {}, "small": dict(data="out/small", height=128, width=128, frames=33, temperature=1.0)}
PRESETS |= {name: dict(data=f"out/{name}", height=512, width=512, frames=49, fps=fps, steps=50, cfg=5.0,
                       shift=shift, solver="unipc", temperature=1.0, chunk=1)
            for name, fps, shift in (("wan5b", 24, 5.0), ("wan1.3b", 16, 8.0))}


def shared(cfg):
    """How many scenes of a split each scenario has."""
    names = common.check_names("scenarios", cfg.scenarios, simdata.SCENARIOS)
    return {name: cfg.n // len(names) + (i < cfg.n % len(names)) for i, name in enumerate(names)}


def captions(cfg):
    """Of all clips that a run judges on; data/embed_text.py asks, too."""
    if cfg.clips:
        return simdata.Clips(cfg.clips, common.clip_size(cfg), cfg.frames, cfg.fps, cfg.skip_broken).captions
    return [c for unseen in (False, True) for name, n in shared(cfg).items() if n for c in simdata.captions(
        simdata.make_scene(name, n, cfg.seed, cfg.split, unseen=unseen)[0])]


def main():
    cfg = common.parse_config(Config, sys.argv[1:], PRESETS)
    common.check_range(cfg, n=(1, 10**6), steps=(1, 1000), shift=(0.01, 100), cfg=(0, 30), temperature=(0, 2),
                       best_of=(1, 64), chunk=(1, 4096), height=(16, 2048), width=(16, 2048), frames=(5, 1001),
                       fps=(1, 240))
    common.check_frames(cfg)
    shares = shared(cfg)
    names = list(shares)
    if cfg.json:
        common.check_writable(cfg.json)
    common.check_choice(cfg, solver=SOLVERS, split=("val", "test"))
    if not set(cfg.stages.split(",")) <= {"1", "2", "3"}:
        raise common.InputError(f"--stages={cfg.stages}: expected some of 1,2,3, separated by commas")
    if cfg.clips:
        folder = simdata.Clips(cfg.clips, common.clip_size(cfg), cfg.frames, cfg.fps, cfg.skip_broken)
        if "mask" not in folder.truth:
            raise common.InputError(f"--clips={cfg.clips}: not all clips have a mask; expected NAME.npz with at least "
                                    "the masks of the bodies, by which they are found again")
    if cfg.table and (cfg.clips or cfg.rows):
        raise common.InputError("--table judges what lies in --runs on simulated clips; expected neither --clips nor "
                                "--rows beside it")
    more = {}
    for row in filter(None, cfg.rows.split(",")):
        name, _, place = row.partition("=")
        at, _, stage = place.rpartition(":")
        if not name or not at or stage not in ("1", "2", "3", "head"):
            raise common.InputError(f"--rows: {row!r}: expected NAME=FOLDER:STAGE, for example plain=out/plain:1; a "
                                    "stage is 1, 2, 3 or head (1 with head3)")
        more[name] = at, stage if stage == "head" else int(stage)
    device, rank, _ = common.setup(cfg.device, keep=False)
    size = common.clip_size(cfg)
    options = dict(best_of=cfg.best_of, references=cfg.references, steps=cfg.steps, shift=cfg.shift, cfg=cfg.cfg,
                   solver=cfg.solver, temperature=cfg.temperature, size=size, frames=cfg.frames, fps=cfg.fps,
                   chunk=cfg.chunk if sample.small(cfg.height, cfg.width) else 1)   # large ones take gigabytes each
    places = {f"{name}, {split}": (n, cfg.seed, split == "unseen", name)
              for split in ("seen", "unseen") for name, n in shares.items() if n}

    if cfg.table:
        result = table_one(cfg, places, options, device, rank)
        if rank == 0:
            print(brief(result), table({row: {k: splits[k] for k in ("seen", "unseen", "average") if k in splits}
                                        for row, splits in result.items() if not row.endswith("of the gap")}, LAWS),
                  sep="\n\n")
        finish(cfg, result, rank)
        return
    reads, text = common.read_config(cfg.ckpt or f"{cfg.data}/dit.safetensors"), None
    if reads.get("text") == "features":            # before the DiT takes the memory
        text = sample.text_features(cfg.text_emb or f"{cfg.data}/captions.safetensors", captions(cfg),
                                    reads["text_dim"], cfg.data, device)
    models = {f"Stage {'I' * int(s)}": sample.load_models(cfg.data, int(s), cfg.ckpt, cfg.head, device)
              for s in cfg.stages.split(",")}
    models |= {name: sample.load_models(*place, device=device) for name, place in more.items()}
    first = next(iter(models.values()))
    common.check_sides(cfg, ("height", "width"), 2 * first.vae.stride)
    for m in models.values():
        sample.check_foretelling(m.encoder, cfg)
        m.text = text
    if cfg.clips:
        folder.photo = photo_size(size, *(m.encoder for m in models.values()))
        per_row = {cfg.clips: evaluate(models, cfg.split, min(cfg.n, len(folder)), cfg.seed, clips=folder, **options)}
        broken = list(dict.fromkeys(sum(common.gather(folder.broken), [])))              # some every rank has found
        if broken and rank == 0:
            print(f"left out {len(broken)} broken clips: " + "; ".join(broken))
        if not per_row[cfg.clips]:
            raise common.InputError(f"--clips={cfg.clips}: no clip could be read")
    else:
        films = film([*places.values()], models.values(), cfg.split, options["chunk"], cfg.references,
                     dict(size=size, frames=cfg.frames, fps=cfg.fps))
        each = {place: evaluate(models, cfg.split, *args, **options, films=films) for place, args in places.items()}
        rows = next(iter(each.values()))
        per_row = {split: {row: {k: torch.cat([p[row][k] for where, p in each.items() if where.endswith(", " + split)])
                                 for k in rows[row]} for row in rows} for split in ("seen", "unseen")}
    overall, result = list(per_row), {}
    if not cfg.clips and len(names) > 1:
        per_row |= each
    for name, rows in per_row.items():
        for row, per_clip in rows.items():
            result.setdefault(row, {})[name] = summary(per_clip)
    stages = list(models)
    for row in stages[1:]:                         # paired by scene: far tighter than two separate intervals
        for name, rows in per_row.items():
            a, b = rows[row], rows[stages[0]]
            result.setdefault(f"{row} - {stages[0]}, paired", {})[name] = summary({k: a[k] - b[k] for k in a})
    if rank == 0:
        print(table({row: {k: splits[k] for k in overall} for row, splits in result.items()}))
        if len(per_row) > len(overall):
            print("\ntraj_l2 of each scenario:\n" + by_scenario(result, names))
    finish(cfg, result, rank)


def finish(cfg, result, rank):
    if cfg.json and rank == 0:
        with common.atomic(cfg.json) as tmp, open(tmp, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    common.run(main)
