"""The parameters of both MLPs, packed into the matrices that the kernels of `sdf_render` read: one launch, and one for
the gradient.

With the symbols of sdf_field.py, a layer of an MLP is z_l = W_l x_l + A_l f + G_l geometry + E_l e. A, G and E are
products with the parameters of sdf_reference.py, whose conditioning vector c has f, and in the color MLP also the
direction, the gradient and the geometry. All of these products are one:

    S_l = (C_l by columns, P if l = 0, d_l (+ q if l = 0)),   (A_l, G_l, E_l) = W_l S_l + (b_l in the column of 1)
    dW_l = d(A_l, G_l, E_l) S_l^T + d(W_l),   dS_l = W_l^T d(A_l, G_l, E_l)

The layout: one row per output unit, layer after layer, and the columns of W, A, G and E side by side, those of E at
POINT, ONE, DIRECTION and GRADIENT. W is 0 in layer 0, since x_0 = 0. Widths are padded with zeros, which changes no
result: units and channels to `padded_width`, the color MLP's last layer to COLORS rows, E to INPUTS columns. The
distance MLP has no G, and in its E no direction and no gradient. Matrix products read these numbers in the orders of
sdf_weights.py, and add up the gradient in the first of them.

Part of `sdf_render`. Sizes: CHANNELS of the volume, HIDDEN units; C and H the same padded; L layers; K entries of c.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unipad.kernels.backend import jit, on_triton, pick, tl, triton, without_autocast
from unipad.kernels.sdf_field import COLORS, DIRECTION, GRADIENT, INPUTS, ONE, POINT, padded_width, precision
from unipad.kernels.sdf_reference import fold
from unipad.kernels.sdf_weights import places, to_tf32


class Packed(NamedTuple):
    """Both MLPs as the kernels read them."""

    sdf: Tensor  # [(L - 1) H + 1 + H, H + C + INPUTS] the distance MLP by rows
    sdf_w: Tensor  # [2, *sdf.shape] in both orders of sdf_weights.py, rounded to tf32 where products are in tf32
    rgb_w: Tensor  # [2, (L - 1) H + COLORS, H + C + H + INPUTS] the color MLP likewise; empty without one
    exact: bool
    sizes: dict  # CHANNELS, HIDDEN, C, H, SDF_LAYERS and RGB_LAYERS, 0 without a color MLP

    def check(self, sdf_mlp, rgb_mlp, channels, exact):
        """Raises AssertionError unless it was packed with `exact` from MLPs of these sizes, and with a color MLP if
        there is one here. Values are not compared."""
        assert self.exact == exact, f"`packed` was made with exact={self.exact}, not {exact}"
        expected, sizes = _sizes(sdf_mlp, rgb_mlp, channels), self.sizes
        sizes = sizes if rgb_mlp is not None else sizes | dict(RGB_LAYERS=0)
        assert sizes == expected, f"`packed` was made from other MLPs: {sizes}, not {expected}"


def pack(sdf_mlp: Sequence[Tensor], rgb_mlp: Sequence[Tensor] | None, channels: int, exact: bool = False) -> Packed:
    """Both MLPs packed for the kernels.

    Args:
        sdf_mlp:  the distance MLP as in `sdf_render`: P [HIDDEN, 3], q [HIDDEN], then C_l [HIDDEN, K], d_l [HIDDEN],
                  W_l [n, HIDDEN], b_l [n] of at least two layers; K = channels; n = HIDDEN, of the last 1 + HIDDEN.
        rgb_mlp:  the color MLP likewise, K = 3 + channels + 3 + HIDDEN and n = 3 for the last layer; or None.
        channels: of the volume.
        exact:    as in `sdf_render`.

    Not differentiable: its gradient is `pack_bwd`. The kernels compute in fp32. Deterministic. Raises AssertionError if
    shapes or types do not match.
    """
    hidden = len(sdf_mlp[0])
    _check("distance", sdf_mlp, channels, hidden, outputs=1 + hidden)
    if rgb_mlp is not None:
        _check("color", rgb_mlp, 3 + channels + 3 + hidden, hidden, outputs=3)
    if not on_triton(sdf_mlp[0]):
        return pack_ref(sdf_mlp, rgb_mlp, channels, exact)
    assert sdf_mlp[0].dtype == torch.float32, f"the kernels pack parameters in fp32, not {sdf_mlp[0].dtype}"
    tensors, sizes = [t.contiguous() for t in (*sdf_mlp, *(rgb_mlp or ()))], _sizes(sdf_mlp, rgb_mlp, channels)
    C, H, sdf_layers, rgb_layers = (sizes[name] for name in ("C", "H", "SDF_LAYERS", "RGB_LAYERS"))
    rows, stride = sdf_layers * H + 1, H + C + INPUTS.value
    rgb_shape = (rgb_layers - 1) * H + COLORS.value, stride + H
    sdf, sdf_w = tensors[0].new_empty(rows, stride), tensors[0].new_empty(2, rows, stride)
    rgb_w = tensors[0].new_empty(2, *rgb_shape) if rgb_layers else tensors[0].new_empty(0)
    blocks = (stride + H) // BLOCK  # of columns
    _pack_fwd_kernel[(sdf_layers + rgb_layers, blocks)](
        **_by_kind("", tensors, sdf_layers), sdf_ptr=sdf, sdf_w_ptr=sdf_w, rgb_w_ptr=rgb_w, **sizes,
        ROUND=precision(exact) == "tf32", BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return Packed(sdf, sdf_w, rgb_w, exact, sizes)


@without_autocast
@torch.no_grad()
def pack_ref(sdf_mlp, rgb_mlp, channels, exact=False):
    """`pack` in plain PyTorch; rounds fp32 only."""
    H, layers = padded_width(len(sdf_mlp[0])), len(sdf_mlp) // 4
    sdf, rgb = _rows(sdf_mlp, rgb_mlp, channels)
    sdf_w = _in_both_orders(sdf, layers, H, H)
    rgb_w = _in_both_orders(rgb, len(rgb_mlp) // 4, H, COLORS.value) if rgb_mlp is not None else rgb
    if precision(exact) == "tf32" and sdf.dtype == torch.float32:
        # to the nearest number with 10 bits of mantissa, ties away from 0
        sdf_w, rgb_w = (((w.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) for w in (sdf_w, rgb_w))
    return Packed(sdf, sdf_w, rgb_w, exact, _sizes(sdf_mlp, rgb_mlp, channels))


def pack_bwd(
    sdf_mlp: Sequence[Tensor], rgb_mlp: Sequence[Tensor] | None, channels: int, d_sdf: Tensor, d_rgb: Tensor
) -> list[Tensor]:
    """Gradients of all tensors of both MLPs, in their order; arguments as for `pack`.

    d_sdf, d_rgb: gradients of the packed MLPs in the first order, each of the shape of `Packed.sdf_w[0]` and
    `Packed.rgb_w[0]`; without a color MLP, `d_rgb` is not read.
    """
    if not on_triton(sdf_mlp[0]):
        return pack_bwd_ref(sdf_mlp, rgb_mlp, channels, d_sdf, d_rgb)
    tensors, sizes = [t.contiguous() for t in (*sdf_mlp, *(rgb_mlp or ()))], _sizes(sdf_mlp, rgb_mlp, channels)
    C, H, sdf_layers = sizes["C"], sizes["H"], sizes["SDF_LAYERS"]
    grads = [torch.empty_like(t) for t in tensors]
    blocks = H // BLOCK + 1 + (C + H + INPUTS.value) // BLOCK  # of rows of W, then of columns of S
    _pack_bwd_kernel[(sdf_layers + sizes["RGB_LAYERS"], blocks)](
        **_by_kind("", tensors, sdf_layers), **_by_kind("d_", grads, sdf_layers),
        up_sdf_ptr=d_sdf.contiguous(), up_rgb_ptr=d_rgb.contiguous(), **sizes, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grads


@without_autocast
@torch.enable_grad()
def pack_bwd_ref(sdf_mlp, rgb_mlp, channels, d_sdf, d_rgb):
    """`pack_bwd` by autograd."""
    mlps = [mlp and [t.detach().requires_grad_() for t in mlp] for mlp in (sdf_mlp, rgb_mlp)]
    sdf, rgb = _rows(*mlps, channels)
    H, layers = padded_width(len(sdf_mlp[0])), len(sdf_mlp) // 4
    packed, upstream = [_in_both_orders(sdf, layers, H, H)[0]], [d_sdf]
    if rgb_mlp is not None:
        packed.append(_in_both_orders(rgb, len(rgb_mlp) // 4, H, COLORS.value)[0])
        upstream.append(d_rgb)
    return list(torch.autograd.grad(packed, [t for mlp in mlps if mlp for t in mlp], upstream))


def _rows(sdf_mlp, rgb_mlp, channels):
    """Both MLPs by rows, in plain PyTorch; an empty tensor without a color MLP."""
    hidden, C, H = len(sdf_mlp[0]), padded_width(channels), padded_width(len(sdf_mlp[0]))
    packed = []
    for mlp in (sdf_mlp, rgb_mlp):
        if mlp is None:
            packed.append(sdf_mlp[0].new_empty(0))
            continue
        A, bias, WP, W = fold(mlp)
        is_rgb, E = mlp is rgb_mlp, A.new_zeros(len(A), INPUTS.value)
        E[:hidden, POINT.value : POINT.value + 3], E[:, ONE.value : ONE.value + 1] = WP, bias
        feature, geometry = A, A[:, :0]
        if is_rgb:
            direction, feature, gradient, geometry = A.split([3, channels, 3, hidden], dim=1)
            E[:, DIRECTION.value : DIRECTION.value + 3], E[:, GRADIENT.value : GRADIENT.value + 3] = direction, gradient
        columns = [
            F.pad(torch.cat(W[1:]), (0, H - hidden, hidden, 0)),  # 0 in the rows of layer 0: x_0 = 0
            F.pad(feature, (0, C - channels)),
            F.pad(geometry, (0, H - hidden)) if is_rgb else geometry,
            E,
        ]
        layers = torch.cat(columns, dim=1).split([len(w) for w in W])
        padding = [H - hidden] * (len(W) - 1) + [COLORS.value - 3 if is_rgb else H - hidden]  # rows of 0
        packed.append(torch.cat([F.pad(layer, (0, 0, 0, n)) for layer, n in zip(layers, padding, strict=True)]))
    return packed


def _in_both_orders(packed, layers, H, last):
    """[2, *packed.shape] an MLP by rows in the orders of sdf_weights.py; layers have H rows, the last one `last`, but
    for the distance's row before them, which is moved behind all others."""
    *hidden, out = packed.split([H] * (layers - 1) + [len(packed) - H * (layers - 1)])
    moved, out = out[:-last], out[-last:]
    first, second = [], []
    for rows in (*hidden, out):
        # bits n4.., n3, n2 n1 n0, k3.., k2 k1, k0, and n4.., n3, n2 n1, n0, k3.., k2 k1 k0
        first.append(rows.unflatten(0, (-1, 2, 8)).unflatten(-1, (-1, 4, 2)).permute(3, 0, 2, 4, 1, 5))
        second.append(rows.unflatten(0, (-1, 2, 4, 2)).unflatten(-1, (-1, 8)).permute(4, 0, 5, 2, 1, 3))
    return torch.stack([torch.cat([t.flatten() for t in (*o, moved)]).view_as(packed) for o in (first, second)])


def _sizes(sdf_mlp, rgb_mlp, channels):
    """The kernels' sizes."""
    hidden = len(sdf_mlp[0])
    return dict(
        CHANNELS=channels, HIDDEN=hidden, C=padded_width(channels), H=padded_width(hidden),
        SDF_LAYERS=len(sdf_mlp) // 4, RGB_LAYERS=0 if rgb_mlp is None else len(rgb_mlp) // 4,
    )  # fmt: skip


def _check(name, mlp, K, hidden, outputs):
    layers, rest = divmod(len(mlp) - 2, 4)
    assert layers >= 2 and rest == 0, (
        f"the {name} MLP has {len(mlp)} tensors: not 2, and 4 for each of at least two layers"
    )
    condition, square = [(hidden, K), (hidden,)], [(hidden, hidden), (hidden,)]
    last = [*condition, (outputs, hidden), (outputs,)]
    expected = [(hidden, 3), (hidden,), *(condition + square) * (layers - 1), *last]
    shapes, dtypes = [t.shape for t in mlp], [t.dtype for t in mlp]
    if shapes == expected and dtypes.count(dtypes[0]) == len(mlp):
        return
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        assert shape == expected[i], f"tensor {i} of the {name} MLP is {list(shape)}, not {list(expected[i])}"
        assert dtype == dtypes[0], f"tensor {i} of the {name} MLP is {dtype}, the first {dtypes[0]}"


BLOCK = 16  # rows and columns that a program multiplies at once: the minimum of tl.dot; divides C, H, COLORS and INPUTS
WARPS = 2


def _by_kind(prefix, tensors, sdf_layers):
    """Arguments of the kernels: P and q of the MLPs, and C, d, W and b of all layers."""
    at = 2 + 4 * sdf_layers
    sdf, rgb = tuple(tensors[:at]), tuple(tensors[at:])
    kinds = dict(p=slice(0, 1), q=slice(1, 2), c=slice(2, None, 4), d=slice(3, None, 4), w=slice(4, None, 4))
    kinds["b"] = slice(5, None, 4)
    return {f"{prefix}{kind}_ptrs": sdf[which] + rgb[which] for kind, which in kinds.items()}


@triton.jit
def _place(
    layer, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr,
):  # fmt: skip
    """Of a layer, counted through both MLPs:

    is_rgb, l:   whether it is the color MLP's, and its number there.
    begin:       where it begins in the packed MLP.
    rows, N:     rows without and with padding.
    moved:       rows before these, 1 or 0, which `_places` moves.
    stride, K:   packed columns, entries of c.
    """
    is_rgb = layer >= SDF_LAYERS
    l = layer - tl.where(is_rgb, SDF_LAYERS, 0)
    is_last = l == tl.where(is_rgb, RGB_LAYERS, SDF_LAYERS) - 1
    rows = tl.where(is_last, tl.where(is_rgb, 3, 1 + HIDDEN), HIDDEN)
    N = tl.where(is_last & is_rgb, COLORS, H).to(tl.int64)
    moved = tl.where(is_last, tl.where(is_rgb, 0, 1), 0)
    stride = tl.where(is_rgb, H + C + H + INPUTS, H + C + INPUTS).to(tl.int64)
    K = tl.where(is_rgb, CHANNELS + HIDDEN + 6, CHANNELS)
    return is_rgb, l, l.to(tl.int64) * H * stride, rows, N, moved, stride, K


@triton.jit
def _places(n, j, N, moved, stride):
    """Where rows n and columns j of a layer are, from its beginning, in both orders of sdf_weights.py."""
    first, second = places(n - moved, j, N)
    return tl.where(n < moved, N * stride + j, first), tl.where(n < moved, N * stride + j, second)


@triton.jit
def _columns(
    at, is_rgb, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The layout: for packed columns from `at` on, [1, BLOCK], the columns of C_l (-1: none), and those of E (others
    are not from 0 to 15)."""
    j = at - H + tl.arange(0, BLOCK)[None, :].to(tl.int64)  # behind the columns of W
    g = tl.where(is_rgb, j - C, -1)
    e = j - C - tl.where(is_rgb, H, 0)
    column = tl.where((j >= 0) & (j < CHANNELS), j + tl.where(is_rgb, 3, 0), -1)
    column = tl.where((g >= 0) & (g < HIDDEN), CHANNELS + 6 + g, column)
    column = tl.where(is_rgb & (e >= DIRECTION) & (e < DIRECTION + 3), e - DIRECTION, column)
    return tl.where(is_rgb & (e >= GRADIENT) & (e < GRADIENT + 3), CHANNELS + 3 + e - GRADIENT, column), e


@triton.jit
def _parts(column, e, k, l, HIDDEN: tl.constexpr):
    """Which entries [H, BLOCK] of S_l are those of C_l, P, d_l and q; k: their rows, [H, 1]."""
    k_ok = k < HIDDEN
    first_ok = k_ok & (l + 0 * e == 0)  # a block, as the interpreter combines no mask with a scalar
    of_p = first_ok & (e >= POINT) & (e < POINT + 3)
    return k_ok & (column >= 0), of_p, k_ok & (e == ONE), first_ok & (e == ONE)


@triton.jit
def _load_source(p_ptr, q_ptr, c_ptr, d_ptr, column, e, k, l, K, HIDDEN: tl.constexpr):
    """Columns of S_l, [H, BLOCK]."""
    of_c, of_p, of_d, of_q = _parts(column, e, k, l, HIDDEN)
    source = tl.load(c_ptr + k * K + column, mask=of_c, other=0.0)
    source += tl.load(p_ptr + 3 * k + e - POINT, mask=of_p, other=0.0)
    source += tl.load(d_ptr + k + 0 * e, mask=of_d, other=0.0)
    return source + tl.load(q_ptr + k + 0 * e, mask=of_q, other=0.0)


@jit
def _pack_fwd_kernel(
    p_ptrs, q_ptrs,  # per MLP [HIDDEN, 3], [HIDDEN]
    c_ptrs, d_ptrs, w_ptrs, b_ptrs,  # per layer [HIDDEN, K], [HIDDEN], [rows, HIDDEN], [rows]
    sdf_ptr, sdf_w_ptr, rgb_w_ptr,  # `Packed`
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, at = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK
    is_rgb, l, begin, rows, N, moved, stride, K = _place(layer, CHANNELS, HIDDEN, C, H, SDF_LAYERS, RGB_LAYERS)
    p_ptr, q_ptr = pick(p_ptrs, is_rgb), pick(q_ptrs, is_rgb)
    c_ptr, d_ptr, w_ptr, b_ptr = pick(c_ptrs, layer), pick(d_ptrs, layer), pick(w_ptrs, layer), pick(b_ptrs, layer)
    ordered_ptr = tl.where(is_rgb, rgb_w_ptr, sdf_w_ptr) + begin
    second_order = tl.where(is_rgb, (RGB_LAYERS - 1) * H + COLORS, SDF_LAYERS * H + 1) * stride  # where it begins
    column, e = _columns(at, is_rgb, CHANNELS, HIDDEN, C, H, BLOCK)
    h = tl.arange(0, H).to(tl.int64)
    source = _load_source(p_ptr, q_ptr, c_ptr, d_ptr, column, e, h[:, None], l, K, HIDDEN)  # [H, BLOCK]
    j = at + tl.arange(0, BLOCK)[None, :]
    for row in range(0, N + moved, BLOCK):
        n = row + tl.arange(0, BLOCK)[:, None].to(tl.int64)
        n_ok = n < rows
        w = tl.load(w_ptr + n * HIDDEN + h[None, :], mask=n_ok & (h[None, :] < HIDDEN), other=0.0)
        # the columns of W
        copied = tl.load(w_ptr + n * HIDDEN + j, mask=n_ok & (j < tl.where(l > 0, HIDDEN, 0)), other=0.0)
        copied += tl.load(b_ptr + n + 0 * e, mask=n_ok & (e == ONE), other=0.0)
        out = tl.dot(w, source, copied, input_precision="ieee")
        ok = (n < N + moved) & (j < stride)
        tl.store(sdf_ptr + begin + n * stride + j, out, mask=ok & (n < tl.where(is_rgb, 0, N + moved)))
        first, second = _places(n, j, N, moved, stride)
        if ROUND:
            out = to_tf32(out)
        tl.store(ordered_ptr + first, out, mask=ok)
        tl.store(ordered_ptr + second_order + second, out, mask=ok)


@jit
def _pack_bwd_kernel(
    p_ptrs, q_ptrs, c_ptrs, d_ptrs, w_ptrs, b_ptrs,  # as for the forward kernel
    d_p_ptrs, d_q_ptrs, d_c_ptrs, d_d_ptrs, d_w_ptrs, d_b_ptrs,  # their gradients
    up_sdf_ptr, up_rgb_ptr,  # upstream gradients of the packed MLPs, in the first order
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    SDF_LAYERS: tl.constexpr, RGB_LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_rgb, l, begin, rows, N, moved, stride, K = _place(layer, CHANNELS, HIDDEN, C, H, SDF_LAYERS, RGB_LAYERS)
    w_ptr = pick(w_ptrs, layer)
    up_ptr = tl.where(is_rgb, up_rgb_ptr, up_sdf_ptr) + begin
    h = tl.arange(0, H).to(tl.int64)
    if block <= H // BLOCK:  # rows of W_l and b_l, of which a last layer may have 1 + HIDDEN
        p_ptr, q_ptr = pick(p_ptrs, is_rgb), pick(q_ptrs, is_rgb)
        c_ptr, d_ptr = pick(c_ptrs, layer), pick(d_ptrs, layer)
        n = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        n_ok = n < rows
        copied = n_ok & (h[None, :] < tl.where(l > 0, HIDDEN, 0))
        d_w = tl.load(up_ptr + _places(n, h[None, :], N, moved, stride)[0], mask=copied, other=0.0)
        d_b = tl.zeros((BLOCK,), tl.float32)
        for at in range(H, stride, BLOCK):
            column, e = _columns(at, is_rgb, CHANNELS, HIDDEN, C, H, BLOCK)
            source = _load_source(p_ptr, q_ptr, c_ptr, d_ptr, column, e, h[:, None], l, K, HIDDEN)
            j = at + tl.arange(0, BLOCK)[None, :].to(tl.int64)
            up = tl.load(up_ptr + _places(n, j, N, moved, stride)[0], mask=n_ok, other=0.0)
            d_w = tl.dot(up, tl.trans(source), d_w, input_precision="ieee")
            d_b += tl.sum(tl.where(e == ONE, up, 0.0), axis=1)
        tl.store(pick(d_w_ptrs, layer) + n * HIDDEN + h[None, :], d_w, mask=n_ok & (h[None, :] < HIDDEN))
        tl.store(pick(d_b_ptrs, layer) + n, d_b[:, None], mask=n_ok)
    else:  # columns of S_l
        begin_column = H + (block - H // BLOCK - 1) * BLOCK
        column, e = _columns(begin_column, is_rgb, CHANNELS, HIDDEN, C, H, BLOCK)
        j = begin_column + tl.arange(0, BLOCK)[None, :]
        d_source = tl.zeros((H, BLOCK), tl.float32)
        for row in range(0, rows, BLOCK):
            n = row + tl.arange(0, BLOCK)[:, None].to(tl.int64)
            n_ok = n < rows
            w = tl.load(w_ptr + n * HIDDEN + h[None, :], mask=n_ok & (h[None, :] < HIDDEN), other=0.0)
            up = tl.load(up_ptr + _places(n, j, N, moved, stride)[0], mask=n_ok & (j < stride), other=0.0)
            d_source = tl.dot(tl.trans(w), up, d_source, input_precision="ieee")
        k = h[:, None]
        of_c, of_p, of_d, of_q = _parts(column, e, k, l, HIDDEN)
        tl.store(pick(d_c_ptrs, layer) + k * K + column, d_source, mask=of_c)
        tl.store(pick(d_p_ptrs, is_rgb) + 3 * k + e - POINT, d_source, mask=of_p)
        tl.store(pick(d_d_ptrs, layer) + k + 0 * e, d_source, mask=of_d)
        tl.store(pick(d_q_ptrs, is_rgb) + k + 0 * e, d_source, mask=of_q)
