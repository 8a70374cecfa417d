"""What a person looks at.

views.py     pictures and films of real beside rendered
boxes.py     boxes from above and in the cameras
segments.py  classes of points from above and in the cameras
mesh.py      the surface that a model renders, as a PLY file
scene3d.py   points, boxes and the rendered surface, for TensorBoard
"""
