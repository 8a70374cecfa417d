"""The presets: recipes of the paper and of the released configs, and tiny ones for two CPU cores.

encoders.py  encoders, and the grids, sweeps and augmentation that go with them
pretrain.py  pre-training
finetune.py  fine-tuning: detection, segmentation, occupancy

Tables: modality -> name -> recipe.
"""

from unipad.recipes.finetune import DETECT, OCCUPANCY, SEGMENT
from unipad.recipes.pretrain import PRETRAIN

__all__ = ["DEFAULT_PRESET", "DETECT", "OCCUPANCY", "PRETRAIN", "SEGMENT"]

# Default presets with --data-root, by modality, or by "segment" with --task segment; on the synthetic city it is "tiny"
DEFAULT_PRESET = {"camera": "camera-0.1", "lidar": "lidar-0.075", "fusion": "fusion-0.075", "segment": "segment"}
