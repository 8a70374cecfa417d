"""The model. Frames are the LiDAR's, lengths meters; a volume is [B, C, Z, Y, X], a ray knows which volume it reads.

lidar.py     points -> voxels -> sparse encoder and neck -> volume
unet.py      points -> sparse U-Net -> features of points, or a volume
sparse.py    sparse convolutions as modules
norm.py      batch norm over all processes
camera.py    images -> features and depth probabilities of every view
depth.py     heads that guess the depth of what an image shows
volume.py    views -> one volume of voxels, and its projection to what is rendered
rays.py      which rays are cast, and what they should see
field.py     volume at a point -> signed distance, its gradient, color
samplers.py  where along a ray the field is read
render.py    rays -> color and depth, and the losses
pretrain.py  all of it: images and rays -> losses
boxes.py     box codes, and boxes in other frames
decoder.py   queries that look at each other and at the volume
detect.py    detection heads on the volume
targets.py   which query learns which box, and the losses of detection
segment.py   a class for every point, and the losses of segmentation
"""
