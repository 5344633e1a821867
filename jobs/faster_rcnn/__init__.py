"""Trees found on pictures from above, by Faster R-CNN of torchvision."""
