"""Batch normalization over the samples of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization of [N, C, ...] with statistics over the rows of all processes.

    Unlike `nn.SyncBatchNorm` it also runs on CPUs, and a process, or all of them, may have no row or a single one, as
    happens with sparse features: a lone row becomes the bias, and without rows the running statistics do not change.
    In eval mode, and in a single process with more rows, it is the same as `nn.BatchNorm1d`, `2d` and `3d`.
    Statistics and the result are computed in fp32 or better; the output has the dtype of x.
    """

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"batch normalization takes [N, C, ...], not {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if alone and x.numel() > x.shape[1]:
            return super().forward(x)
        sum_over_processes = _identity if alone else SumOverProcesses.apply
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        sums = sum_over_processes(torch.cat([x.sum(dims), x.new_full((1,), x[:, 0].numel())]))  # [C + 1]
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        # not mean(x^2) - mean(x)^2, which cancels where the mean is large
        centered = x - mean.view(shape)
        variance = sum_over_processes(centered.square().sum(dims)) / count.clamp(min=1)
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum * (count > 0)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(shape), centered, scale.view(shape)).to(dtype)


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes. The gradient is summed too, since every process's loss depends on the sum.

    `torch.distributed.nn.functional.all_reduce` does the same, and is deprecated in torch 2.13.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, d_sum):
        d_sum = d_sum.clone()  # also makes it contiguous, as gloo requires
        dist.all_reduce(d_sum)
        return d_sum


def _identity(x):
    return x
