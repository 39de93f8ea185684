"""What runs beside training: one purpose a file, each named by a config node."""

import blip._torchvision  # noqa: F401
