"""Batch normalization with the statistics of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization of [N, C, ...] with statistics over the rows of all processes; a row is one vector [C].

    Unlike `nn.SyncBatchNorm` it also synchronizes on CPUs, and all processes together may have a single row or none, as
    happens with sparse features: in training, the output of a single row is the bias, and without rows the running
    statistics do not change.
    On a GPU it is the same as `nn.BatchNorm1d`, `2d` and `3d` in eval mode, and in training in a single process with at
    least two rows; in training in several processes it runs PyTorch's kernels for that, with a collective in each pass.
    On a CPU it is more accurate: PyTorch 2.13 adds up the rows of [N, C] and of channels-last
    tensors one by one in fp32, which for 10^5 rows is off by 1e-5 of the largest entry.
    Statistics and the result are computed in fp32 or better; the output has the dtype of x. Differentiable once.
    """

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"batch normalization takes [N, C, ...], not {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        alone = is_alone()
        if x.is_cuda and (not self.training or (alone and x.numel() > x.shape[1])):  # two rows or more
            return super().forward(x)
        self._check_input_dim(x)
        dtype = x.dtype
        by_kernels = x.is_cuda and not alone
        if not by_kernels:
            x = x.to(torch.promote_types(dtype, torch.float32))
        if not self.training:
            shape = _along_channels(x)
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            out = torch.addcmul(self.bias.view(shape), x - self.running_mean.view(shape), scale.view(shape))
            return out.to(dtype)
        if by_kernels:
            out, mean, variance, count = KernelBatchNorm.apply(x, self.weight, self.bias, self.eps)
        else:
            out, mean, variance, count = BatchNorm.apply(x, self.weight, self.bias, self.eps, not alone)
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum * (count > 0)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)  # unbiased, as PyTorch's
        return out.to(dtype)


def is_alone():
    """Whether this process is the only one."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


class BatchNorm(torch.autograd.Function):
    """(output, mean [C], biased variance [C], number of rows of all processes); the last three have no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, synced):
        dims, shape = _reduced_dims(x), _along_channels(x)
        sums = _over_processes(torch.cat([x.sum(dims), x.new_full((1,), x[:, 0].numel())]), synced)  # [C + 1]
        count = sums[-1]
        mean = sums[:-1] / count.clamp(min=1)
        # not mean(x^2) - mean(x)^2, which cancels where the mean is large
        centered = x - mean.view(shape)
        variance = _over_processes(centered.square().sum(dims), synced) / count.clamp(min=1)
        inv_std = (variance + eps).rsqrt()
        ctx.synced = synced
        ctx.save_for_backward(centered, weight, inv_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        out = torch.addcmul(bias.view(shape), centered, (weight * inv_std).view(shape))
        return out, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        centered, weight, inv_std, count = ctx.saved_tensors
        dims, shape = _reduced_dims(centered), _along_channels(centered)
        # sums over this process's rows, as DistributedDataParallel expects
        d_bias, d_weight = d_out.sum(dims), (d_out * centered).sum(dims) * inv_std
        # means over the rows of all processes, since every process's loss depends on the statistics
        means = _over_processes(torch.stack([d_bias, d_weight * inv_std]), ctx.synced) / count.clamp(min=1)
        mean, slope = means.view(2, *shape)  # of d_out: its mean, and its regression slope on `centered`
        d_x = torch.addcmul(d_out - mean, centered, slope, value=-1).mul_((weight * inv_std).view(shape))
        return d_x, d_weight, d_bias, None, None


# Stands for a count of 0: PyTorch divides by the sum of the counts of the first processes, which must not be 0
NO_ROWS = 1e-20


class KernelBatchNorm(torch.autograd.Function):
    """`BatchNorm` over all processes by the CUDA kernels of `nn.SyncBatchNorm`, in any floating-point type of x.

    Unlike `nn.SyncBatchNorm` it drops nothing from the gathered statistics, for which the host would wait: a process
    without rows gathers mean 0, standard deviation 1 and `NO_ROWS`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        x, C = _dense(x), x.shape[1]
        rows, full = x.numel() // C, weight.new_full
        mean, inv_std = torch.batch_norm_stats(x, eps) if rows else (full((C,), 0.0), full((C,), 1.0))
        own = torch.cat([mean, inv_std, mean.new_full((1,), rows)])
        gathered = own.new_empty(dist.get_world_size() * len(own))
        # the newer name, if there is one: PyTorch 2.13 warns about the older one
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        getattr(dist, name)(gathered, own)
        gathered = gathered.view(-1, len(own))
        means, inv_stds, counts = gathered.split([C, C, 1], dim=1)
        counts = counts[:, 0]
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(
            gathered,  # only its type counts: it must be that of the counts, which bf16 would round
            means, inv_stds, None, None, 0.0, eps, counts.clamp(min=NO_ROWS),
        )  # fmt: skip
        out = torch.batch_norm_elemt(x, weight, bias, mean, inv_std, eps) if rows else x.clone()
        count = counts.sum()
        # rounding can take it below 0, and without rows it is not finite
        variance = (inv_std.square().reciprocal() - eps).clamp(min=0).where(count > 0, 0)
        ctx.save_for_backward(x, weight, mean, inv_std, counts)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, *_):
        x, weight, mean, inv_std, counts = ctx.saved_tensors
        d_out, C = _dense(d_out), len(mean)
        if x.numel():
            sum_d, sum_d_centered, d_weight, d_bias = torch.batch_norm_backward_reduce(
                d_out, x, mean, inv_std, weight, True, True, True
            )
        else:
            sum_d, sum_d_centered = mean.new_zeros(2, C)
            d_weight, d_bias = weight.new_zeros(2, C)
        sums = torch.cat([sum_d, sum_d_centered])
        dist.all_reduce(sums)
        if not x.numel():
            return torch.zeros_like(x), d_weight, d_bias, None
        d_x = torch.batch_norm_backward_elemt(d_out, x, mean, inv_std, weight, *sums.split(C), counts.int())
        return d_x, d_weight, d_bias, None


def _dense(x):
    """x contiguous in one of the memory formats that PyTorch's batch norm kernels take."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    return x if last and x.is_contiguous(memory_format=last) else x.contiguous()


def _reduced_dims(x):
    """The dimensions of x that are not the channels'."""
    return [d for d in range(x.dim()) if d != 1]


def _along_channels(x):
    """The shape in which [C] broadcasts to x."""
    return [1, -1] + [1] * (x.dim() - 2)


def _over_processes(x, synced):
    """The sum over all processes, in place; `x` unchanged in a single process."""
    if synced:
        dist.all_reduce(x)
    return x
