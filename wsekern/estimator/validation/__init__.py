"""Programs whose times on a wafer were published, written as kernels, and the points themselves.

The kernels run on every backend, as any kernel does; the estimator is compared with the points.
"""
