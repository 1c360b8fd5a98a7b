// Functions that a GPU and its host both run.
#pragma once

#if defined(__CUDACC__)
#define SBF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SBF_HOST_DEVICE inline
#endif
