"""qmpnbd: prove that the allocation depth a running QEMU serves over NBD is what its disk images hold."""

__version__ = "0.1.0"
