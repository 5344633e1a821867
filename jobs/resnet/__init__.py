"""Any network of torchvision for pictures, by its name."""
