"""Control of a running QEMU over its monitor (QMP)."""
