#if defined(__x86_64__)
#define SBF_ISA avx_vnni
#include "kernel_table.h"
#endif
