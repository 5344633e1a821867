"""Pictures as files, and what is known of each.

Here: one file a layout: folders by class, boxes as of Pascal VOC or COCO, masks; the fragments that they share; pixels of files.
Not here: how pixels are changed for training, which is the pipeline's.
"""
