"""CapFilt (paper section 3.3): captions of the web judged by a filter and joined by captions of a captioner's own."""

from blip import _torchvision  # noqa: F401  what follows imports torchvision
