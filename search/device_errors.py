"""Recognizes, by what a framework raised, an accelerator that fails and memory that ran out. Does not import Keras."""

import errno
import re
from collections.abc import Iterator

# TensorFlow's type, PyTorch's type, Python's and NumPy's.
_MEMORY_TYPES = ("ResourceExhaustedError", "OutOfMemoryError", "MemoryError", "_ArrayMemoryError")
_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    r"|CU[A-Z]+_STATUS_ALLOC_FAILED|failed to allocate memory",
    re.IGNORECASE,
)
_ACCELERATOR_TYPES = ("AcceleratorError", "DeferredCudaCallError")  # PyTorch's
_LIBRARIES = r"cu(?:da|dnn|blas(?:lt)?|solver|sparse|fft|rand)|hip|rocm|miopen|nccl"
_ACCELERATOR = re.compile(
    rf"(?:{_LIBRARIES})[ _]?(?:internal )?error|(?:{_LIBRARIES})_STATUS_[A-Z]|\bcuda[A-Z]\w+\(\) failed"
    rf"|(?:failed to|could not|cannot|error) [^\n]{{0,80}}\b(?:{_LIBRARIES}|StreamExecutor)\b"
    rf"|\b(?:{_LIBRARIES}) (?:failed|cannot|could not|initialization)"
    r"|INTERNAL:[^\n]*\b(?:GPU|CUDA|cuDNN|cuBLAS|cuSolver|stream)\b"
    r"|DNN library (?:is not found|initialization failed)|BLAS \w+ launch failed|without BLAS support"
    r"|(?:GPU|device) (?:is |has been |was )?(?:lost|fallen off the bus)|uncorrectable ECC error|NVRM: Xid",
    re.IGNORECASE,
)
# What a program asks of a device that works: PyTorch reports a label out of range as an error of CUDA.
_PROGRAM = re.compile(
    r"device-side assert|STATUS_(?:NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)|CUDA_ERROR_INVALID_VALUE"
    r"|invalid (?:configuration )?argument",
    re.IGNORECASE,
)
# A network disk gives ESTALE where its server has removed or moved what was open.
_DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_DISK_WORDS = ("No space left on device", "Input/output error", "Stale file handle")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of a device ran out."""
    return any(type(each).__name__ in _MEMORY_TYPES or _MEMORY.search(str(each)) for each in _causes(error))


def is_of_the_accelerator(error: BaseException) -> bool:
    """Whether CUDA, cuDNN, cuBLAS, another library of an accelerator, or its driver failed."""
    return any(
        (type(each).__name__ in _ACCELERATOR_TYPES or _ACCELERATOR.search(str(each))) and not _PROGRAM.search(str(each))
        for each in _causes(error)
    )


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk is full, may not be written, fails or is away. HDF5 says it in words, without a number."""
    return any(
        (isinstance(each, OSError) and each.errno in _DISK_NUMBERS) or any(words in str(each) for words in _DISK_WORDS)
        for each in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
