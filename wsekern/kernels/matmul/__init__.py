"""Matrix products: `matmul` and `gemv`, one algorithm a file."""

from wsekern.kernels.matmul.matmul import matmul as matmul
