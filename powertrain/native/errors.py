"""What can go wrong between the sources of the kernels and a loaded library."""


class KernelsUnavailable(RuntimeError):
    """There is no usable kernel library: one sentence says why and what to do. The PyTorch path does not need it."""


class KernelBuildError(RuntimeError):
    """The compiler refused the sources; the message holds its output."""


class KernelLaunchError(RuntimeError):
    """A stage returned an error status; the message is the library's own."""
