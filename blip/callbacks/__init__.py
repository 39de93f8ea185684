import blip._torchvision  # noqa: F401
