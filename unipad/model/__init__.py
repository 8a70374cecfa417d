"""The model. Coordinates are in the LiDAR frame, in meters (field.py, samplers.py and the inside of render.py: meters *
`Grid.scale`); a volume is [B, C, Z, Y, X]; a ray has the index in the batch of the volume that it crosses.

encoder.py   images, points or both -> one volume: what pre-training trains and fine-tuning starts from
mask.py      random masks of image patches and of blocks of voxels
camera.py    images -> features and depth probabilities of every view
depth.py     depth heads and their LiDAR supervision
lidar.py     points -> voxels -> sparse encoder and neck -> volume
unet.py      points -> sparse U-Net -> features of points, or a volume
volume.py    view transforms, frame fusion, dense 3D convolutions
sparse.py    sparse convolutions and the blocks made of them
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
"""
