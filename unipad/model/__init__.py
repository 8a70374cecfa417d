"""The model. Frames are the LiDAR's, lengths metres; a volume is [B, C, Z, Y, X], a ray knows which volume it reads.

camera.py    images -> features and depth probabilities of every view
depth.py     heads that guess the depth of what an image shows
volume.py    views -> one volume of voxels, and its projection to what is rendered
rays.py      which rays are cast, and what they should see
field.py     volume at a point -> signed distance, its gradient, colour
samplers.py  where along a ray the field is read
render.py    rays -> colour and depth, and the losses
pretrain.py  all of it: images and rays -> losses
"""
