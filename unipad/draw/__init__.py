"""Pictures, videos and meshes.

views.py        renderings next to images and LiDAR depth; videos
boxes.py        boxes in bird's-eye view and in the camera images
segments.py     classes of points in bird's-eye view and in the camera images
occupancy.py    classes of voxels, from above and as the cameras see them
calibration.py  LiDAR points and boxes over the images, to check a dataset's calibration (also a command line)
mesh.py         the rendered surface as a PLY file
scene3d.py      points, boxes and the rendered surface as TensorBoard's 3D view
"""
