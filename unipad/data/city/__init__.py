"""The synthetic city: a function of seed, place and time that cameras and LiDARs can look at.

    rig.py       the sensors on the ego vehicle
    paint.py     how things look: colors, textures, sun and sky
    raycast.py   exact ray casting, for cameras and LiDAR alike
    traffic.py   what comes and goes: the kinds of road users, and scenes, drives through the city among them
    streets.py   what stands: ground, houses, trees
    solids.py    what everything is made of: tapered boxes and ellipsoids, and their lidarseg categories

Imports run down this list.
"""
