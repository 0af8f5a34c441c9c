"""Transformers' Deformable DETR, with and without three ideas of DINO. See README.md."""
