"""The synthetic city: a function of seed, scene and time, seen by simulated cameras and LiDAR.

    occupancy.py labels of voxels, and which of them the sensors saw
    records.py   names of scenes and files, times of frames, and the tables of the nuScenes format
    rig.py       the sensors on the ego vehicle
    paint.py     appearance: colors, textures, sun, shadows and sky; LiDAR intensity
    raycast.py   exact ray casting, for cameras and LiDAR alike
    traffic.py   road users, and `Scene`: a drive through the city in traffic
    weather.py   sun, clouds and haze of a scene
    streets.py   the static city: ground, houses, trees
    solids.py    the primitives: tapered boxes and ellipsoids, with their lidarseg categories

Each module imports only from those below it in this list.
"""
