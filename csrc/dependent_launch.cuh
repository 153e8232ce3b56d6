// Programmatic dependent launch (compute capability 9.0 and later; nothing elsewhere): a kernel that was launched
// so may start while the one before it on the stream still runs, and waits for it itself.
#pragma once
#include "elements.cuh"

// Let the next kernel of the stream start. What it may do before it waits is its own affair.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until the kernel before has finished and its writes are seen. Before that, nothing may be read that it writes,
// and nothing written that it reads.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
