"""What is done to a running QEMU with several doors at once: QMP and NBD, or QMP and images."""
