"""What frameworks say of an accelerator that fails, of memory that ran out, and of a mistake in a program."""

import errno
import os

import pytest

from search.device_errors import is_of_the_accelerator, is_of_the_disk, is_out_of_memory

FAILING = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: unspecified launch failure",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDNN_STATUS_INTERNAL_ERROR in external/local_xla/xla/stream_executor/cuda/cuda_dnn.cc(2461)",
    "failed to synchronize: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    "cudaGetDevice() failed. Status: initialization error",
    "INTERNAL: Failed to launch CUDA kernel: fusion_12",
    "INTERNAL: Could not synchronize on GPU stream",
    "FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above for more details.",
    "Failed to create cuBLAS handle: cublas error",
    "Blas GEMM launch failed : a.shape=(128, 10)",
    "cuSolver internal error",
    "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU",
]
MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA error: out of memory",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
]
MISTAKES = [
    "CUDA error: device-side assert triggered",  # PyTorch's words for a label that is out of range
    "CUDNN_STATUS_NOT_SUPPORTED: engine is not supported for this graph",
    "CUBLAS_STATUS_INVALID_VALUE when calling cublasGemmEx",
    "CUDA error: invalid configuration argument",
    "Shapes (10,) and (12,) are incompatible",
    "cannot reshape array of size 12 into shape (5,)",
    "INTERNAL: a message of another library",
    "could not convert string to float: 'wide'",
]


@pytest.mark.parametrize("message", FAILING)
def test_an_accelerator_that_fails_is_recognized(message: str) -> None:
    assert is_of_the_accelerator(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", MEMORY)
def test_memory_that_ran_out_is_recognized(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", MISTAKES)
def test_a_program_s_mistake_is_not_the_accelerator_s(message: str) -> None:
    assert not is_of_the_accelerator(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError(message))


def test_the_cause_of_an_error_counts() -> None:
    error = ValueError("the function failed")
    error.__cause__ = RuntimeError("CUDA error: unknown error")
    assert is_of_the_accelerator(error)
    assert not is_of_the_accelerator(ValueError("the function failed"))


def test_a_full_disk_is_recognized_in_hdf5_s_words_too() -> None:
    assert is_of_the_disk(OSError(28, "No space left on device"))
    assert is_of_the_disk(RuntimeError("file write failed: errno = 28, error message = 'No space left on device'"))
    assert not is_of_the_disk(FileNotFoundError(2, "No such file"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_or_is_away_is_recognized(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert is_of_the_disk(error)
    assert is_of_the_disk(RuntimeError(f"file read failed: errno = {number}, error message = '{os.strerror(number)}'"))
