"""In the place of `spconv.constants`: settings that code assigns, such as OpenPCDet, have no effect."""
