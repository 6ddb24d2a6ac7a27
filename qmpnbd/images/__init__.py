"""An own reading of disk images and their backing chains, independent of QEMU's code."""
