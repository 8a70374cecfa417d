"""The weather of a scene: sun, clouds and haze."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Weather:
    """Light and air of a scene. Brightness is the factor by which the light multiplies the color of a surface."""

    sun: np.ndarray  # [3] unit, towards the sun
    sunlight: float  # brightness of what the sun lights at a right angle
    skylight: float  # brightness of what the whole sky lights
    clouds: float  # 0: blue sky with some clouds; 1: overcast
    haze_length: float  # meters after which 1/e of a color remains

    @classmethod
    def draw(cls, rng, varied):
        """Random weather: a sunny day at about noon or, if `varied`, any light and air."""
        elevation, azimuth = rng.uniform(0.6, 0.95), rng.uniform(0, 2 * np.pi)
        sunlight, skylight, clouds, haze_length = 0.75, 0.42, 0.0, 320.0
        if varied:
            elevation = rng.uniform(0.2, 1.2)
            clouds = max(0.0, rng.uniform(-0.7, 1.0))  # two fifths of the scenes are clear
            sunlight, skylight = 0.85 * (1 - clouds) * rng.uniform(0.7, 1), rng.uniform(0.3, 0.6)
            haze_length = np.exp(rng.uniform(np.log(60), np.log(600)))
        horizontal = np.cos(elevation)
        sun = np.array([horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), np.sin(elevation)])
        return cls(sun, sunlight, skylight, clouds, haze_length)
