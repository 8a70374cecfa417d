"""Hand-written Triton kernels: tensors in, tensors out, independent of the rest of the project.

    backend.py      dispatch (Triton on a GPU, the reference elsewhere), launches, caches, waits of the host for the GPU
    voxelize.py     points -> voxels, each with the mean of its points; grid sampling: one point of each voxel
    carve.py        rays -> free and full cells of a grid
    voxel_keys.py   voxels sorted by linear index, their key
    sparse_map.py   neighbor tables: which voxels each offset of a sparse convolution reads
    sparse_outputs.py ... the output voxels of strided and transposed convolutions
    sparse_conv.py  convolution over a neighbor table; for inference, with a fused epilogue
    sparse_gemm.py  ... its GEMMs
    sparse_tiles.py ... layouts of the neighbor table that the GEMMs read
    sparse_reference.py ... its reference
    norm_relu.py    batch normalization over voxels, residual and ReLU, for training
    sparse_layers.py several layers of sparse convolution and norm_relu in one op, for training
    tuning.py       autotuning of an op's launch parameters, saved in a file; off by default
    lift.py         voxel <- sum over views and levels of bilinear feature x trilinear depth probability
    pixel_sum.py    ... its gradients on coarse levels, summed in a fixed order
    voxel_pool.py   voxel <- sum of feature x depth probability over the frustum points inside it
    pool_points.py  ... the voxels of its points, and the order of its sums
    rotated_iou.py  IoU of rotated boxes, non-maximum suppression
    ray_sample.py   ray-box clipping, stratified samples, inverse-CDF resampling
    trilinear.py    a feature volume at points, with its spatial gradient as an output
    sdf_alpha.py    signed distance to opacity: NeuS, VolSDF, UniSurf
    composite.py    front-to-back compositing of samples along rays
    ray_features.py features of a volume along rays, summed with the weights of the samples
    depth_range.py  rendered depth clamped to the range of the samples on all rays through the same volume
    warp.py         the end point of each ray projected into source images, and the color there
    ray_mean.py     means over the rays of each volume
    sdf_render.py   trilinear, the field's MLPs, sdf_alpha and composite fused, with one custom backward
    sdf_backward.py ... its backward
    sdf_field.py    ... its MLPs on a tile of samples, inside a kernel
    sdf_gather.py   ... its samples in the volume, inside a kernel; those of `ray_features` too
    sdf_weights.py  ... its MLPs' weights as operands of matrix products
    sdf_pack.py     ... the MLPs' parameters as the kernels read them
    sdf_reference.py ... its MLPs in the reference
    cell_sum.py     ... the volume's gradient without atomics

A file holds an op, or some that are used together, with the PyTorch reference (same signature, suffix `_ref`; also the
CPU path), the autograd Function and the kernels of each. Files listed with dots are parts of the op above and share its
reference and benchmark. Import from the file (`from unipad.kernels.composite import composite`): nothing is re-exported
here, since an op with the name of its file would shadow the module. docs/kernels.md has a row per op. "The original" is
the code published by UniPAD's authors.
"""
