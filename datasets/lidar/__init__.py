"""Scans of a rotating LiDAR: reading published layouts, building ground-truth maps, making training samples."""
