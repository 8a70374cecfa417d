"""Published sparse networks, in our own words but with the calls of spconv that their authors make: the same layers,
arguments, keys and ways to handle tensors, with fewer channels.

Each function takes the module `sp`, which is `spconv.pytorch` or `unipad.spconv`, and returns a network, which takes
features [N, C], indices [N, 1 + dimensions] and a batch size, and returns a dict of sparse or dense tensors.
"""

from collections import OrderedDict
from functools import partial

import numpy as np
import torch
from torch import nn

from tests.spconv import layers

NORM = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)
GRID = [20, 24, 40]  # cells (x, y, z) of detectors, which add a slice in z


def replace_feature(out, features):
    """As OpenPCDet and CenterPoint find out the version of spconv."""
    if "replace_feature" in out.__dir__():
        return out.replace_feature(features)
    out.features = features
    return out


def residual_block(sp, conv, width, key, bias=True):
    """Of OpenPCDet and CenterPoint: relu(x + norm(conv(relu(norm(conv(x))))))."""

    class Block(sp.SparseModule):
        def __init__(self):
            super().__init__()
            given = dict(kernel_size=3, stride=1, padding=1, bias=bias, indice_key=key)
            self.conv1, self.bn1 = conv(width, width, **given), NORM(width)
            self.conv2, self.bn2, self.relu = conv(width, width, **given), NORM(width), nn.ReLU()

        def forward(self, x):
            out = self.conv1(x)
            out = replace_feature(out, self.bn1(out.features))
            out = replace_feature(out, self.relu(out.features))
            out = self.conv2(out)
            out = replace_feature(out, self.bn2(out.features))
            out = replace_feature(out, out.features + x.features)
            return replace_feature(out, self.relu(out.features))

    return Block()


def conv_block(sp, conv):
    """Of OpenPCDet: convolution, norm, ReLU."""
    return sp.SparseSequential(conv, NORM(conv.out_channels), nn.ReLU())


class Detector(nn.Module):
    """Stages of a detector's 3D backbone, one after the other."""

    def __init__(self, sp, stages, dense):
        super().__init__()
        self.sp, self.stages, self.dense = sp, stages, dense
        for name, stage in stages.items():
            self.add_module(name, stage)

    def forward(self, features, indices, batch_size):
        shape = np.array(GRID[::-1]) + [1, 0, 0]
        x = self.sp.SparseConvTensor(
            features=features, indices=indices.int(), spatial_shape=shape, batch_size=batch_size
        )
        results = {}
        for name, stage in self.stages.items():
            results[name] = x = stage(x)
        if self.dense:
            out = x.dense()
            N, C, D, H, W = out.shape
            results["dense"] = out.view(N, C * D, H, W)
        return results


def voxel_backbone(sp, channels=4, widths=(4, 8, 8, 12), out=16):
    """OpenPCDet's VoxelBackBone8x."""
    conv = partial(sp.SparseConv3d, bias=False)

    def subm(in_channels, width, key):
        return conv_block(sp, sp.SubMConv3d(in_channels, width, 3, bias=False, indice_key=key))

    stages = dict(
        conv_input=sp.SparseSequential(
            sp.SubMConv3d(channels, widths[0], 3, padding=1, bias=False, indice_key="subm1"), NORM(widths[0]), nn.ReLU()
        ),
        conv1=sp.SparseSequential(subm(widths[0], widths[0], "subm1")),
    )
    for i, padding in ((2, 1), (3, 1), (4, (0, 1, 1))):
        before, width = widths[i - 2], widths[i - 1]
        down = conv(before, width, 3, stride=2, padding=padding, indice_key=f"spconv{i}")
        stages[f"conv{i}"] = sp.SparseSequential(
            conv_block(sp, down), subm(width, width, f"subm{i}"), subm(width, width, f"subm{i}")
        )
    last = conv(widths[-1], out, (3, 1, 1), stride=(2, 1, 1), padding=0, indice_key="spconv_down2")
    stages["conv_out"] = sp.SparseSequential(last, NORM(out), nn.ReLU())
    return Detector(sp, stages, dense=False)


def residual_backbone(sp, channels=4, widths=(4, 4, 8, 8), out=12):
    """OpenPCDet's VoxelResBackBone8x."""
    conv = partial(sp.SparseConv3d, bias=False)

    def block(i):
        return residual_block(sp, sp.SubMConv3d, widths[i - 1], f"res{i}")

    stem = sp.SubMConv3d(channels, widths[0], 3, padding=1, bias=False, indice_key="subm1")
    stages = dict(conv_input=sp.SparseSequential(stem, NORM(widths[0]), nn.ReLU()))
    stages["conv1"] = sp.SparseSequential(block(1), block(1))
    for i, padding in ((2, 1), (3, 1), (4, (0, 1, 1))):
        down = conv(widths[i - 2], widths[i - 1], 3, stride=2, padding=padding, indice_key=f"spconv{i}")
        stages[f"conv{i}"] = sp.SparseSequential(conv_block(sp, down), block(i), block(i))
    last = conv(widths[-1], out, (3, 1, 1), stride=(2, 1, 1), padding=0, indice_key="spconv_down2")
    stages["conv_out"] = sp.SparseSequential(last, NORM(out), nn.ReLU())
    return Detector(sp, stages, dense=False)


def center_point(sp, channels=5, widths=(4, 4, 8, 8), out=8):
    """CenterPoint's SpMiddleResNetFHD, which inverts nothing, so its strided convolutions have no keys."""
    stem = sp.SubMConv3d(channels, widths[0], 3, bias=False, indice_key="res0")
    stages = dict(conv_input=sp.SparseSequential(stem, NORM(widths[0]), nn.ReLU(inplace=True)))

    def block(i):
        return residual_block(sp, sp.SubMConv3d, widths[i], f"res{i}")

    stages["conv1"] = sp.SparseSequential(block(0), block(0))
    for i, padding in ((1, 1), (2, 1), (3, [0, 1, 1])):
        down = sp.SparseConv3d(widths[i - 1], widths[i], 3, 2, padding=padding, bias=False)
        stages[f"conv{i + 1}"] = sp.SparseSequential(down, NORM(widths[i]), nn.ReLU(inplace=True), block(i), block(i))
    last = sp.SparseConv3d(widths[-1], out, (3, 1, 1), (2, 1, 1), bias=False)
    stages["extra_conv"] = sp.SparseSequential(last, NORM(out), nn.ReLU())
    return Detector(sp, stages, dense=True)


def spunet(sp, channels=6, classes=5, base=4, widths=(4, 8, 8, 4), blocks=(1, 1, 1, 1)):
    """Pointcept's SpUNet-v1m1."""

    class Block(sp.SparseModule):
        def __init__(self, in_channels, width, key):
            super().__init__()
            if in_channels == width:
                self.proj = sp.SparseSequential(nn.Identity())
            else:
                point = sp.SubMConv3d(in_channels, width, kernel_size=1, bias=False)
                self.proj = sp.SparseSequential(point, NORM(width))
            given = dict(kernel_size=3, stride=1, padding=1, bias=False, indice_key=key)
            self.conv1, self.bn1 = sp.SubMConv3d(in_channels, width, **given), NORM(width)
            self.conv2, self.bn2, self.relu = sp.SubMConv3d(width, width, **given), NORM(width), nn.ReLU()

        def forward(self, x):
            out = self.conv1(x)
            out = out.replace_feature(self.bn1(out.features))
            out = out.replace_feature(self.relu(out.features))
            out = self.conv2(out)
            out = out.replace_feature(self.bn2(out.features))
            out = out.replace_feature(out.features + self.proj(x).features)
            return out.replace_feature(self.relu(out.features))

    class SpUNet(nn.Module):
        def __init__(self):
            super().__init__()
            stem = sp.SubMConv3d(channels, base, kernel_size=5, padding=1, bias=False, indice_key="stem")
            self.conv_input = sp.SparseSequential(stem, NORM(base), nn.ReLU())
            self.down, self.up, self.enc, self.dec = (nn.ModuleList() for _ in range(4))
            above, right = base, widths[-1]
            for s in range(len(widths) // 2):
                below, given = widths[len(widths) - s - 2], dict(kernel_size=2, bias=False, indice_key=f"spconv{s + 1}")
                down = sp.SparseConv3d(above, widths[s], stride=2, **given)
                self.down.append(sp.SparseSequential(down, NORM(widths[s]), nn.ReLU()))
                self.enc.append(self.stage(widths[s], widths[s], blocks[s], f"subm{s + 1}"))
                up = sp.SparseInverseConv3d(below, right, **given)
                self.up.append(sp.SparseSequential(up, NORM(right), nn.ReLU()))
                self.dec.append(self.stage(right + above, right, blocks[-1 - s], f"subm{s}"))
                above, right = widths[s], below
            self.final = sp.SubMConv3d(widths[-1], classes, kernel_size=1, padding=1, bias=True)

        def stage(self, in_channels, width, count, key):
            named = [(f"block{i}", Block(width if i else in_channels, width, key)) for i in range(count)]
            return sp.SparseSequential(OrderedDict(named))

        def forward(self, features, indices, batch_size):
            shape = torch.add(torch.max(indices[:, 1:], dim=0).values, 96).tolist()
            indices = indices.int().contiguous()
            x = sp.SparseConvTensor(features=features, indices=indices, spatial_shape=shape, batch_size=batch_size)
            x = self.conv_input(x)
            skips = [x]
            for down, enc in zip(self.down, self.enc, strict=True):
                x = enc(down(x))
                skips.append(x)
            deepest = x = skips.pop(-1)
            for s in reversed(range(len(self.up))):
                x = self.up[s](x)
                skip = skips.pop(-1)
                x = x.replace_feature(torch.cat((x.features, skip.features), dim=1))
                x = self.dec[s](x)
            return dict(deepest=deepest, out=self.final(x))

    return SpUNet()


def point_transformer(sp, channels=6, width=8, blocks=2):
    """PointTransformerV3's embedding and positional encodings (xCPE), without the attention between them.

    Modules are told apart by `is_spconv_module`, features live beside the sparse tensor.
    """

    class PointSequential(nn.Sequential):
        def forward(self, point):
            for module in self:
                if sp.modules.is_spconv_module(module):
                    point["sparse"] = module(point["sparse"])
                    point["feat"] = point["sparse"].features
                else:
                    point["feat"] = module(point["feat"])
                    point["sparse"] = point["sparse"].replace_feature(point["feat"])
            return point

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            stem = sp.SubMConv3d(channels, width, kernel_size=5, padding=1, bias=False, indice_key="stem")
            self.stem = PointSequential(stem, nn.BatchNorm1d(width, eps=1e-3, momentum=0.01), nn.GELU())
            self.cpe = nn.ModuleList()
            for _ in range(blocks):
                conv = sp.SubMConv3d(width, width, kernel_size=3, bias=True, indice_key="stage0")
                self.cpe.append(PointSequential(conv, nn.Linear(width, width), nn.LayerNorm(width)))

        def forward(self, features, indices, batch_size):
            shape = torch.add(torch.max(indices[:, 1:], dim=0).values, 96).tolist()
            indices = indices.int().contiguous()
            x = sp.SparseConvTensor(features=features, indices=indices, spatial_shape=shape, batch_size=batch_size)
            point = self.stem(dict(feat=features, sparse=x))
            for cpe in self.cpe:
                shortcut = point["feat"]
                point = cpe(point)
                point["feat"] = shortcut + point["feat"]
                point["sparse"] = point["sparse"].replace_feature(point["feat"])
            return dict(out=point["sparse"])

    return Net()


def pillar_net(sp, channels=4, widths=(4, 8, 8, 12)):
    """PillarNet's 2D backbone, OpenPCDet's PillarRes18BackBone8x: sparse, its last stage dense."""

    def dense_block(width, stride):
        norm = nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)
        return nn.Sequential(nn.Conv2d(width, width, 3, stride, padding=1, bias=False), norm, nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()

            def block(i):
                return residual_block(sp, sp.SubMConv2d, widths[i - 1], f"res{i}")

            self.conv1 = sp.SparseSequential(block(1), block(1))
            for i in (2, 3, 4):
                down = sp.SparseConv2d(
                    widths[i - 2], widths[i - 1], 3, stride=2, padding=1, bias=False, indice_key=f"spconv{i}"
                )
                self.add_module(f"conv{i}", sp.SparseSequential(conv_block(sp, down), block(i), block(i)))
            self.conv5 = nn.Sequential(dense_block(widths[-1], 2), dense_block(widths[-1], 1))

        def forward(self, features, indices, batch_size):
            shape = np.array(GRID)[[1, 0]]
            x = sp.SparseConvTensor(features, indices.int(), spatial_shape=shape, batch_size=batch_size)
            results = {}
            for i in (1, 2, 3, 4):
                results[f"conv{i}"] = x = self.get_submodule(f"conv{i}")(x)
            results["conv4"] = x.dense()
            results["conv5"] = self.conv5(results["conv4"])
            return results

    return Net()


# name -> (network, channels of its input, cells of the grid as in `indices`)
ZYX = (GRID[2] + 1, GRID[1], GRID[0])
NETWORKS = {
    "VoxelBackBone8x": (voxel_backbone, 4, ZYX),
    "VoxelResBackBone8x": (residual_backbone, 4, ZYX),
    "SpMiddleResNetFHD": (center_point, 5, ZYX),
    "SpUNet-v1m1": (spunet, 6, (15, 17, 13)),
    "PT-v3m1": (point_transformer, 6, (15, 17, 13)),
    "PillarRes18BackBone8x": (pillar_net, 4, ZYX[1:]),
    "layers-3d": (partial(layers.convolutions, ndim=3, shape=(9, 10, 11)), 4, (9, 10, 11)),
    "layers-2d": (partial(layers.convolutions, ndim=2, shape=(19, 16)), 4, (19, 16)),
    "sums": (layers.sums, 4, (9, 10, 11)),
}
VOXELS, BATCH_SIZE, RATE = 150, 2, 0.05  # voxels of the batch at most; learning rate of the step


def inputs(name):
    """Features and indices, the same everywhere: numpy guarantees this generator's numbers."""
    _, channels, shape = NETWORKS[name]
    rng = np.random.RandomState(0)
    # blocks of voxels at random places, so that they have neighbors
    corners = rng.randint(0, [BATCH_SIZE, *shape], size=(VOXELS // 12, 1 + len(shape)))
    offsets = rng.randint(0, 3, size=(len(corners), 12, 1 + len(shape)))
    offsets[..., 0] = 0
    indices = np.unique((corners[:, None] + offsets).reshape(-1, 1 + len(shape)) % [BATCH_SIZE, *shape], axis=0)
    indices = rng.permutation(indices)
    return torch.from_numpy(rng.standard_normal((len(indices), channels))), torch.from_numpy(indices)


def set_weights(net):
    """Weights that are the same everywhere."""
    rng = np.random.RandomState(1)
    with torch.no_grad():
        for name, parameter in sorted(net.named_parameters()):
            values = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
            if parameter.dim() > 1:
                values *= (2 / parameter[0].numel()) ** 0.5
            else:
                values = (1 if name.endswith("weight") else 0) + 0.2 * values
            parameter.copy_(values)


def results(sp, name, dtype):
    """{name: array} of one training step, of outputs after it with the norms' running statistics, and of the outputs'
    voxels and grids; the rows are in ascending order of voxels."""
    make, *_ = NETWORKS[name]
    net = make(sp).to(dtype)
    set_weights(net)
    features, indices = inputs(name)
    features = features.to(dtype).requires_grad_()
    found, loss = {}, 0.0
    rng = np.random.RandomState(2)
    for key, out in net(features, indices, BATCH_SIZE).items():
        values = in_order(out)
        found[f"out/{key}"] = values
        if not torch.is_tensor(out):
            found[f"voxels/{key}"] = out.indices[order(out)]
            found[f"grid/{key}"] = torch.tensor([out.batch_size, *out.spatial_shape], dtype=torch.int32)
        loss = loss + (values * torch.from_numpy(rng.standard_normal(tuple(values.shape))).to(dtype)).mean()
    loss.backward()
    found["grad/features"] = features.grad
    for key, parameter in net.named_parameters():
        found[f"grad/{key}"] = parameter.grad
    torch.optim.SGD(net.parameters(), lr=RATE).step()
    for module in net.modules():  # not the whole net: spconv adds no bias in evaluation mode on a CPU
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    with torch.no_grad():
        for key, out in net(features, indices, BATCH_SIZE).items():
            found[f"after/{key}"] = in_order(out)
    return {key: value.detach().numpy() for key, value in found.items()}, net


def differences(found, expected):
    """{key: largest difference}, as a fraction of the largest entry of the array. Voxels and grids must be equal.

    The bias of a convolution before a batch norm has the gradient 0, of which rounding errors are left: their
    differences are fractions of the net's largest gradient.
    """
    assert found.keys() == set(expected)
    largest_gradient = max(np.abs(v).max() for key, v in expected.items() if key.startswith("grad/"))
    result = {}
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        if key.split("/")[0] in ("voxels", "grid"):
            assert np.array_equal(found[key], value), key
            continue
        largest = np.abs(value).max()
        if key.startswith("grad/") and key.endswith(".bias") and largest < 1e-6 * largest_gradient:
            largest = largest_gradient
        result[key] = np.abs(found[key].astype(np.float64) - value).max() / largest
    return result


def in_order(out):
    """A dense tensor as it is; the features of a sparse one in ascending order of its voxels."""
    if torch.is_tensor(out):
        return out
    return out.features[order(out)]


def order(out):
    return torch.from_numpy(np.lexsort(out.indices.flip(1).T.numpy()))
