"""Disks of a running QEMU, or an image file, exported for other tools."""
