"""SSD-offloaded training: the layer-major schedule (DESIGN 6). Knows torch modules, never a model framework."""
