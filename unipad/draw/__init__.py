"""Pictures, films and meshes.

views.py     renderings beside images and LiDAR depth; films
boxes.py     boxes from above and in the camera images
segments.py  classes of points from above and in the camera images
mesh.py      the rendered surface as a PLY file
"""
