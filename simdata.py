"""
The world: rigid bodies that fall, bounce, roll, slide and come to rest, and a camera that films them. Batched torch, no
dependencies, exact ground truth. Every clip follows from its first frame and its caption.

    python simdata.py                      # contact sheets and mp4s of every scenario in out/simdata/
    python simdata.py --split=test --unseen=True --seed=3
    python simdata.py --export=out/world --scenarios=drop,roll --n=1000    # mp4, png, npz, jsonl; see class Clips

    batch = make_batch("drop", 16, seed=0)         # a dict of tensors, see make_batch

Physics: 240 Hz substeps. Each is an exact ballistic step, then contacts are resolved by projected Jacobi on impulses
(accumulated and clamped as in Catto's sequential impulses; a body's mass is split over its contacts, so that the
plain iteration converges, and momentum is conserved to rounding), accelerated as Nesterov's gradient method is,
so that steel stands on wood, which is twelve times lighter. Then what is left of the penetration is projected out, by
the same solver, as if all bodies were equally heavy. A contact that was pressed counts until it is 1 cm apart.
Restitution uses the approach speed at the surface, sqrt(v^2 - 2 g d), not the one at the end of the substep: without
that, a bounce would depend on where in the substep it fell. Forces of resting and sliding act all through a substep, so
they move bodies by h dv / 2 as well: ramps come out exact to 1e-4 and towers stand. The contacts of a whole batch are
one flat list, so a scene in flight costs next to nothing. Units are SI, z is up.

Why not small-step XPBD (Mueller et al. 2020)? Measured on the same contacts (bench.py --only=solvers): contact after
contact, as published, it bounces and slides within 1.1 % at 960 Hz, but runs at a tenth of the speed in a batch, its
tower of five boxes moves by 30 mm in two seconds (here 0.1), and in a few scenes penetration becomes speed. All
contacts at once, one pass does not spread an impulse over the corners of a box, and flat boxes do not bounce.
"""
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common                                      # for clips on disk alone; the world itself needs nothing of ours

PHOTO = 112                                        # pixels of the picture that the encoder gets; a video has 64
SHAPES = ("sphere", "box", "cylinder", "capsule")  # the last two along z; half extents are their bounding boxes'
SPHERE, BOX, CYLINDER, CAPSULE = range(4)
TILE = 0.25                                        # m: the floor's tiles fix the metric scale in every picture
RATE = 240                                         # Hz, substeps (rounded up to a multiple of the frame rate)
BURIED = 0.02                                      # m; what sinks in for a frame is still drawn, a ramp's root is not
SLOP = 2e-4                                        # m; closer than this is touching, so that rest is not a hopping
HOLD = 0.01                                        # m; what was pressed counts until it is so far apart, see detect()
#             density kg/m^3, restitution, friction, hues in degrees: what behaves differently looks different
MATERIALS = {"rubber": (1100.0, 0.75, 0.9, (325, 385)),
             "wood":   (650.0, 0.35, 0.5, (45, 95)),
             "clay":   (1800.0, 0.05, 0.8, (125, 175)),
             "steel":  (7800.0, 0.45, 0.3, (205, 290))}
# nine hues, at least 39 degrees apart, each within its material's: a scene that takes different ones can be parsed
SLOTS = (("rubber", 333), ("rubber", 373), ("wood", 53), ("wood", 92), ("clay", 131), ("clay", 170), ("steel", 209),
         ("steel", 248), ("steel", 287))
# what only unseen scenes combine
HELD_OUT = {"rubber": CAPSULE, "wood": SPHERE, "clay": CYLINDER, "steel": CAPSULE}
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")
PATTERNS = ("halves", "stripes", "checker", "spots")  # of bodies
FLOORS = ("checker", "planks", "tiles")            # all of 0.25 m
WALLS = ("plain", "boards", "panelling")
SPLITS = {"train": 1, "val": 2, "test": 3}
EARTH = 9.81                                       # m/s^2; a scenario may give its own gravity, captions then say so
PLACES = {1.62: "on the Moon", 3.73: "on Mars"}


# ----------------------------------------------------------------------------------------------------------------------
# randomness: a hash of (split, seed, clip index, name, column), so no clip depends on batch size or on another clip

def _mix(h):
    """splitmix64's finaliser on int64 (wrapping multiplication; the shifts are made logical by a mask)."""
    h = (h ^ (h >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    h = (h ^ (h >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return h ^ (h >> 31 & (1 << 33) - 1)


class Draws:
    """draw("size", 3) -> (B, 3) uniforms in [0, 1): functions of (split, seed, index) and the name alone."""
    def __init__(self, split, seed, index):
        self.split = split
        self.key = _mix(_mix(index * len(SPLITS) * 2 + SPLITS[split]) + seed)                       # (B,)

    def __call__(self, name, *shape):
        if len(name.encode()) > 8:
            raise ValueError(f"draw({name!r}): only eight letters of a name are used, so longer ones could coincide")
        n = math.prod(shape)
        word = int.from_bytes(name.encode().ljust(8, b"_")[:8], "little", signed=True)
        columns = _mix(torch.arange(n, device=self.key.device) + word)                              # (n,)
        bits = _mix(self.key[:, None] + columns) >> 40 & (1 << 24) - 1                              # 24 bits
        return (bits.float() / 2**24).view(-1, *shape)                               # exact: 24 bits fit

    def uniform(self, name, low, high, *shape):
        return low + (high - low) * self(name, *shape)


# ----------------------------------------------------------------------------------------------------------------------
# rotations: quaternions (w, x, y, z)

def quat_mul(a, b):
    """Hamilton product, (..., 4) x (..., 4) -> (..., 4)."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], -1)


def quat_to_matrix(q):
    """(..., 4) -> (..., 3, 3), body to world."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def quat_exp(v):
    """Rotation vector (..., 3) in radians -> quaternion (..., 4)."""
    angle = v.norm(dim=-1, keepdim=True)
    return torch.cat([(angle / 2).cos(), v * torch.special.sinc(angle / (2 * math.pi)) / 2], -1)


def random_quat(u):
    """Three uniforms (..., 3) -> uniformly random rotation (..., 4) (Shoemake 1992)."""
    a, b, c = u[..., 0], u[..., 1] * 2 * math.pi, u[..., 2] * 2 * math.pi
    return torch.stack([(1 - a).sqrt() * b.sin(), (1 - a).sqrt() * b.cos(), a.sqrt() * c.sin(), a.sqrt() * c.cos()], -1)


def yaw_quat(angle):
    return torch.stack([(angle / 2).cos(), 0 * angle, 0 * angle, (angle / 2).sin()], -1)


def tilt_quat(angle):
    """About the y axis, which points away from the camera: what pointed up then leans to the right."""
    return torch.stack([(angle / 2).cos(), 0 * angle, (angle / 2).sin(), 0 * angle], -1)


def rotate(matrix, v):
    """(..., 3, 3) times (..., 3), column by column: for 3x3 blocks much faster than a batched matmul."""
    x, y, z = v.unsqueeze(-1).unbind(-2)
    a, b, c = matrix.unbind(-1)
    return a * x + b * y + c * z


def cross(a, b):
    a0, a1, a2 = a.unbind(-1)
    b0, b1, b2 = b.unbind(-1)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], -1)


def matmul(a, b):
    """(..., 3, 3) times (..., 3, 3), as rotate() does it."""
    return torch.stack([rotate(a, column) for column in b.unbind(-1)], -1)


def take(t, rows):
    """t[rows] of a long t and a list of rows (F,): several times faster."""
    return t.index_select(0, rows)


def dot(a, b):
    x, y, *z = (a * b).unbind(-1)                  # faster than a sum over so short a dimension
    return sum(z, x + y)


# ----------------------------------------------------------------------------------------------------------------------
# shapes

def volume(shape, h):
    """Shapes (...,) of half extents h (..., 3) m -> (...,) m^3."""
    rod = math.pi * h[..., 0] ** 2
    each = torch.stack([4 / 3 * rod * h[..., 0], 8 * h.prod(-1), 2 * rod * h[..., 2],
                        2 * rod * (h[..., 2] - h[..., 0] / 3)], -1)                  # a capsule: a ball, pulled apart
    return each.gather(-1, shape[..., None])[..., 0]


def principal_inertia(shape, h, mass):
    """Moments of inertia (..., 3) kg m^2 about the body's own axes, of solid bodies; shape, mass (...,), h (..., 3)."""
    x, y, z = h.square().unbind(-1)
    r, l = h[..., 0], h[..., 2] - h[..., 0]        # a capsule: a cylinder of half length l and two half balls
    tube = l / (l + 2 / 3 * r).clamp_min(1e-12)    # the cylinder's share of the mass
    side = tube * (x / 4 + l * l / 3) + (1 - tube) * (0.4 * x + 0.75 * r * l + l * l)
    each = torch.stack([torch.stack([0.4 * x, 0.4 * x, 0.4 * x], -1),
                        torch.stack([y + z, x + z, x + y], -1) / 3,
                        torch.stack([x / 4 + z / 3, x / 4 + z / 3, x / 2], -1),
                        torch.stack([side, side, tube * x / 2 + (1 - tube) * 0.4 * x], -1)], -2)
    return mass[..., None] * each.gather(-2, shape[..., None, None].expand(*shape.shape, 1, 3))[..., 0, :]


# ----------------------------------------------------------------------------------------------------------------------
# scenarios: draws -> bodies. A scenario says only what lies where; look() adds camera, light and floor

def bodies(shape, half_extents, material, position, rotation, alive, hue, tone, falls, normal=None, dynamic=None):
    """Fill in what follows from shape, size and material. All (B, N, ...); -> the scene dict that simulate() takes.

    falls: what is to be judged, because it moves or might. normal (B, N, 3): of what a body lies on, 0 in the air; by
    default the floor's. dynamic: all, by default; what is not is a part of the world."""
    table = torch.tensor([m[:3] for m in MATERIALS.values()], device=shape.device)
    density, restitution, friction = table[material].unbind(-1)                                     # (B, N)
    zeros = torch.zeros_like(position)
    if normal is None:
        normal = torch.tensor([0.0, 0.0, 1.0], device=shape.device).expand_as(position)
    rgb = ((hue[..., None] / 60 + torch.tensor([5.0, 3.0, 1.0], device=hue.device)) % 6)            # HSV to RGB
    rgb = tone[..., :1] * (1 - tone[..., 1:] * torch.minimum(rgb, 4 - rgb).clamp(0, 1))
    return dict(shape=shape, half_extents=half_extents, material=material, position=position, rotation=rotation,
                velocity=zeros, angular_velocity=zeros.clone(), alive=alive, normal=normal, falls=falls & alive,
                dynamic=alive.clone() if dynamic is None else alive & dynamic,
                mass=density * volume(shape, half_extents), restitution=restitution, friction=friction, hue=hue,
                color=rgb, pattern=torch.zeros_like(shape))                          # halves, unless skins() says more


def tones(draw, N):
    """Value and saturation of N bodies, (B, N, 2)."""
    return torch.stack([draw.uniform("value", 0.8, 1.0, N), draw.uniform("satur", 0.75, 0.95, N)], -1)


def palette(draw, N):
    """Materials (B, N), hues (B, N) and tones (B, N, 2) of up to nine bodies that a parser can tell apart."""
    order = draw("palette", len(SLOTS)).argsort(1)[:, :N]
    names, device = list(MATERIALS), draw.key.device
    material, hue = (torch.tensor(column, device=device)[order] for column in
                     ([names.index(m) for m, _ in SLOTS], [float(h) for _, h in SLOTS]))
    return material, (hue + draw.uniform("hue", -2, 2, N)) % 360, tones(draw, N)


def skins(draw, N):
    """Patterns of N bodies, for any scenario: an index into PATTERNS (B, N), and three waves, (B, N, 3, 3) cycles a
    half width along the body's axes and (B, N, 3) phases. They change brightness alone: a body is known by its hue."""
    kind = (draw("pattern", N) * len(PATTERNS)).long()
    lean, cycles = draw.uniform("wavelean", -0.7, 0.7, N), draw.uniform("wavelong", 0.4, 0.8, N, 3, 1)
    zero = torch.zeros_like(lean)
    stripes = torch.stack([lean.cos(), zero, lean.sin()], -1)[..., None, :].expand(-1, -1, 3, -1)   # across the axis
    axes = torch.eye(3, device=lean.device).expand_as(stripes)
    spots = rotate(quat_to_matrix(random_quat(draw("waveturn", N, 3, 3))), axes)
    wave = torch.where((kind == 1)[..., None, None], stripes, torch.where((kind == 2)[..., None, None], axes, spots))
    return dict(pattern=kind, wave=wave * cycles, phase=2 * math.pi * draw("wavephas", N, 3))


def any_of(shapes, draw, name, material, unseen):
    """For each body one of `shapes`, (B, N). Unless unseen, never one that HELD_OUT keeps from its material."""
    names, device, each = list(MATERIALS), draw.key.device, torch.arange(len(SHAPES), device=draw.key.device)
    held = torch.tensor([HELD_OUT[m] for m in names], device=device)[material, None]                # (B, N, 1)
    good = torch.isin(each, torch.tensor(shapes, device=device)) & ((each != held) | unseen)
    return draw(name, material.shape[1], len(SHAPES)).masked_fill(~good, -1).argmax(-1)


def between(draw, name, seen, low, high, unseen, *shape):
    """Uniform in the range `seen`; for unseen scenes in `low` or in `high`, both outside it. -> (B, *shape)."""
    if not unseen:
        return draw.uniform(name, *seen, *shape)
    below = draw(name + "s", *shape) < 0.5
    return torch.where(below, draw.uniform(name, *low, *shape), draw.uniform(name, *high, *shape))


def drop(draw, unseen):
    """PISA's proxy task: one to three bodies, dropped from rest at 0.3 to 1.2 m or resting on the floor to be hit.

    unseen: sizes and heights outside the training range, both, and combinations of shape and material."""
    N = 3
    # what meets is hard to learn, what falls alone is easy: one trains on more crowded scenes than one is judged by
    two, three = (0.10, 0.45) if draw.split == "train" else (0.35, 0.75)
    count = 1 + (draw("count", 1) > two).int() + (draw("count", 1) > three)                         # (B, 1)
    alive = torch.arange(N, device=count.device) < count                                            # (B, N)
    material = (draw("material", N) * len(MATERIALS)).long()
    shape = any_of((SPHERE, BOX), draw, "shape", material, unseen)
    small = draw("small", N) < 0.5
    size = torch.where(small, draw.uniform("size", 0.13, 0.155, N), draw.uniform("size", 0.245, 0.27, N)) if unseen \
        else draw.uniform("size", 0.17, 0.23, N)
    aspect = draw.uniform("aspect", 0.65, 1.0, N, 3)
    half = size[..., None] * torch.where(shape[..., None] == SPHERE, torch.ones_like(aspect), aspect * 0.95)
    position, rotation, hue, falls, alive = scatter(draw, shape, size, half, material, alive, unseen)
    floor = torch.tensor([0.0, 0.0, 1.0], device=half.device)
    return bodies(shape, half, material, position, rotation, alive, hue, tones(draw, N), falls,
                  normal=floor * ~falls[..., None])


def scatter(draw, shape, size, half_extents, material, alive, unseen, attempts=24):
    """Where drop's bodies are: the first of A attempts in which they neither touch, nor hide each other, nor look alike
    -> position (B, N, 3), rotation (B, N, 4), hue (B, N), which fall, and which of `alive` there is room for."""
    (B, N), A, device = shape.shape, attempts, shape.device
    low = draw("low", A, N) < 0.5
    height = torch.where(low, draw.uniform("height", 0.15, 0.3, A, N), draw.uniform("height", 1.2, 1.3, A, N)) \
        if unseen else draw.uniform("height", 0.3, 1.2, A, N)
    falls = draw("falls", A, N) < 0.5
    falls[..., 0] = True                           # the first body always falls
    spot = draw("spot", A, N, 2) * torch.tensor([1.2, 0.5], device=device) - torch.tensor([0.6, 0.25], device=device)
    near = draw("near", A, N, 1) < 0.6             # the others often near it, so that things do meet
    near[..., 0, :] = False
    offset = (draw("offset", A, N, 2) * 2 - 1) * torch.tensor([0.35, 0.15], device=device)
    spot = torch.where(near, (spot[..., :1, :] + offset).clamp(-0.65, 0.65), spot)                  # (B, A, N, 2)
    tumbled, upright = random_quat(draw("tumbled", A, N, 3)), yaw_quat(draw("yaw", A, N) * 2 * math.pi)
    rotation = torch.where((falls & (shape == BOX)[:, None])[..., None], tumbled, upright)
    # how far the body reaches below its centre
    reach = torch.where(shape[:, None] == SPHERE, size[:, None],
                        (quat_to_matrix(rotation)[..., 2, :].abs() * half_extents[:, None]).sum(-1))  # (B, A, N)
    position = torch.cat([spot, (reach + torch.where(falls, height, 0.0))[..., None]], -1)          # (B, A, N, 3)

    bound = torch.where(shape == SPHERE, size, half_extents.norm(dim=-1))                           # (B, N)
    i, j = torch.triu_indices(N, N, 1, device=device)
    gap = position[:, :, i] - position[:, :, j]                                                     # (B, A, P, 3)
    together = (bound[:, i] + bound[:, j])[:, None]
    apart = (gap.norm(dim=-1) > 1.05 * together) & (gap[..., [0, 2]].norm(dim=-1) > 0.8 * together)  # nobody hidden
    # two bodies of one scene differ clearly in hue, so that a parser can tell them apart
    hues = torch.tensor([m[3] for m in MATERIALS.values()], dtype=torch.float32, device=device)[material]  # (B, N, 2)
    hue = hues[..., 0][:, None] + draw("hue", A, N) * (hues[..., 1] - hues[..., 0])[:, None]        # (B, A, N)
    turn = (hue[..., i] - hue[..., j] + 180) % 360 - 180
    valid = ((apart & (turn.abs() > 35)) | ~(alive[:, i] & alive[:, j])[:, None]).all(-1)           # (B, A)
    first = valid.float().argmax(1)                # (B,) index of the first valid attempt ...
    alive = alive & (valid.any(1, keepdim=True) | (torch.arange(N, device=device) == 0))            # ... else one body
    pick = lambda x: x[torch.arange(B, device=device), first]
    return pick(position), pick(rotation), pick(hue) % 360, pick(falls), alive


def ramp(draw, angle):
    """A block with a slope of `angle` (B,) radians that leads down to the floor's middle, from the left or the right.

    -> half extents, centre (B, 3), rotation (B, 4); the middle of its foot, the directions uphill and normal (B, 3)."""
    side, zero = torch.where(draw("side") < 0.5, 1.0, -1.0), torch.zeros_like(angle)                # (B,)
    up = torch.stack([side * angle.cos(), zero, angle.sin()], -1)
    normal = torch.stack([-side * angle.sin(), zero, angle.cos()], -1)
    foot = torch.stack([side * draw.uniform("foot", 0.05, 0.15), zero, zero], -1)
    half = torch.tensor([0.45, 0.42, 0.3], device=angle.device).expand_as(up)
    center = foot + half[:, :1] * up - half[:, 2:] * normal                          # its foot is sunk into the floor
    return half, center, tilt_quat(-side * angle), foot, up, normal


def lying(shape, size, draw, name):
    """Lay down bodies of about `size` (B, N) m, so that what can roll, rolls along x.

    -> half extents (B, N, 3), rotation (B, N, 4), and the height of the centre above what they lie on (B, N)."""
    N = shape.shape[1]
    aspect, long = draw.uniform(name, 0.7, 1.0, N, 3), draw.uniform(name + "l", 0.7, 1.1, N, 1)
    tube = torch.cat([torch.ones_like(aspect[..., :2]), long + 0.4 * (shape == CAPSULE)[..., None]], -1)
    half = torch.where((shape == BOX)[..., None], aspect, torch.where((shape == SPHERE)[..., None], 1.0, tube))
    half = half * size[..., None]
    axial = (shape == CYLINDER) | (shape == CAPSULE)
    quarter = torch.tensor([0.5**0.5, 0.5**0.5, 0.0, 0.0], device=size.device)       # about x: its axis along y
    upright = torch.tensor([1.0, 0.0, 0.0, 0.0], device=size.device)
    return half, torch.where(axial[..., None], quarter, upright), torch.where(shape == BOX, half[..., 2], size)


def roll(draw, unseen):
    """One or two bodies let go on a ramp: what is round rolls down and on along the floor, a box slides or stays.

    unseen: flatter and steeper ramps, sizes, combinations of shape and material."""
    N = 3                                          # the ramp and two bodies, each in its lane
    material, hue, tone = palette(draw, N)
    shape = any_of(range(4), draw, "shape", material, unseen)
    shape[:, 0] = BOX
    angle = between(draw, "angle", (9, 18), (6, 8), (19, 21), unseen) * math.pi / 180
    size = between(draw, "size", (0.13, 0.16), (0.105, 0.12), (0.17, 0.185), unseen, N)
    block, center, turn, foot, up, normal = ramp(draw, angle)
    half, rotation, height = lying(shape, size, draw, "aspect")
    half[..., 2] = half[..., 2].clamp_max(0.2)     # no capsule is longer than its lane is wide
    along = torch.stack([0 * angle, draw.uniform("front", 0.2, 0.4), draw.uniform("back", 0.5, 0.7)], -1)
    across = torch.tensor([[0.0, 0.0, 0.0], [0.0, -0.21, 0.0], [0.0, 0.21, 0.0]], device=angle.device)
    position = foot[:, None] + along[..., None] * up[:, None] + across + height[..., None] * normal[:, None]
    rotation = quat_mul(turn[:, None].expand_as(rotation), rotation)
    half[:, 0], position[:, 0], rotation[:, 0] = block, center, turn
    alone, lane = draw("alone", 1) < 0.5, draw("lane", 1) < 0.5
    which = torch.arange(N, device=angle.device)
    alive = ~alone | (which == 0) | (which == 1 + lane)
    moves = (which > 0).expand_as(alive)
    return bodies(shape, half, material, position, rotation, alive, hue, tone, moves,
                  normal[:, None].expand_as(position), moves)


def collide(draw, unseen):
    """A body rolls off a ramp and into one or two that stand in its way.

    unseen: flatter and steeper ramps, sizes, combinations of shape and material."""
    N = 4                                          # the ramp, what rolls, what stands there
    material, hue, tone = palette(draw, N)
    shape = any_of(range(4), draw, "shape", material, unseen)
    shape[:, 0] = BOX
    shape[:, 1:2] = any_of((SPHERE, CYLINDER, CAPSULE), draw, "rolls", material[:, 1:2], unseen)
    angle = between(draw, "angle", (20, 30), (16, 18), (32, 36), unseen) * math.pi / 180
    size = between(draw, "size", (0.13, 0.17), (0.105, 0.12), (0.18, 0.195), unseen, N)
    block, center, turn, foot, up, normal = ramp(draw, angle)
    half, rotation, height = lying(shape, size, draw, "aspect")
    stands = shape[:, 2:] == CYLINDER              # a cylinder that is hit stands upright, a capsule lies across
    height[:, 2:] = torch.where(stands, half[:, 2:, 2], height[:, 2:])
    rotation[:, 2:] = torch.where(stands[..., None] | (shape[:, 2:] == BOX)[..., None],
                                  yaw_quat(draw.uniform("yaw", -0.3, 0.3, 2)), rotation[:, 2:])
    position = foot[:, None] + draw.uniform("along", 0.5, 0.75)[:, None, None] * up[:, None] \
        + height[..., None] * normal[:, None]
    reach = 1.3 * size[:, 2:]                      # a box turns by 0.3 rad
    away = (2 * reach + draw.uniform("away", 0.02, 0.12, 2)).cumsum(1) - reach                      # m from the foot
    position[:, 2:, 0] = (foot[:, :1].abs() - away) * up[:, :1].sign()
    position[:, 2:, 1], position[:, 2:, 2] = draw.uniform("aside", -0.06, 0.06, 2), height[:, 2:]
    rotation[:, 1] = quat_mul(turn, rotation[:, 1])
    half[:, 0], position[:, 0], rotation[:, 0] = block, center, turn
    which = torch.arange(N, device=angle.device)
    alive = (draw("two", 1) < 0.5) | (which < 3)
    floor = torch.tensor([0.0, 0.0, 1.0], device=angle.device)
    return bodies(shape, half, material, position, rotation, alive, hue, tone, (which > 0).expand_as(alive),
                  torch.where((which < 2)[:, None], normal[:, None], floor), (which > 0).expand_as(alive))


def support(draw, unseen):
    """A tower of three or four boxes and cylinders, put up with more or less care: it stands, or it topples.

    unseen: five of them, sizes, combinations of shape and material."""
    N = 5
    material, hue, tone = palette(draw, N)
    shape = any_of((BOX, CYLINDER), draw, "shape", material, unseen)
    count = 5 if unseen else 3 + (draw("count", 1) < 0.5).long()
    wide = between(draw, "wide", (0.14, 0.18), (0.12, 0.13), (0.19, 0.2), unseen, N)
    half = torch.stack([wide, torch.where(shape == BOX, wide * draw.uniform("deep", 0.8, 1.0, N), wide),
                        draw.uniform("high", 0.08, 0.11, N)], -1)
    shift = (draw("shift", N, 2) * 2 - 1) * torch.tensor([1.6, 0.2], device=wide.device)
    careless = draw("careless", 1, 1).sqrt()       # of the whole tower
    xy = (shift * wide[..., None] * careless).cumsum(1)
    z = 2 * half[..., 2].cumsum(1) - half[..., 2]
    rotation = yaw_quat(draw.uniform("yaw", -0.3, 0.3, N))
    alive = torch.arange(N, device=wide.device) < count
    alive = alive.expand_as(wide).contiguous()
    return bodies(shape, half, material, torch.cat([xy, z[..., None]], -1), rotation, alive, hue, tone, alive)


def dominoes(draw, unseen):
    """A row of four or five dominoes. The first one leans on nothing; some rows have a gap that is too wide.

    unseen: six of them, heights."""
    N = 6
    material, hue, tone = palette(draw, N)
    alive = torch.arange(N, device=hue.device) < (6 if unseen else 4 + (draw("count", 1) < 0.5).long())
    alive = alive.expand_as(hue).contiguous()
    high = between(draw, "high", (0.18, 0.22), (0.15, 0.165), (0.235, 0.25), unseen, 1)             # half of it
    half = torch.stack([0.04 + 0 * hue, draw.uniform("deep", 0.09, 0.12, 1).expand_as(hue), high.expand_as(hue)], -1)
    lean = draw.uniform("lean", 20, 30) * math.pi / 180
    step = high * draw.uniform("step", 0.8, 1.15, N)                                 # from one to the next
    step[:, 1] = 0.08 + 2 * high[:, 0] * lean.sin() + draw.uniform("room", 0.05, 0.1)
    wide = torch.arange(N, device=hue.device) == 2 + (draw("where", 1) * 3).long()
    step = torch.where(wide & (draw("gap", 1) < 0.35), 2.3 * high, step)
    step[:, 0] = 0
    x = step.cumsum(1)
    x = x - (x * alive).amax(1, keepdim=True) / 2                                    # the row lies in the middle
    side = torch.where(draw("side", 1) < 0.5, 1.0, -1.0)
    position = torch.stack([x, 0 * x, half[..., 2]], -1)
    turn = torch.zeros_like(x)
    turn[:, 0] = lean                              # it stands on its lower edge, which stays where it was
    position[:, 0, 0] += 0.04 * (1 - lean.cos()) + high[:, 0] * lean.sin()
    position[:, 0, 2] = 0.04 * lean.sin() + high[:, 0] * lean.cos()
    position[..., 0] *= side
    return bodies(torch.full_like(material, BOX), half, material, position, tilt_quat(turn * side), alive, hue, tone,
                  alive)


SCENARIOS = {"drop": drop, "collide": collide, "roll": roll, "support": support, "dominoes": dominoes}


def sides(size):
    """Pixels a side, or height and width -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def scaled(size, shorter):
    """The same aspect ratio with so many pixels on the shorter side: pixels a side, or [height, width]."""
    height, width = (round(n * shorter / min(sides(size))) for n in sides(size))
    return shorter if height == width else [height, width]


def look(draw, size):
    """Camera, light, floor and wall, drawn for any scenario. -> dict of (B, ...). A picture that is not square shows
    the same in its middle, and more at two of its sides."""
    device = draw.key.device
    distance, pitch = draw.uniform("dist", 3.4, 4.0), draw.uniform("pitch", 6, 16) * math.pi / 180
    target = torch.stack([draw.uniform("aim", -0.08, 0.08), 0 * pitch, draw.uniform("aimz", 0.72, 0.82)], -1)
    eye = target + distance[:, None] * torch.stack([0 * pitch, -pitch.cos(), pitch.sin()], -1)
    forward = (target - eye) / distance[:, None]
    right = torch.tensor([1.0, 0.0, 0.0], device=device).expand_as(forward)
    axes = torch.stack([right, cross(forward, right), forward], 1)                   # rows: x right, y down, z forward
    extrinsics = torch.eye(4, device=device).repeat(len(eye), 1, 1)
    extrinsics[:, :3, :3], extrinsics[:, :3, 3] = axes, -rotate(axes, eye)
    height, width = sides(size)
    focal = min(height, width) * draw.uniform("focal", 1.7, 1.8)
    intrinsics = torch.zeros(len(eye), 3, 3, device=device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2                 # pixel centres at +0.5
    intrinsics[:, 2, 2] = 1

    azimuth, elevation = draw("sun") * 2 * math.pi, draw.uniform("sunz", 50, 75) * math.pi / 180
    light = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    pale = lambda name: 1 - draw.uniform(name, 0.0, 0.12, 3)                         # greyish: colour belongs to bodies
    tile_a = draw.uniform("floor", 0.5, 0.75)[:, None] * pale("tint1")
    return dict(camera=dict(intrinsics=intrinsics, world_to_camera=extrinsics), eye=eye, light=light,
                ambient=draw.uniform("ambient", 0.4, 0.55),
                floor=dict(tile=torch.full_like(pitch, TILE), yaw=draw("tileyaw") * math.pi / 2, color_a=tile_a,
                           kind=(draw("floorkin") * len(FLOORS)).long(),
                           wall_kind=(draw("wallkind") * len(WALLS)).long(),
                           color_b=tile_a * draw.uniform("contrast", 0.8, 0.9)[:, None],
                           wall_color=draw.uniform("wall", 0.45, 0.9)[:, None] * pale("tint2"),
                           wall_y=draw.uniform("wally", 1.4, 2.2)))


def captions(scene):
    """One line a clip that names every body: colour, material, shape; where things fall, also what falls and rests.

    First the place, by its gravity, if that is not Earth's."""
    names, lines = list(MATERIALS), []
    gravity = [round(g, 2) for g in scene["gravity"].norm(dim=-1).tolist()]
    places = [[] if g == EARTH else [PLACES.get(g, f"under {g} m/s^2")] for g in gravity]
    in_air = (scene["normal"] == 0).all(-1) & scene["alive"]
    columns = (scene[k].tolist() for k in ("alive", "shape", "material", "hue", "dynamic"))
    for place, alive, shape, material, hue, dynamic, air in zip(places, *columns, in_air.tolist()):
        words = [[HUES[round(h / 30) % 12], names[m], ("ball", *SHAPES[1:])[s] if d else "ramp"]
                 + ["falls" if f else "rests"] * any(air)
                 for a, s, m, h, d, f in zip(alive, shape, material, hue, dynamic, air) if a]
        lines.append(", ".join(place + [f"{'an' if w[0][0] in 'aeiou' else 'a'} {' '.join(w)}" for w in words]))
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# contacts. Every shape is a box grown by a radius (a ball's and a capsule's box is a point and a segment; a cylinder's
# is one in the coordinates "distance from the axis, 0, z"), so one signed distance serves all. Per body 8 points touch
# the floor; of each of a pair, 8 points and 12 edges touch the other. Scenes are one flat list of bodies: body n of
# clip b is b * N + n, and the world, which never moves, is the last.

CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
EDGES = torch.tensor([[a, b] for a in range(8) for b in range(a + 1, 8) if (CORNERS[a] != CORNERS[b]).sum() == 1])
RING = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4), 0.0] for k in range(8)])
RIMS = torch.cat([RING[::2] + torch.tensor([0.0, 0.0, z]) for z in (1.0, -1.0)])
ROUND = 0.01                                       # corners are inset and rounded by this share of the thinnest half
SOFT = 0.08                                        # and edges, against edges, by this one
MIDDLE = 1e-3                                      # how much an edge prefers to touch half-way, see nearest()


def _bound(shape, h):
    """Radius of the smallest ball around the centre of each body; shape (...,), half extents (..., 3) -> (...,)."""
    return torch.where(shape == BOX, h.norm(dim=-1),
                       torch.where(shape == CYLINDER, h[..., ::2].norm(dim=-1), h.amax(-1)))


class Contacts:
    """All possible contacts of a batch of scenes; detect() returns those that touch."""
    def __init__(self, scene):
        B, N = scene["shape"].shape
        device = scene["shape"].device
        flat = lambda t: t.flatten(0, 1)
        self.world = B * N
        self.shape, self.h = shape, h = flat(scene["shape"]), flat(scene["half_extents"])
        self.tube = shape == CYLINDER
        self.tubes = self.tube.any().item()        # else much is simpler
        self.bound = _bound(shape, h) + HOLD
        smooth = (shape == SPHERE) | (shape == CAPSULE)
        self.radius = torch.where(smooth, h[:, 0], 0.0)                                             # (M,)
        self.core = h - self.radius[:, None]                                                        # (M, 3)
        self.points = CORNERS.to(device) * self.core[:, None]                                       # (M, 8, 3)
        self.core[:, 1] = torch.where(self.tube, 1e6, self.core[:, 1])
        thin = torch.where(smooth, 0.0, h.amin(-1))
        self.inset, self.soft = ROUND * thin, SOFT * thin
        eight = torch.arange(8, device=device)
        self.used = eight < torch.tensor([1, 8, 8, 2], device=device)[shape][:, None]               # (M, 8)
        # a cylinder's edge runs from rim to rim on the side that faces b, a capsule's is its axis
        self.lined = (shape == BOX)[:, None] | (torch.arange(12, device=device) == 0)               # (M, 12)
        one = torch.tensor([[0, 4], [0, 1]], device=device)[:, None].expand(-1, 12, -1)
        self.edges = torch.cat([EDGES.to(device).expand(2, -1, -1), one]).flatten(0, 1)             # (shapes * 12, 2)

        alive, moves = flat(scene["alive"]), flat(scene["dynamic"] & scene["alive"])
        self.on_floor = moves.nonzero()[:, 0]
        # ordered pairs: the features of a against the distance of b
        i, j = torch.triu_indices(N, N, 1, device=device)
        first = (torch.arange(B, device=device) * N)[:, None]
        a, b = (first + torch.cat([i, j])).flatten(), (first + torch.cat([j, i])).flatten()
        possible = alive[a] & alive[b] & (moves[a] | moves[b])
        self.a, self.b = a, b = a[possible], b[possible]
        self.near = (self.bound[a] + self.bound[b]).square()
        # the same contact is found once: a ball's by its centre, an axis' by the box whose edge it meets
        A, Z, once = shape[a], shape[b], a < b
        self.pointed = (Z != SPHERE) | ((A == SPHERE) & once)
        self.edged = torch.where(A == BOX, Z != SPHERE,
                                 ((A == Z) & once & (A != SPHERE)) | ((A == CAPSULE) & (Z == CYLINDER)))
        self.slots = self.world * 8 + len(a) * 20
        one = torch.ones(1, device=device)                                           # the floor multiplies by one
        self.e, self.mu = torch.cat([flat(scene["restitution"]), one]), torch.cat([flat(scene["friction"]), one])

    def features(self, k, toward):
        """Points of bodies k (F,) in their frames -> (F, 8, 3); a cylinder's are on its rims, from `toward` on."""
        if not self.tubes:
            return take(self.points, k)
        tube, d, h = take(self.tube, k), toward[:, :2], take(self.h, k)
        # within three degrees of flat the rim's points stay where they are: circling, they would lose their impulses
        d = d + 0.02 * (1 - d.norm(dim=-1, keepdim=True) / 0.05).clamp_min(0) * RING[0, :2].to(d)
        d = d / d.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        ends_on = toward[:, 2:].abs() > 0.5          # it stands: eight points on one rim; it lies: four on each
        c, s, z = torch.where(ends_on[..., None], RING.to(d), RIMS.to(d)).unbind(-1)                # (F, 8)
        z = torch.where(ends_on, toward[:, 2:].sign(), z)
        x, y = d.unsqueeze(-1).unbind(1)
        rims = torch.stack([h[:, :1] * (c * x - s * y), h[:, :1] * (c * y + s * x), h[:, 2:] * z], -1)
        return torch.where(tube[:, None, None], rims, take(self.points, k))

    def unroll(self, p, tube):
        """Points (F, 3) in the frames of bodies; of cylinders, tube (F,), as (distance from the axis, 0, z)."""
        if not self.tubes:
            return p
        x, y, z = p.unbind(1)
        return torch.stack([torch.where(tube, p[:, :2].norm(dim=-1), x), torch.where(tube, 0.0, y), z], 1)

    def overlap(self, center, turn, a, b):
        """How deep bodies a (P,) reach into bodies b along b's axes, (P, 3), unrolled; below 0 along one: not at all.

        center (P, 3): of a, in b's frame; turn (P, 3, 3): a's frame to b's."""
        tube = take(self.tube, b)
        flat = self.unroll(center, tube)
        reach = rotate(turn.abs(), take(self.h, a))
        if self.tubes:
            spoke = center[:, :2] / center[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-9)
            radial = dot((spoke[..., None] * turn[:, :2]).sum(1).abs(), take(self.h, a))
            reach[:, 0] = torch.where(tube, radial, reach[:, 0])
        return take(self.core, b) + take(self.radius, b)[:, None] + reach - flat.abs()

    def distance(self, p, k, soft, u):
        """Signed distance of points p (F, 3), in the frames of bodies k (F,), edges rounded by soft (F,).

        u (F, 3): how p moves there, m/s. A point inside leaves by the face that it came through last, which is not the
        nearest: a domino's corner that sinks into the next one, which is as wide, is nearest to its side.
        -> gap (F,) and outward normal (F, 3)."""
        tube = take(self.tube, k)
        flat = self.unroll(p, tube)
        spoke = p[:, :2] / p[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-9)       # of cylinders
        if self.tubes:
            u = torch.where(tube[:, None], torch.stack([dot(u[:, :2], spoke), 0 * u[:, 0], u[:, 2]], 1), u)
        side = torch.where(flat < 0, -1.0, 1.0)
        q = flat.abs() - take(self.core, k) + soft[:, None]
        out = q.clamp_min(0)
        length = out.norm(dim=-1)
        came = (-q / ((-u * side).clamp_min(0) + 1e-3)).argmin(-1)                   # s ago, at the latest
        n = torch.where(length[:, None] > 0, out / length.clamp_min(1e-9)[:, None], F.one_hot(came, 3).to(p)) * side
        gap = torch.where(length > 0, length, q.gather(1, came[:, None])[:, 0])
        if self.tubes:
            n = torch.where(tube[:, None], torch.cat([n[:, :1] * spoke, n[:, 2:]], 1), n)
        return gap - take(self.radius, k) - soft, n

    def nearest(self, p, d, k, soft):
        """Where on the segments p to p + d (F, 3), in the frames of bodies k, is the point nearest to the core?

        -> s (F,) in [0, 1] and whether both ends are farther away. The squared distance is convex along it, and for a
        box its slope is piecewise linear: bisection finds the piece, one secant the root. Half-way gets a small bonus:
        else the point would jump from end to end of an edge that lies on a face, and what lies there would tremble."""
        core, tube = take(self.core, k) - soft[:, None], take(self.tube, k)
        square = dot(d, d).clamp_min(1e-12)

        def slope(s):
            at, along = p + s[:, None] * d, d
            flat = self.unroll(at, tube)
            if self.tubes:
                radial = dot(at[:, :2], d[:, :2]) / at[:, :2].norm(dim=-1).clamp_min(1e-9)
                along = torch.stack([torch.where(tube, radial, d[:, 0]), d[:, 1], d[:, 2]], 1)
            return dot((flat.abs() - core).clamp_min(0), torch.where(flat < 0, -along, along)) / square

        low, high = torch.zeros_like(square), torch.ones_like(square)
        f_low, f_high = slope(low), slope(high)
        across = (f_low < -MIDDLE / 2) & (f_high > MIDDLE / 2)
        # one end lies on a face, the other sticks out: where it leaves the face is a corner of what carries the body
        leaves = torch.where((f_high > 2 * MIDDLE) & (f_low.abs() <= MIDDLE / 2), 1.0, 0.0) \
            - torch.where((f_low < -2 * MIDDLE) & (f_high.abs() <= MIDDLE / 2), 1.0, 0.0)
        inside = across | (leaves != 0)                                              # else ends count, and are corners
        if not inside.any():
            return torch.full_like(low, 0.5), inside
        pull = lambda s: MIDDLE * torch.where(across, s - 0.5, -leaves)
        f_low, f_high = f_low + pull(low), f_high + pull(high)
        for _ in range(7):
            s = (low + high) / 2
            f = slope(s) + pull(s)
            low, f_low = torch.where(f < 0, s, low), torch.where(f < 0, f, f_low)
            high, f_high = torch.where(f < 0, high, s), torch.where(f < 0, f_high, f)
        s = (low * f_high - high * f_low) / torch.where(inside, f_high - f_low, 1.0)
        return torch.where(inside, s, 0.5), inside

    def detect(self, x, R, v, w, pressed):
        """Positions (M, 3), matrices (M, 3, 3) and velocities of bodies, impulses of the step before (slots, 3) ->
        of contacts: slot, a, b (C,), point, normal b to a (C, 3), gap. Those with the floor come first.

        What was pressed a step ago still counts if it is a little apart: a light body between the floor and a heavy one
        would else be pushed to and fro between them, and the heavy one would never feel the floor."""
        touches = lambda gap, slot: gap < SLOP + (HOLD - SLOP) * take(pressed, slot).any(1)
        # what cannot touch is left out as early as that is cheap
        f, x_f, R_f = self.on_floor, take(x, self.on_floor), take(R, self.on_floor)
        low = (x_f[:, 2] < dot(R_f[:, 2].abs(), take(self.h, f)) + HOLD).nonzero()[:, 0]
        f, x_f, R_f = (take(t, low) for t in (f, x_f, R_f))                                         # (F,) bodies
        p = x_f[:, None] + rotate(R_f[:, None], self.features(f, -R_f[:, 2]))                       # (F, 8, 3)
        gap = (p[..., 2] - take(self.radius, f)[:, None]).flatten()
        slot = (f[:, None] * 8 + torch.arange(8, device=x.device)).flatten()
        hit = (touches(gap, slot) & take(self.used, f).flatten()).nonzero()[:, 0]                   # row * 8 + k
        f, gap, p, slot = take(f, hit // 8), take(gap, hit), take(p.flatten(0, 1), hit), take(slot, hit)
        up = torch.tensor([0.0, 0.0, 1.0], device=x.device).expand(len(f), 3)
        floor = slot, f, torch.full_like(f, self.world), p - up * take(self.radius, f)[:, None], up, gap

        apart = take(x, self.a) - take(x, self.b)
        d = (dot(apart, apart) < self.near).nonzero()[:, 0]
        if not len(d):
            return floor
        a, b = take(self.a, d), take(self.b, d)
        to_b = take(R, b).mT
        turn, center = matmul(to_b, take(R, a)), rotate(to_b, take(apart, d))        # a's frame and centre in b's frame
        meet = (self.overlap(center, turn, a, b) > -HOLD).all(1).nonzero()[:, 0]
        a, b, d, turn, center = (take(t, meet) for t in (a, b, d, turn, center))                    # P pairs
        if not len(d):
            return floor
        toward = -rotate(turn.mT, self.distance(center, b, 0 * take(self.soft, b), 0 * center)[1])
        corners, radius, inset = self.features(a, toward), take(self.radius, a), take(self.inset, a)  # (P, 8, 3)
        # two boxes of one size, stacked, have their corners on each other's rims, where nothing is inside: inset them
        sharp = corners * (1 - inset[:, None] / take(self.h, a))[:, None]
        sharp, corners = ((rotate(turn[:, None], t) + center[:, None]).flatten(0, 1) for t in (sharp, corners))
        point = (take(self.used, a) & take(self.pointed, d)[:, None]).flatten().nonzero()[:, 0]     # 8 P + k

        edge = (take(self.lined, a) & take(self.edged, d)[:, None]).flatten().nonzero()[:, 0]       # 12 P + k
        line, k = edge // 12, edge % 12
        start, end = (take(corners, line * 8 + i)
                      for i in take(self.edges, take(take(self.shape, a), line) * 12 + k).unbind(1))  # (E, 3)
        reach = take(take(self.h, b) + radius[:, None] + HOLD, line)
        close = ((start + end).abs() - (end - start).abs() < 2 * reach).all(1).nonzero()[:, 0]
        line, k, start, end = (take(t, close) for t in (line, k, start, end))
        soft = take(torch.where(radius > 0, 0.0, take(self.soft, b)), line)
        s, inside = self.nearest(start, end - start, take(b, line), soft)

        row, p = torch.cat([point // 8, line]), torch.cat([take(sharp, point), start + s[:, None] * (end - start)])
        k, soft = torch.cat([point % 8, 8 + k]), F.pad(soft, (len(point), 0))
        a, b, d = (take(t, row) for t in (a, b, d))
        R_b, x_b = take(R, b), take(x, b)
        r = rotate(R_b, p)
        u = take(v, a) + cross(take(w, a), r + x_b - take(x, a)) - take(v, b) - cross(take(w, b), r)
        gap, n = self.distance(p, b, soft, rotate(R_b.mT, u))
        reach = take(radius, row) + torch.where(k < 8, take(inset, row), 0.0)        # from the feature to a's surface
        slot, gap = self.world * 8 + d * 20 + k, gap - reach
        touch = (touches(gap, slot) & F.pad(inside, (len(point), 0), value=True)).nonzero()[:, 0]
        a, b, slot, p, n, gap, reach = (take(t, touch) for t in (a, b, slot, p, n, gap, reach))
        p = p - n * (reach + gap / 2)[:, None]                                       # and on to half-way between both
        R_b = take(R_b, touch)
        pair = slot, a, b, take(x_b, touch) + rotate(R_b, p), rotate(R_b, n), gap
        return tuple(torch.cat(both) for both in zip(floor, pair))


def _momentum(count):
    theta, betas = 1.0, []
    for _ in range(count):
        theta, was = (theta**4 / 4 + theta**2) ** 0.5 - theta**2 / 2, theta
        betas.append(was * (1 - was) / (was * was + theta))
    return torch.tensor(betas)


MOMENTUM = _momentum(160)                          # Nesterov's, by the steps since it began; one solve makes fewer


class Impulses:
    """Projected Jacobi: impulses that make every contact separate at >= a target speed, within Coulomb's cone.

    Impulses and speeds are in a contact's own frame (normal, two tangents): (3, C). A contact has two sides, but for
    those with the world, of which one side never moves; sides (S,) are all contacts' a, then the b of those that have
    one. Velocities V (6, k) are of the bodies in contact, linear above angular: those of a against b are J V, side by
    side, and impulses p change V by W p, W = M^-1 J^T."""
    def __init__(self, a, b, point, n, x, inv_mass, inv_inertia, clip):
        """a, b (C,), those with the world (b is the last body) first, point and normal (C, 3); of all bodies x
        (M+1, 3), inv_mass (M+1,), inv_inertia (M+1, 3, 3) and the clip they are in (M+1,)."""
        self.C, self.alone = len(a), int((b == len(x) - 1).sum())
        bodies = torch.cat([a, b[self.alone:]])                                                     # (S,)
        met = torch.zeros(len(x), dtype=torch.long, device=x.device).index_fill_(0, bodies, 1)
        self.rows, self.body = met.nonzero()[:, 0], (met.cumsum(0) - 1)[bodies]                     # (k,), (S,)
        self.home, self.clips = clip[a], len(x)
        self.homes = torch.cat([clip[self.rows].repeat(6), self.home.repeat(3)])     # of every number in solve's state
        side = torch.where(n[:, 2:].abs() < 0.7, *torch.eye(3, device=x.device)[[2, 0]])            # not along n
        side = cross(side, n)
        side = side / side.norm(dim=-1, keepdim=True)
        self.frame = torch.stack([n, side, cross(n, side)], -1)                                     # (C, 3, 3)
        push = self.both(self.frame.movedim(0, -1))                                                 # (3, 3, S)
        push = torch.cat([push[..., :self.C], -push[..., self.C:]], -1).permute(1, 2, 0)            # (3, S, 3)
        r, m, I = self.both(point.T).T - x[bodies], inv_mass[bodies], inv_inertia[bodies]
        arm = cross(r, push)
        spin = rotate(I, arm)
        self.J = torch.cat([push, arm], -1).transpose(1, 2).contiguous()                            # (3, 6, S)
        self.W = torch.cat([m[:, None] * push, spin], -1).transpose(1, 2).contiguous()
        # where in a flat V the six numbers of each side are: flat gathers and scatters are many times faster
        self.into = (self.body + len(self.rows) * torch.arange(6, device=x.device)[:, None]).flatten()  # (6 S,)
        # a body's mass is split over its n contacts: with D_ii = n_a w_a + n_b w_b, lambda_max(D^-1 A) <= 1, and the
        # iteration converges (w: inverse masses along the normal and, an upper bound for every direction, across it)
        count = torch.zeros(len(self.rows), device=x.device).index_add_(0, self.body, torch.ones_like(m))[self.body]
        w_n, w_t = m + dot(arm[0], spin[0]), m + I.abs().sum(-1).amax(-1) * dot(r, r)
        self.load, self.inv_mass = count * torch.stack([w_n, w_t, w_t]), m                          # (3, S), (S,)
        self.step = 1 / self.each(self.load).clamp_min(1e-12)                                       # (3, C)

    def level(self):
        """From here on all bodies that move have a mass of 1: so a light one is not crushed by what lies on it."""
        mass = torch.where(self.inv_mass > 0, 1 / self.inv_mass.clamp_min(1e-12), 0.0)
        self.W = self.W * mass
        self.step = 1 / self.each(self.load * mass).clamp_min(1e-12)

    def both(self, c):
        """What contacts have, (..., C), for each of their sides, (..., S)."""
        return c if self.alone == self.C else torch.cat([c, c[..., self.alone:]], -1)

    def each(self, s):
        """The sum over the sides, (..., S), of each contact, (..., C)."""
        if self.alone == self.C:
            return s
        return torch.cat([s[..., :self.alone], s[..., self.alone:self.C] + s[..., self.C:]], -1)

    def speed(self, V):
        """Flat velocities (6 k,) -> that of a against b at each contact, in its frame (3, C)."""
        V = V.index_select(0, self.into).view(6, -1)
        # a sum of three: more at once would be added in an order that depends on how many contacts there are
        return self.each(torch.addcmul(self.J[:, :3] * V[:3], self.J[:, 3:], V[3:]).sum(1))

    def apply(self, V, p):
        """Add to flat velocities (6 k,), in place, what impulses p (3, C) do."""
        V.scatter_add_(0, self.into, (self.W * self.both(p)[:, None]).sum(0).flatten())

    def solve(self, V, target, mu, p, iterations):
        """Flat velocities, target speeds (C,), friction (C,), first guess of impulses (3, C) -> velocities, impulses.

        Nesterov's acceleration, begun anew in a clip whose steps grow (after O'Donoghue and Candes, arXiv 1204.3982):
        plain iterations are too slow where heavy bodies lie on light ones. What is extrapolated in the impulses is
        extrapolated in the velocities, which are linear in them."""
        n, goal, momentum = len(V), torch.stack([target, 0 * target, 0 * target]), MOMENTUM.to(V)
        # velocities and impulses in one row: small operations cost what they are, whatever their size
        last = state = torch.cat([V, p.flatten()])                                                  # (6 k + 3 C,)
        self.apply(state[:n], p)
        age = torch.zeros(self.clips, dtype=torch.long, device=V.device)
        moved_last = torch.full_like(age, torch.inf, dtype=V.dtype)
        for _ in range(iterations):
            y = torch.addcmul(state, momentum[age].index_select(0, self.homes), state - last)
            V_y, p_y = y[:n], y[n:].view(3, -1)
            p = torch.addcmul(p_y, self.step, goal - self.speed(V_y))
            push, slide = p[0].clamp_min_(0), p[1:]
            slide *= (mu * push / torch.hypot(slide[0], slide[1]).clamp_min(1e-12)).clamp_max(1)
            change = p - p_y
            moved = torch.zeros_like(moved_last).index_add_(0, self.home, (change * change).sum(0) / self.step[0])
            age, moved_last = torch.where(moved > moved_last, 0, age + 1), moved
            self.apply(V_y, change)
            p_y.copy_(p)
            last, state = state, y
        return state[:n], p


@torch.inference_mode()                            # thousands of small operations: their bookkeeping was a quarter
def simulate(scene, frames, fps, gravity=None, rate=RATE):
    """Run a scene -> dict of position (B, T, N, 3), rotation (B, T, N, 4), velocity, angular_velocity (B, T, N, 3) and
    impulse (B, T, N, N+1): what body n got from body m, or the floor (m = N), since frame t-1, N s along the normal.

    scene: as from a scenario. gravity: (B, 3) m/s^2, default 9.81 down. Frame 0 is the scene as given.
    Raises ValueError if a body has no positive mass or a number is not finite."""
    for key in ("position", "rotation", "half_extents", "mass", "restitution", "friction"):
        if not scene[key].isfinite().all():
            raise ValueError(f"the scene's {key} has a number that is not finite")
    if (scene["mass"][scene["alive"]] <= 0).any():
        raise ValueError("the scene has a body without positive mass: density and half extents must be positive")
    B, N = scene["shape"].shape
    M, device = B * N, scene["shape"].device
    flat = lambda t: F.pad(t.flatten(0, 1), (0, 0) * (t.ndim - 2) + (0, 1))        # and the world
    x, q, v, w = (flat(scene[k]) for k in ("position", "rotation", "velocity", "angular_velocity"))
    g = torch.tensor([0.0, 0.0, -EARTH], device=device).repeat(B, 1) if gravity is None else gravity
    moves = flat(scene["dynamic"] & scene["alive"])
    g = flat(g[:, None].expand(-1, N, -1)) * moves[:, None]                                         # (M+1, 3)
    steps = math.ceil(rate / fps)
    h = 1 / (fps * steps)
    inertia = flat(principal_inertia(scene["shape"], scene["half_extents"], scene["mass"]))         # (M+1, 3)
    inv_mass = moves / flat(scene["mass"]).clamp_min(1e-12)
    inv_body = moves[:, None] / inertia.clamp_min(1e-12)
    clip = torch.arange(M + 1, device=device) // N
    contacts = Contacts(scene)
    # impulses are remembered by slot: what rests starts from those of the last step
    warm, last = torch.zeros(contacts.slots, 3, device=device), torch.zeros(0, dtype=torch.long, device=device)

    def world_inertia(q):
        R = quat_to_matrix(q)
        return R, matmul(R * inv_body[:, None], R.mT)

    given = torch.zeros((M + 1) * (N + 1), device=device)
    record = [(x, q, v, w, given)]
    R, I = world_inertia(q)
    for step in range((frames - 1) * steps):
        x = x + h * v + h * h / 2 * g              # ballistic: exact under constant gravity
        v = v + h * g
        spin = rotate(R, inertia * rotate(R.mT, w))                                  # angular momentum is what is kept
        q = quat_mul(quat_exp(h * w), q)
        q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        R, I = world_inertia(q)
        w = rotate(I, spin)

        slot, a, b, point, n, gap = contacts.detect(x[:-1], R[:-1], v[:-1], w[:-1], warm)
        start = warm[slot]
        warm[last], last = 0, slot
        if len(slot):
            touch = Impulses(a, b, point, n, x, inv_mass, I, clip)
            k = touch.rows
            V = torch.cat([v[k], w[k]], 1).T.flatten()                                              # (6 k,)
            approach = -touch.speed(V)[0]
            # speed when the surfaces met: what the fall through the gap added is taken away again
            speed = (approach.square() - 2 * dot(g[a] - g[b], n) * gap).clamp_min(0).sqrt()
            apart = (gap - SLOP).clamp_min(0)      # what is held may come so near and no nearer
            bounces = (approach > 3 * h * EARTH) & (apart == 0)                      # slower than that is resting
            target = torch.where(bounces, contacts.e[a] * contacts.e[b] * speed, -apart / h)
            start = rotate(touch.frame.mT, start).T * ~bounces                                      # (3, C)
            # a tower is put up with no impulses to start from: that must be right before it leans
            after, p = touch.solve(V, target, contacts.mu[a] * contacts.mu[b], start, 150 if step < 6 else 20)
            v[k], w[k] = after.view(6, -1).T.split(3, 1)
            # resting and sliding forces act all through the step, so half of what they do to v belongs into x as well
            steady = torch.ones(len(k), device=device).index_fill(0, touch.body[touch.both(bounces)], 0)
            dx, dq = (h / 2 * steady * (after - V).view(6, -1)).T.split(3, 1)
            x[k], q[k] = x[k] + dx, quat_mul(quat_exp(dq), q[k])
            warm[slot] = rotate(touch.frame, p.T)
            for one, other in ((a, b), (b, a)):
                given = given.index_add(0, one * (N + 1) + torch.where(other == M, N, other % N), p[0])
            if (gap < 0).any():                    # else nothing would move
                # the same solver moves positions: the penetration is the "speed" wanted, friction-free, from zero
                touch.level()
                push = touch.solve(torch.zeros_like(V), -gap, 0 * gap, torch.zeros_like(p), 10)[0]
                dx, dq = push.view(6, -1).T.split(3, 1)
                x[k], q[k] = x[k] + dx, quat_mul(quat_exp(dq), q[k])
        if (step + 1) % steps == 0:
            record.append((x, q, v, w, given))
            given = torch.zeros_like(given)
    keys = ("position", "rotation", "velocity", "angular_velocity", "impulse")
    with torch.inference_mode(False):              # what leaves may be learned from
        return {k: torch.stack([r[i].view(M + 1, -1)[:M].view(B, N, -1) for r in record], 1)
                for i, k in enumerate(keys)}


def wander(scene, frames, fps, draw):
    """Motion without physics, which a base model may know: what would fall drifts and turns along smooth random paths,
    from rest and above the floor, through whatever is in its way. -> a path like simulate's, without impulses."""
    B, N = scene["shape"].shape
    time = torch.arange(frames, device=scene["shape"].device) / fps                                 # (T,)
    rate = 2 * math.pi * draw.uniform("wanderhz", 0.2, 0.7, N, 2)[..., None]                        # (B, N, 2, 1) rad/s
    ease, pace = (1 - (rate * time).cos()) / 2, rate * (rate * time).sin() / 2                      # (B, N, 2, T)
    room = (scene["position"][..., 2] - scene["half_extents"].norm(dim=-1)).clamp_min(0)[..., None]  # m to the floor
    u = draw("wanderto", N, 2, 3)
    to = torch.cat([u[..., :1] - 0.5, 0.2 * u[..., 1:2] - 0.1, (u[..., 2] * (0.5 + room) - room)[..., None] / 2], -1)
    turn = (2 * draw("wanderby", N, 2, 3) - 1) * torch.tensor([[1.0], [0.0]], device=to.device) * math.pi
    to, turn = to * scene["falls"][..., None, None], turn * scene["falls"][..., None, None]         # (B, N, 2, 3)
    along = lambda how, much: torch.einsum("bnkt,bnkc->btnc", how, much)
    q = quat_mul(quat_exp(along(ease, turn)), scene["rotation"][:, None].expand(-1, frames, -1, -1))
    return dict(position=scene["position"][:, None] + along(ease, to), rotation=q, velocity=along(pace, to),
                angular_velocity=along(pace, turn), impulse=time.new_zeros(B, frames, N, N + 1))


def energy(scene, path, g=EARTH):
    """Potential (floor: 0) and kinetic energy of all bodies that can move, (B, T) J; g in m/s^2."""
    m = scene["mass"]
    inertia = principal_inertia(scene["shape"], scene["half_extents"], m)
    spin = rotate(quat_to_matrix(path["rotation"]).mT, path["angular_velocity"])                     # in body axes
    each = m[:, None] * (g * path["position"][..., 2] + path["velocity"].square().sum(-1) / 2) \
        + (inertia[:, None] * spin.square()).sum(-1) / 2
    return (each * scene["dynamic"][:, None]).sum(-1)


def jitter(scene, camera, draw, pixels=0.5, degrees=5.0):
    """The same scene as far as a picture can tell: body centres moved by `pixels` (std per axis), turned by `degrees`.

    What lies on something stays on it: it slides along it and turns about its normal. draw: a Draws. -> a new scene
    dict, to be simulated."""
    B, N = scene["shape"].shape
    normal = lambda name: ((-2 * (1 - draw(name + "r", N, 3)).log()).sqrt()
                           * (2 * math.pi * draw(name + "a", N, 3)).cos())
    depth = rotate(camera["world_to_camera"][:, None, :3, :3], scene["position"])[..., 2] \
        + camera["world_to_camera"][:, None, 2, 3]
    step = pixels * depth / camera["intrinsics"][:, 0, 0, None]                                     # m a pixel
    n, moves = scene["normal"], scene["dynamic"][..., None]
    lies = dot(n, n)[..., None] > 0
    turn, move = normal("turn") * degrees * math.pi / 180 * moves, normal("move") * step[..., None] * moves
    turn = torch.where(lies, n * dot(turn, n)[..., None], turn)
    move = torch.where(lies, move - n * dot(move, n)[..., None], move)
    return scene | dict(position=scene["position"] + move, rotation=quat_mul(quat_exp(turn), scene["rotation"]))


def clips(d, which):
    """Some clips, by whatever can index a tensor, of a scene or of a path."""
    return {k: clips(v, which) if isinstance(v, dict) else v[which] for k, v in d.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the camera: one ray a sample, cast only inside the window that a body can cover

def project(points, camera):
    """World points (B, ..., 3) -> pixel coordinates (B, ..., 2) and z-depth (B, ...); pixel centres are at +0.5."""
    shape = (len(points),) + (1,) * (points.dim() - 2)
    M, K = camera["world_to_camera"], camera["intrinsics"]
    p = rotate(M[:, :3, :3].view(*shape, 3, 3), points) + M[:, :3, 3].view(*shape, 3)
    uv = p[..., :2] / p[..., 2:] * K[:, 0, 0].view(*shape, 1) + K[:, :2, 2].view(*shape, 2)
    return uv, p[..., 2]


def _rays(camera, x, y, axes=None):
    """Through the crossings of columns x (F, W) and rows y (F, H), px -> ray directions (F, H W, 3), scaled so that t
    is the z-depth, in world axes, or in others to which axes (F, 3, n) turns the camera's.

    A ray is the sum of what its column and what its row gives."""
    K, axes = camera["intrinsics"], camera["world_to_camera"][:, :3, :3] if axes is None else axes
    across = ((x - K[:, 0, 2, None]) / K[:, 0, 0, None])[..., None] * axes[:, None, 0]              # (F, W, n)
    down = ((y - K[:, 1, 2, None]) / K[:, 1, 1, None])[..., None] * axes[:, None, 1] + axes[:, None, 2]
    return (across[:, None] + down[:, :, None]).flatten(1, 2)


def _roots(a, b, c):
    """Where a t^2 + 2 b t + c < 0: from, to; inf and -inf where it never is."""
    root = (b * b - a * c).clamp_min(0).sqrt()
    a = a.clamp_min(1e-12)
    return torch.where(root > 0, (-b - root) / a, torch.inf), torch.where(root > 0, (-b + root) / a, -torch.inf)


def _slabs(o, d, h):
    """Where |o + t d| < h for all of the last dimension: from, to."""
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    t0, t1 = (-h - o) * inverse, (h - o) * inverse
    return torch.minimum(t0, t1).amax(-1), torch.maximum(t0, t1).amin(-1)


def _tube(o, d, r, half):
    side = _roots(dot(d[..., :2], d[..., :2]), dot(o[..., :2], d[..., :2]), dot(o[..., :2], o[..., :2]) - r * r)
    ends = _slabs(o[..., 2:], d[..., 2:], half)
    return torch.maximum(side[0], ends[0]), torch.minimum(side[1], ends[1])


def _ball(o, d, r):
    return _roots(dot(d, d), dot(o, d), dot(o, o) - r * r)


def _capsule(o, d, h):                             # a convex body is entered where the first of its parts is
    r, half = h[..., 0], h[..., 2:] - h[..., :1]
    up = F.pad(half, (2, 0))
    parts = [_tube(o, d, r, half), _ball(o - up, d, r), _ball(o + up, d, r)]
    parts = [(torch.where(n < f, n, torch.inf), torch.where(n < f, f, -torch.inf)) for n, f in parts]
    return torch.stack([n for n, _ in parts]).amin(0), torch.stack([f for _, f in parts]).amax(0)


def _span(o, d, shape, h):
    """Rays from o (F, 1, 3) along d (F, P, 3), in the bodies' frames -> t (F, P) where they enter and leave the body.

    A ray that misses enters after it leaves. Each shape's own formula runs on its own frames only."""
    formulas = (lambda o, d, h: _ball(o, d, h[..., 0]), _slabs,
                lambda o, d, h: _tube(o, d, h[..., 0], h[..., 2:]), _capsule)
    near, far = torch.empty_like(d[..., 0]), torch.empty_like(d[..., 0])
    for s, formula in enumerate(formulas):
        row = (shape == s).nonzero()[:, 0]
        if len(row):
            near[row], far[row] = formula(o[row], d[row], h[row, None])
    return near, far


def _normal(p, shape, h):
    """Outward normals at surface points p (S, 3), in the bodies' frames; shape (S,), h (S, 3) -> (S, 3)."""
    radial = F.pad(p[:, :2], (0, 1)) / h[:, :1]
    face = F.one_hot((p.abs() / h).argmax(-1), 3).to(p) * p.sign()
    cap = F.pad(p[:, 2:].sign(), (2, 0))
    half = h[:, 2] - h[:, 0]                       # of a capsule's axis; zero for a ball
    beyond = p[:, 2].sign() * (p[:, 2].abs() - half).clamp_min(0)
    smooth = torch.cat([p[:, :2], beyond[:, None]], -1) / h[:, :1]
    flat = torch.where((p[:, 2].abs() / h[:, 2] > radial.norm(dim=-1))[:, None], cap, radial)
    return torch.where((shape == BOX)[:, None], face, torch.where((shape == CYLINDER)[:, None], flat, smooth))


def _pattern(p, pattern, wave, phase):
    """Brightness, 0.7 to 1, at points p (S, 3) of bodies, in half widths along their axes; the rest as of skins()."""
    waves = (2 * math.pi * (wave * p[:, None]).sum(-1) + phase).cos()                               # (S, 3)
    stripes, checker, spots = waves[:, 0], 4 * waves.prod(-1), waves.sum(-1)
    height = torch.where(pattern == 1, stripes, torch.where(pattern == 2, checker, spots))
    return 0.85 + 0.15 * (6 * height).tanh()       # the edge is a little soft


def _grid(scene, H, W, samples=1):
    """Columns (B, W samples) and rows (B, H samples), px, of so many samples a pixel and side."""
    return (((torch.arange(n * samples, device=scene["eye"].device) + 0.5) / samples).expand(len(scene["eye"]), -1)
            for n in (W, H))


def _background(scene, H, W, samples):
    """What is seen where no body is, P = H W -> z-depth of the samples (B, P samples^2), colour in sun and in shadow
    (B, P, 3), means over samples^2."""
    B, floor, eye = len(scene["eye"]), scene["floor"], scene["eye"][:, None]
    dx, dy, dz = _rays(scene["camera"], *_grid(scene, H, W, samples)).unbind(-1)                    # (B, P samples^2)
    t_floor = torch.where(dz < 0, -eye[..., 2] / dz, torch.inf)
    t_wall = (floor["wall_y"][:, None] - eye[..., 1]) / dy
    t, on_floor = torch.minimum(t_floor, t_wall), t_floor < t_wall
    x, y, z = eye[..., 0] + t * dx, eye[..., 1] + t * dy, eye[..., 2] + t * dz
    c, s = floor["yaw"].cos()[:, None] / TILE, floor["yaw"].sin()[:, None] / TILE
    row, v, kind = (x * c - y * s).floor(), x * s + y * c, floor["kind"][:, None]
    mix = (row + v.floor()) % 2
    if kind.any():                                 # planks, four tiles long, and tiles have a shade each, of 61
        along = torch.where(kind == 1, ((v + 1.3 * row) / 4).floor(), v.floor())
        mix = torch.where(kind == 0, mix, (7 * row + 31 * along) ** 2 % 61 / 60)
    kind = floor["wall_kind"][:, None]
    wall = 0.7 + 0.15 * z.clamp(0, 2)              # brighter towards the top
    if kind.any():
        board = (13 * (x / 0.5).floor()) ** 2 % 7 / 50
        wall = wall * (1 - torch.where(kind == 1, board, torch.where(kind == 2, 0.15 * (z < 0.6), 0.0)))
    # colours are linear in these three, so their means are enough
    one, two, wall = (F.avg_pool2d(shade.view(B, H * samples, -1), samples).flatten(1)[..., None] for shade in
                      (on_floor * (1 - mix), on_floor * mix, ~on_floor * wall))                     # (B, P, 1)
    tiles = one * floor["color_a"][:, None] + two * floor["color_b"][:, None]
    wall = wall * floor["wall_color"][:, None]
    dark = scene["ambient"][:, None, None]
    return t, tiles * (dark + (1 - dark) * scene["light"][:, None, 2:]) + wall, tiles * dark + wall


def _window(center, side, H, W):
    """Columns and rows (F, side or fewer) of a square around center (F, 2) in an H x W image, kept inside it."""
    def line(center, side, limit):
        corner = (center - side / 2).round().clamp(0, limit - side).long()
        return corner[:, None] + torch.arange(side, device=center.device)
    return (line(center[:, i], min(side, limit), limit) for i, limit in enumerate((W, H)))


def _frames(scene, path, k):
    """The frames in which body k exists: their clips (F,), its centre (F, 3), matrix (F, 3, 3), shape, size there."""
    T = path["position"].shape[1]
    clip = scene["alive"][:, k].nonzero()[:, 0].repeat_interleave(T)                                # (F,)
    time = torch.arange(T, device=clip.device).repeat(len(clip) // T)
    x, R = path["position"][clip, time, k], quat_to_matrix(path["rotation"][clip, time, k])
    return clip, clip * T + time, x, R, scene["shape"][clip, k], scene["half_extents"][clip, k]


def _side(camera, radius, center, samples):
    """Samples across the silhouette of the largest ball (F,) seen at center (F, 3): a window that misses nothing."""
    uv, z = project(center[:, None], camera)
    reach = camera["intrinsics"][:, 0, 0] * radius / (z[:, 0] - radius).clamp_min(0.5)
    return uv[:, 0] * samples, math.ceil(2.1 * samples * reach.max().item()) + 3


def _may_shade(x, y, center, light, bound):
    """Floor points (C, G), a body's centre (C, T, 3) and the radius of a ball around it (C,), light (C, 3) ->
    (C, T, G): whether the sun's ray through the point meets the ball."""
    l, c = light[:, None, None], center[:, :, None]
    x, y = x[:, None] - c[..., 0], y[:, None] - c[..., 1]                                           # (C, T, G)
    along = l[..., 0] * x + l[..., 1] * y - l[..., 2] * c[..., 2]
    return x * x + y * y + c[..., 2] * c[..., 2] - along * along < (bound * bound)[:, None, None]


def _sunlight(scene, path, H, W):
    """Fraction of the sun on the floor at each pixel, (B, T, H W): one ray a pixel, then a 3x3 mean as penumbra."""
    B, T, N, _ = path["position"].shape
    d, eye = _rays(scene["camera"], *_grid(scene, H, W)), scene["eye"][:, None]
    ground = (d[..., 2] < 0).any(0).nonzero()[:, 0]                                  # pixels below a horizon
    d = d[:, ground]
    floor = eye - d * (eye[..., 2:] / d[..., 2:].clamp_max(-1e-3))                   # what they show of it, (B, G, 3)
    lit = torch.ones(B * T, H * W, device=scene["eye"].device)
    for k in range(N):
        clip, frame, x, R, shape, h = _frames(scene, path, k)
        if not len(clip):
            continue
        who = clip[::T]                            # the clips with such a body
        near = _may_shade(floor[who, :, 0], floor[who, :, 1], x.view(-1, T, 3), scene["light"][who],
                          _bound(shape, h)[::T])
        row, p = near.flatten(0, 1).nonzero().unbind(1)
        o, turn = floor[clip[row], p] - x[row], R[row].mT
        light = rotate(turn, scene["light"][clip[row]])
        near, far = _span(rotate(turn, o)[:, None], light[:, None], shape[row], h[row])
        miss = (near >= far) | (far <= 0)          # the latter meets what is below the floor
        lit[frame[row], ground[p]] *= miss[:, 0].float()
    lit = F.pad(lit.view(B * T, 1, H, W), (1, 1, 1, 1), mode="replicate")
    return F.avg_pool2d(lit, 3, 1).view(B, T, H * W)


def _cast(scene, path, H, W, samples):
    """Bodies only, F = B*T, P = H W samples^2 -> z-depth (F, P), id (F, P), and the samples that hit: for each body
    its id, their flat indices into (F, P), shaded colours, normals in camera axes and points in the body's (S, 3)."""
    B, T, N, _ = path["position"].shape
    H, W, device = H * samples, W * samples, scene["eye"].device
    depth = torch.full((B * T, H * W), torch.inf, device=device)
    ident = torch.zeros(B * T, H * W, dtype=torch.uint8, device=device)
    hits = []
    for k in range(N):
        clip, frame, x, R, shape, h = _frames(scene, path, k)
        if not len(clip):
            continue
        camera = clips(scene["camera"], clip)
        column, line = _window(*_side(camera, _bound(shape, h), x, samples), H, W)                   # (F, side)
        px, py, M = (column + 0.5) / samples, (line + 0.5) / samples, camera["world_to_camera"][:, :3, :3]
        d = _rays(camera, px, py, M @ R)           # (F, S, 3); everything below happens in the body's own frame
        o = rotate(R.mT, scene["eye"][clip] - x)
        t, far = _span(o[:, None], d, shape, h)
        flat = (frame[:, None, None] * H * W + line[..., None] * W + column[:, None]).flatten(1)
        # the floor hides what is under it
        above = scene["eye"][clip, 2:] + t * _rays(camera, px, py, M[..., 2:])[..., 0] > -BURIED
        closer = (t < far) & (t > 0) & (t < depth.view(-1).take(flat)) & above
        row, sample = closer.nonzero().unbind(1)   # from here on only the samples that hit: one in four
        flat, t, kind = flat[row, sample], t[row, sample], shape[row]
        depth.view(-1)[flat], ident.view(-1)[flat] = t, k + 1
        point = o[row] + t[:, None] * d[row, sample]
        normal = _normal(point, kind, h[row])
        # two tones on what is round, three on a box, so that rotation shows; and so does a pattern
        faces = 1 - (normal.abs() * torch.tensor([0.0, 0.14, 0.28], device=device)).sum(-1)
        half = 1 - 0.25 * (torch.where(kind == SPHERE, normal[:, 2], normal[:, 0]) > 0)
        tone = torch.where(kind == BOX, faces, half)
        drawn = (scene["pattern"][clip, k][row] > 0).nonzero()[:, 0]
        if len(drawn):
            r = row[drawn]
            skin = (scene[key][clip[r], k] for key in ("pattern", "wave", "phase"))
            tone[drawn] = _pattern(point[drawn] / h[r].amax(-1, keepdim=True), *skin) \
                * torch.where(kind[drawn] == BOX, faces[drawn], 1.0)
        ambient, diffuse = (scene["ambient"][clip][row],
                            dot(normal, rotate(R.mT, scene["light"][clip])[row]).clamp_min(0))
        color = scene["color"][clip, k][row] * (tone * (ambient + (1 - ambient) * diffuse))[:, None]
        hits.append((k + 1, flat, color, rotate((M @ R)[row], normal), point))
    return depth, ident, hits


def _compose(lit, dark, sun, body, share):
    """The floor in sun and shadow (B, 1, P, 3), how much sun it gets (B, T, P), and bodies' colour and coverage, (B, T,
    P, 4), each of so many samples -> video (B, 3, T, P) in [-1, 1]."""
    cover, sun = 1 - share * body[..., 3], sun * 2
    planes = [(2 * dark[..., c] + (lit - dark)[..., c] * sun) * cover + 2 * share * body[..., c] - 1 for c in range(3)]
    return torch.stack(planes, 1).clamp(-1, 1)


def render(scene, path, size=64, antialias=2, truth=True):
    """Film a simulated scene. -> dict of video (B, 3, T, H, W) in [-1, 1] and, if truth: mask, depth, normal, flow,
    visible, as in make_batch."""
    (B, T, _, _), (H, W) = path["position"].shape, sides(size)
    depth, ident, hits = _cast(scene, path, H, W, antialias)
    # the floor does not move: only how much sun it gets. It is filmed once, with more samples: its far tiles are fine
    fine = max(antialias, min(4, 256 // min(H, W))) if antialias > 1 else 1
    _, lit, dark = _background(scene, H, W, fine)
    body = torch.zeros(B * T * H * W, 4, device=lit.device)                          # colour and coverage of each pixel
    for k, flat, color, *_ in hits:
        front = ident.view(-1)[flat] == k                         # not hidden by a later body
        flat, color = flat[front], color[front]
        line, column = flat // (W * antialias), flat % (W * antialias)               # lines of all frames
        pixel = line // antialias * W + column // antialias
        body.index_add_(0, pixel, F.pad(color, (0, 1), value=1.0))
    sun = _sunlight(scene, path, H, W)
    video = _compose(lit[:, None], dark[:, None], sun, body.view(B, T, -1, 4), 1 / antialias**2)
    out = dict(video=video.view(B, 3, T, H, W))
    if not truth:
        return out
    if antialias > 1:                              # truth: what a pixel's centre sees
        depth, ident, hits = _cast(scene, path, H, W, 1)
    ident, P = ident.view(B, T, -1), H * W
    depth = torch.minimum(depth.view(B, T, P), _background(scene, H, W, 1)[0][:, None])
    normal = torch.zeros(B, 3, T, P, device=depth.device)
    # where a pixel's surface point is one frame later, and whether the camera sees it there; the rest stands still
    flow, visible = torch.zeros(B, T - 1, 2, P, device=depth.device), ident[:, 1:] == 0
    x, R = path["position"], quat_to_matrix(path["rotation"])
    for k, flat, _, n, point in hits:
        front = (ident.view(-1).take(flat) == k).nonzero()[:, 0]
        flat, n, point = (take(t, front) for t in (flat, n, point))
        clip, time, pixel = flat // (T * P), flat // P % T, flat % P
        normal[clip, :, time, pixel] = n
        moves = (time < T - 1).nonzero()[:, 0]
        clip, time, pixel, point = (take(t, moves) for t in (clip, time, pixel, point))
        later = rotate(R[clip, time + 1, k - 1], point) + x[clip, time + 1, k - 1]
        to, z = (t[:, 0] for t in project(later[:, None], clips(scene["camera"], clip)))
        flow[clip, time, :, pixel] = to - torch.stack([pixel % W, pixel // W], 1) - 0.5
        cell = to.floor().long()
        index, inside = (cell[:, 1] * W + cell[:, 0]).clamp(0, P - 1), (cell >= 0) & (cell < cell.new_tensor([W, H]))
        # seen if the pixel there shows the same thing, and not its other side
        visible[clip, time, pixel] = inside.all(-1) & (ident[clip, time + 1, index] == k) \
            & (z < depth[clip, time + 1, index] + 0.05)
    truth = dict(mask=ident, depth=depth, normal=normal, flow=flow, visible=visible)
    return out | {key: v.unflatten(-1, (H, W)) for key, v in truth.items()}


# ----------------------------------------------------------------------------------------------------------------------

def make_scene(scenario, batch_size, seed, split="train", size=64, device="cpu", start=0, unseen=False):
    """Draw clips start .. start + batch_size - 1 of a split, not simulated yet. -> scene dict, Draws.

    Raises ValueError for an unknown scenario or split, and for bodies that start inside each other or the floor."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}; there are: {', '.join(SCENARIOS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    draw = Draws(split, seed, torch.arange(start, start + batch_size, device=device) * 2 + unseen)
    earth = dict(gravity=torch.tensor([0.0, 0.0, -EARTH], device=device).repeat(batch_size, 1))
    scene = SCENARIOS[scenario](draw, unseen)
    N, size_of = scene["shape"].shape[1], scene["half_extents"].flatten(0, 1).amin(-1)
    x, R = scene["position"].flatten(0, 1), quat_to_matrix(scene["rotation"].flatten(0, 1))
    contacts = Contacts(scene)
    _, a, b, _, _, gap = contacts.detect(x, R, 0 * x, 0 * x, x.new_zeros(contacts.slots, 3))
    inside = gap < -0.01 * size_of[a]
    if inside.any():
        a, b, gap = (t[inside][0].item() for t in (a, b, gap))
        raise ValueError(f"{scenario}, clip {start + a // N}: body {a % N} starts {-1e3 * gap:.0f} mm inside "
                         + ("the floor" if b == len(x) else f"body {b % N}") + "; the scenario must keep them apart")
    return earth | scene | skins(draw, N) | look(draw, size), draw


@torch.no_grad()
def make_batch(scenario, batch_size, seed, split="train", frames=25, size=64, fps=16, device="cpu", start=0,
               unseen=False, antialias=2, truth=True, jitter_seed=None, chunk=32, filmed=None, photo=0,
               physics=True):
    """Simulate and film a batch of clips. Clip i depends on (split, seed, start + i) alone, whatever the batch size.

    Returns a dict, float32 unless said (T frames, N bodies; size: H = W, or (H, W)):
      video (B,3,T,H,W) in [-1,1]; mask (B,T,H,W) uint8, 0 background, k+1 body k; depth (B,T,H,W) m, metric z-depth;
      normal (B,3,T,H,W) of bodies, camera axes (x right, y down, z forward), 0 where there is none;
      flow (B,T-1,2,H,W) px, x right, y down, frame t to t+1; visible (B,T-1,H,W) bool;
      position (B,T,N,3) m, rotation (B,T,N,4) quaternion wxyz, velocity m/s, angular_velocity rad/s (B,T,N,3);
      impulse (B,T,N,N+1) N s, of the other bodies and of the floor, since the frame before;
      alive, dynamic, falls (B,N) bool; shape, material (B,N) index into SHAPES, MATERIALS; half_extents (B,N,3) m;
      mass kg, restitution, friction (B,N); color (B,N,3); light (B,3); floor dict; gravity (B,3) m/s^2; camera dict:
      intrinsics (B,3,3), world_to_camera (B,4,4); caption list[str].
      photo (B,3,S,S) in [-1,1], frame 0 at a resolution of its own, anti-aliased, if photo = S is given (or (H, W), of
      about the same aspect ratio), and its photo_mask (B,S,S).
    unseen: what the scenario keeps out of training. truth=False skips mask, depth, normal, flow, visible.
    filmed: stop the camera after so many frames; positions and the like still have all.
    physics: False lets bodies wander instead (see there); what is meant by truth is then what they do.
    jitter_seed: an int simulates the scene moved by half a pixel and 5 degrees instead (see jitter).
    Raises ValueError for an unknown scenario or split and for sizes that make no clip."""
    if batch_size < 1 or frames < 1 or min(sides(size)) < 8 or fps <= 0:
        raise ValueError(f"batch_size={batch_size}, frames={frames}, size={size}, fps={fps}: expected at least 1, 1, 8 "
                         "and a positive frame rate")
    scene, draw = make_scene(scenario, batch_size, seed, split, size, device, start, unseen)
    if jitter_seed is not None:
        draw.key = _mix(draw.key + 1 + jitter_seed)
        scene = jitter(scene, scene["camera"], draw)
    path = simulate(scene, frames, fps, scene["gravity"]) if physics else wander(scene, frames, fps, draw)
    chunk = chunk if torch.device(device).type == "cpu" else 4 * chunk
    pixels = max((filmed or frames) * math.prod(sides(size)), math.prod(sides(photo)))              # of a clip
    chunk = max(1, min(chunk, chunk * 25 * 64**2 // pixels))
    reel, still = ({k: v[:, :n] for k, v in path.items()} for n in (filmed, 1))
    (H, W), (finer_h, finer_w) = sides(size), sides(photo)
    scale = torch.tensor([finer_w / W, finer_h / H, 1.0], device=device)[:, None]    # the same camera with finer pixels
    fine = scene | dict(camera=scene["camera"] | dict(intrinsics=scene["camera"]["intrinsics"] * scale))
    out = {}
    for i in range(0, batch_size, chunk):          # films are large: each is put where it belongs at once
        these = slice(i, i + chunk)
        film = render(clips(scene, these), clips(reel, these), size, antialias, truth)
        if photo:
            shot = render(clips(fine, these), clips(still, these), photo, 2)
            film |= {"photo": shot["video"][:, :, 0], "photo_mask": shot["mask"][:, 0]}
        for k, v in film.items():
            out.setdefault(k, v.new_empty(batch_size, *v.shape[1:]))[these] = v
    keep = ("alive", "dynamic", "falls", "shape", "half_extents", "mass", "restitution", "friction", "material",
            "color", "floor", "gravity", "camera", "light")
    return out | path | {k: scene[k] for k in keep} | dict(caption=captions(scene))


# ----------------------------------------------------------------------------------------------------------------------
# clips on disk, simulated here or from elsewhere (Kubric, PyBullet, a camera). A folder holds
#
#   clips.jsonl   a line a clip: {"clip": NAME, "caption": text, "fps": number, ...}; without it every video is a clip
#   NAME.mp4      the video (or .gif, .webp)
#   NAME.png      frame 0 for the encoder, as fine as there is; without it the video's own
#   NAME.npz      the truth: arrays as make_batch has them but for the batch axis, camera.intrinsics and the like for
#                 those in dicts. Any may be missing.

TRUTH = {"mask", "depth", "normal", "flow", "visible", "position", "rotation", "velocity", "angular_velocity",
         "impulse", "alive", "dynamic", "falls", "shape", "half_extents", "mass", "restitution", "friction", "material",
         "color", "floor", "gravity", "camera", "light"}                             # other arrays are somebody's own
BODY_AXIS = dict.fromkeys(("position", "rotation", "velocity", "angular_velocity", "impulse"), 1) | dict.fromkeys(
    ("alive", "dynamic", "falls", "shape", "half_extents", "mass", "restitution", "friction", "material", "color"), 0)


def export(folder, scenario, n, seed, split="train", unseen=False, size=64, frames=25, fps=16):
    """Write clips 0 .. n - 1 of a split to a folder, lossless; what is there already is kept.

    A clip's line is written after its files, so a run that was stopped goes on where it was.
    Raises InputError if the folder cannot be written, or holds clips of another size, length or rate."""
    size = size if isinstance(size, int) else list(size)                             # as JSON gives it back
    form, index = dict(fps=fps, frames=frames, size=size), f"{folder}/clips.jsonl"
    common.make_dir(folder)
    have = common.read_lines(index, mend=True) if os.path.exists(index) else []
    for line in have:
        if {k: line.get(k) for k in form} != form:
            raise common.InputError(f"{folder} holds clips of another form ({line.get('clip')}); expected "
                                    + ", ".join(f"{k} {v}" for k, v in form.items()) + ", or choose another folder")
    have = {line["clip"] for line in have}
    name = lambda i: f"{scenario}-{split}{'-unseen' * unseen}-{seed}-{i:06d}"
    missing = [i for i in range(n) if name(i) not in have]
    bar = tqdm(total=n, initial=n - len(missing), desc=f"export {scenario}", unit="clip")
    many = max(1, min(32, 32 * 25 * 64**2 // (frames * math.prod(sides(size)))))     # large films take gigabytes
    for start in sorted({i // many * many for i in missing}):
        batch = make_batch(scenario, min(many, n - start), seed, split, frames, size, fps, start=start, unseen=unseen,
                           photo=scaled(size, 2 * PHOTO))
        flat = {k: v for k, v in batch.items() if torch.is_tensor(v) and k not in ("video", "photo", "photo_mask")}
        flat |= {f"{k}.{j}": u for k, v in batch.items() if isinstance(v, dict) for j, u in v.items()}
        for i in (i for i in missing if i // many * many == start):
            path, b = f"{folder}/{name(i)}", i - start
            with common.atomic(f"{path}.npz") as tmp:
                np.savez_compressed(tmp, **{k: v[b].numpy() for k, v in flat.items()})
            common.write_image(f"{path}.png", common.to_uint8(batch["photo"][b][:, None])[0])
            common.write_video(f"{path}.mp4", common.to_uint8(batch["video"][b]), fps, lossless=True)
            common.log_line(index, dict(clip=name(i), caption=batch["caption"][b], scenario=scenario, split=split,
                                        unseen=unseen, seed=seed, index=i) | form)
            bar.update()
    bar.close()


class Clips:
    """A folder of clips, to train on and to judge with: clips.read(start, count) -> a dict as make_batch has it.

    It has video, photo, caption and the truth that all clips have; where that is only masks, every body counts as
    alive and falling. A video without truth is cropped about its centre, resized and brought to `fps`; one with truth
    must fit as it is. size, photo: pixels a side, or (height, width).
    Raises InputError for a folder without clips and for a broken clip; with skip=True such clips are left out and
    listed, with the reason, in `broken`."""
    def __init__(self, folder, size=64, frames=25, fps=16, skip=False, photo=PHOTO):
        self.folder, self.size, self.frames, self.fps, self.photo = folder, size, frames, fps, photo
        self.skip, self.broken = skip, []
        files = sorted(f for f in os.listdir(folder) if f[0] != ".") if os.path.isdir(folder) else []
        self.videos = {name: f"{folder}/{name}{extension}" for name, extension in map(os.path.splitext, files)
                       if extension.lower() in common.VIDEO_EXTENSIONS}
        index = f"{folder}/clips.jsonl"
        self.lines = common.read_lines(index) if os.path.exists(index) else [dict(clip=name) for name in self.videos]
        if not self.lines:
            raise common.InputError(f"{folder} is no folder of clips; expected videos in it "
                                    f"({', '.join(common.VIDEO_EXTENSIONS)}), or a clips.jsonl as python simdata.py "
                                    "--export=FOLDER writes it")
        names = [self._try(self._names, line) for line in self.lines]
        self.lines = [line for line, found in zip(self.lines, names) if found is not None]
        if not self.lines:
            raise common.InputError(f"{folder}: none of its {len(names)} clips can be read: {self.broken[-1]}")
        self.truth = sorted(set.intersection(*(found for found in names if found is not None)))

    def __len__(self):
        return len(self.lines)

    @property
    def captions(self):
        return [str(line.get("caption", "")) for line in self.lines]

    def _try(self, read, line):
        """read(line), or the reason why not, with the clip's name."""
        try:
            return read(line)
        except (common.InputError, OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError,
                zipfile.BadZipFile, zlib.error) as error:
            if common.out_of_memory(error):        # that is not the clip's fault
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            self.broken.append(f"{self.folder}, clip {line.get('clip', '?')}: {reason}")
        if not self.skip:
            raise common.InputError(self.broken[-1])

    def _names(self, line):
        if "clip" not in line:
            raise ValueError('its line in clips.jsonl has no "clip", the name of its files')
        if not os.path.exists(path := f"{self.folder}/{line['clip']}.npz"):
            return set()
        with np.load(path, allow_pickle=False) as file:
            return {k for k in file.files if k.split(".")[0] in TRUTH}

    def _clip(self, line):
        path, video, T = f"{self.folder}/{line['clip']}", self.videos.get(line["clip"]), self.frames
        if video is None:
            raise ValueError("its video is missing")
        fps, clip = line.get("fps") or common.frame_rate(video), {}
        if video.lower().endswith((".gif", ".webp")) and abs(1 / fps - 1 / self.fps) <= 0.005:
            fps = self.fps                         # their frames last whole hundredths or thousandths of a second
        at = (np.arange(T) * fps / self.fps + 0.5).astype(int)      # halves rounded to even would judder
        raw = common.read_video(video, T + 1 if self.truth else int(at[-1]) + 1)
        if self.truth:
            with np.load(f"{path}.npz", allow_pickle=False) as file:
                clip = {k: file[k] for k in self.truth}
            form = T, H, W = (T, *sides(self.size))
            if raw.shape[:3] != form or fps != self.fps:
                raise ValueError(f"{raw.shape[0]} frames of {raw.shape[2]}x{raw.shape[1]} at {fps} fps with truth; "
                                 f"expected {T} of {W}x{H} at {self.fps}")
            film = dict(mask=form, depth=form, normal=(3, *form), flow=(T - 1, 2, H, W), visible=(T - 1, H, W))
            for k, v in clip.items():
                wanted = film.get(k, (T, *v.shape[1:]) if BODY_AXIS.get(k) else v.shape)
                if v.shape != wanted:
                    raise ValueError(f"its {k} is {v.shape}; expected {wanted}")
                if v.dtype.kind == "f" and np.isnan(v).any():
                    raise ValueError(f"its {k} has NaN")
            if "mask" in clip and not (0 <= clip["mask"].min() and clip["mask"].max() < 256):
                raise ValueError("its mask has numbers outside 0 to 255")
            clip = {k: torch.from_numpy(v.astype(np.uint8) if k == "mask" else v.astype(np.float32)
                                        if v.dtype.kind == "f" else v) for k, v in clip.items()}
        else:
            if at[-1] >= len(raw):
                raise ValueError(f"{len(raw)} frames at {fps} fps; expected {T} at {self.fps} or longer")
            raw = raw[at]
        photo = common.to_float(common.fit(raw[:1], self.photo))[:, 0]
        if os.path.exists(f"{path}.png"):
            photo, _ = common.read_image(f"{path}.png", self.photo)
        return clip | dict(video=common.to_float(common.fit(raw, self.size)), photo=photo,
                           caption=str(line.get("caption", "")))

    def read(self, start, count):
        clips = [self._try(self._clip, line) for line in self.lines[start:start + count]]
        clips = [c for c in clips if c is not None]
        if "mask" in self.truth and clips:         # bodies by their masks, where nothing else is said
            most = max(1, *(int(c["mask"].max()) for c in clips))                      # nobody: one that is not there
            for c in clips:
                seen = torch.tensor([bool((c["mask"][0] == k + 1).any()) for k in range(most)], dtype=torch.bool)
                c.setdefault("alive", seen), c.setdefault("falls", c["alive"])
        N = max((len(c["alive"]) for c in clips if "alive" in c), default=0)
        batch = {}
        for k in clips[0] if clips else ():
            values = [c[k] for c in clips]
            if k in BODY_AXIS:                     # clips differ in their number of bodies
                axis = BODY_AXIS[k]
                if k == "impulse":                 # (T, N, N + 1), the floor comes last
                    values = [torch.cat([F.pad(v[..., :-1], (0, N + 1 - v.shape[2])), v[..., -1:]], 2) for v in values]
                values = [F.pad(v, (0, 0) * (v.dim() - 1 - axis) + (0, N - v.shape[axis])) for v in values]
            if k != "caption" and len({v.shape for v in values}) > 1:
                raise common.InputError(f"{self.folder}: {k} has another shape in some clips than in others; expected "
                                        "those of simdata.make_batch")
            batch[k] = values if k == "caption" else torch.stack(values)
        for k in [k for k in batch if "." in k]:
            batch.setdefault(k.split(".")[0], {})[k.split(".")[1]] = batch.pop(k)
        return batch


# ----------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    out: str = "out/simdata"       # folder for contact sheets and clips
    export: str = ""               # write clips with all their truth into this folder instead, see class Clips
    scenarios: str = ",".join(SCENARIOS)  # which ones, separated by commas
    n: int = 8                     # clips per scenario
    seed: int = 0                  # any integer
    split: str = "train"           # train, val or test
    unseen: bool = False           # what scenarios keep out of training: sizes, slopes, counts
    height: int = 64               # pixels
    width: int = 64                # likewise
    frames: int = 25               # of a clip
    fps: int = 16                  # of the clips


def main():
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, n=(1, 10**8 if cfg.export else 256), height=(16, 2048), width=(16, 2048),
                       frames=(1, 1000), fps=(1, 240))
    common.check_choice(cfg, split=SPLITS)
    names = common.check_names("scenarios", cfg.scenarios, SCENARIOS)
    size = common.clip_size(cfg)
    if cfg.export:
        for name in names:
            export(cfg.export, name, cfg.n, cfg.seed, cfg.split, cfg.unseen, size, cfg.frames, cfg.fps)
        print(f"{cfg.export} holds {len(Clips(cfg.export, size, cfg.frames, cfg.fps))} clips")
        return
    common.make_dir(cfg.out)
    rows = []
    for name in names:
        batch = make_batch(name, cfg.n, cfg.seed, cfg.split, cfg.frames, size, cfg.fps, unseen=cfg.unseen, truth=False)
        clips = [common.to_uint8(v) for v in batch["video"]]
        rows += clips
        common.write_image(f"{cfg.out}/{name}.png", common.sheet(clips, every=2))
        common.write_video(f"{cfg.out}/{name}.mp4", common.grid(clips, 4), cfg.fps, scale=max(1, 256 // cfg.height))
        for i, caption in enumerate(batch["caption"]):
            print(f"{name} {i}: {caption}")
    common.write_video(f"{cfg.out}/world.gif", common.grid(rows, cfg.n), cfg.fps, scale=max(1, 128 // cfg.height))
    print(f"wrote contact sheets and clips to {cfg.out}/; world.gif has a row for each scenario")


if __name__ == "__main__":
    common.run(main)
