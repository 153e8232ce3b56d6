"""Answers of the CUDA driver, and the context that its calls work in: PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch

# Errors of a kernel that ran earlier on the device: the driver reports them from whichever call comes next.
_ASYNCHRONOUS = ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_MISALIGNED_ADDRESS",
                 "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_ASSERT", "CUDA_ERROR_LAUNCH_TIMEOUT")


class KernelLaunchError(RuntimeError):
    """A CUDA driver call failed; the message has the error, the kernel and the launch configuration."""


def checked(driver: Any, step: str, answer: tuple[Any, ...]) -> Any:
    """Return the value in a driver call's answer, (code,) or (code, value); raise for a code but success."""
    if answer[0] != 0:
        raise driver_error(driver, step, answer[0])
    return answer[1] if len(answer) > 1 else None


def driver_error(driver: Any, step: str, result: Any) -> KernelLaunchError:
    """The error for a ``step`` that the driver answered with ``result``, a CUresult but success."""
    _, text = driver.cuGetErrorString(result)
    description = text.decode() if text else "no description"
    name = driver.CUresult(result).name
    hint = ""
    if name in _ASYNCHRONOUS:
        hint = " (possibly of an earlier kernel: set CUDA_LAUNCH_BLOCKING=1 to see which)"
    return KernelLaunchError(f"{step} failed: {name}: {description}{hint}")


def enter_context(driver: Any) -> None:
    """Make PyTorch's context of the current device the calling thread's, which may not have one yet."""
    if int(checked(driver, "cuCtxGetCurrent", driver.cuCtxGetCurrent())) == 0:
        context = primary_context(driver, torch.cuda.current_device())
        checked(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))


def primary_context(driver: Any, index: int) -> Any:
    """The primary context, PyTorch's own, of device ``index``."""
    device = checked(driver, "cuDeviceGet", driver.cuDeviceGet(index))
    return checked(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))
