"""In the place of `spconv.constants`: settings that code such as OpenPCDet's assigns; they have no effect."""
