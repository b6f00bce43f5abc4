"""
The world: rigid bodies that fall, bounce, roll and come to rest, and a camera that films them. Batched torch, no
dependencies, exact ground truth. Every clip follows from its first frame and its caption.

    python simdata.py                      # contact sheets and mp4s of every scenario in out/simdata/
    python simdata.py --split=test --unseen=True --seed=3

    batch = make_batch("drop", 16, seed=0)         # a dict of tensors, see make_batch

Physics: 240 Hz substeps. Each is an exact ballistic step, then contacts are resolved by projected Jacobi on impulses
(accumulated and clamped as in Catto's sequential impulses; body mass split over its contacts, so that the iteration is
provably convergent and momentum is conserved to rounding), then what is left of the penetration is projected out.
Restitution uses the approach speed at the surface, sqrt(v^2 - 2 g d), not the one at the end of the substep: without
that, a bounce would depend on where in the substep it fell. Units are SI, z is up.
"""
import math
import sys
from dataclasses import dataclass

import torch

SHAPES = ("sphere", "box")
TILE = 0.25                                        # m: the floor's tiles fix the metric scale in every picture
RATE = 240                                         # Hz, substeps (rounded up to a multiple of the frame rate)
DEEP = 0.02                                        # m; a clip with a contact as deep gets more solver iterations
#             density kg/m^3, restitution, friction, hues in degrees: what behaves differently looks different
MATERIALS = {"rubber": (1100.0, 0.75, 0.9, (325, 385)),
             "wood":   (650.0, 0.35, 0.5, (45, 95)),
             "clay":   (1800.0, 0.05, 0.8, (125, 175)),
             "steel":  (7800.0, 0.45, 0.3, (205, 290))}
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")
SPLITS = {"train": 1, "val": 2, "test": 3}


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


def rotate(matrix, v):
    """(..., 3, 3) times (..., 3), as sums: for 3x3 blocks much faster than a batched matmul."""
    return (matrix * v.unsqueeze(-2)).sum(-1)


def cross(a, b):
    a0, a1, a2 = a.unbind(-1)
    b0, b1, b2 = b.unbind(-1)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], -1)


def dot(a, b):
    return (a * b).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# scenarios: draws -> bodies. A scenario says only what lies where; look() adds camera, light and floor

def bodies(shape, half_extents, material, position, rotation, alive, hue, tone, falls):
    """Fill in what follows from shape, size and material. All (B, N, ...); -> the scene dict that simulate() takes."""
    table = torch.tensor([m[:3] for m in MATERIALS.values()], device=shape.device)
    density, restitution, friction = table[material].unbind(-1)                                     # (B, N)
    volume = torch.where(shape == 0, 4 / 3 * math.pi, 8.0) * half_extents.prod(-1)
    zeros = torch.zeros_like(position)
    rgb = ((hue[..., None] / 60 + torch.tensor([5.0, 3.0, 1.0], device=hue.device)) % 6)            # HSV to RGB
    rgb = tone[..., :1] * (1 - tone[..., 1:] * torch.minimum(rgb, 4 - rgb).clamp(0, 1))
    return dict(shape=shape, half_extents=half_extents, material=material, position=position, rotation=rotation,
                velocity=zeros, angular_velocity=zeros.clone(), alive=alive, dynamic=alive.clone(), falls=falls & alive,
                mass=density * volume, restitution=restitution, friction=friction, hue=hue, color=rgb)


def drop(draw, unseen):
    """PISA's proxy task: one to three bodies, dropped from rest at 0.3 to 1.2 m or resting on the floor to be hit.

    unseen: sizes and heights outside the training range, both."""
    N, A = 3, 24                                   # bodies, and attempts to place them: the first valid one is taken
    B, device = draw.key.shape[0], draw.key.device

    # what meets is hard to learn, what falls alone is easy: one trains on more crowded scenes than one is judged by
    two, three = (0.10, 0.45) if draw.split == "train" else (0.35, 0.75)
    count = 1 + (draw("count", 1) > two).int() + (draw("count", 1) > three)                         # (B, 1)
    shape = (draw("shape", N) < 0.5).long()
    material = (draw("material", N) * len(MATERIALS)).long()
    hues = torch.tensor([m[3] for m in MATERIALS.values()], dtype=torch.float32, device=device)[material]  # (B, N, 2)
    small = draw("small", N) < 0.5
    size = torch.where(small, draw.uniform("size", 0.13, 0.155, N), draw.uniform("size", 0.245, 0.27, N)) if unseen \
        else draw.uniform("size", 0.17, 0.23, N)
    aspect = draw.uniform("aspect", 0.65, 1.0, N, 3)
    half_extents = size[..., None] * torch.where(shape[..., None] == 0, torch.ones_like(aspect), aspect * 0.95)
    bound = torch.where(shape == 0, size, half_extents.norm(dim=-1))                                # (B, N)

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
    rotation = torch.where((falls & (shape == 1)[:, None])[..., None], tumbled, upright)
    # how far the body reaches below its centre
    reach = torch.where(shape[:, None] == 0, size[:, None],
                        (quat_to_matrix(rotation)[..., 2, :].abs() * half_extents[:, None]).sum(-1))  # (B, A, N)
    position = torch.cat([spot, (reach + torch.where(falls, height, 0.0))[..., None]], -1)          # (B, A, N, 3)

    alive = torch.arange(N, device=device) < count                                                  # (B, N)
    i, j = torch.triu_indices(N, N, 1, device=device)
    gap = position[:, :, i] - position[:, :, j]                                                     # (B, A, P, 3)
    together = (bound[:, i] + bound[:, j])[:, None]
    apart = (gap.norm(dim=-1) > 1.05 * together) & (gap[..., [0, 2]].norm(dim=-1) > 0.8 * together)  # nobody hidden
    # two bodies of one scene differ clearly in hue, so that a parser can tell them apart
    hue = hues[..., 0][:, None] + draw("hue", A, N) * (hues[..., 1] - hues[..., 0])[:, None]        # (B, A, N)
    turn = (hue[..., i] - hue[..., j] + 180) % 360 - 180
    valid = ((apart & (turn.abs() > 35)) | ~(alive[:, i] & alive[:, j])[:, None]).all(-1)           # (B, A)
    first = valid.float().argmax(1)                # (B,) index of the first valid attempt ...
    alive &= valid.any(1, keepdim=True) | (torch.arange(N, device=device) == 0)      # ... else the first body alone
    pick = lambda x: x[torch.arange(B, device=device), first]
    tone = torch.stack([draw.uniform("value", 0.8, 1.0, N), draw.uniform("satur", 0.75, 0.95, N)], -1)
    return bodies(shape, half_extents, material, pick(position), pick(rotation), alive,
                  pick(hue) % 360, tone, pick(falls))


SCENARIOS = {"drop": drop}


def look(draw, size):
    """Camera, light, floor and wall, drawn for any scenario. -> dict of (B, ...)."""
    device = draw.key.device
    distance, pitch = draw.uniform("dist", 3.4, 4.0), draw.uniform("pitch", 6, 16) * math.pi / 180
    target = torch.stack([draw.uniform("aim", -0.08, 0.08), 0 * pitch, draw.uniform("aimz", 0.72, 0.82)], -1)
    eye = target + distance[:, None] * torch.stack([0 * pitch, -pitch.cos(), pitch.sin()], -1)
    forward = (target - eye) / distance[:, None]
    right = torch.tensor([1.0, 0.0, 0.0], device=device).expand_as(forward)
    axes = torch.stack([right, cross(forward, right), forward], 1)                   # rows: x right, y down, z forward
    extrinsics = torch.eye(4, device=device).repeat(len(eye), 1, 1)
    extrinsics[:, :3, :3], extrinsics[:, :3, 3] = axes, -rotate(axes, eye)
    focal = size * draw.uniform("focal", 1.7, 1.8)
    intrinsics = torch.zeros(len(eye), 3, 3, device=device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2] = intrinsics[:, 1, 2] = size / 2                             # pixel centres at +0.5
    intrinsics[:, 2, 2] = 1

    azimuth, elevation = draw("sun") * 2 * math.pi, draw.uniform("sunz", 50, 75) * math.pi / 180
    light = torch.stack([azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], -1)
    pale = lambda name: 1 - draw.uniform(name, 0.0, 0.12, 3)                         # greyish: colour belongs to bodies
    tile_a = draw.uniform("floor", 0.5, 0.75)[:, None] * pale("tint1")
    return dict(camera=dict(intrinsics=intrinsics, world_to_camera=extrinsics), eye=eye, light=light,
                ambient=draw.uniform("ambient", 0.4, 0.55),
                floor=dict(tile=torch.full_like(pitch, TILE), yaw=draw("tileyaw") * math.pi / 2, color_a=tile_a,
                           color_b=tile_a * draw.uniform("contrast", 0.8, 0.9)[:, None],
                           wall_color=draw.uniform("wall", 0.45, 0.9)[:, None] * pale("tint2"),
                           wall_y=draw.uniform("wally", 1.4, 2.2)))


def captions(scene):
    """One line a clip that names every body: colour, material, shape, and whether it falls."""
    names, lines = list(MATERIALS), []
    columns = (scene[k].tolist() for k in ("alive", "shape", "material", "hue", "falls"))
    for alive, shape, material, hue, falls in zip(*columns):
        words = [(HUES[round(h / 30) % 12], names[m], ("ball", "box")[s], "falls" if f else "rests")
                 for a, s, m, h, f in zip(alive, shape, material, hue, falls) if a]
        lines.append(", ".join(f"{'an' if w[0][0] in 'aeiou' else 'a'} {' '.join(w)}" for w in words))
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# contacts: fixed slots. Eight points a body against the floor; per pair 8 + 8 points against the other's signed
# distance and 12 edges of the first that cut an edge of the second

CORNERS = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
EDGES = torch.tensor([[a, b] for a in range(8) for b in range(a + 1, 8) if (CORNERS[a] != CORNERS[b]).sum() == 1])
KEEP = 16                                          # contacts kept a scene, deepest first: three boxes flat need 12


def _distance(p, shape, h):
    """Signed distance of points p (B, P, K, 3), in the body's frame, to sphere or box h (B, P, 3) -> gap, normal."""
    h, ball = h[:, :, None], (shape == 0)[:, :, None]
    far = p.norm(dim=-1).clamp_min(1e-9)
    q = p.abs() - h
    outside = q.clamp_min(0)
    length = outside.norm(dim=-1)
    deepest = torch.nn.functional.one_hot(q.argmax(-1), 3).to(p)                     # nearest face, for points inside
    gap = torch.where(ball, far - h[..., 0], torch.where(length > 0, length, q.amax(-1)))
    normal = torch.where((length > 0)[..., None], outside / length.clamp_min(1e-9)[..., None], deepest) * p.sign()
    return gap, torch.where(ball[..., None], p / far[..., None], normal)


def _edges(a, b, h):
    """Segments a to b (B, P, E, 3), in the frame of box h (B, P, 3), that pass through it near one of its edges.

    -> contact point, gap (positive where there is none), normal. The point is the middle of the chord."""
    h, d = h[:, :, None], b - a
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    t0, t1 = (-h - a) * inverse, (h - a) * inverse
    enter, leave = torch.minimum(t0, t1).amax(-1), torch.maximum(t0, t1).amin(-1)
    p = a + d * ((enter + leave) / 2)[..., None]
    # the box's edge in question runs along the axis whose face is farthest; both edges span the contact plane
    along = torch.nn.functional.one_hot((h - p.abs()).argmax(-1), 3).to(p)
    normal = cross(d, along)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    normal = normal * dot(normal, p).sign()[..., None]
    depth = dot(normal, (h * p.sign() - p) * (1 - along))
    crosses = (enter > 0) & (enter < leave) & (leave < 1) & (depth > 0)
    return p, torch.where(crosses, -depth, 1.0), normal


class Contacts:
    """All possible contacts of a batch of scenes; detect() returns the deepest KEEP of them."""
    def __init__(self, scene):
        B, N = scene["shape"].shape
        device = scene["shape"].device
        self.scene, self.N = scene, N
        self.box = scene["shape"] == 1
        self.corners, self.edges = CORNERS.to(device), EDGES.to(device)
        self.i, self.j = torch.triu_indices(N, N, 1, device=device)
        n = torch.arange(N, device=device).repeat_interleave(8)
        i, j = self.i.repeat_interleave(28), self.j.repeat_interleave(28)
        self.a, self.b = torch.cat([n, i]), torch.cat([torch.full_like(n, N), j])    # body N is the world
        solid = torch.cat([scene["alive"], torch.ones_like(scene["alive"][:, :1])], 1)
        moves = torch.cat([scene["dynamic"], torch.zeros_like(scene["dynamic"][:, :1])], 1)
        self.possible = solid[:, self.a] & solid[:, self.b] & (moves[:, self.a] | moves[:, self.b])  # (B, C)
        one = torch.ones_like(scene["restitution"][:, :1])                           # the floor multiplies by one
        e, mu = torch.cat([scene["restitution"], one], 1), torch.cat([scene["friction"], one], 1)
        self.e, self.mu = e[:, self.a] * e[:, self.b], mu[:, self.a] * mu[:, self.b]                # (B, C)

    def detect(self, x, R):
        """Positions (B, N, 3), matrices (B, N, 3, 3) -> slot index (B, K), point (B, K, 3), normal from b to a, gap."""
        h, box, i, j = self.scene["half_extents"], self.box, self.i, self.j
        ball = ~box[..., None, None]                                                                # (B, N, 1, 1)
        local = self.corners * h[:, :, None] * box[..., None, None]                  # a ball's eight points: its centre
        first = torch.arange(8, device=x.device) == 0
        radius = torch.where(ball[..., 0], h[..., :1], 0.0)                                         # (B, N, 1)
        world = x[:, :, None] + rotate(R[:, :, None], local)                                        # (B, N, 8, 3)

        gap = world[..., 2] - radius
        gap = torch.where(box[..., None] | first, gap, 1.0)
        low = world - torch.nn.functional.pad(radius[..., None], (2, 0))             # a ball touches below its centre
        up = torch.zeros_like(world)
        up[..., 2] = 1
        points, gaps, normals = [low.flatten(1, 2)], [gap.flatten(1, 2)], [up.flatten(1, 2)]

        pair = []
        for a, b, sign in ((i, j, 1), (j, i, -1)):                                   # points of a against b's shape
            p = rotate(R[:, b, None].mT, world[:, a] - x[:, b, None])                               # (B, P, 8, 3)
            g, n = _distance(p, self.scene["shape"][:, b], h[:, b])
            g = g - radius[:, a]
            n = rotate(R[:, b, None], n)
            # a ball counts by its centre, once; a box's corners say nothing that the ball's centre has not said
            counts = torch.where(box[:, a, None], box[:, b, None], first & (box[:, b, None] | (sign > 0)))
            point = world[:, a] - n * (radius[:, a] + g / 2)[..., None]
            pair.append((point, torch.where(counts, g, 1.0), n * sign))
        p = rotate(R[:, j, None].mT, world[:, i] - x[:, j, None])
        p, g, n = _edges(p[:, :, self.edges[:, 0]], p[:, :, self.edges[:, 1]], h[:, j])
        both = (box[:, i] & box[:, j])[..., None]
        pair.append((x[:, j, None] + rotate(R[:, j, None], p), torch.where(both, g, 1.0), rotate(R[:, j, None], n)))
        for k, out in enumerate((points, gaps, normals)):
            out.append(torch.cat([part[k] for part in pair], 2).flatten(1, 2))

        gap = torch.where(self.possible, torch.cat(gaps, 1), 1.0)                                   # (B, C)
        gap, slot = gap.topk(min(KEEP, gap.shape[1]), 1, largest=False)
        take = lambda v: v.gather(1, slot[..., None].expand(-1, -1, 3))
        return slot, take(torch.cat(points, 1)), take(torch.cat(normals, 1)), gap


def _solve(v, w, inv_mass, inv_inertia, a, b, ra, rb, n, active, target, mu, impulse, iterations):
    """Projected Jacobi: impulses that make every active contact separate at >= target speed, within Coulomb's cone.

    v, w (B, N+1, 3); a, b (B, K); ra, rb, n (B, K, 3); impulse (B, K, 3) is the start -> v, w, impulse."""
    expand = lambda index: index[..., None].expand(-1, -1, 3)
    at = lambda x, index: x.gather(1, expand(index))
    mass = lambda index: inv_mass.gather(1, index)
    inertia = lambda index: inv_inertia.flatten(2).gather(1, index[..., None].expand(-1, -1, 9)).unflatten(2, (3, 3))
    on_a, on_b = torch.nn.functional.one_hot(a, v.shape[1]).to(v), torch.nn.functional.one_hot(b, v.shape[1]).to(v)
    ca, cb, Ia, Ib = cross(ra, n), cross(rb, n), inertia(a), inertia(b)
    w_n = mass(a) + mass(b) + dot(ca, rotate(Ia, ca)) + dot(cb, rotate(Ib, cb))      # inverse mass along the normal
    # across it: an upper bound for every direction (exact for a ball), so that friction never overshoots
    w_t = mass(a) + mass(b) + _spin(Ia, ra) + _spin(Ib, rb)
    live = active.to(v)
    share = (on_a + on_b) * live[..., None]                                                         # (B, K, N+1)
    count = share.sum(1)                                                                            # (B, N+1)
    count[:, -1] = 1                               # the world is not moved, so its contacts need not share it
    # n contacts on a body have lambda_max(D^-1 A) <= n: dividing by (n + 1) / 2 keeps the iteration convergent
    relax = (torch.maximum(count.gather(1, a), count.gather(1, b)) + 1) / 2
    step_n, step_t = live / (relax * w_n).clamp_min(1e-12), live / (relax * w_t).clamp_min(1e-12)

    def apply(v, w, p):
        out_a, out_b = on_a.mT, on_b.mT                                                             # (B, N+1, K)
        v = v + inv_mass[..., None] * (out_a @ p - out_b @ p)
        return v, w + rotate(inv_inertia, out_a @ cross(ra, p) - out_b @ cross(rb, p))

    impulse = impulse * live[..., None]
    v, w = apply(v, w, impulse)
    for _ in range(iterations):
        u = at(v, a) + cross(at(w, a), ra) - at(v, b) - cross(at(w, b), rb)                         # (B, K, 3)
        u_n = dot(u, n)
        p_n = dot(impulse, n)
        new_n = (p_n + step_n * (target - u_n)).clamp_min(0)
        new_t = impulse - p_n[..., None] * n - step_t[..., None] * (u - u_n[..., None] * n)
        size = new_t.norm(dim=-1).clamp_min(1e-12)
        new = new_n[..., None] * n + new_t * (mu * new_n / size).clamp_max(1)[..., None]
        v, w = apply(v, w, new - impulse)
        impulse = new
    return v, w, impulse


def _spin(inertia, r):
    """Upper bound of (r x t) I^-1 (r x t) over unit t: |r|^2 times the largest eigenvalue's row-sum bound."""
    return inertia.abs().sum(-1).amax(-1) * dot(r, r)


def simulate(scene, frames, fps, gravity=None, rate=RATE):
    """Run a scene -> dict of position (B, T, N, 3), rotation (B, T, N, 4), velocity, angular_velocity (B, T, N, 3).

    scene: as from a scenario. gravity: (B, 3) m/s^2, default 9.81 down. Frame 0 is the scene as given.
    Raises ValueError if a body has no positive mass or a number is not finite."""
    for key in ("position", "rotation", "half_extents", "mass", "restitution", "friction"):
        if not scene[key].isfinite().all():
            raise ValueError(f"the scene's {key} has a number that is not finite")
    if (scene["mass"][scene["alive"]] <= 0).any():
        raise ValueError("the scene has a body without positive mass: density and half extents must be positive")
    x, q, v, w = (scene[k].clone() for k in ("position", "rotation", "velocity", "angular_velocity"))
    B, N, _ = x.shape
    g = torch.tensor([0.0, 0.0, -9.81], device=x.device).repeat(B, 1) if gravity is None else gravity
    g = g[:, None] * scene["dynamic"][..., None]                                                    # (B, N, 3)
    steps = math.ceil(rate / fps)
    h = 1 / (fps * steps)
    m, e = scene["mass"], scene["half_extents"]
    square = e.square()
    inertia = m[..., None] * torch.where((scene["shape"] == 0)[..., None], 0.4 * square,
                                         (square.sum(-1, keepdim=True) - square) / 3)               # (B, N, 3)
    moves = scene["dynamic"].to(x)
    inv_mass, inv_body = moves / m.clamp_min(1e-12), moves[..., None] / inertia.clamp_min(1e-12)
    pad = lambda t: torch.cat([t, torch.zeros_like(t[:, :1])], 1)                    # the world: a body that stays put
    inv_mass_w, zero = pad(inv_mass), torch.zeros(B, N + 1, 3, device=x.device)
    contacts = Contacts(scene)
    warm = torch.zeros(B, contacts.a.numel(), 3, device=x.device)                    # last impulses, by slot

    def world_inertia(q, diagonal):
        R = quat_to_matrix(q)
        return R, (R * diagonal[..., None, :]) @ R.mT

    record = [(x, q, v, w)]
    R, I_inv = world_inertia(q, inv_body)
    for step in range((frames - 1) * steps):
        x = x + h * v + h * h / 2 * g              # ballistic: exact under constant gravity
        v = v + h * g
        spin = rotate(R, inertia * rotate(R.mT, w))                                  # angular momentum is what is kept
        q = quat_mul(quat_exp(h * w), q)
        q = q / q.norm(dim=-1, keepdim=True)
        R, I_inv = world_inertia(q, inv_body)
        w = rotate(I_inv, spin)

        slot, point, n, gap = contacts.detect(x, R)
        active = gap < 0
        if active.any():
            a, b = contacts.a[slot], contacts.b[slot]
            center, g_w, v_w, w_w = pad(x), pad(g), pad(v), pad(w)
            at = lambda t, index: t.gather(1, index[..., None].expand(-1, -1, 3))
            ra, rb = point - at(center, a), point - at(center, b)
            u = at(v_w, a) + cross(at(w_w, a), ra) - at(v_w, b) - cross(at(w_w, b), rb)
            approach = -dot(u, n)
            # speed when the surfaces met: what the fall through the gap added is taken away again
            pull = -dot(at(g_w, a) - at(g_w, b), n)
            speed = (approach.square() + 2 * pull * gap).clamp_min(0).sqrt()
            bounces = approach > 3 * h * 9.81                                        # slower than that is resting
            target = torch.where(bounces, contacts.e.gather(1, slot) * speed, 0.0)
            start = at(warm, slot) * ~bounces[..., None]
            I_w = pad(I_inv)
            v_w, w_w, impulse = _solve(v_w, w_w, inv_mass_w, I_w, a, b, ra, rb, n, active, target,
                                       contacts.mu.gather(1, slot), start, 10)
            v, w = v_w[:, :N], w_w[:, :N]
            warm = torch.zeros_like(warm).scatter(1, slot[..., None].expand(-1, -1, 3), impulse)
            # the same solver moves positions: the penetration is the "speed" wanted, friction-free, from zero
            def free(iterations):
                return _solve(zero, zero, inv_mass_w, I_w, a, b, ra, rb, n, active, -gap, 0 * gap, 0 * impulse,
                              iterations)[:2]
            dx, dq = free(4)
            deep = (gap < -DEEP).any(1)[:, None, None]
            if deep.any():                         # a light body lies between the floor and a heavy one that hits it
                dx, dq = (torch.where(deep, many, few) for many, few in zip(free(32), (dx, dq)))
            x, q = x + dx[:, :N], quat_mul(quat_exp(dq[:, :N]), q)
        if (step + 1) % steps == 0:
            record.append((x, q, v, w))
    keys = ("position", "rotation", "velocity", "angular_velocity")
    return {k: torch.stack([r[i] for r in record], 1) for i, k in enumerate(keys)}


def jitter(scene, camera, draw, pixels=0.5, degrees=5.0):
    """The same scene as far as a picture can tell: body centres moved by `pixels` (std per axis), turned by `degrees`.

    What rests on the floor stays on it and stays upright. draw: a Draws. -> a new scene dict, to be simulated."""
    B, N = scene["shape"].shape
    normal = lambda name: ((-2 * (1 - draw(name + "r", N, 3)).log()).sqrt()
                           * (2 * math.pi * draw(name + "a", N, 3)).cos())
    depth = rotate(camera["world_to_camera"][:, None, :3, :3], scene["position"])[..., 2] \
        + camera["world_to_camera"][:, None, 2, 3]
    step = pixels * depth / camera["intrinsics"][:, 0, 0, None]                                     # m a pixel
    falls = scene["falls"][..., None]
    flat = torch.tensor([0.0, 0.0, 1.0], device=step.device)
    turn = normal("turn") * degrees * math.pi / 180
    position = scene["position"] + normal("move") * step[..., None] * torch.where(falls, 1.0, 1 - flat)
    return scene | dict(position=position,
                        rotation=quat_mul(quat_exp(torch.where(falls, turn, turn * flat)), scene["rotation"]))


# ----------------------------------------------------------------------------------------------------------------------
# the camera: one ray a sample, cast only inside the window that a body can cover

def project(points, camera):
    """World points (B, ..., 3) -> pixel coordinates (B, ..., 2) and z-depth (B, ...); pixel centres are at +0.5."""
    shape = (len(points),) + (1,) * (points.dim() - 2)
    M, K = camera["world_to_camera"], camera["intrinsics"]
    p = rotate(M[:, :3, :3].view(*shape, 3, 3), points) + M[:, :3, 3].view(*shape, 3)
    uv = p[..., :2] / p[..., 2:] * K[:, 0, 0].view(*shape, 1) + K[:, :2, 2].view(*shape, 2)
    return uv, p[..., 2]


def _rays(uv, camera):
    """Pixel coordinates (F, P, 2) -> ray directions in world axes (F, P, 3), scaled so that t is the z-depth."""
    K, M = camera["intrinsics"], camera["world_to_camera"]
    xy = (uv - K[:, None, :2, 2]) / K[:, None, 0, 0, None]
    return torch.nn.functional.pad(xy, (0, 1), value=1.0) @ M[:, :3, :3]


def _hit(o, d, shape, h):
    """Rays from o (F, 1, 3) along d (F, P, 3), in the body's frame -> t (F, P), inf if they miss; normal (F, P, 3)."""
    ball, h = (shape == 0)[:, None], h[:, None]
    a, b, c = dot(d, d), dot(o, d), dot(o, o) - h[..., 0].square()
    disc = b * b - a * c
    t_ball = (-b - disc.clamp_min(0).sqrt()) / a
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    t0, t1 = (-h - o) * inverse, (h - o) * inverse
    near, axis = torch.minimum(t0, t1).max(-1)
    far = torch.maximum(t0, t1).amin(-1)
    t = torch.where(ball, t_ball, near)
    hits = torch.where(ball, disc > 0, near < far) & (t > 0)
    face = torch.nn.functional.one_hot(axis, 3).to(d) * -d.sign()
    normal = torch.where(ball[..., None], (o + t_ball[..., None] * d) / h, face)
    return torch.where(hits, t, torch.inf), normal


def _background(scene, size, samples):
    """What is seen where no body is, P = (size*samples)^2 -> z-depth (B, P), colour in sun and in shadow (B, P, 3)."""
    B, device = len(scene["eye"]), scene["eye"].device
    s = (torch.arange(size * samples, device=device) + 0.5) / samples
    uv = torch.stack(torch.meshgrid(s, s, indexing="xy"), -1).view(1, -1, 2).expand(B, -1, -1)
    d, eye, floor = _rays(uv, scene["camera"]), scene["eye"][:, None], scene["floor"]
    t_floor = torch.where(d[..., 2] < 0, -eye[..., 2] / d[..., 2], torch.inf)
    t_wall = (floor["wall_y"][:, None] - eye[..., 1]) / d[..., 1]
    t = torch.minimum(t_floor, t_wall)
    point, on_floor = eye + t[..., None] * d, (t_floor < t_wall)[..., None]
    c, s = floor["yaw"].cos()[:, None], floor["yaw"].sin()[:, None]
    tile = (((point[..., 0] * c - point[..., 1] * s) / TILE).floor()
            + ((point[..., 0] * s + point[..., 1] * c) / TILE).floor())
    checker = torch.where((tile % 2 == 0)[..., None], floor["color_a"][:, None], floor["color_b"][:, None])
    wall = (0.7 + 0.3 * (point[..., 2:] / 2).clamp(0, 1)) * floor["wall_color"][:, None]  # brighter towards the top
    ambient = scene["ambient"][:, None, None]
    sun = ambient + (1 - ambient) * scene["light"][:, None, 2:]
    return t, torch.where(on_floor, checker * sun, wall), torch.where(on_floor, checker * ambient, wall)


def _window(center, side, width):
    """Indices of a side x side window around center (F, 2) in a width x width image, kept inside it -> (F, side^2)."""
    corner = (center - side / 2).round().clamp(0, width - side).long()
    step = torch.arange(side, device=center.device)
    return ((corner[:, 1:] + step)[:, :, None] * width + (corner[:, :1] + step)[:, None, :]).flatten(1)


def _frames(scene, path, k):
    """The frames in which body k exists: their clips (F,), its centre (F, 3), matrix (F, 3, 3), shape, size there."""
    T = path["position"].shape[1]
    clip = scene["alive"][:, k].nonzero()[:, 0].repeat_interleave(T)                                # (F,)
    time = torch.arange(T, device=clip.device).repeat(len(clip) // T)
    x, R = path["position"][clip, time, k], quat_to_matrix(path["rotation"][clip, time, k])
    return clip, clip * T + time, x, R, scene["shape"][clip, k], scene["half_extents"][clip, k]


def _side(camera, radius, center, samples, limit):
    """Samples across the silhouette of the largest ball (F,) seen at center (F, 3): a window that misses nothing."""
    uv, z = project(center[:, None], camera)
    reach = camera["intrinsics"][:, 0, 0] * radius / (z[:, 0] - radius).clamp_min(0.5)
    return uv[:, 0] * samples, min(limit, math.ceil(2.1 * samples * reach.max().item()) + 3)


def _sunlight(scene, path, size):
    """Fraction of the sun on the floor at each pixel, (B, T, H, W): one ray a pixel, then a 3x3 mean as penumbra."""
    B, T, N, _ = path["position"].shape
    lit = torch.ones(B * T, size * size, device=scene["eye"].device)
    for k in range(N):
        clip, frame, x, R, shape, h = _frames(scene, path, k)
        if not len(clip):
            continue
        light, camera = scene["light"][clip], {key: v[clip] for key, v in scene["camera"].items()}
        bound = torch.where(shape == 0, h[:, 0], h.norm(dim=-1))
        center, side = _side(camera, bound / light[:, 2], x - light * (x[:, 2:] / light[:, 2:]), 1, size)
        index = _window(center, side, size)                                                         # (F, P)
        d = _rays(torch.stack([index % size + 0.5, index // size + 0.5], -1), camera)
        eye = scene["eye"][clip][:, None]
        point = eye - d * (eye[..., 2:] / d[..., 2:].clamp_max(-1e-3))                              # on the floor
        o, d = (point - x[:, None]) @ R, rotate(R.mT, light)[:, None]
        ball, h = (shape == 0)[:, None], h[:, None]
        b = dot(o, d)
        inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
        t0, t1 = (-h - o) * inverse, (h - o) * inverse
        blocked = torch.where(ball, dot(o, o) - b * b < h[..., 0].square(),
                              torch.minimum(t0, t1).amax(-1) < torch.maximum(t0, t1).amin(-1))
        lit[frame[:, None], index] *= 1 - blocked.float()
    lit = torch.nn.functional.pad(lit.view(B * T, 1, size, size), (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(lit, 3, 1).view(B, T, size * size)


def _cast(scene, path, size, samples):
    """Bodies only, F = B*T, P = (size*samples)^2 -> z-depth (F, P), id (F, P), and the samples that hit: id, flat
    index into (F, P) and shaded colour (.., 3) for each body."""
    B, T, N, _ = path["position"].shape
    W, device = size * samples, scene["eye"].device
    depth = torch.full((B * T, W * W), torch.inf, device=device)
    ident = torch.zeros(B * T, W * W, dtype=torch.uint8, device=device)
    hits = []
    for k in range(N):
        clip, frame, x, R, shape, h = _frames(scene, path, k)
        if not len(clip):
            continue
        camera = {key: v[clip] for key, v in scene["camera"].items()}
        center, side = _side(camera, torch.where(shape == 0, h[:, 0], h.norm(dim=-1)), x, samples, W)
        index = _window(center, side, W)                                                            # (F, S)
        pixel = torch.stack([(index % W + 0.5) / samples, (index // W + 0.5) / samples], -1)
        d = _rays(pixel, camera) @ R               # everything below happens in the body's own frame
        t, normal = _hit(rotate(R.mT, scene["eye"][clip] - x)[:, None], d, shape, h)
        flat = frame[:, None] * W * W + index
        closer = t < depth.view(-1)[flat]
        row, sample = closer.nonzero().unbind(1)   # from here on only the samples that hit: one in four
        flat, normal, ball = flat[row, sample], normal[row, sample], (shape == 0)[row]
        depth.view(-1)[flat], ident.view(-1)[flat] = t[row, sample], k + 1
        # two tones on a ball, three on a box, so that rotation shows
        faces = (normal.abs() * torch.tensor([0.0, 0.14, 0.28], device=device)).sum(-1)
        tone = 1 - torch.where(ball, 0.25 * (normal[:, 2] > 0), faces)
        ambient, diffuse = (scene["ambient"][clip][row],
                            dot(normal, rotate(R.mT, scene["light"][clip])[row]).clamp_min(0))
        hits.append((k + 1, flat, scene["color"][clip, k][row] * (tone * (ambient + (1 - ambient) * diffuse))[:, None]))
    return depth, ident, hits


def render(scene, path, size=64, antialias=2, truth=True):
    """Film a simulated scene. -> dict of video (B, 3, T, H, W) in [-1, 1] and, if truth: mask, depth, flow, visible."""
    B, T, N, _ = path["position"].shape
    W = size * antialias
    _, ident, hits = _cast(scene, path, size, antialias)
    # the floor does not move: only how much sun it gets. It is filmed once, with more samples: its far tiles are fine
    fine = 4 if antialias > 1 else 1
    pool = lambda c: c.view(B, size, fine, size, fine, 3).mean((2, 4)).view(B, 1, size * size, 3)
    lit, dark = map(pool, _background(scene, size, fine)[1:])
    image = (dark + (lit - dark) * _sunlight(scene, path, size)[..., None]).view(-1, 3)             # (B*T*H*W, 3)
    body = torch.zeros(len(image), 4, device=image.device)                           # colour and coverage of each pixel
    for k, flat, color in hits:
        front = ident.view(-1)[flat] == k                         # not hidden by a later body
        flat, color = flat[front], color[front]
        pixel = (flat // (W * W) * size + flat % (W * W) // W // antialias) * size + flat % W // antialias
        body.index_add_(0, pixel, torch.nn.functional.pad(color, (0, 1), value=1.0))
    body /= antialias**2
    image = (image * (1 - body[:, 3:]) + body[:, :3]).view(B, T, size, size, 3).permute(0, 4, 1, 2, 3)
    out = dict(video=(image.clamp(0, 1) * 2 - 1).contiguous())
    if not truth:
        return out
    depth, ident, _ = _cast(scene, path, size, 1)                                    # truth: what a pixel's centre sees
    depth, ident = torch.minimum(depth.view(B, T, -1), _background(scene, size, 1)[0][:, None]), ident.view(B, T, -1)
    return out | dict(mask=ident.view(B, T, size, size), depth=depth.view(B, T, size, size),
                      **_flow(scene, path, depth, ident, size))


def _flow(scene, path, depth, ident, size):
    """Where each pixel's surface point is one frame later, in pixels, and whether the camera sees it there."""
    B, T, N, _ = path["position"].shape
    s = torch.arange(size, device=depth.device) + 0.5
    uv = torch.stack(torch.meshgrid(s, s, indexing="xy"), -1).view(1, -1, 2).expand(B, -1, -1)
    point = scene["eye"][:, None, None] + depth[..., None] * _rays(uv, scene["camera"])[:, None]    # (B, T, P, 3)
    R = quat_to_matrix(path["rotation"])                                                            # (B, T, N, 3, 3)
    later = point[:, :-1].clone()                  # the background stays where it is
    for k in range(N):
        local = (point[:, :-1] - path["position"][:, :-1, k, None]) @ R[:, :-1, k]
        moved = local @ R[:, 1:, k].mT + path["position"][:, 1:, k, None]
        later = torch.where((ident[:, :-1] == k + 1)[..., None], moved, later)
    uv_later, z = project(later, scene["camera"])                                                   # (B, T-1, P, 2)
    flow = (uv_later - uv[:, None]).permute(0, 1, 3, 2)
    cell = uv_later.floor().long()
    inside = ((cell >= 0) & (cell < size)).all(-1)
    index = (cell[..., 1] * size + cell[..., 0]).clamp(0, size * size - 1)
    # seen if the pixel there shows the same thing, and not its other side
    visible = inside & (ident[:, 1:].gather(2, index) == ident[:, :-1]) & (z < depth[:, 1:].gather(2, index) + 0.05)
    return dict(flow=flow.reshape(B, T - 1, 2, size, size), visible=visible.view(B, T - 1, size, size))


# ----------------------------------------------------------------------------------------------------------------------

def make_scene(scenario, batch_size, seed, split="train", size=64, device="cpu", start=0, unseen=False):
    """Draw clips start .. start + batch_size - 1 of a split, not simulated yet. -> scene dict, Draws."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}; there are: {', '.join(SCENARIOS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    draw = Draws(split, seed, torch.arange(start, start + batch_size, device=device) * 2 + unseen)
    scene = SCENARIOS[scenario](draw, unseen) | look(draw, size)
    return scene | dict(gravity=torch.tensor([0.0, 0.0, -9.81], device=device).repeat(batch_size, 1)), draw


@torch.no_grad()
def make_batch(scenario, batch_size, seed, split="train", frames=25, size=64, fps=16, device="cpu", start=0,
               unseen=False, antialias=2, truth=True, jitter_seed=None, chunk=32):
    """Simulate and film a batch of clips. Clip i depends on (split, seed, start + i) alone, whatever the batch size.

    Returns a dict, float32 unless said (T frames, N bodies, H = W = size):
      video (B,3,T,H,W) in [-1,1]; mask (B,T,H,W) uint8, 0 background, k+1 body k; depth (B,T,H,W) m, metric z-depth;
      flow (B,T-1,2,H,W) px, x right, y down, frame t to t+1; visible (B,T-1,H,W) bool;
      position (B,T,N,3) m, rotation (B,T,N,4) quaternion wxyz, velocity m/s, angular_velocity rad/s (B,T,N,3);
      alive, dynamic, falls (B,N) bool; shape (B,N) index into SHAPES; half_extents (B,N,3) m; mass kg, restitution,
      friction (B,N); floor dict; gravity (B,3) m/s^2; camera dict: intrinsics (B,3,3), world_to_camera (B,4,4);
      caption list[str].
    unseen: sizes and heights outside the training range. truth=False skips mask, depth, flow, visible.
    jitter_seed: an int simulates the scene moved by half a pixel and 5 degrees instead (see jitter).
    Raises ValueError for an unknown scenario or split and for sizes that make no clip."""
    if batch_size < 1 or frames < 1 or size < 8 or fps <= 0:
        raise ValueError(f"batch_size={batch_size}, frames={frames}, size={size}, fps={fps}: expected at least 1, 1, 8 "
                         "and a positive frame rate")
    scene, draw = make_scene(scenario, batch_size, seed, split, size, device, start, unseen)
    if jitter_seed is not None:
        draw.key = _mix(draw.key + 1 + jitter_seed)
        scene = jitter(scene, scene["camera"], draw)
    path = simulate(scene, frames, fps, scene["gravity"])
    part = lambda d, i: {k: part(v, i) if isinstance(v, dict) else v[i:i + chunk] for k, v in d.items()}
    films = [render(part(scene, i), part(path, i), size, antialias, truth) for i in range(0, batch_size, chunk)]
    keep = ("alive", "dynamic", "falls", "shape", "half_extents", "mass", "restitution", "friction", "material",
            "color", "floor", "gravity", "camera", "light")
    return {k: torch.cat([f[k] for f in films]) for k in films[0]} | path | {k: scene[k] for k in keep} \
        | dict(caption=captions(scene))


# ----------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    out: str = "out/simdata"       # folder for contact sheets and clips
    n: int = 8                     # clips per scenario
    seed: int = 0                  # any integer
    split: str = "train"           # train, val or test
    unseen: bool = False           # sizes and heights outside the training range
    size: int = 64                 # pixels
    frames: int = 25               # at 16 fps


def main():
    import common                                  # only to look at clips; the world itself needs nothing of ours
    cfg = common.parse_config(Config, sys.argv[1:])
    common.check_range(cfg, n=(1, 256), size=(16, 1024), frames=(1, 1000))
    if cfg.split not in SPLITS:
        raise common.InputError(f"--split={cfg.split}: expected one of {', '.join(SPLITS)}")
    common.make_dir(cfg.out)
    for name in SCENARIOS:
        batch = make_batch(name, cfg.n, cfg.seed, cfg.split, cfg.frames, cfg.size, unseen=cfg.unseen)
        clips = [common.to_uint8(v) for v in batch["video"]]
        common.write_image(f"{cfg.out}/{name}.png", common.sheet(clips, every=2))
        common.write_video(f"{cfg.out}/{name}.mp4", common.grid(clips, 4), 16, scale=max(1, 256 // cfg.size))
        for i, caption in enumerate(batch["caption"]):
            print(f"{name} {i}: {caption}")
    print(f"wrote contact sheets and clips to {cfg.out}/")


if __name__ == "__main__":
    import common
    common.run(main)
