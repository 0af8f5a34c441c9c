// The kernels for any processor: 16-byte vectors, which x86-64 and 64-bit Arm always have.
#include "kernels.h"

#define DINO_D2_VECTOR_BYTES 16
#define DINO_D2_NAME "generic"
#define DINO_D2_KERNELS generic_kernels
#include "kernel_body.h"
