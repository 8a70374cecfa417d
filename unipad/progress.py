"""Progress of a training loop: losses, speed and memory in log and terminal, and the error that ends a diverged run."""

import contextlib
import math
import sys
import time
from datetime import timedelta

try:
    import resource
except ImportError:  # on Windows: no host memory in the log
    resource = None

import torch

from unipad.errors import UserError
from unipad.runtime import World, gather_to_main, mean_over_processes


class Progress:
    """Reports of a training loop: losses and speed, in the log and the terminal; each unreadable frame once."""

    def __init__(self, run, world: World, step: int, last: int, steps: int, batch_size: int):
        """run: a `RunFolder`; step: steps done so far; last: the step at which this program stops; steps: length of
        the schedule, more than `last` with --stop-at; batch_size: samples per step over all processes."""
        self.run, self.world, self.last, self.steps, self.batch_size = run, world, last, steps, batch_size
        self.unreadable = set()
        self.restart(step)

    def restart(self, step: int):
        """Measure the speed from now on, at `step`."""
        self.since, self.clock = step, time.perf_counter()

    def report_unreadable(self, bad_frames: list[str]):
        """Print each frame that could not be read, once per run of the program. bad_frames: `path: reason` of each."""
        for frame in set(bad_frames) - self.unreadable:
            print(f"skipped {frame}", file=sys.stderr)
        self.unreadable.update(bad_frames)

    def sum_up(self):
        """Print the number of frames that at least one process could not read. Collective."""
        unreadable = set().union(*gather_to_main(self.unreadable, self.world) or ())  # empty outside the main process
        if unreadable:
            print(f"{len(unreadable)} unreadable frames, named above, were replaced by others.")

    def checked_means(self, values: dict[str, torch.Tensor], scaler, step: int) -> dict[str, float]:
        """Means of `values`, among them `loss` and `grad_norm`, over processes. Raises `UserError` if training has
        diverged, so that diverged weights are not saved."""
        values = mean_over_processes(values)
        # with fp16, an infinite gradient is no divergence: the scaler skips the step and lowers its scale
        if not math.isfinite(values["loss"] + (0 if scaler.is_enabled() else values["grad_norm"])):
            raise _diverged(step)
        return values

    @contextlib.contextmanager
    def explains_divergence(self, net: torch.nn.Module, step: int):
        """Context in which an exception due to weights that are not finite becomes the error of `checked_means`.

        A loss that is not finite makes weights infinite or NaN, and then the model may raise any exception before the
        next report. Weights are read only after an exception: other steps do not wait for the device.
        """
        try:
            yield
        except UserError:
            raise
        except Exception:
            if all(p.isfinite().all() for p in net.parameters()):
                raise
            raise _diverged(step) from None

    def report(self, step: int, values: dict[str, float], lr: float, rays_per_sample: int = 0):
        """Log the values of `step` and print them, with the speed of all processes since the last report.

        rays_per_sample: to log the rays per second, too; 0: do not.
        """
        speed = self.batch_size * (step - self.since) / (time.perf_counter() - self.clock)
        self.restart(step)
        extras = {"lr": lr, "samples_per_s": speed, **memory_mb(self.world.device)}
        extras |= {"rays_per_s": speed * rays_per_sample} if rays_per_sample else {}
        self.run.scalars({f"train/{name}": value for name, value in (values | extras).items()}, step)
        left = timedelta(seconds=round((self.last - step) * self.batch_size / speed))
        line = f"step {step}/{self.steps}  {format_metrics(values)}  {format_metrics(extras)}  {left} left"
        self.world.print0(line)


def _diverged(step):
    return UserError(
        f"Training has diverged: at step {step}, loss, gradients or weights are not finite. "
        "Lower --lr or use --precision fp32."
    )


def format_metrics(values: dict[str, float]) -> str:
    """Numbers with their names, three digits each, for a progress line."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: of its tensors on the GPU, or, without one, of the whole process."""
    if device.type == "cuda":
        return {"gpu_mem_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes per unit of ru_maxrss
    return {"mem_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
