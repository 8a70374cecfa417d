"""Data: nuScenes tables to batches, and a synthetic city in the same format.

    nuscenes.py   samples of the real set or the synthetic one -> batch
    tables.py     nuScenes tables -> index of samples, cached
    transforms.py points, cameras and boxes move together; images change colors
    cutpaste.py   objects of other frames put into a sample
    loader.py     samples -> batches, sharded over processes
    synthetic.py  writes the city to disk in the nuScenes format (also a command line)
    city/         the city itself: streets, traffic, ray casting, paint

Nothing here imports unipad.model; what passes between them is the batch.
"""
