"""Samples of `sdf_render` and `ray_features` on their rays and in the volume: device functions.

A sample is interpolated between the 8 voxels around it, corners k = 0 to 7: bits 0, 1 and 2 of k are 1 at the upper
end along x, y and z. Corner k's weight is the product of one share per axis, with u the grid coordinate:

    f = u - floor(u),   share 1 - f of voxel floor(u), f of the next one;   slopes (d share / du) -1 and 1

Addresses are computed once per sample: corners have constant offsets from the first one, which is clamped so that all 8
are in the volume. If clamping has moved a share to another voxel, or if its voxel does not exist, the share is 0; so no
access needs a mask. The volume fades to 0 within one cell beyond its first and last voxel centers.

A volume has less than 2^31 voxels (checked in `sdf_render` and `ray_features`). Sizes as in `sdf_field`; the volume's
are constants.
"""

from unipad.kernels.backend import tl, triton


@triton.jit
def load_ray(origins_ptr, directions_ptr, volume_idx_ptr, r):
    """Origin, direction (x, y, z each) and volume index of rays r, which must exist: one or [M]."""
    return load3(origins_ptr, r), load3(directions_ptr, r), tl.load(volume_idx_ptr + r)


@triton.jit
def load3(ptr, n):
    return tl.load(ptr + 3 * n), tl.load(ptr + 3 * n + 1), tl.load(ptr + 3 * n + 2)


@triton.jit
def load3_masked(ptr, n, ok):
    x = tl.load(ptr + 3 * n, mask=ok, other=0.0)
    return x, tl.load(ptr + 3 * n + 1, mask=ok, other=0.0), tl.load(ptr + 3 * n + 2, mask=ok, other=0.0)


@triton.jit
def store3(ptr, n, v, ok):
    x, y, z = v
    tl.store(ptr + 3 * n, x, mask=ok)
    tl.store(ptr + 3 * n + 1, y, mask=ok)
    tl.store(ptr + 3 * n + 2, z, mask=ok)


@triton.jit
def sample_at(ray, t, cells_per_unit_ptr, cell_offset_ptr):
    """Points and grid coordinates (x, y, z each) of samples [M] at distances t, and the rays' volume indices."""
    origin, direction, volume_idx = ray
    px, py, pz = origin[0] + direction[0] * t, origin[1] + direction[1] * t, origin[2] + direction[2] * t
    scale, offset = load3(cells_per_unit_ptr, 0), load3(cell_offset_ptr, 0)
    coords = (px * scale[0] + offset[0], py * scale[1] + offset[1], pz * scale[2] + offset[2])
    return (px, py, pz), coords, volume_idx


@triton.jit
def axis_shares(u, SIZE: tl.constexpr):
    """Along one axis: index of the lower of two voxels, clamped; for both, their shares and slopes."""
    LAST: tl.constexpr = SIZE - 2 if SIZE > 1 else 0
    low = tl.floor(u)
    f = u - low
    base = tl.minimum(tl.maximum(low, 0.0), LAST)
    inside, below = low == base, low == base - 1.0  # below: the first voxel is the upper one of the sample's cell
    lower, lower_slope = tl.where(inside, 1.0 - f, tl.where(below, f, 0.0)), tl.where(below, 1.0, 0.0)
    lower_slope = tl.where(inside, -1.0, lower_slope)
    if SIZE > 1:
        above = low == base + 1.0
        upper = tl.where(inside, f, tl.where(above, 1.0 - f, 0.0))
        upper_slope = tl.where(inside, 1.0, tl.where(above, -1.0, 0.0))
    else:
        upper, upper_slope = tl.zeros_like(u), tl.zeros_like(u)
    return base.to(tl.int32), (lower, upper), (lower_slope, upper_slope)


@triton.jit
def cell_around(coords, volume_idx, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr):
    """The row of each sample's first corner among all voxels [M] int32; shares and slopes of both ends of each axis."""
    x, ax, bx = axis_shares(coords[0], X)
    y, ay, by = axis_shares(coords[1], Y)
    z, az, bz = axis_shares(coords[2], Z)
    return ((volume_idx * Z + z) * Y + y) * X + x, (ax, ay, az), (bx, by, bz)


@triton.jit
def weight(cell, upper_z, k: tl.constexpr):
    """Interpolation weight [M] of corner k, 0 to 3, at the lower end along z or, if `upper_z`, at the upper end."""
    ax, ay, az = cell[1]
    return tl.where(upper_z == 1, az[1], az[0]) * (ay[k // 2] * ax[k % 2])


@triton.jit
def weight_along(cell, v, upper_z, k: tl.constexpr):
    """Derivative [M] of this weight along v, given in grid coordinates."""
    ax, ay, az = cell[1]
    bx, by, bz = cell[2]
    along_xy = ay[k // 2] * (bx[k % 2] * v[0]) + ax[k % 2] * (by[k // 2] * v[1])
    along_z = ay[k // 2] * ax[k % 2] * (tl.where(upper_z == 1, bz[1], bz[0]) * v[2])
    return tl.where(upper_z == 1, az[1], az[0]) * along_xy + along_z


@triton.jit
def corner_ptr(
    volume_ptr, cell, upper_z, k: tl.constexpr,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Pointers [M, C] to the voxels at this corner. On an axis of one voxel, both ends are that voxel."""
    STEP_X: tl.constexpr = 1 if X > 1 else 0
    STEP_Y: tl.constexpr = X if Y > 1 else 0
    STEP_Z: tl.constexpr = Y * X if Z > 1 else 0
    row = (cell[0] + upper_z * STEP_Z).to(tl.int64)
    offset = (k // 2 * STEP_Y + k % 2 * STEP_X) * CHANNELS
    return volume_ptr + (row[:, None] * CHANNELS + (tl.arange(0, C)[None, :] + offset))


@triton.jit
def load_corner(
    volume_ptr, cell, upper_z, k: tl.constexpr,
    Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Features [M, C] of the voxels at this corner; 0 in padded channels."""
    ptr = corner_ptr(volume_ptr, cell, upper_z, k, Z, Y, X, CHANNELS, C)
    if CHANNELS == C:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=tl.arange(0, C)[None, :] < CHANNELS, other=0.0)


@triton.jit
def interpolate(
    volume_ptr, cell, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The interpolated feature [M, C]."""
    feature = tl.zeros((cell[0].shape[0], C), tl.float32)
    # a loop that is not unrolled: the compiler would load all corners at once and run out of registers
    for z in range(2):
        for k in tl.static_range(4):
            feature += weight(cell, z, k)[:, None] * load_corner(volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
    return feature


@triton.jit
def interpolate_along(
    volume_ptr, cell, v, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The interpolated feature [M, C], and its derivative [M, C] along v, given in grid coordinates."""
    feature = tl.zeros((cell[0].shape[0], C), tl.float32)
    along = feature
    for z in range(2):
        for k in tl.static_range(4):
            voxel = load_corner(volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
            feature += weight(cell, z, k)[:, None] * voxel
            along += weight_along(cell, v, z, k)[:, None] * voxel
    return feature, along


@triton.jit
def interpolate_with_slopes(
    volume_ptr, cell, Z: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The interpolated feature [M, C], and its derivatives w.r.t. the grid coordinates (x, y, z), [M, C] each."""
    ax, ay, az = cell[1]
    bx, by, bz = cell[2]
    feature = tl.zeros((cell[0].shape[0], C), tl.float32)
    along_x, along_y, along_z = feature, feature, feature
    for z in range(2):
        share, slope = tl.where(z == 1, az[1], az[0]), tl.where(z == 1, bz[1], bz[0])
        for k in tl.static_range(4):
            voxel = load_corner(volume_ptr, cell, z, k, Z, Y, X, CHANNELS, C)
            feature += (share * (ay[k // 2] * ax[k % 2]))[:, None] * voxel
            along_x += (share * (ay[k // 2] * bx[k % 2]))[:, None] * voxel
            along_y += (share * (by[k // 2] * ax[k % 2]))[:, None] * voxel
            along_z += (slope * (ay[k // 2] * ax[k % 2]))[:, None] * voxel
    return feature, (along_x, along_y, along_z)
