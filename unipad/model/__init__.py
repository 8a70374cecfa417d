"""The model. Coordinates are in the LiDAR frame, in meters (field.py, samplers.py and the inside of render.py: meters *
`Grid.scale`). A volume is [B, C, Z, Y, X] between modules, [B, Z, Y, X, C] inside the transformer decoder and the
renderer. The rays of all samples are concatenated; `volume_idx` is the index of the sample whose volume a ray crosses.

encoder.py   images, points or both -> one volume: the pre-trained part that fine-tuning starts from
mask.py      random masks of image patches and of blocks of voxels
camera.py    images -> features and depth probabilities of every view
depth.py     depth heads and their LiDAR supervision
lidar.py     points -> voxels -> sparse encoder and neck -> volume
unet.py      points -> sparse U-Net -> features of points, or a volume
volume.py    view transforms, frame fusion, dense 3D convolutions
sparse.py    blocks of sparse convolutions (unipad/spconv), fused with their norms
norm.py      batch norm synchronized over processes
dropout.py   dropout drawn per sample

pretrain.py  the whole pre-training model: a batch -> losses
rays.py      which rays are cast, and their targets
field.py     volume at a point -> signed distance, its gradient, color
samplers.py  where along a ray the field is sampled
render.py    rays -> color and depth, and the losses

detect.py    detection heads on the volume
decoder.py   the transformer decoder of the detection heads
targets.py   Hungarian assignment and detection losses
segment.py   segmentation of LiDAR points, and its losses
occupancy.py occupancy of voxels: an MLP on the volume, and its losses
"""
