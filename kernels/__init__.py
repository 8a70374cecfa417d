"""Hand-written Triton kernels: tensors in, tensors out, nothing else known. One file an op.

    backend.py      which path runs: Triton on a GPU, the reference elsewhere; launches, caches, host waits
    voxelize.py     points -> voxels with the mean of their points, one point a cell
    voxel_keys.py   voxels in the order of their keys
    sparse_map.py   which voxels each offset of a sparse convolution reads
    sparse_conv.py  gather-GEMM over a neighbor table, with what follows it in inference
    sparse_gemm.py  ... its products; sparse_tiles.py, what they read of a table; sparse_reference.py, in plain PyTorch
    tuning.py       which of an op's launches is fastest, found and remembered; off by default
    lift.py         voxel <- sum over views and levels of bilinear feature x trilinear depth probability
    pixel_sum.py    ... its gradients without atomics
    voxel_pool.py   voxel <- sum of feature x depth probability over the frustum points that fall into it
    rotated_iou.py  overlap of turned boxes, and suppression of doubles
    ray_sample.py   ray-box clipping, stratified starts, inverse-CDF resampling with rank merge
    trilinear.py    a feature volume at points, with its spatial gradient as an output
    sdf_alpha.py    signed distance to opacity: NeuS, VolSDF, UniSurf
    composite.py    front-to-back compositing of samples along rays
    sdf_render.py   trilinear, the field's MLPs, sdf_alpha and composite in one, with one custom backward
    sdf_backward.py ... its backward
    sdf_field.py    ... its MLPs on a tile of samples, inside a kernel; sdf_reference.py, in plain PyTorch
    cell_sum.py     ... the volume's gradient without atomics

A file holds the op, its PyTorch reference (same name and signature, `_ref` behind; it is the CPU path),
the autograd Function and the kernels. Files behind dots are parts of the op above, whose reference and
benchmark serve them too. Import from the file (`from unipad.kernels.composite import composite`);
nothing is re-exported here, since an op that bears its file's name would hide the file.
"""
