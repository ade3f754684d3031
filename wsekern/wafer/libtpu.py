"""Keep libtpu, the compiler of TPUs, quiet on a machine without one. Loads no jax."""

import glob
import os

_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def keep_libtpu_quiet() -> None:
    """Tells libtpu what it would ask the network for, on a machine without a TPU.

    The extra `tpu` installs it to compile for TPUs that are not there. Where jax looks for devices
    it would wait for an answer, and print that there is none; and a second process would end on the
    lock that keeps a real chip to one. Call it before jax's backend starts.
    """
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    for name, value in _WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
