"""Data: from files to batches, and a synthetic city in the nuScenes format.

dataset.py    the interface of a dataset
collate.py    samples -> one batch
nuscenes.py   the nuScenes dataset, real or synthetic
files.py      files of a dataset: which exist, images and point clouds
tables.py     finds the nuScenes tables on disk, and loads or rebuilds the cached index of each split
index.py      tables -> index: what samples need, as flat arrays
schema.py     what the tables must contain: rows are checked when they are read
splits.py     scenes of each split: nuScenes' own, or those of a splits.json
transforms.py augmentation: points, cameras and boxes together; colors of images
occupancy.py  the file with a keyframe's occupancy labels
cutpaste.py   objects of other frames pasted into a sample
cache.py      files computed from a dataset once: the indices, and the objects to paste
loader.py     which frames each batch of a run has: order, ranks, worker processes, unreadable frames
synthetic.py  writes the city to disk in the nuScenes format (also a command line)
city/         the city itself: streets, traffic, ray casting, paint

Neither unipad.data nor unipad.model imports the other: the interface between them is unipad.batch.
"""
