#if defined(__x86_64__)
#define SBF_ISA avx2
#include "kernel_table.h"
#endif
